/* Softmax attention, one head of one image a task; the formulas of the 8-bit form are those of quant/attention.py.
 *
 * Codes are kept as int16: a signed 8-bit product has no instruction on AVX2, and an int16 one with int32 sums is exact
 * for every head width and, since 255 * 127 * L < 2^31, for L up to 66,000 tokens. */

/* out[i][j] = x_i . w_j over `width` codes, a multiple of 16 (zeros beyond the true width). */
FN void int_dot_block(const int16_t *x, int64_t rows, const int16_t *w, int64_t columns, int64_t width, int32_t *out,
                      int64_t out_stride) {
    enum { ROWS = 2, COLUMNS = 4 };
    for (int64_t j0 = 0; j0 < columns; j0 += COLUMNS) {
        const int16_t *w_rows[COLUMNS];
        for (int j = 0; j < COLUMNS; j++) w_rows[j] = w + min64(j0 + j, columns - 1) * width;
        for (int64_t i0 = 0; i0 < rows; i0 += ROWS) {
            const int16_t *x_rows[ROWS] = {x + i0 * width, x + min64(i0 + 1, rows - 1) * width};
            int32_t tile[ROWS][COLUMNS];
#if HAVE_AVX2
            __m256i sums[ROWS][COLUMNS] = {0};
            for (int64_t k = 0; k < width; k += INT16_LANES) {
                const __m256i a = _mm256_loadu_si256((const __m256i *)(x_rows[0] + k));
                const __m256i b = _mm256_loadu_si256((const __m256i *)(x_rows[1] + k));
#pragma GCC unroll 4
                for (int j = 0; j < COLUMNS; j++) {
                    const __m256i wk = _mm256_loadu_si256((const __m256i *)(w_rows[j] + k));
                    sums[0][j] = _mm256_add_epi32(sums[0][j], _mm256_madd_epi16(wk, a));
                    sums[1][j] = _mm256_add_epi32(sums[1][j], _mm256_madd_epi16(wk, b));
                }
            }
            for (int i = 0; i < ROWS; i++) _mm_storeu_si128((__m128i *)tile[i], sum_lanes(sums[i]));
#else
            for (int i = 0; i < ROWS; i++) {
                for (int j = 0; j < COLUMNS; j++) {
                    int32_t sum = 0;
                    for (int64_t k = 0; k < width; k++) sum += (int32_t)x_rows[i][k] * w_rows[j][k];
                    tile[i][j] = sum;
                }
            }
#endif
            for (int i = 0; i < ROWS && i0 + i < rows; i++)
                for (int j = 0; j < COLUMNS && j0 + j < columns; j++)
                    out[(i0 + i) * out_stride + j0 + j] = tile[i][j];
        }
    }
}

FN float max_abs(const float *x, int64_t count) {
    v8 top = splat(0);
    for (int64_t k = 0; k < count; k += LANES) top = vmax(top, vabs(load_part(x + k, count - k)));
    return vmax_lane(top);
}

/* Scale of symmetric 8-bit codes of values up to `top`. */
INLINE float signed_scale(float top) { return top / 127.0f; }

INLINE v8s signed_codes(v8 x, float scale) {
    return to_int16(vrint(x / splat(scale > 1e-30f ? scale : 1e-30f)));
}

/* Codes of `length` rows of `dim` values, `stride` apart, into padded rows, and a scale for each row. */
FN void quantize_tokens(const float *x, int64_t stride, int64_t length, int64_t dim, int16_t *codes, float *scales) {
    const int64_t padded = round_up(dim, INT16_LANES);
    for (int64_t i = 0; i < length; i++) {
        scales[i] = signed_scale(max_abs(x + i * stride, dim));
        for (int64_t k = 0; k < padded; k += LANES) {
            const v8 part = k < dim ? load_part(x + i * stride + k, dim - k) : splat(0);
            const v8s code = signed_codes(part, scales[i]);
            memcpy(codes + i * padded + k, &code, sizeof code);
        }
    }
}

