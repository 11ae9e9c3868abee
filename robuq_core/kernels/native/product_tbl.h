/* The integer products of AArch64 without dot products: of codes up to six bits by table look-up, as product_lookup.h
 * does and says; of few rows and wider codes by multiplication. */

enum {
    TABLE = 16,             /* bytes */
    LOOKUP_TOKENS = 4,      /* of a tile; their tables lie side by side */
    TILE_VECTORS = 2,       /* of 16 channels */
    PAIRS = GROUP / 2,
};

/* 16 bytes of 16 rows, transposed, become indices: each vector two, its low and its high half-bytes. */
FN void transpose_indices(const uint8_t *const rows[16], int64_t at, uint8_t *out) {
    uint8x16_t a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = vld1q_u8(rows[i] + at);
#pragma GCC unroll 2
    for (int stage = 0; stage < 2; stage++) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            b[2 * i] = vzip1q_u8(a[i], a[i + 8]);
            b[2 * i + 1] = vzip2q_u8(a[i], a[i + 8]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            a[2 * i] = vzip1q_u8(b[i], b[i + 8]);
            a[2 * i + 1] = vzip2q_u8(b[i], b[i + 8]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++, out += 2 * PANEL) {
        vst1q_u8(out, vandq_u8(a[i], vdupq_n_u8(15)));
        vst1q_u8(out + PANEL, vshrq_n_u8(a[i], 4));
    }
}

/* Indices of a panel: for each pair of codes, a byte for each channel. */
FN void tbl_decode(const struct ternary_job *job, int64_t channel, int64_t group, int64_t groups, uint8_t *panel) {
    for (int c = 0; c < PANEL; c += 16) {
        const uint8_t *rows[16];
        for (int i = 0; i < 16; i++) rows[i] = planar_row(job, channel + c + i) + group * GROUP_BYTES;
        for (int64_t at = 0; at < groups * GROUP_BYTES; at += 16)
            transpose_indices(rows, at, panel + c + 2 * at * PANEL);
    }
}

/* Tables of a group of 128 codes of one token. */
INLINE void tbl_tables(const int8_t *x, int8_t bias, uint8_t *out, const int midrise) {
    const int8x16_t sign0 = {-1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1}, sign1 = {-1, -1, -1, 0, 0, 0, 0, 0, 1, 1, 1};
    const int8x16_t ones = vsubq_s8(vdupq_n_s8(0), (int8x16_t)vaddq_u8(vcgtzq_s8(sign0), vcgtzq_s8(sign1)));
    const int8x16_t nonzero = vaddq_s8(vabsq_s8(sign0), vabsq_s8(sign1));
    const int8x16_t biases = vdupq_n_s8(bias), first = midrise ? nonzero : vaddq_s8(ones, biases);
    for (int j = 0; j < GROUP_BYTES; j++) {
#pragma GCC unroll 2
        for (int pair = 0; pair < 2; pair++, out += LOOKUP_TOKENS * TABLE) {
            const int8_t *code = x + 2 * pair * GROUP_BYTES + j;
            const int8x16_t t0 = vmlaq_s8(first, vld1q_dup_s8(code), sign0);
            const int8x16_t x1 = vld1q_dup_s8(code + GROUP_BYTES);
            /* Mid-rise: half of t0 + t1 + n, an even number. */
            const int8x16_t entries = midrise ? vaddq_s8(vhaddq_s8(t0, vmulq_s8(x1, sign1)), biases)
                                              : vmlaq_s8(t0, x1, sign1);
            vst1q_s8((int8_t *)out, entries);
        }
    }
}

/* Tables of a block of rows: [rows / 4][pairs][4 tokens][16]. */
FN void tbl_operands(const struct ternary_job *job, int64_t first, int64_t rows, int64_t group, int64_t groups,
                     int8_t *operands, int32_t *offsets) {
    const int bias = pair_bias(job->layer), midrise = job->layer->midrise;
    for (int64_t row = 0; row < rows; row++) {
        uint8_t *out = (uint8_t *)operands + row / LOOKUP_TOKENS * groups * PAIRS * LOOKUP_TOKENS * TABLE +
                       row % LOOKUP_TOKENS * TABLE;
        for (int64_t g = 0; g < groups; g++, out += PAIRS * LOOKUP_TOKENS * TABLE) {
            int8_t tail[GROUP];
            const int8_t *x = group_codes(job, first + row, group + g, tail);
            if (midrise) tbl_tables(x, (int8_t)bias, out, 1);
            else tbl_tables(x, (int8_t)bias, out, 0);
        }
        offsets[row] = (int32_t)(job->padded_width / 2) * bias * (midrise ? 2 : 1);
    }
}

/* out += sums 2^shift */
INLINE void add_wide(int32_t *out, uint16x8_t sums, int32x4_t shift) {
    vst1q_s32(out, vaddq_s32(vld1q_s32(out), (int32x4_t)vshlq_u32(vmovl_u16(vget_low_u16(sums)), shift)));
    vst1q_s32(out + 4, vaddq_s32(vld1q_s32(out + 4), (int32x4_t)vshlq_u32(vmovl_high_u16(sums), shift)));
}

/* products[t][c] += what the biased sums of `tokens` tokens and 32 channels over a slice come to. */
INLINE void tbl_tile(const uint8_t *index, const uint8_t *tables, int64_t pairs, const struct ternary_job *job,
                     int32_t *products, const int tokens) {
    const int32x4_t shift = vdupq_n_s32(job->layer->midrise);
    uint16x8_t wide[LOOKUP_TOKENS][TILE_VECTORS][2];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 2
        for (int v = 0; v < TILE_VECTORS; v++) wide[t][v][0] = wide[t][v][1] = vdupq_n_u16(0);
    for (int64_t left = pairs; left > 0; left -= job->safe_pairs) {
        uint8x16_t sums[LOOKUP_TOKENS][TILE_VECTORS];
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++)
#pragma GCC unroll 2
            for (int v = 0; v < TILE_VECTORS; v++) sums[t][v] = vdupq_n_u8(0);
#pragma GCC unroll 1
        for (int64_t p = 0; p < job->safe_pairs; p += 2) {
#pragma GCC unroll 2
            for (int both = 0; both < 2; both++, index += PANEL, tables += LOOKUP_TOKENS * TABLE) {
                uint8x16_t at[TILE_VECTORS];
#pragma GCC unroll 2
                for (int v = 0; v < TILE_VECTORS; v++) at[v] = vld1q_u8(index + v * 16);
#pragma GCC unroll 4
                for (int t = 0; t < tokens; t++) {
                    const uint8x16_t table = vld1q_u8(tables + t * TABLE);
#pragma GCC unroll 2
                    for (int v = 0; v < TILE_VECTORS; v++)
                        sums[t][v] = vaddq_u8(sums[t][v], vqtbl1q_u8(table, at[v]));
                }
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) {
#pragma GCC unroll 2
            for (int v = 0; v < TILE_VECTORS; v++) {
                wide[t][v][0] = vaddw_u8(wide[t][v][0], vget_low_u8(sums[t][v]));
                wide[t][v][1] = vaddw_high_u8(wide[t][v][1], sums[t][v]);
            }
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) {
#pragma GCC unroll 2
        for (int v = 0; v < TILE_VECTORS; v++) {
            add_wide(products + t * PANEL + v * 16, wide[t][v][0], shift);
            add_wide(products + t * PANEL + v * 16 + 8, wide[t][v][1], shift);
        }
    }
}

FN void tbl_multiply(const struct ternary_job *job, int64_t channel, int64_t group, int64_t groups,
                     uint8_t *panel, const int8_t *operands, int64_t rows, int32_t *products) {
    const uint8_t *tables = (const uint8_t *)operands;
    const int64_t pairs = groups * PAIRS;
    if (group == 0) begin_products(job->layer, channel, rows, products);
    for (; rows > 0; rows -= LOOKUP_TOKENS) {
        for (int c = 0; c < PANEL; c += 16 * TILE_VECTORS) {
            switch (min64(rows, LOOKUP_TOKENS)) {
                case 1: tbl_tile(panel + c, tables, pairs, job, products + c, 1); break;
                case 2: tbl_tile(panel + c, tables, pairs, job, products + c, 2); break;
                case 3: tbl_tile(panel + c, tables, pairs, job, products + c, 3); break;
                default: tbl_tile(panel + c, tables, pairs, job, products + c, 4);
            }
        }
        tables += pairs * LOOKUP_TOKENS * TABLE;
        products += LOOKUP_TOKENS * PANEL;
    }
}

static const struct product tbl_product = {
    .decode = tbl_decode, .operands = tbl_operands, .multiply = tbl_multiply};

enum { DIRECT_TOKENS = 4, DIRECT_CHANNELS = 2, SAFE_GROUPS = 7 /* 16 products a group and lane of at most 256 */ };

/* Products of two channels, whose weights are decoded in registers as t + 1. */
INLINE void direct_tile(const uint8_t *const planar[DIRECT_CHANNELS], const int8_t *codes, int64_t groups,
                        int32_t *products, const int tokens) {
    int32x4_t sums[DIRECT_TOKENS][DIRECT_CHANNELS] = {0};
    const int8_t *x = codes;
    for (int64_t g = 0; g < groups; g += SAFE_GROUPS) {
        int16x8_t narrow[DIRECT_TOKENS][DIRECT_CHANNELS] = {0};
        for (int64_t at = g; at < min64(g + SAFE_GROUPS, groups); at++, x += GROUP) {
#pragma GCC unroll 2
            for (int half = 0; half < GROUP_BYTES; half += 16) {
                uint8x16_t bytes[DIRECT_CHANNELS];
#pragma GCC unroll 2
                for (int c = 0; c < DIRECT_CHANNELS; c++) bytes[c] = vld1q_u8(planar[c] + at * GROUP_BYTES + half);
#pragma GCC unroll 4
                for (int plane = 0; plane < 4; plane++) {
                    int8x16_t weights[DIRECT_CHANNELS];
#pragma GCC unroll 2
                    for (int c = 0; c < DIRECT_CHANNELS; c++) {
                        weights[c] = (int8x16_t)vandq_u8(bytes[c], vdupq_n_u8(3));
                        bytes[c] = vshrq_n_u8(bytes[c], 2);
                    }
#pragma GCC unroll 4
                    for (int t = 0; t < tokens; t++) {
                        const int8x16_t code = vld1q_s8(x + t * groups * GROUP + plane * GROUP_BYTES + half);
#pragma GCC unroll 2
                        for (int c = 0; c < DIRECT_CHANNELS; c++) {
                            narrow[t][c] = vmlal_s8(narrow[t][c], vget_low_s8(weights[c]), vget_low_s8(code));
                            narrow[t][c] = vmlal_high_s8(narrow[t][c], weights[c], code);
                        }
                    }
                }
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++)
#pragma GCC unroll 2
            for (int c = 0; c < DIRECT_CHANNELS; c++) sums[t][c] = vpadalq_s16(sums[t][c], narrow[t][c]);
    }
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 2
        for (int c = 0; c < DIRECT_CHANNELS; c++) products[t * PANEL + c] += vaddvq_s32(sums[t][c]);
}

FN void direct_multiply(const struct ternary_job *job, int64_t channel, int64_t group, int64_t groups,
                        uint8_t *panel, const int8_t *codes, int64_t rows, int32_t *products) {
    (void)panel;
    for (int64_t row = 0; row < rows; row += DIRECT_TOKENS) {
        const int8_t *x = codes + row * groups * GROUP;
        for (int c = 0; c < PANEL; c += DIRECT_CHANNELS) {
            int32_t *out = products + row * PANEL + c;
            const uint8_t *planar[DIRECT_CHANNELS];
            for (int i = 0; i < DIRECT_CHANNELS; i++)
                planar[i] = planar_row(job, channel + c + i) + group * GROUP_BYTES;
            switch (min64(rows - row, DIRECT_TOKENS)) {
                case 1: direct_tile(planar, x, groups, out, 1); break;
                case 2: direct_tile(planar, x, groups, out, 2); break;
                case 3: direct_tile(planar, x, groups, out, 3); break;
                default: direct_tile(planar, x, groups, out, 4);
            }
        }
    }
}

static const struct product direct_product = {.adds = 1, .operands = copy_codes, .multiply = direct_multiply};
