/* Softmax attention, one head of one image a task; the formulas of the 8-bit form are those of quant/attention.py.
 *
 * Codes that one 32-bit lane sums lie side by side, a pack: with VNNI four bytes, of unsigned by signed codes; with
 * NEON's dot products and tiles four signed bytes; without either two int16. Sums are exact for every head width and for
 * up to 65,793 tokens: 255 * 127 * L < 2^31, and a row's sum of codes, at most 255 * L < 2^24, is a whole float. */

#define LOWEST_LOGIT -3e38f /* of what stands beyond the last key */

#if HAVE_AMX
typedef int8_t pack_code;
enum { PACK = 4, QUERY_BIAS = 0, CODES_BIAS = 0, QUERY_ROWS = TILE_ROWS };
#elif HAVE_AVX512VNNI
typedef int8_t pack_code;
/* Makes a query's codes unsigned, or codes of exponentials signed; column_offsets() take it off again. */
enum { PACK = 4, QUERY_BIAS = 128, CODES_BIAS = 0, QUERY_ROWS = 8 };
#elif HAVE_DOTPROD
typedef int8_t pack_code;
enum { PACK = 4, QUERY_BIAS = 0, CODES_BIAS = -128, QUERY_ROWS = 8 };
#else
typedef int16_t pack_code;
enum { PACK = 2, QUERY_BIAS = 0, CODES_BIAS = 0, QUERY_ROWS = 8 };
#endif

/* Rows of x by columns of w, a pack at a time: out[i][c] = sum_p x[i][p] . w[p][c], LANES columns a vector. */
INLINE vint add_packs(vint sum, const pack_code *x, const pack_code *w) {
#if HAVE_AVX2
    int32_t pack;
    memcpy(&pack, x, sizeof pack);
#if HAVE_AVX512VNNI
    return (vint)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(pack), _mm512_loadu_si512(w));
#else
    return (vint)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(load_bytes(w), _mm256_set1_epi32(pack)));
#endif
#elif HAVE_NEON
    int32_t pack;
    memcpy(&pack, x, sizeof pack);
#if HAVE_DOTPROD
    const int8x16_t all = (int8x16_t)vdupq_n_s32(pack);
    return (vint){vdotq_s32(sum.low, vld1q_s8(w), all), vdotq_s32(sum.high, vld1q_s8(w + 16), all)};
#else
    const int16x8_t all = (int16x8_t)vdupq_n_s32(pack), a = vld1q_s16(w), b = vld1q_s16(w + 8);
    const int32x4_t first = vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(all)), vmull_high_s16(a, all));
    const int32x4_t second = vpaddq_s32(vmull_s16(vget_low_s16(b), vget_low_s16(all)), vmull_high_s16(b, all));
    return (vint){vaddq_s32(sum.low, first), vaddq_s32(sum.high, second)};
#endif
#else
    for (int lane = 0; lane < LANES; lane++) sum[lane] += (int32_t)x[0] * w[2 * lane] + (int32_t)x[1] * w[2 * lane + 1];
    return sum;
#endif
}

#if HAVE_AMX
#define ADD_COLUMNS(sums, codes, packs, w)                       \
    do {                                                         \
        _tile_loadd(packs, w, stride);                           \
        if (positive) _tile_dpbusd(sums, codes, packs);          \
        else _tile_dpbssd(sums, codes, packs);                   \
    } while (0)

#define ADD_TILES(codes, packs, x, w)                                          \
    do {                                                                       \
        _tile_loadd(codes, x, x_stride);                                       \
        ADD_COLUMNS(0, codes, packs, w);                                       \
        if (tiles > 1) ADD_COLUMNS(1, codes, packs, w + TILE_BYTES);           \
        if (tiles > 2) ADD_COLUMNS(2, codes, packs, w + 2 * TILE_BYTES);       \
        if (tiles > 3) ADD_COLUMNS(3, codes, packs, w + 3 * TILE_BYTES);       \
    } while (0)

