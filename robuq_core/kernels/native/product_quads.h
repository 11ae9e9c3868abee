/* The integer product by look-up of four weights at a time, for codes of up to five bits: vpermi2b reads a
 * table of 128 bytes for 64 output channels at once.
 *
 * A byte of the planar form holds a channel's weights for four codes, a quad: k, k + 32, k + 64, k + 96. Their digits
 * t + 1 in base 3, low + 9 high, index a table of the 81 sums that the four codes of a token can have. Entries with
 * high < 7 fill 63 bytes; the other 18 share 64 bytes with those of the next quad, so two quads take three vectors.
 *
 * Sums are those of cells, see ternary.h. An entry, biased, is 0 .. 4 m, m = 2^b - 1: 255 / (4 m) of them fit an
 * unsigned byte. Bytes then go to 16 bits, even and odd channels apart, and after the last slice to 32. */

enum {
    GROUP_QUADS = GROUP_BYTES,  /* of a group */
    QUAD_VECTOR = 64,           /* bytes of a vector, channels that it looks up */
    QUAD_PANELS = 4,            /* vectors of a tile, each of a panel */
    QUAD_TOKENS = 2,            /* of a tile; their tables lie side by side */
    PAIR_TABLES = 3 * QUAD_VECTOR, /* of two quads: their first 63 entries each, then the last 18 of both */
    LAST = 18,                  /* of a quad's entries, those in the vector that it shares */
};

/* The first 16 bytes in every lane of 16. */
INLINE __m512i every_lane(const int8_t lane[16]) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)lane));
}

INLINE __m512i load_lanes(const uint8_t *p, int64_t stride) { /* 16 bytes each */
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)p));
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(p + stride)), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(p + 2 * stride)), 2);
    return _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(p + 3 * stride)), 3);
}

/* Indices of a group of 64 channels, a vector for each quad, QUAD_PANELS vectors apart. The byte 2 i of a vector is the
 * channel i and the byte 2 i + 1 the channel 32 + i, so that even and odd sums come out in order. */
FN void group_indices(const uint8_t *rows, int64_t stride, int64_t step, uint8_t *out) {
    const __m512i digit = _mm512_set1_epi8(15);
    const __m512i low = every_lane((const int8_t[16]){0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8});
    __m512i high[2]; /* of an even and of an odd quad: they share the third vector of their tables */
    high[0] = every_lane((const int8_t[16]){0, 9, 18, 0, 27, 36, 45, 0, 54, 64, 73});
    high[1] = every_lane((const int8_t[16]){0, 9, 18, 0, 27, 36, 45, 0, 54, 64 + LAST, 73 + LAST});
    for (int half = 0; half < 2; half++, rows += 16) {
        __m512i a[16], b[16];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            a[2 * i] = load_lanes(rows + i * stride, 8 * stride);
            a[2 * i + 1] = load_lanes(rows + (32 + i) * stride, 8 * stride);
        }
#pragma GCC unroll 2
        for (int stage = 0; stage < 2; stage++) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                b[2 * i] = _mm512_unpacklo_epi8(a[i], a[i + 8]);
                b[2 * i + 1] = _mm512_unpackhi_epi8(a[i], a[i + 8]);
            }
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                a[2 * i] = _mm512_unpacklo_epi8(b[i], b[i + 8]);
                a[2 * i + 1] = _mm512_unpackhi_epi8(b[i], b[i + 8]);
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++, out += step) {
            const __m512i first = _mm512_shuffle_epi8(low, _mm512_and_si512(a[i], digit));
            const __m512i last = _mm512_and_si512(_mm512_srli_epi16(a[i], 4), digit);
            _mm512_storeu_si512(out, _mm512_add_epi8(first, _mm512_shuffle_epi8(high[i % 2], last)));
        }
    }
}

/* How many of a tile's panels lie within the layer from `channel` on. */
INLINE int quad_panels(const struct ternary_job *job, int64_t channel) {
    return (int)min64(ceil_div(job->layer->channels - channel, PANEL), QUAD_PANELS);
}