/* V of one head, transposed to [dim, padded length] with zeros beyond: as codes if asked, returning their scale. */
FN float transpose_values(const float *v, int64_t stride, int64_t length, int64_t dim, struct attention_buffers *b,
                          int quantized) {
    const int64_t padded = round_up(length, INT16_LANES);
    float scale = 1.0f;
    if (quantized) {
        float top = 0.0f;
        for (int64_t i = 0; i < length; i++) {
            const float row = max_abs(v + i * stride, dim);
            top = row > top ? row : top;
        }
        scale = signed_scale(top);
        memset(b->v_codes, 0, (size_t)(dim * padded) * sizeof *b->v_codes);
    } else {
        memset(b->v, 0, (size_t)(dim * padded) * sizeof *b->v);
    }
    for (int64_t i = 0; i < length; i++) {
        for (int64_t k = 0; k < dim; k += LANES) {
            const int64_t count = min64(LANES, dim - k);
            const v8 part = load_part(v + i * stride + k, count);
            const v8s code = signed_codes(part, scale);
            for (int64_t lane = 0; lane < count; lane++) {
                if (quantized) b->v_codes[(k + lane) * padded + i] = code[lane];
                else b->v[(k + lane) * padded + i] = part[lane];
            }
        }
    }
    return scale;
}

/* Softmax of a padded row in place; the padding becomes zero. */
FN void softmax_row(float *x, int64_t length) {
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
    const v8 total = splat(vsum(sum));
    for (int64_t k = 0; k < padded; k += LANES) store(x + k, load(x + k) / total);
}

INLINE void attend(const struct attention_job *job, int64_t task, char *scratch, const int quantized) {
    const int64_t length = job->length, dim = job->head_dim, stride = 3 * job->width;
    const int64_t padded_length = round_up(length, INT16_LANES), padded_dim = round_up(dim, INT16_LANES);
    const int64_t image = task / job->heads, head = task % job->heads;
    const float *q = job->qkv + image * length * stride + head * dim, *k = q + job->width, *v = k + job->width;
    float *out = job->out + image * length * job->width + head * dim;
    struct attention_buffers b;
    attention_carve(scratch, length, dim, &b);
    const float v_scale = transpose_values(v, stride, length, dim, &b, quantized);
    if (quantized) {
        quantize_tokens(q, stride, length, dim, b.q, b.q_scale);
        quantize_tokens(k, stride, length, dim, b.k, b.k_scale);
    }
    for (int64_t first = 0; first < length; first += QUERY_ROWS) {
        const int64_t rows = min64(QUERY_ROWS, length - first);
        if (quantized) int_dot_block(b.q + first * padded_dim, rows, b.k, length, padded_dim, b.products, length);
        else dot_block(&(struct dot_job){
            .x = q + first * stride, .x_stride = stride, .rows = rows, .w = k, .w_stride = stride, .columns = length,
            .width = dim, .out = b.logits, .out_stride = padded_length});
        for (int64_t i = 0; i < rows; i++) {
            float *p = b.logits + i * padded_length;
            if (quantized) {
                const float scale = b.q_scale[first + i] * job->logit_scale;
                for (int64_t j = 0; j < length; j++)
                    p[j] = (float)b.products[i * length + j] * (scale * b.k_scale[j]);
            } else {
                for (int64_t j = 0; j < length; j++) p[j] *= job->logit_scale;
            }
            softmax_row(p, length);
            for (int64_t j = 0; quantized && j < padded_length; j += LANES) {
                const v8s code = to_int16(vrint(load(p + j) * splat(255)));
                memcpy(b.p_codes + i * padded_length + j, &code, sizeof code);
            }
        }
        if (quantized) {
            const float scale = v_scale / 255.0f;
            int_dot_block(b.p_codes, rows, b.v_codes, dim, padded_length, b.products, dim);
            for (int64_t i = 0; i < rows; i++)
                for (int64_t d = 0; d < dim; d++)
                    out[(first + i) * job->width + d] = (float)b.products[i * dim + d] * scale;
        } else {
            dot_block(&(struct dot_job){
                .x = b.logits, .x_stride = padded_length, .rows = rows, .w = b.v, .w_stride = padded_length,
                .columns = dim, .width = padded_length, .out = out + first * job->width, .out_stride = job->width});
        }
    }
}

FN void attention_task(const void *job, int64_t task, char *scratch) { attend(job, task, scratch, 0); }
FN void attention_int8_task(const void *job, int64_t task, char *scratch) { attend(job, task, scratch, 1); }