/* QUERY_ROWS rows of x, of signed codes or `positive` ones, by 16 columns a tile. */
FN void pack_block(const pack_code *x, int64_t x_stride, int64_t rows, const pack_code *w, int64_t columns,
                   int64_t packs, int32_t *out, int64_t out_stride, int positive) {
    const int64_t stride = PACK * columns, line = out_stride * (int64_t)sizeof *out;
    (void)rows;
    configure_tiles(packs % TILE_ROWS);
    for (int64_t c = 0; c < columns; c += 4 * TILE_ROWS, w += 4 * TILE_BYTES, out += 4 * TILE_ROWS) {
        const int64_t tiles = (columns - c) / TILE_ROWS;
        int64_t p = 0;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (; p + TILE_ROWS <= packs; p += TILE_ROWS) ADD_TILES(4, 5, x + PACK * p, w + p * stride);
        if (p < packs) ADD_TILES(6, 7, x + PACK * p, w + p * stride);
        _tile_stored(0, out, line);
        if (tiles > 1) _tile_stored(1, out + TILE_ROWS, line);
        if (tiles > 2) _tile_stored(2, out + 2 * TILE_ROWS, line);
        if (tiles > 3) _tile_stored(3, out + 3 * TILE_ROWS, line);
    }
    release_tiles();
}
#else
INLINE void pack_tile(const pack_code *x, int64_t x_stride, const pack_code *w, int64_t w_stride, int64_t packs,
                      int32_t *out, int64_t out_stride, const int vectors) {
    enum { ROWS = PACK_ROWS };
    vint sum[ROWS][PACK_VECTORS] = {0};
    for (int64_t p = 0; p < packs; p++) {
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++)
                sum[i][v] = add_packs(sum[i][v], x + i * x_stride + PACK * p, w + p * w_stride + PACK * v * LANES);
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) store_int(out + i * out_stride + v * LANES, sum[i][v]);
}

/* `rows`, a multiple of PACK_ROWS, by `columns`, a multiple of LANES. */
FN void pack_block(const pack_code *x, int64_t x_stride, int64_t rows, const pack_code *w, int64_t columns,
                   int64_t packs, int32_t *out, int64_t out_stride, int positive) {
    (void)positive; /* what codes of x are is known */
    for (int64_t c = 0; c < columns; c += PACK_VECTORS * LANES) {
        const int64_t vectors = (columns - c) / LANES;
        for (int64_t i = 0; i < rows; i += PACK_ROWS) {
            const pack_code *xi = x + i * x_stride, *wc = w + PACK * c;
            int32_t *tile = out + i * out_stride + c;
            if (vectors == 1) pack_tile(xi, x_stride, wc, PACK * columns, packs, tile, out_stride, 1);
            else if (vectors == 2) pack_tile(xi, x_stride, wc, PACK * columns, packs, tile, out_stride, 2);
            else pack_tile(xi, x_stride, wc, PACK * columns, packs, tile, out_stride, 3);
        }
    }
}
#endif

/* Rows of a head lie too far apart for the processor to foresee. */
enum { AHEAD = 8 };
INLINE void prefetch_values(const float *x, int64_t count) {
    for (int64_t k = 0; k < count; k += ALIGNMENT / (int64_t)sizeof *x) __builtin_prefetch(x + k);
}

FN vfloat magnitudes(const float *x, int64_t count, vfloat top) {
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) top = vmax(top, vabs(load(x + k)));
    return k < count ? vmax(top, vabs(load_part(x + k, count - k))) : top;
}

/* Scale of symmetric 8-bit codes of values up to `top`; that of zeros only keeps their codes finite. */
INLINE float signed_scale(float top) { return top / 127.0f < 1e-30f ? 1e-30f : top / 127.0f; }

INLINE vfloat signed_codes(vfloat x, float scale) { return vrint(divide(x, splat(scale))); }

/* Codes of whole floats, plus a bias; bytes may be signed or not. */
INLINE void store_pack_codes(pack_code *out, vfloat x, const int bias) {
    if (bias) x = add(x, splat((float)bias));
#if HAVE_AVX512VNNI || HAVE_DOTPROD
    const vbyte codes = to_int8(x);
#else
    const vshort codes = to_int16(x);
#endif
    memcpy(out, &codes, sizeof codes);
}