/* Indices of up to QUAD_PANELS panels: [quads][panels][64]. */
FN void quads_decode(const struct ternary_job *job, int64_t channel, int64_t group, int64_t groups, uint8_t *panel) {
    const int64_t stride = job->padded_width / GROUP * GROUP_BYTES;
    const int panels = quad_panels(job, channel);
    for (int p = 0; p < panels; p++, channel += PANEL) {
        uint8_t *out = panel + p * QUAD_VECTOR;
        for (int64_t g = 0; g < groups; g++, out += GROUP_QUADS * panels * QUAD_VECTOR) {
            if (channel + PANEL <= job->layer->channels) {
                const uint8_t *rows = job->layer->planar + channel * stride + (group + g) * GROUP_BYTES;
                group_indices(rows, stride, panels * QUAD_VECTOR, out);
                continue;
            }
            uint8_t edge[PANEL * GROUP_BYTES];
            for (int i = 0; i < PANEL; i++)
                memcpy(edge + i * GROUP_BYTES, planar_row(job, channel + i) + (group + g) * GROUP_BYTES, GROUP_BYTES);
            group_indices(edge, GROUP_BYTES, panels * QUAD_VECTOR, out);
        }
    }
}

/* Which sums of two codes an entry adds: i % 9 and i / 9. Sums of four quads lie side by side, 16 bytes each. */
#define UP(x) x, x + 1, x + 2, x + 3, x + 4, x + 5, x + 6, x + 7, x + 8
#define SAME(x) x, x, x, x, x, x, x, x, x
static const int8_t low_sums[QUAD_VECTOR] = {UP(0), UP(0), UP(0), UP(0), UP(0), UP(0), UP(0)};
static const int8_t high_sums[QUAD_VECTOR] = {SAME(0), SAME(1), SAME(2), SAME(3), SAME(4), SAME(5), SAME(6)};
static const int8_t last_low_sums[QUAD_VECTOR] = {UP(0), UP(0), UP(16), UP(16)};
static const int8_t last_high_sums[QUAD_VECTOR] = {SAME(7), SAME(8), SAME(23), SAME(24)};
#undef UP
#undef SAME

INLINE __m512i sums_of_two(__m512i plus, __m512i minus, __m512i first, __m512i second, __m512i bias) {
    const uint64_t not_first = 0x016D016D016D016D;  /* sum % 3 != 1, of sums 0 .. 8 */
    const uint64_t not_second = 0x01C701C701C701C7; /* sum / 3 != 1 */
    const __m512i a = _mm512_maskz_permutex2var_epi8(not_first, plus, first, minus);
    const __m512i b = _mm512_maskz_permutex2var_epi8(not_second, plus, second, minus);
    return _mm512_add_epi8(_mm512_add_epi8(a, bias), b);
}

INLINE void put_table(uint8_t *out, __m512i low, __m512i high, __m512i low_of, __m512i high_of, int quad) {
    const __m512i lane = _mm512_set1_epi8((char)quad);
    _mm512_store_si512(out, _mm512_add_epi8(_mm512_permutexvar_epi8(_mm512_add_epi8(low_of, lane), low),
                                            _mm512_permutexvar_epi8(_mm512_add_epi8(high_of, lane), high)));
}

/* Tables of a token's group of codes: [pairs of quads][QUAD_TOKENS][3][64], `out` at the token's own. */
FN void group_quads(const int8_t *codes, const int midrise, int bias, uint8_t *out) {
    const __m512i one = _mm512_set1_epi8(1), half = _mm512_set1_epi8((char)bias);
    __m512i plus[2], minus[2]; /* of the quads' codes 0 and 1, 2 and 3 */
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        __m512i cell = _mm512_loadu_si512(codes + i * QUAD_VECTOR);
        if (midrise) { /* (code - 1) / 2; bytes have no arithmetic shift */
            cell = _mm512_srli_epi16(_mm512_xor_si512(cell, _mm512_set1_epi8((char)0x80)), 1);
            cell = _mm512_sub_epi8(_mm512_and_si512(cell, _mm512_set1_epi8(0x7F)), _mm512_set1_epi8(0x40));
        }
        plus[i] = _mm512_add_epi8(cell, one);
        minus[i] = _mm512_sub_epi8(_mm512_setzero_si512(), cell);
    }
    /* Of a sum of two codes a digit 2 takes the one's u + 1 and a digit 0 its -u, 64 bytes on; 1 is masked out. */
    const __m512i lane = _mm512_shuffle_epi8(_mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0), _mm512_setzero_si512());
    __m512i first = _mm512_add_epi8(every_lane((const int8_t[16]){64, 0, 0, 64, 0, 0, 64}), lane);
    __m512i second = _mm512_add_epi8(every_lane((const int8_t[16]){96, 96, 96, 32, 32, 32, 32, 32, 32}), lane);
    const __m512i low_of = _mm512_loadu_si512(low_sums), high_of = _mm512_loadu_si512(high_sums);
    const __m512i last_low = _mm512_loadu_si512(last_low_sums), last_high = _mm512_loadu_si512(last_high_sums);
    for (int quad = 0; quad < GROUP_QUADS; quad += 4) {
        const __m512i low = sums_of_two(plus[0], minus[0], first, second, half);
        const __m512i high = sums_of_two(plus[1], minus[1], first, second, half);
        first = _mm512_add_epi8(first, _mm512_set1_epi8(4));
        second = _mm512_add_epi8(second, _mm512_set1_epi8(4));
#pragma GCC unroll 2
        for (int i = 0; i < 4; i += 2, out += QUAD_TOKENS * PAIR_TABLES) {
            put_table(out, low, high, low_of, high_of, 16 * i);
            put_table(out + QUAD_VECTOR, low, high, low_of, high_of, 16 * (i + 1));
            put_table(out + 2 * QUAD_VECTOR, low, high, last_low, last_high, 16 * i);
        }
    }
}

