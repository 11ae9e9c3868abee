/* The integer product by smmla: eight weights of each of two channels by eight codes of each of two tokens, summed in
 * 32 bits.
 *
 * Weights enter as t + 1 in {0, 1, 2}; subtracting the sum of a token's codes makes them t again. */

enum { OCTET = 8, OCTETS = GROUP / OCTET, BLOCK_PAIRS = 4 /* of channels of a tile, and of tokens */, OCTET_BYTES = 64 };

/* Weights of a panel: [channels / 8][codes / 8][4 pairs][2][8]. */
FN void i8mm_decode(const struct ternary_job *job, int64_t channel, int64_t group, int64_t groups, uint8_t *panel) {
    const uint8x16_t mask = vdupq_n_u8(3);
    for (int c = 0; c < PANEL; c += 2) {
        const uint8_t *even = planar_row(job, channel + c) + group * GROUP_BYTES;
        const uint8_t *odd = planar_row(job, channel + c + 1) + group * GROUP_BYTES;
        uint8_t *out = panel + c / OCTET * OCTET * groups * GROUP + c % OCTET * OCTET;
        for (int64_t at = 0; at < groups * GROUP_BYTES; at += 16) {
            const uint64x2_t a = (uint64x2_t)vld1q_u8(even + at), b = (uint64x2_t)vld1q_u8(odd + at);
            const uint8x16_t octets[2] = {(uint8x16_t)vtrn1q_u64(a, b), (uint8x16_t)vtrn2q_u64(a, b)};
            uint8_t *first = out + (at / GROUP_BYTES * OCTETS + at % GROUP_BYTES / OCTET) * OCTET_BYTES;
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++, first += OCTET_BYTES) {
                vst1q_u8(first, vandq_u8(octets[i], mask));
                vst1q_u8(first + 4 * OCTET_BYTES, vandq_u8(vshrq_n_u8(octets[i], 2), mask));
                vst1q_u8(first + 8 * OCTET_BYTES, vandq_u8(vshrq_n_u8(octets[i], 4), mask));
                vst1q_u8(first + 12 * OCTET_BYTES, vshrq_n_u8(octets[i], 6));
            }
        }
    }
}

/* Codes [rows / 2][groups * GROUP / 8][2][8]; a last odd row is its own neighbour. */
FN void i8mm_operands(const struct ternary_job *job, int64_t first, int64_t rows, int64_t group, int64_t groups,
                      int8_t *operands, int32_t *offsets) {
    for (int64_t row = 0; row < rows; row += 2) {
        const int64_t next = min64(row + 1, rows - 1);
        int32_t sums[2] = {group ? offsets[row] : 0, group ? offsets[next] : 0};
        for (int64_t g = 0; g < groups; g++) {
            int8_t tails[2][GROUP];
            const int8_t *x = group_codes(job, first + row, group + g, tails[0]);
            const int8_t *y = group_codes(job, first + next, group + g, tails[1]);
            sums[0] += sum_codes(x);
            sums[1] += sum_codes(y);
            for (int k = 0; k < GROUP; k += 16, operands += 32) {
                const int64x2_t a = (int64x2_t)vld1q_s8(x + k), b = (int64x2_t)vld1q_s8(y + k);
                vst1q_s8(operands, (int8x16_t)vtrn1q_s64(a, b));
                vst1q_s8(operands + 16, (int8x16_t)vtrn2q_s64(a, b));
            }
        }
        offsets[row] = sums[0];
        offsets[next] = sums[1];
    }
}

/* products[t][c] += codes_t . weights_c for `pairs` pairs of tokens and eight channels. */
INLINE void i8mm_tile(const uint8_t *panel, const int8_t *codes, int64_t width, int32_t *products, const int pairs) {
    int32x4_t sums[BLOCK_PAIRS][BLOCK_PAIRS]; /* a token's two channels, then the other's */
#pragma GCC unroll 4
    for (int t = 0; t < pairs; t++)
#pragma GCC unroll 4
        for (int c = 0; c < BLOCK_PAIRS; c++) sums[t][c] = vdupq_n_s32(0);
    for (int64_t k = 0; k < width; k += OCTET, panel += OCTET_BYTES, codes += 2 * OCTET) {
        int8x16_t weights[BLOCK_PAIRS];
#pragma GCC unroll 4
        for (int c = 0; c < BLOCK_PAIRS; c++) weights[c] = (int8x16_t)vld1q_u8(panel + c * 2 * OCTET);
#pragma GCC unroll 4
        for (int t = 0; t < pairs; t++) {
            const int8x16_t x = vld1q_s8(codes + t * 2 * width);
#pragma GCC unroll 4
            for (int c = 0; c < BLOCK_PAIRS; c++) sums[t][c] = vmmlaq_s32(sums[t][c], x, weights[c]);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < pairs; t++, products += 2 * PANEL) {
#pragma GCC unroll 2
        for (int c = 0; c < BLOCK_PAIRS; c += 2) {
            const int64x2_t a = (int64x2_t)sums[t][c], b = (int64x2_t)sums[t][c + 1];
            int32_t *out = products + 2 * c, *next = out + PANEL;
            vst1q_s32(out, vaddq_s32(vld1q_s32(out), (int32x4_t)vtrn1q_s64(a, b)));
            vst1q_s32(next, vaddq_s32(vld1q_s32(next), (int32x4_t)vtrn2q_s64(a, b)));
        }
    }
}

/* The neighbour of a last odd row has room: buffers are long enough for whole tiles. */
FN void i8mm_multiply(const struct ternary_job *job, int64_t channel, int64_t group, int64_t groups,
                      uint8_t *panel, const int8_t *codes, int64_t rows, int32_t *products) {
    enum { ROWS = 2 * BLOCK_PAIRS };
    const int64_t width = groups * GROUP;
    (void)job, (void)channel, (void)group;
    for (; rows > 0; rows -= ROWS, codes += ROWS * width, products += ROWS * PANEL) {
        for (int c = 0; c < PANEL; c += OCTET) {
            const uint8_t *weights = panel + c * width;
            switch (min64(ceil_div(rows, 2), BLOCK_PAIRS)) {
                case 1: i8mm_tile(weights, codes, width, products + c, 1); break;
                case 2: i8mm_tile(weights, codes, width, products + c, 2); break;
                case 3: i8mm_tile(weights, codes, width, products + c, 3); break;
                default: i8mm_tile(weights, codes, width, products + c, 4);
            }
        }
    }
}

static const struct product i8mm_product = {
    .adds = 1, .decode = i8mm_decode, .operands = i8mm_operands, .multiply = i8mm_multiply};