/* Codes of `length` rows of `dim` values, `stride` apart, into padded rows, and a scale for each row. */
INLINE void quantize_tokens(const float *x, int64_t stride, int64_t length, int64_t dim, pack_code *codes,
                            float *scales, const int bias) {
    const int64_t padded = round_up(dim, PACK * LANES), whole = dim / LANES * LANES;
    for (int64_t i = 0; i < length; i++, x += stride, codes += padded) {
        prefetch_values(x + AHEAD * stride, dim);
        const float scale = scales[i] = signed_scale(vmax_lane(magnitudes(x, dim, splat(0))));
        for (int64_t k = 0; k < padded; k += LANES) {
            vfloat code = splat(0);
            if (k < whole) code = signed_codes(load(x + k), scale);
            else if (k < dim) code = signed_codes(load_part(x + k, dim - k), scale);
            store_pack_codes(codes + k, code, bias);
        }
    }
}

/* Rows of x, `length` of `width` floats or packs, `stride` apart, to columns [width, padded length], zeros beyond. */
FN void to_columns(const float *x, int64_t stride, int64_t length, int64_t width, int64_t padded_length, float *out) {
    for (int64_t i = 0; i < padded_length; i += LANES) {
        for (int64_t k = 0; k < width; k += LANES) {
            vfloat tile[LANES];
#pragma GCC unroll 16
            for (int row = 0; row < LANES; row++)
                tile[row] = i + row < length ? load_part(x + (i + row) * stride + k, width - k) : splat(0);
            transpose(tile);
#pragma GCC unroll 16
            for (int column = 0; column < LANES; column++)
                if (k + column < width) store(out + (k + column) * padded_length + i, tile[column]);
        }
    }
}

/* What the bias of a row's codes adds to its product with each column. */
FN void column_offsets(const pack_code *w, int64_t columns, int64_t packs, int32_t *offsets) {
    pack_code bias[PACK];
    for (int i = 0; i < PACK; i++) bias[i] = (pack_code)(QUERY_BIAS + CODES_BIAS);
    for (int64_t j = 0; j < columns; j += LANES) {
        vint sum = {0};
        for (int64_t p = 0; p < packs; p++) sum = add_packs(sum, bias, w + (p * columns + j) * PACK);
        store_int(offsets + j, sum);
    }
}

/* The codes of PACK tokens, those of a dimension side by side. */
INLINE void store_packed(pack_code *out, const vfloat codes[PACK]) {
#if HAVE_AVX512VNNI
    vint packs = to_int(codes[PACK - 1]);
#pragma GCC unroll 3
    for (int t = PACK - 2; t >= 0; t--) packs = packs << 8 | (to_int(codes[t]) & 255);
    store_int((int32_t *)out, packs);
#elif HAVE_DOTPROD
    int8x8x4_t packs;
#pragma GCC unroll 4
    for (int t = 0; t < PACK; t++) packs.val[t] = (int8x8_t)to_int8(codes[t]);
    vst4_s8(out, packs);
#else
    store_interleaved(out, to_int16(codes[0]), to_int16(codes[1]));
#endif
}

/* Codes of V of one head, tokens packed side by side [padded length / PACK, padded dim, PACK]; returns their scale. */
FN float quantize_values(const float *v, int64_t stride, int64_t length, int64_t dim, pack_code *out) {
    const int64_t padded_length = round_up(length, FLOAT_LANES);
    vfloat top = splat(0);
    for (int64_t i = 0; i < length; i++) {
        prefetch_values(v + (i + AHEAD) * stride, dim);
        top = magnitudes(v + i * stride, dim, top);
    }
    const float scale = signed_scale(vmax_lane(top));
    for (int64_t i = 0; i < padded_length; i += PACK) {
        for (int64_t k = 0; k < dim; k += LANES, out += PACK * LANES) {
            vfloat codes[PACK] = {0};
            for (int64_t t = 0; t < PACK && i + t < length; t++)
                codes[t] = signed_codes(load_part(v + (i + t) * stride + k, dim - k), scale);
            store_packed(out, codes);
        }
    }
    return scale;
}