/* Tables of a block of rows: [rows / 2][quads / 2][2 tokens][3][64]. */
FN void quads_operands(const struct ternary_job *job, int64_t first, int64_t rows, int64_t group, int64_t groups,
                       int8_t *operands, int32_t *offsets) {
    enum { GROUP_TABLES = GROUP_QUADS / 2 * QUAD_TOKENS * PAIR_TABLES };
    const int midrise = job->layer->midrise;
    const int bias = pair_bias(job->layer);
    for (int64_t row = 0; row < rows; row++) {
        uint8_t *out = (uint8_t *)operands + row / QUAD_TOKENS * groups * GROUP_TABLES +
                       row % QUAD_TOKENS * PAIR_TABLES;
        for (int64_t g = 0; g < groups; g++, out += GROUP_TABLES) {
            int8_t tail[GROUP];
            const int8_t *codes = group_codes(job, first + row, group + g, tail);
            if (midrise) group_quads(codes, 1, bias, out);
            else group_quads(codes, 0, bias, out);
        }
        offsets[row] = (int32_t)(job->padded_width / GROUP * GROUP_QUADS) * 2 * bias * (midrise ? 2 : 1);
    }
}

/* sum += entries: in assembly, as in product_lookup.h. */
INLINE void look_up_quads(__m512i *sum, __m512i first, __m512i last, __m512i index) {
#if defined(ROBUQ_SIMDE)
    *sum = _mm512_add_epi8(*sum, _mm512_permutex2var_epi8(first, index, last));
#else
    __asm__("vpermi2b %3, %2, %1\n\tvpaddb %1, %0, %0" : "+v"(*sum), "+v"(index) : "v"(first), "v"(last));
#endif
}

/* A load that stays one: GCC 12 would rather read memory again for each token. */
INLINE __m512i load_indices(const uint8_t *p) {
    __m512i x = _mm512_loadu_si512(p);
#if !defined(ROBUQ_SIMDE)
    __asm__("" : "+v"(x));
#endif
    return x;
}

struct quad_slice {
    int64_t pairs, safe_pairs;  /* of quads: of the slice, and between two additions to 16 bits */
    int64_t stride;             /* between the products of two panels */
    int first, last;            /* of the slices that are summed in 16 bits */
    const int32_t *offsets;     /* [panels, 64], where products begin: what to take off them; NULL: they go on */
    int midrise;
};

/* Products of 16 channels: of the mid-rise grid twice the sums. */
INLINE void put_products(const struct quad_slice *slice, __m256i sums, int32_t *products, int64_t channel) {
    __m512i wide = _mm512_cvtepu16_epi32(sums);
    if (slice->midrise) wide = _mm512_add_epi32(wide, wide);
    if (slice->offsets) wide = _mm512_sub_epi32(wide, _mm512_loadu_si512(slice->offsets + channel));
    else wide = _mm512_add_epi32(wide, _mm512_loadu_si512(products));
    _mm512_storeu_si512(products, wide);
}

/* A token's sums of a panel, even and odd channels. Until the last slice they wait where its products will be. */
INLINE void put_panel(const struct quad_slice *slice, __m512i even, __m512i odd, int32_t *products, int64_t channel) {
    if (!slice->first) {
        even = _mm512_add_epi16(even, _mm512_loadu_si512(products));
        odd = _mm512_add_epi16(odd, _mm512_loadu_si512(products + 16));
    }
    if (!slice->last) {
        _mm512_storeu_si512(products, even);
        _mm512_storeu_si512(products + 16, odd);
        return;
    }
    even = _mm512_sub_epi16(even, _mm512_slli_epi16(odd, 8));
    put_products(slice, _mm512_castsi512_si256(even), products, channel);
    put_products(slice, _mm512_extracti64x4_epi64(even, 1), products + 16, channel + 16);
    put_products(slice, _mm512_castsi512_si256(odd), products + 32, channel + 32);
    put_products(slice, _mm512_extracti64x4_epi64(odd, 1), products + 48, channel + 48);
}

