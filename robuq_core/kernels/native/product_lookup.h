/* The integer product by table look-up, for codes of up to six bits.
 *
 * A token's codes x0, x1 and two weights t0, t1 of -1, 0, 1 have nine sums: a table of 16 bytes for each token and pair
 * of codes, which vpshufb reads for 32 output channels at once. Index: (t0 + 1) + 4 (t1 + 1), four bits of the planar
 * form as they lie: a byte of it holds two pairs, (k, k + 32) and (k + 64, k + 96).
 *
 * Sums are those of cells, see ternary.h. An entry, biased, is 0 .. 2 m, m = 2^b - 1: 255 / (2 m) of them fit an
 * unsigned byte; bytes then go to 16 bits, even and odd channels apart: 65535 / (2 m) entries fit there; after a slice
 * of the width, to 32 bits. The bias of all comes off in the epilogue. */

enum {
    TABLE = 16,             /* bytes */
    LOOKUP_TOKENS = 4,      /* of a tile; their tables lie side by side */
    PAIRS = GROUP / 2,
    LANE_CHANNELS = 32,
    PANEL_VECTORS = PANEL / LANE_CHANNELS,
};

/* 32 bytes of 32 rows, transposed. In a vector the byte 2 i is row i and the byte 2 i + 1 row 16 + i, so that even and
 * odd sums come out in order. Each vector becomes two of indices, its low and its high half-bytes. */
FN void transpose_group(const uint8_t *rows, int64_t stride, uint8_t *out) {
    const __m256i mask = _mm256_set1_epi8(15), sixteenth = _mm256_set1_epi16(1 << 12);
    for (int half = 0; half < 2; half++, rows += 16) {
        const uint8_t *row = rows;
        __m256i a[16], b[16];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++, row += stride) {
            a[2 * i] = load_two(row, row + 8 * stride);
            a[2 * i + 1] = load_two(row + 16 * stride, row + 24 * stride);
        }
#pragma GCC unroll 2
        for (int stage = 0; stage < 2; stage++) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                b[2 * i] = _mm256_unpacklo_epi8(a[i], a[i + 8]);
                b[2 * i + 1] = _mm256_unpackhi_epi8(a[i], a[i + 8]);
            }
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                a[2 * i] = _mm256_unpacklo_epi8(b[i], b[i + 8]);
                a[2 * i + 1] = _mm256_unpackhi_epi8(b[i], b[i + 8]);
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++, out += 2 * PANEL) {
            store_bytes(out, _mm256_and_si256(a[i], mask));
            store_bytes(out + PANEL, _mm256_and_si256(_mm256_mulhi_epu16(a[i], sixteenth), mask));
        }
    }
}

/* Indices of a panel: for each pair of codes, a byte for each channel. */
FN void lookup_decode(const struct ternary_job *job, int64_t channel, int64_t group, int64_t groups, uint8_t *panel) {
    const int64_t stride = job->padded_width / GROUP * GROUP_BYTES;
    for (int v = 0; v < PANEL_VECTORS; v++, channel += LANE_CHANNELS, panel += LANE_CHANNELS) {
        for (int64_t g = 0; g < groups; g++) {
            const uint8_t *rows = job->layer->planar + channel * stride + (group + g) * GROUP_BYTES;
            uint8_t *out = panel + g * PAIRS * PANEL;
            if (channel + LANE_CHANNELS <= job->layer->channels) {
                transpose_group(rows, stride, out);
                continue;
            }
            uint8_t edge[LANE_CHANNELS * GROUP_BYTES];
            for (int i = 0; i < LANE_CHANNELS; i++)
                memcpy(edge + i * GROUP_BYTES, planar_row(job, channel + i) + (group + g) * GROUP_BYTES, GROUP_BYTES);
            transpose_group(edge, GROUP_BYTES, out);
        }
    }
}

