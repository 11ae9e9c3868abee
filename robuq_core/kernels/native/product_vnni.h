/* The integer product by vpdpbusd: four weights of each of 16 channels by four codes of a token, summed in 32 bits.
 *
 * Weights enter as t + 1 in {0, 1, 2}; subtracting the sum of a token's codes makes them t again. */

enum { QUAD = 4, QUADS = GROUP / QUAD, BLOCK_CHANNELS = 16, BLOCKS = PANEL / BLOCK_CHANNELS, QUAD_BYTES = 64 };

/* Dwords of 16 rows of a group, transposed: out[j] holds the dword j of every row, row 0 first. */
INLINE void transpose_rows(const uint8_t *const rows[BLOCK_CHANNELS], int64_t at, __m512i out[8]) {
    const __m512i even_lanes = _mm512_set_epi64(13, 12, 5, 4, 9, 8, 1, 0);
    const __m512i odd_lanes = _mm512_set_epi64(15, 14, 7, 6, 11, 10, 3, 2);
    __m512i quads[2][4]; /* dwords of rows 0-3 and 8-11, then of rows 4-7 and 12-15 */
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        __m512i row[4], pair[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            row[i] = _mm512_inserti64x4(_mm512_castsi256_si512(load_bytes(rows[4 * half + i] + at)),
                                        load_bytes(rows[4 * half + i + 8] + at), 1);
        pair[0] = _mm512_unpacklo_epi32(row[0], row[1]);
        pair[1] = _mm512_unpackhi_epi32(row[0], row[1]);
        pair[2] = _mm512_unpacklo_epi32(row[2], row[3]);
        pair[3] = _mm512_unpackhi_epi32(row[2], row[3]);
        quads[half][0] = _mm512_unpacklo_epi64(pair[0], pair[2]);
        quads[half][1] = _mm512_unpackhi_epi64(pair[0], pair[2]);
        quads[half][2] = _mm512_unpacklo_epi64(pair[1], pair[3]);
        quads[half][3] = _mm512_unpackhi_epi64(pair[1], pair[3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        out[j] = _mm512_permutex2var_epi64(quads[0][j], even_lanes, quads[1][j]);
        out[j + 4] = _mm512_permutex2var_epi64(quads[0][j], odd_lanes, quads[1][j]);
    }
}

/* Weights of a panel: [channels / 16][codes / 4][16][4]. */
FN void vnni_decode(const struct ternary_job *job, int64_t channel, int64_t group, int64_t groups, uint8_t *panel) {
    const __m512i mask = _mm512_set1_epi8(3);
    for (int block = 0; block < BLOCKS; block++) {
        const uint8_t *rows[BLOCK_CHANNELS];
        for (int i = 0; i < BLOCK_CHANNELS; i++) rows[i] = planar_row(job, channel + block * BLOCK_CHANNELS + i);
        for (int64_t g = 0; g < groups; g++, panel += QUADS * QUAD_BYTES) {
            __m512i bytes[8];
            transpose_rows(rows, (group + g) * GROUP_BYTES, bytes);
            /* Bits 2p of dword j: the codes 32 p + 4 j and the three after it. */
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                uint8_t *out = panel + j * QUAD_BYTES;
                _mm512_storeu_si512(out, _mm512_and_si512(bytes[j], mask));
                _mm512_storeu_si512(out + 8 * QUAD_BYTES, _mm512_and_si512(_mm512_srli_epi16(bytes[j], 2), mask));
                _mm512_storeu_si512(out + 16 * QUAD_BYTES, _mm512_and_si512(_mm512_srli_epi16(bytes[j], 4), mask));
                _mm512_storeu_si512(out + 24 * QUAD_BYTES, _mm512_and_si512(_mm512_srli_epi16(bytes[j], 6), mask));
            }
        }
    }
}

/* products[t][c] += codes_t . weights_c for `tokens` tokens and a panel's channels. */
INLINE void vnni_tile(const uint8_t *panel, const int8_t *codes, int64_t width, int32_t *products, const int tokens) {
    __m512i sums[4][BLOCKS];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
        for (int b = 0; b < BLOCKS; b++)
            sums[t][b] = _mm512_loadu_si512(products + t * PANEL + b * BLOCK_CHANNELS);
    for (int64_t k = 0; k < width; k += QUAD) {
        __m512i weights[BLOCKS];
#pragma GCC unroll 4
        for (int b = 0; b < BLOCKS; b++)
            weights[b] = _mm512_loadu_si512(panel + (b * width + k) * BLOCK_CHANNELS);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) {
            int32_t quad;
            memcpy(&quad, codes + t * width + k, sizeof quad);
            const __m512i x = _mm512_set1_epi32(quad);
#pragma GCC unroll 4
            for (int b = 0; b < BLOCKS; b++) sums[t][b] = _mm512_dpbusd_epi32(sums[t][b], weights[b], x);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
        for (int b = 0; b < BLOCKS; b++)
            _mm512_storeu_si512(products + t * PANEL + b * BLOCK_CHANNELS, sums[t][b]);
}

FN void vnni_multiply(const struct ternary_job *job, int64_t channel, int64_t group, int64_t groups,
                      uint8_t *panel, const int8_t *codes, int64_t rows, int32_t *products) {
    const int64_t width = groups * GROUP;
    (void)job, (void)channel, (void)group;
    for (; rows > 0; rows -= 4, codes += 4 * width, products += 4 * PANEL) {
        switch (min64(rows, 4)) {
            case 1: vnni_tile(panel, codes, width, products, 1); break;
            case 2: vnni_tile(panel, codes, width, products, 2); break;
            case 3: vnni_tile(panel, codes, width, products, 3); break;
            default: vnni_tile(panel, codes, width, products, 4);
        }
    }
}

static const struct product vnni_product = {
    .adds = 1, .decode = vnni_decode, .operands = copy_codes, .multiply = vnni_multiply};

FN void ternary_vnni_task(const void *job, int64_t task, char *scratch) {
    ternary_task(job, task, scratch, &vnni_product);
}

#define VNNI_WAY                                                                        \
    {.task = ternary_vnni_task, .operand_bytes = GROUP, .panels = 1, .most_groups = 9, .kept_panels = 18, \
     .block_rows = 128, .decode_rows = 4, .operand_panels = 1, .least_rows = 8, .most_code = 128}