INLINE void quads_tile(const struct quad_slice *slice, const uint8_t *index, const uint8_t *tables, int32_t *products,
                       const int tokens, const int panels) {
    __m512i even[QUAD_TOKENS][QUAD_PANELS], odd[QUAD_TOKENS][QUAD_PANELS];
#pragma GCC unroll 2
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) even[t][p] = odd[t][p] = _mm512_setzero_si512();
    for (int64_t left = slice->pairs; left > 0; left -= slice->safe_pairs) {
        __m512i sums[QUAD_TOKENS][QUAD_PANELS];
#pragma GCC unroll 2
        for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
            for (int p = 0; p < panels; p++) sums[t][p] = _mm512_setzero_si512();
        const int64_t count = min64(left, slice->safe_pairs);
#pragma GCC unroll 1
        for (int64_t pair = 0; pair < count; pair++, tables += QUAD_TOKENS * PAIR_TABLES) {
#pragma GCC unroll 2
            for (int quad = 0; quad < 2; quad++, index += panels * QUAD_VECTOR) {
                __m512i at[QUAD_PANELS];
#pragma GCC unroll 4
                for (int p = 0; p < panels; p++) at[p] = load_indices(index + p * QUAD_VECTOR);
#pragma GCC unroll 2
                for (int t = 0; t < tokens; t++) {
                    const __m512i first = _mm512_load_si512(tables + t * PAIR_TABLES + quad * QUAD_VECTOR);
                    const __m512i last = _mm512_load_si512(tables + t * PAIR_TABLES + 2 * QUAD_VECTOR);
#pragma GCC unroll 4
                    for (int p = 0; p < panels; p++) look_up_quads(&sums[t][p], first, last, at[p]);
                }
            }
        }
#pragma GCC unroll 2
        for (int t = 0; t < tokens; t++) {
#pragma GCC unroll 4
            for (int p = 0; p < panels; p++) {
                even[t][p] = _mm512_add_epi16(even[t][p], sums[t][p]); /* and 256 times the odd ones, for now */
                odd[t][p] = _mm512_add_epi16(odd[t][p], _mm512_srli_epi16(sums[t][p], 8));
            }
        }
    }
#pragma GCC unroll 2
    for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++)
            put_panel(slice, even[t][p], odd[t][p], products + p * slice->stride + t * PANEL, p * PANEL);
}

INLINE void quads_rows(const struct quad_slice *slice, const uint8_t *index, const uint8_t *tables, int64_t rows,
                       int32_t *products, const int panels) {
    for (; rows > 0; rows -= QUAD_TOKENS, products += QUAD_TOKENS * PANEL) {
        if (rows == 1) quads_tile(slice, index, tables, products, 1, panels);
        else quads_tile(slice, index, tables, products, 2, panels);
        tables += slice->pairs * QUAD_TOKENS * PAIR_TABLES;
    }
}

FN void quads_multiply(const struct ternary_job *job, int64_t channel, int64_t group, int64_t groups,
                       const uint8_t *panel, const int8_t *operands, int64_t rows, int32_t *products, int64_t stride) {
    const struct layer *layer = job->layer;
    /* Codes as wide as these may have sums that 16 bits do not hold: each slice is then added to 32. */
    const int wide = job->padded_width * layer->max_code > UINT16_MAX;
    struct quad_slice slice = {
        .pairs = groups * GROUP_QUADS / 2, .safe_pairs = 255 / (4 * layer->max_code) / 2,
        .stride = stride, .midrise = layer->midrise, .first = wide || group == 0,
        .last = wide || (group + groups) * GROUP == job->padded_width,
    };
    int32_t offsets[QUAD_PANELS * PANEL] = {0};
    if (wide ? group == 0 : slice.last) {
        const int64_t count = min64(QUAD_PANELS * PANEL, layer->channels - channel);
        memcpy(offsets, layer->weight_offsets + channel, (size_t)count * sizeof *offsets);
        slice.offsets = offsets;
    }
    const uint8_t *tables = (const uint8_t *)operands;
    switch (quad_panels(job, channel)) {
        case 1: quads_rows(&slice, panel, tables, rows, products, 1); break;
        case 2: quads_rows(&slice, panel, tables, rows, products, 2); break;
        case 3: quads_rows(&slice, panel, tables, rows, products, 3); break;
        default: quads_rows(&slice, panel, tables, rows, products, 4);
    }
}

static const struct product quads_product = {0, quads_decode, quads_operands, quads_multiply};
