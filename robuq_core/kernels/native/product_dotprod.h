/* The integer product by sdot: four weights of each of four channels by four codes of a token, summed in 32 bits.
 *
 * Weights enter as t + 1 in {0, 1, 2}; subtracting the sum of a token's codes makes them t again. */

enum { QUAD = 4, QUADS = GROUP / QUAD, BLOCK_CHANNELS = 16, BLOCK_VECTORS = 4, QUAD_BYTES = 64 };

/* Weights of a panel: [channels / 16][codes / 4][16][4]. */
FN void dotprod_decode(const struct ternary_job *job, int64_t channel, int64_t group, int64_t groups, uint8_t *panel) {
    const uint8x16_t mask = vdupq_n_u8(3);
    for (int c = 0; c < PANEL; c += 4) {
        const uint8_t *rows[4];
        for (int i = 0; i < 4; i++) rows[i] = planar_row(job, channel + c + i) + group * GROUP_BYTES;
        uint8_t *out = panel + c / BLOCK_CHANNELS * BLOCK_CHANNELS * groups * GROUP + c % BLOCK_CHANNELS * QUAD;
        /* 16 bytes of each row at a time: the quads 4 half .. of each plane, eight of which are a plane of a group. */
        for (int64_t at = 0; at < groups * GROUP_BYTES; at += 16) {
            uint32x4_t row[4], pair[4];
            uint8x16_t quads[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) row[i] = (uint32x4_t)vld1q_u8(rows[i] + at);
#pragma GCC unroll 2
            for (int i = 0; i < 4; i += 2) {
                pair[i] = vtrn1q_u32(row[i], row[i + 1]);
                pair[i + 1] = vtrn2q_u32(row[i], row[i + 1]);
            }
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                quads[i] = (uint8x16_t)vtrn1q_u64((uint64x2_t)pair[i], (uint64x2_t)pair[i + 2]);
                quads[i + 2] = (uint8x16_t)vtrn2q_u64((uint64x2_t)pair[i], (uint64x2_t)pair[i + 2]);
            }
            uint8_t *first = out + (at / GROUP_BYTES * QUADS + at % GROUP_BYTES / QUAD) * QUAD_BYTES;
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++, first += QUAD_BYTES) {
                vst1q_u8(first, vandq_u8(quads[i], mask));
                vst1q_u8(first + 8 * QUAD_BYTES, vandq_u8(vshrq_n_u8(quads[i], 2), mask));
                vst1q_u8(first + 16 * QUAD_BYTES, vandq_u8(vshrq_n_u8(quads[i], 4), mask));
                vst1q_u8(first + 24 * QUAD_BYTES, vshrq_n_u8(quads[i], 6));
            }
        }
    }
}

/* products[t][c] += codes_t . weights_c for `tokens` tokens and 16 channels. */
INLINE void dotprod_tile(const uint8_t *panel, const int8_t *codes, int64_t width, int32_t *products, const int tokens) {
    int32x4_t sums[4][BLOCK_VECTORS];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
        for (int b = 0; b < BLOCK_VECTORS; b++) sums[t][b] = vld1q_s32(products + t * PANEL + b * 4);
    for (int64_t k = 0; k < width; k += 4 * QUAD, panel += 4 * QUAD_BYTES) {
        int8x16_t x[4], weights[BLOCK_VECTORS];
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) x[t] = vld1q_s8(codes + t * width + k);
#define ADD_QUAD(quad)                                                                                              \
    _Pragma("GCC unroll 4") for (int b = 0; b < BLOCK_VECTORS; b++)                                                \
        weights[b] = (int8x16_t)vld1q_u8(panel + quad * QUAD_BYTES + b * 16);                                      \
    _Pragma("GCC unroll 4") for (int t = 0; t < tokens; t++)                                                       \
        _Pragma("GCC unroll 4") for (int b = 0; b < BLOCK_VECTORS; b++)                                            \
            sums[t][b] = vdotq_laneq_s32(sums[t][b], weights[b], x[t], quad);
        ADD_QUAD(0)
        ADD_QUAD(1)
        ADD_QUAD(2)
        ADD_QUAD(3)
#undef ADD_QUAD
    }
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
        for (int b = 0; b < BLOCK_VECTORS; b++) vst1q_s32(products + t * PANEL + b * 4, sums[t][b]);
}

FN void dotprod_multiply(const struct ternary_job *job, int64_t channel, int64_t group, int64_t groups,
                         uint8_t *panel, const int8_t *codes, int64_t rows, int32_t *products) {
    const int64_t width = groups * GROUP;
    (void)job, (void)channel, (void)group;
    for (; rows > 0; rows -= 4, codes += 4 * width, products += 4 * PANEL) {
        for (int c = 0; c < PANEL; c += BLOCK_CHANNELS) {
            const uint8_t *weights = panel + c * width;
            switch (min64(rows, 4)) {
                case 1: dotprod_tile(weights, codes, width, products + c, 1); break;
                case 2: dotprod_tile(weights, codes, width, products + c, 2); break;
                case 3: dotprod_tile(weights, codes, width, products + c, 3); break;
                default: dotprod_tile(weights, codes, width, products + c, 4);
            }
        }
    }
}

static const struct product dotprod_product = {
    .adds = 1, .decode = dotprod_decode, .operands = copy_codes, .multiply = dotprod_multiply};