/* Tables of a group of 128 codes of two tokens, side by side: one in each half of a vector. */
INLINE void group_tables(const int8_t *x, const int8_t *y, int bias, uint8_t *out, const int midrise) {
    enum { POSITIVE = 64 /* makes a code unsigned */ };
    const __m256i sign0 = both_halves(_mm_setr_epi8(-1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0, 0, 0, 0, 0));
    const __m256i sign1 = both_halves(_mm_setr_epi8(-1, -1, -1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0));
    const __m256i none = _mm256_setzero_si256(), extra = _mm256_set1_epi8((char)(POSITIVE - bias));
    /* n, the weights that are not 0, and p, those that are 1; a comparison that holds gives -1. */
    const __m256i nonzero = _mm256_add_epi8(_mm256_abs_epi8(sign0), _mm256_abs_epi8(sign1));
    const __m256i ones = _mm256_sub_epi8(none, _mm256_add_epi8(_mm256_cmpgt_epi8(sign0, none),
                                                               _mm256_cmpgt_epi8(sign1, none)));
    const __m256i offset = midrise ? _mm256_set1_epi8(POSITIVE) : _mm256_add_epi8(ones, _mm256_set1_epi8((char)bias));
    const __m256i offset1 = _mm256_add_epi8(nonzero, _mm256_set1_epi8(POSITIVE - 1));
    for (int at = 0; at < GROUP_BYTES; at += 16) {
        __m256i codes[4];
#pragma GCC unroll 4
        for (int plane = 0; plane < 4; plane++)
            codes[plane] = load_two(x + at + plane * GROUP_BYTES, y + at + plane * GROUP_BYTES);
        __m256i lane = none;
        for (int j = 0; j < 16; j++, lane = _mm256_add_epi8(lane, _mm256_set1_epi8(1))) {
#pragma GCC unroll 2
            for (int pair = 0; pair < 2; pair++, out += LOOKUP_TOKENS * TABLE) {
                const __m256i t0 = _mm256_sign_epi8(_mm256_shuffle_epi8(codes[2 * pair], lane), sign0);
                const __m256i t1 = _mm256_sign_epi8(_mm256_shuffle_epi8(codes[2 * pair + 1], lane), sign1);
                const __m256i first = _mm256_add_epi8(t0, offset);
                /* Mid-rise: half of t0 + t1 + n, an even number; the average rounds up what is 1 too small. */
                store_bytes(out, midrise ? _mm256_sub_epi8(_mm256_avg_epu8(first, _mm256_add_epi8(t1, offset1)), extra)
                                         : _mm256_add_epi8(first, t1));
            }
        }
    }
}

/* Tables of a block of rows: [rows / 4][pairs][4 tokens][16]. A last odd row is its own neighbour. */
FN void lookup_operands(const struct ternary_job *job, int64_t first, int64_t rows, int64_t group, int64_t groups,
                        int8_t *operands, int32_t *offsets) {
    const int bias = pair_bias(job->layer), midrise = job->layer->midrise;
    for (int64_t row = 0; row < rows; row += 2) {
        uint8_t *out = (uint8_t *)operands + row / LOOKUP_TOKENS * groups * PAIRS * LOOKUP_TOKENS * TABLE +
                       row % LOOKUP_TOKENS * TABLE;
        const int64_t next = min64(row + 1, rows - 1);
        for (int64_t g = 0; g < groups; g++, out += PAIRS * LOOKUP_TOKENS * TABLE) {
            int8_t tails[2][GROUP];
            const int8_t *x = group_codes(job, first + row, group + g, tails[0]);
            const int8_t *y = group_codes(job, first + next, group + g, tails[1]);
            if (midrise) group_tables(x, y, bias, out, 1);
            else group_tables(x, y, bias, out, 0);
        }
        offsets[row] = offsets[next] = (int32_t)(job->padded_width / 2) * bias * (midrise ? 2 : 1);
    }
}

/* In assembly, because GCC 12 otherwise turns the chain of sums into a tree and spills it. */
INLINE void look_up(__m256i *sum, __m256i table, __m256i index) {
    __m256i entry;
    __asm__("vpshufb %3, %2, %1\n\tvpaddb %1, %0, %0" : "+x"(*sum), "=&x"(entry) : "x"(table), "x"(index));
}

INLINE __m256i load_table(const uint8_t *p) {
    return both_halves(_mm_load_si128((const __m128i *)p));
}

