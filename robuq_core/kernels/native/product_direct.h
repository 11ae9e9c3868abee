/* The integer product of 32 weights of a channel by 32 codes of a token: for rows too few to pay for decoding a panel,
 * and on AVX2 for codes too wide for tables. Weights are decoded in registers, a channel's group of 128 at a time, as t + 1 in
 * {0, 1, 2}; subtracting the sum of a token's codes makes them t again. */

enum { DIRECT_TOKENS = 4 }; /* of a tile */

/* sum += weights * codes. With VNNI four products go to a 32-bit lane; without, two to a 16-bit one, in assembly because
 * GCC 12 otherwise moves the eight accumulators from register to register at each step, one of them through memory. */
INLINE void add_products(__m256i *sum, __m256i weights, __m256i codes) {
#if HAVE_AVX512VNNI
    *sum = _mm256_dpbusd_epi32(*sum, weights, codes);
#else
    __m256i products;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(*sum), "=&x"(products) : "x"(weights), "x"(codes));
#endif
}

INLINE __m256i wide_sums(__m256i sums) {
#if HAVE_AVX512VNNI
    return sums;
#else
    return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
#endif
}

/* sums[t][c] = lanes of planar_c . codes_t over `groups` groups, two channels; rows of codes lie `stride` apart. */
INLINE void direct_pair(const uint8_t *planar0, const uint8_t *planar1, const int8_t *codes, int64_t stride,
                        int64_t groups, int64_t safe_groups, __m256i sums[DIRECT_TOKENS][2], const int tokens) {
    const __m256i mask = _mm256_set1_epi8(3);
    for (int t = 0; t < tokens; t++) sums[t][0] = sums[t][1] = _mm256_setzero_si256();
    while (groups > 0) {
        __m256i narrow[DIRECT_TOKENS][2] = {0};
        for (int64_t left = min64(groups, safe_groups); left > 0; left--, codes += GROUP) {
            __m256i bytes0 = load_bytes(planar0), bytes1 = load_bytes(planar1);
            planar0 += GROUP_BYTES;
            planar1 += GROUP_BYTES;
#pragma GCC unroll 4
            for (int plane = 0; plane < 4; plane++) {
                const __m256i weights0 = _mm256_and_si256(bytes0, mask), weights1 = _mm256_and_si256(bytes1, mask);
                bytes0 = _mm256_srli_epi16(bytes0, 2);
                bytes1 = _mm256_srli_epi16(bytes1, 2);
#pragma GCC unroll 4
                for (int t = 0; t < tokens; t++) {
                    const __m256i x = load_bytes(codes + t * stride + plane * GROUP_BYTES);
                    add_products(&narrow[t][0], weights0, x);
                    add_products(&narrow[t][1], weights1, x);
                }
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++)
            for (int c = 0; c < 2; c++)
                sums[t][c] = _mm256_add_epi32(sums[t][c], wide_sums(narrow[t][c]));
        groups -= safe_groups;
    }
}

INLINE void direct_rows(const struct ternary_job *job, int64_t channel, const int8_t *codes, int64_t group,
                        int64_t groups, int32_t *products, const int tokens) {
    for (int c = 0; c < PANEL; c += 4) {
        __m256i sums[2][DIRECT_TOKENS][2];
        for (int pair = 0; pair < 2; pair++)
            direct_pair(planar_row(job, channel + c + 2 * pair) + group * GROUP_BYTES,
                        planar_row(job, channel + c + 2 * pair + 1) + group * GROUP_BYTES, codes, groups * GROUP,
                        groups, job->safe_steps / 4, sums[pair], tokens);
        for (int t = 0; t < tokens; t++) {
            const __m256i lanes[4] = {sums[0][t][0], sums[0][t][1], sums[1][t][0], sums[1][t][1]};
            int32_t *out = products + t * PANEL + c;
            const __m128i before = _mm_loadu_si128((const __m128i *)out);
            _mm_storeu_si128((__m128i *)out, _mm_add_epi32(before, sum_lanes(lanes)));
        }
    }
}

FN void direct_multiply(const struct ternary_job *job, int64_t channel, int64_t group, int64_t groups,
                        uint8_t *panel, const int8_t *codes, int64_t rows, int32_t *products) {
    (void)panel;
    for (; rows > 0; rows -= DIRECT_TOKENS, codes += DIRECT_TOKENS * groups * GROUP) {
        switch (min64(rows, DIRECT_TOKENS)) {
            case 1: direct_rows(job, channel, codes, group, groups, products, 1); break;
            case 2: direct_rows(job, channel, codes, group, groups, products, 2); break;
            case 3: direct_rows(job, channel, codes, group, groups, products, 3); break;
            default: direct_rows(job, channel, codes, group, groups, products, 4);
        }
        products += DIRECT_TOKENS * PANEL;
    }
}

static const struct product direct_product = {.adds = 1, .operands = copy_codes, .multiply = direct_multiply};
