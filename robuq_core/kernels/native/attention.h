/* Softmax attention, one head of one image a task; the formulas of the 8-bit form are those of quant/attention.py.
 *
 * Codes are kept as int16, two of them a 32-bit pair: a signed 8-bit product has no instruction on AVX2, and an int16 one
 * with int32 sums is exact for every head width and, since 255 * 127 * L < 2^31, for L up to 66,000 tokens. */

/* Rows of x by columns of w, in pairs of codes: out[i][c] = sum_p x[i][p] . w[p][c], eight columns a vector. */
INLINE v8i add_pairs(v8i sum, const int16_t *x, const int16_t *w) {
#if HAVE_AVX2
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
#if HAVE_AVX512VNNI
    return (v8i)_mm256_dpwssd_epi32((__m256i)sum, load_bytes(w), _mm256_set1_epi32(pair));
#else
    return (v8i)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(load_bytes(w), _mm256_set1_epi32(pair)));
#endif
#else
    for (int lane = 0; lane < LANES; lane++) sum[lane] += (int32_t)x[0] * w[2 * lane] + (int32_t)x[1] * w[2 * lane + 1];
    return sum;
#endif
}

INLINE void pair_tile(const int16_t *x, int64_t x_stride, const int16_t *w, int64_t w_stride, int64_t pairs,
                      int32_t *out, int64_t out_stride, const int vectors) {
    enum { ROWS = PAIR_ROWS };
    v8i sum[ROWS][PAIR_VECTORS] = {0};
    for (int64_t p = 0; p < pairs; p++) {
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++)
                sum[i][v] = add_pairs(sum[i][v], x + i * x_stride + 2 * p, w + p * w_stride + 2 * v * LANES);
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) memcpy(out + i * out_stride + v * LANES, &sum[i][v], sizeof sum[i][v]);
}

/* `rows`, a multiple of PAIR_ROWS, by `columns`, a multiple of eight. */
FN void pair_block(const int16_t *x, int64_t x_stride, int64_t rows, const int16_t *w, int64_t columns, int64_t pairs,
                   int32_t *out, int64_t out_stride) {
    for (int64_t c = 0; c < columns; c += PAIR_VECTORS * LANES) {
        const int64_t vectors = (columns - c) / LANES;
        for (int64_t i = 0; i < rows; i += PAIR_ROWS) {
            const int16_t *xi = x + i * x_stride, *wc = w + 2 * c;
            int32_t *tile = out + i * out_stride + c;
            if (vectors == 1) pair_tile(xi, x_stride, wc, 2 * columns, pairs, tile, out_stride, 1);
            else if (vectors == 2) pair_tile(xi, x_stride, wc, 2 * columns, pairs, tile, out_stride, 2);
            else pair_tile(xi, x_stride, wc, 2 * columns, pairs, tile, out_stride, 3);
        }
    }
}

FN v8 magnitudes(const float *x, int64_t count, v8 top) {
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) top = vmax(top, vabs(load(x + k)));
    return k < count ? vmax(top, vabs(load_part(x + k, count - k))) : top;
}

/* Scale of symmetric 8-bit codes of values up to `top`. */
INLINE float signed_scale(float top) { return top / 127.0f; }

INLINE v8s signed_codes(v8 x, float scale) {
    return to_int16(vrint(x / splat(scale > 1e-30f ? scale : 1e-30f)));
}

/* Codes of `length` rows of `dim` values, `stride` apart, into padded rows, and a scale for each row. */
FN void quantize_tokens(const float *x, int64_t stride, int64_t length, int64_t dim, int16_t *codes, float *scales) {
    const int64_t padded = round_up(dim, INT16_LANES), whole = dim / LANES * LANES;
    const v8s none = {0};
    for (int64_t i = 0; i < length; i++, x += stride, codes += padded) {
        const float scale = scales[i] = signed_scale(vmax_lane(magnitudes(x, dim, splat(0))));
        for (int64_t k = 0; k < padded; k += LANES) {
            const v8s code = k < whole ? signed_codes(load(x + k), scale)
                             : k < dim ? signed_codes(load_part(x + k, dim - k), scale)
                                       : none;
            memcpy(codes + k, &code, sizeof code);
        }
    }
}

/* Rows of codes [length, padded dim], padded with zero rows to whole vectors, to columns of pairs
 * [padded dim / 2, padded length, 2]. */
FN void transpose_pairs(const int16_t *codes, int64_t length, int64_t padded_dim, int64_t padded_length,
                        int16_t *out) {
    for (int64_t i = 0; i < padded_length; i += LANES) {
        for (int64_t k = 0; k < padded_dim; k += 2 * LANES) {
            v8 tile[LANES]; /* of pairs, which travel as floats do */
            for (int row = 0; row < LANES; row++) {
                tile[row] = splat(0);
                if (i + row < length) memcpy(&tile[row], codes + (i + row) * padded_dim + k, sizeof tile[row]);
            }
            transpose8(tile);
            for (int pair = 0; pair < LANES; pair++)
                memcpy(out + ((k / 2 + pair) * padded_length + i) * 2, &tile[pair], sizeof tile[pair]);
        }
    }
}