/* V of one head, to rows of whole vectors. */
FN void gather_values(const float *v, int64_t stride, int64_t length, int64_t dim, float *out) {
    for (int64_t i = 0; i < length; i++, v += stride) {
        prefetch_values(v + AHEAD * stride, dim);
        for (int64_t k = 0; k < dim; k += LANES, out += LANES) store(out, load_part(v + k, dim - k));
    }
}

/* e^(scale (x - max)) of a row in place; returns the sum. */
FN float exponentials(float *x, int64_t length, float scale) {
    vfloat top = splat(LOWEST_LOGIT), sum = splat(0);
    for (int64_t k = 0; k < length; k += LANES)
        top = vmax(top, first_part(load(x + k), length - k, splat(LOWEST_LOGIT)));
    const vfloat shift = splat(vmax_lane(top));
    for (int64_t k = 0; k < length; k += LANES) {
        const vfloat e = vexp(mul(sub(load(x + k), shift), splat(scale)));
        store(x + k, e);
        sum = add(sum, keep_part(e, length - k));
    }
    return vsum(sum);
}

struct head {
    const float *q, *k, *v;     /* [length, dim], rows `stride` apart */
    float *out;                 /* [length, dim], rows `width` apart */
    int64_t length, dim, stride, width;
    float logit_scale;
};

FN void attend(const struct head *h, const struct attention_buffers *b) {
    const int64_t length = h->length, dim = h->dim;
    const int64_t padded_length = round_up(length, FLOAT_LANES), padded_dim = round_up(dim, LANES);
    float *out = (float *)b->products;
    to_columns(h->k, h->stride, length, dim, padded_length, b->columns);
    gather_values(h->v, h->stride, length, dim, b->v);
    for (int64_t first = 0; first < length; first += QUERY_ROWS) {
        const int64_t rows = min64(QUERY_ROWS, length - first);
        outer_block(h->q + first * h->stride, h->stride, rows, b->columns, padded_length, dim, b->logits);
        float totals[QUERY_ROWS];
        for (int64_t i = 0; i < rows; i++)
            totals[i] = exponentials(b->logits + i * padded_length, length, h->logit_scale);
        outer_block(b->logits, padded_length, rows, b->v, padded_dim, length, out);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t d = 0; d < dim; d += LANES)
                store_part(h->out + (first + i) * h->width + d,
                           divide(load(out + i * padded_dim + d), splat(totals[i])), dim - d);
    }
}

enum { TURN = FLOAT_LANES / LANES }; /* vectors of logits at a time */

/* 255 e^(x - max) rounded: codes of 0 .. 255 that are also whole floats. */
INLINE void exponential_codes(const float *logits, vfloat top, vfloat codes[TURN]) {
    for (int i = 0; i < TURN; i++) codes[i] = vrint(mul(vexp(sub(load(logits + i * LANES), top)), splat(255)));
}

INLINE void store_exponentials(pack_code *out, const vfloat codes[TURN]) {
#if HAVE_AVX2 && !HAVE_AVX512VNNI
    const __m256i pairs = _mm256_packs_epi32((__m256i)to_int(codes[0]), (__m256i)to_int(codes[1]));
    store_bytes(out, _mm256_permute4x64_epi64(pairs, 0xD8));
#else
    for (int i = 0; i < TURN; i++) store_pack_codes(out + i * LANES, codes[i], CODES_BIAS);
#endif
}