INLINE void look_up_pair(__m256i sums[LOOKUP_TOKENS][PANEL_VECTORS], const uint8_t *index, const uint8_t *tables,
                         const int tokens, const int first) {
    __m256i at[PANEL_VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < PANEL_VECTORS; v++) at[v] = load_bytes(index + v * LANE_CHANNELS);
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) {
        const __m256i table = load_table(tables + t * TABLE);
#pragma GCC unroll 2
        for (int v = 0; v < PANEL_VECTORS; v++) {
            if (first) sums[t][v] = _mm256_shuffle_epi8(table, at[v]);
            else look_up(&sums[t][v], table, at[v]);
        }
    }
}

/* out += sums 2^shift */
INLINE void add_wide(int32_t *out, __m128i sums, __m128i shift) {
    store_bytes(out, _mm256_add_epi32(load_bytes(out), _mm256_sll_epi32(_mm256_cvtepu16_epi32(sums), shift)));
}

/* products[t][c] += what the biased sums of `tokens` tokens and a panel's channels over a slice come to. */
INLINE void lookup_tile(const uint8_t *index, const uint8_t *tables, int64_t pairs, const struct ternary_job *job,
                        int32_t *products, const int tokens) {
    const int64_t safe_pairs = job->safe_pairs;
    const __m128i shift = _mm_cvtsi32_si128(job->layer->midrise);
    const __m256i odd_byte = _mm256_set1_epi16(0x100);
    __m256i even[LOOKUP_TOKENS][PANEL_VECTORS] = {0}, odd[LOOKUP_TOKENS][PANEL_VECTORS] = {0};
    for (int64_t left = pairs; left > 0; left -= safe_pairs) {
        __m256i sums[LOOKUP_TOKENS][PANEL_VECTORS];
        look_up_pair(sums, index, tables, tokens, 1);
        look_up_pair(sums, index + PANEL, tables + LOOKUP_TOKENS * TABLE, tokens, 0);
        index += 2 * PANEL;
        tables += 2 * LOOKUP_TOKENS * TABLE;
#pragma GCC unroll 1
        for (int64_t p = 2; p < safe_pairs; p += 2) {
            look_up_pair(sums, index, tables, tokens, 0);
            look_up_pair(sums, index + PANEL, tables + LOOKUP_TOKENS * TABLE, tokens, 0);
            index += 2 * PANEL;
            tables += 2 * LOOKUP_TOKENS * TABLE;
        }
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) {
#pragma GCC unroll 2
            for (int v = 0; v < PANEL_VECTORS; v++) {
                even[t][v] = _mm256_add_epi16(even[t][v], sums[t][v]); /* and 256 times the odd ones, for now */
                odd[t][v] = _mm256_add_epi16(odd[t][v], _mm256_maddubs_epi16(sums[t][v], odd_byte));
            }
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) {
#pragma GCC unroll 2
        for (int v = 0; v < PANEL_VECTORS; v++) {
            int32_t *out = products + t * PANEL + v * LANE_CHANNELS;
            const __m256i low = _mm256_sub_epi16(even[t][v], _mm256_slli_epi16(odd[t][v], 8)), high = odd[t][v];
            add_wide(out, _mm256_castsi256_si128(low), shift);
            add_wide(out + 8, _mm256_extracti128_si256(low, 1), shift);
            add_wide(out + 16, _mm256_castsi256_si128(high), shift);
            add_wide(out + 24, _mm256_extracti128_si256(high, 1), shift);
        }
    }
}

FN void lookup_multiply(const struct ternary_job *job, int64_t channel, int64_t group, int64_t groups,
                        uint8_t *panel, const int8_t *operands, int64_t rows, int32_t *products) {
    if (group == 0) begin_products(job->layer, channel, rows, products);
    const uint8_t *tables = (const uint8_t *)operands;
    const int64_t pairs = groups * PAIRS;
    for (; rows > 0; rows -= LOOKUP_TOKENS) {
        switch (min64(rows, LOOKUP_TOKENS)) {
            case 1: lookup_tile(panel, tables, pairs, job, products, 1); break;
            case 2: lookup_tile(panel, tables, pairs, job, products, 2); break;
            case 3: lookup_tile(panel, tables, pairs, job, products, 3); break;
            default: lookup_tile(panel, tables, pairs, job, products, 4);
        }
        tables += pairs * LOOKUP_TOKENS * TABLE;
        products += LOOKUP_TOKENS * PANEL;
    }
}

static const struct product lookup_product = {
    .decode = lookup_decode, .operands = lookup_operands, .multiply = lookup_multiply};