/* Codes of V of one head, pairs of tokens side by side [padded length / 2, padded dim, 2]; returns their scale. */
FN float quantize_values(const float *v, int64_t stride, int64_t length, int64_t dim, int16_t *out) {
    const int64_t padded_length = round_up(length, INT16_LANES);
    v8 top = splat(0);
    for (int64_t i = 0; i < length; i++) top = magnitudes(v + i * stride, dim, top);
    const float scale = signed_scale(vmax_lane(top));
    const v8s none = {0};
    for (int64_t i = 0; i < padded_length; i += 2) {
        const float *even = v + i * stride, *odd = even + stride;
        for (int64_t k = 0; k < dim; k += LANES, out += 2 * LANES) {
            const v8s code = i < length ? signed_codes(load_part(even + k, dim - k), scale) : none;
            const v8s next = i + 1 < length ? signed_codes(load_part(odd + k, dim - k), scale) : none;
            store_interleaved(out, code, next);
        }
    }
    return scale;
}

/* V of one head, transposed to [dim, padded length] with zeros beyond. */
FN void transpose_values(const float *v, int64_t stride, int64_t length, int64_t dim, float *out) {
    const int64_t padded = round_up(length, INT16_LANES);
    for (int64_t d = 0; d < dim; d++) {
        for (int64_t i = 0; i < length; i++) out[d * padded + i] = v[i * stride + d];
        for (int64_t i = length; i < padded; i++) out[d * padded + i] = 0.0f;
    }
}

/* e^(x - max) of a padded row in place, zero in the padding; returns the sum. */
FN float exponentials(float *x, int64_t length) {
    const int64_t padded = round_up(length, INT16_LANES);
    for (int64_t k = length; k < padded; k++) x[k] = -3e38f;
    v8 top = load(x), sum = splat(0);
    for (int64_t k = LANES; k < padded; k += LANES) top = vmax(top, load(x + k));
    const v8 shift = splat(vmax_lane(top));
    for (int64_t k = 0; k < padded; k += LANES) {
        const v8 e = keep_part(vexp(load(x + k) - shift), max64(length - k, 0));
        store(x + k, e);
        sum += e;
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
    const int64_t length = h->length, dim = h->dim, padded = round_up(length, INT16_LANES);
    transpose_values(h->v, h->stride, length, dim, b->v);
    for (int64_t first = 0; first < length; first += QUERY_ROWS) {
        const int64_t rows = min64(QUERY_ROWS, length - first);
        dot_block(&(struct dot_job){
            .x = h->q + first * h->stride, .x_stride = h->stride, .rows = rows, .w = h->k, .w_stride = h->stride,
            .columns = length, .width = dim, .out = b->logits, .out_stride = padded});
        for (int64_t i = 0; i < rows; i++) {
            float *p = b->logits + i * padded;
            for (int64_t j = 0; j < length; j++) p[j] *= h->logit_scale;
            const v8 total = splat(exponentials(p, length));
            for (int64_t j = 0; j < padded; j += LANES) store(p + j, load(p + j) / total);
        }
        dot_block(&(struct dot_job){
            .x = b->logits, .x_stride = padded, .rows = rows, .w = b->v, .w_stride = padded, .columns = dim,
            .width = padded, .out = h->out + first * h->width, .out_stride = h->width});
    }
}

/* Logits of a row from its integer products, softmax, and its probabilities in 255ths. */
FN void quantized_softmax(const struct attention_buffers *b, int64_t row, int64_t length, float scale) {
    const int64_t padded = round_up(length, INT16_LANES);
    float *p = b->logits + row * padded;
    const int32_t *products = b->products + row * padded;
    for (int64_t j = 0; j < padded; j += LANES) {
        v8i product;
        memcpy(&product, products + j, sizeof product);
        store(p + j, __builtin_convertvector(product, v8) * (splat(scale) * load(b->k_scale + j)));
    }
    const v8 factor = splat(255.0f / exponentials(p, length));
    for (int64_t j = 0; j < padded; j += LANES) {
        const v8s code = to_int16(vrint(load(p + j) * factor));
        memcpy(b->p_codes + row * padded + j, &code, sizeof code);
    }
}

FN void attend_int8(const struct head *h, const struct attention_buffers *b) {
    const int64_t length = h->length, dim = h->dim;
    const int64_t padded_length = round_up(length, INT16_LANES), padded_dim = round_up(dim, INT16_LANES);
    const int64_t value_dim = round_up(dim, LANES);
    quantize_tokens(h->k, h->stride, length, dim, b->q, b->k_scale);
    transpose_pairs(b->q, length, padded_dim, padded_length, b->k);
    quantize_tokens(h->q, h->stride, length, dim, b->q, b->q_scale);
    for (int64_t j = length; j < padded_length; j++) b->k_scale[j] = 0.0f;
    const float scale = quantize_values(h->v, h->stride, length, dim, b->v_codes) / 255.0f;
    for (int64_t first = 0; first < length; first += QUERY_ROWS) {
        const int64_t rows = min64(QUERY_ROWS, length - first), tiles = round_up(rows, PAIR_ROWS);
        pair_block(b->q + first * padded_dim, padded_dim, tiles, b->k, padded_length, ceil_div(dim, 2), b->products,
                   padded_length);
        for (int64_t i = 0; i < rows; i++)
            quantized_softmax(b, i, length, b->q_scale[first + i] * h->logit_scale);
        pair_block(b->p_codes, padded_length, tiles, b->v_codes, value_dim, padded_length / 2, b->products, value_dim);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t d = 0; d < dim; d++)
                h->out[(first + i) * h->width + d] = (float)b->products[i * value_dim + d] * scale;
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