/* Codes of a row's exponentials, from its integer products, with zeros in the padding; returns their sum. */
FN float softmax_codes(const struct attention_buffers *b, int64_t row, int64_t length, float scale) {
    const int64_t padded = round_up(length, FLOAT_LANES), whole = length / LANES * LANES;
    float *p = b->logits + row * padded;
    const int32_t *products = b->products + row * padded;
    pack_code *codes = (pack_code *)b->p_codes + row * padded;
    vfloat top = splat(LOWEST_LOGIT);
    for (int64_t j = 0; j < padded; j += LANES) {
        vint product = load_int(products + j);
        if (QUERY_BIAS) product = sub_int(product, load_int(b->offsets + j));
        const vfloat logit = mul(to_float(product), mul(splat(scale), load(b->k_scale + j)));
        top = vmax(top, j < whole ? logit : first_part(logit, length - j, splat(LOWEST_LOGIT)));
        store(p + j, logit);
    }
    top = splat(vmax_lane(top));
    vfloat code[TURN], sum[TURN] = {0};
    int64_t j = 0;
    for (; j + FLOAT_LANES <= length; j += FLOAT_LANES) {
        exponential_codes(p + j, top, code);
        store_exponentials(codes + j, code);
        for (int i = 0; i < TURN; i++) sum[i] = add(sum[i], code[i]);
    }
    if (j < length) {
        exponential_codes(p + j, top, code);
        for (int i = 0; i < TURN; i++) code[i] = keep_part(code[i], max64(length - j - i * LANES, 0));
        store_exponentials(codes + j, code);
        for (int i = 0; i < TURN; i++) sum[i] = add(sum[i], code[i]);
    }
    return vsum(TURN == 1 ? sum[0] : add(sum[0], sum[TURN - 1]));
}

FN void attend_int8(const struct head *h, const struct attention_buffers *b) {
    const int64_t length = h->length, dim = h->dim, packs = ceil_div(dim, PACK);
    const int64_t padded_length = round_up(length, FLOAT_LANES), padded_dim = round_up(dim, PACK * LANES);
    const int64_t value_dim = round_up(dim, LANES);
    pack_code *q = b->q, *k = b->k;
    quantize_tokens(h->k, h->stride, length, dim, q, b->k_scale, 0);
    to_columns((const float *)q, padded_dim / PACK, length, packs, padded_length, (float *)k);
    if (QUERY_BIAS) column_offsets(k, padded_length, packs, b->offsets);
    quantize_tokens(h->q, h->stride, length, dim, q, b->q_scale, QUERY_BIAS);
    for (int64_t j = length; j < padded_length; j++) b->k_scale[j] = 0.0f;
    const float v_scale = quantize_values(h->v, h->stride, length, dim, b->v_codes);
    if (CODES_BIAS) column_offsets(b->v_codes, value_dim, padded_length / PACK, b->offsets);
    for (int64_t first = 0; first < length; first += QUERY_ROWS) {
        const int64_t rows = min64(QUERY_ROWS, length - first), tiles = round_up(rows, PACK_ROWS);
        pack_block(q + first * padded_dim, padded_dim, tiles, k, padded_length, packs, b->products, padded_length,
                   0);
        float factors[QUERY_ROWS];
        for (int64_t i = 0; i < rows; i++)
            factors[i] = v_scale / softmax_codes(b, i, length, b->q_scale[first + i] * h->logit_scale);
        pack_block(b->p_codes, padded_length, tiles, b->v_codes, value_dim, padded_length / PACK, b->products,
                   value_dim, 1);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t d = 0; d < dim; d++)
                h->out[(first + i) * h->width + d] =
                    (float)(b->products[i * value_dim + d] - (CODES_BIAS ? b->offsets[d] : 0)) * factors[i];
    }
}

INLINE struct head head_of(const struct attention_job *job, int64_t task) {
    const int64_t image = task / job->heads, head = task % job->heads, stride = 3 * job->width;
    const float *q = job->qkv + image * job->length * stride + head * job->head_dim;
    return (struct head){
        .q = q, .k = q + job->width, .v = q + 2 * job->width, .stride = stride,
        .out = job->out + image * job->length * job->width + head * job->head_dim, .width = job->width,
        .length = job->length, .dim = job->head_dim, .logit_scale = job->logit_scale,
    };
}

FN void attention_task(const void *job, int64_t task, char *scratch) {
    const struct head head = head_of(job, task);
    struct attention_buffers b;
    attention_carve(scratch, head.length, head.dim, &b);
    attend(&head, &b);
}

FN void attention_int8_task(const void *job, int64_t task, char *scratch) {
    const struct head head = head_of(job, task);
    struct attention_buffers b;
    attention_carve(scratch, head.length, head.dim, &b);
    attend_int8(&head, &b);
}
