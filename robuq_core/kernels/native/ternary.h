/* ternary_linear, eq. (5): 2-bit weights decoded a few channels at a time, an exact integer product, the epilogue.
 *
 * Weights enter the product as t + 1 in {0, 1, 2}; subtracting the sum of a token's codes makes them t again. Four
 * decoded channels lie interleaved, 32 weights of each in turn: they fill half a level-1 cache at most widths. */

enum { STEP = GROUP_BYTES, STEP_BYTES = TILE_CHANNELS * STEP };

/* Channels `channel`.. of the planar matrix, one in each 32 bytes of a step; beyond the last, the last again. */
FN void decode_channels(const struct ternary_job *job, int64_t channel, uint8_t *restrict weights) {
    const int64_t groups = job->padded_width / GROUP;
    for (int i = 0; i < TILE_CHANNELS; i++) {
        const uint8_t *restrict planar = job->planar + min64(channel + i, job->channels - 1) * groups * GROUP_BYTES;
        uint8_t *restrict out = weights + i * STEP;
        for (int64_t g = 0; g < groups; g++, planar += GROUP_BYTES, out += 4 * STEP_BYTES) {
#if HAVE_AVX2
            const __m256i bytes = _mm256_loadu_si256((const __m256i *)planar), mask = _mm256_set1_epi8(3);
            _mm256_storeu_si256((__m256i *)out, _mm256_and_si256(bytes, mask));
            _mm256_storeu_si256((__m256i *)(out + STEP_BYTES), _mm256_and_si256(_mm256_srli_epi16(bytes, 2), mask));
            _mm256_storeu_si256((__m256i *)(out + 2 * STEP_BYTES), _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask));
            _mm256_storeu_si256((__m256i *)(out + 3 * STEP_BYTES), _mm256_and_si256(_mm256_srli_epi16(bytes, 6), mask));
#else
            for (int plane = 0; plane < 4; plane++)
                for (int j = 0; j < GROUP_BYTES; j++) out[plane * STEP_BYTES + j] = (planar[j] >> (2 * plane)) & 3;
#endif
        }
    }
}

/* out[t][c] = sum_k weights[c][k] * x_t[k], exact. */
#if HAVE_AVX2
INLINE __m128i sum_lanes(const __m256i sums[TILE_CHANNELS]) {
    const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
}

INLINE __m256i load_bytes(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }

/* sum += weights * codes, pairs of products in 16-bit lanes. In assembly because GCC 12 otherwise moves the eight
 * accumulators from register to register at each step, one of them through memory. */
INLINE void add_products(__m256i *sum, __m256i weights, __m256i codes) {
    __m256i products;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(*sum), "=&x"(products) : "x"(weights), "x"(codes));
}

FN void product_tile(const uint8_t *weights, const int8_t *x0, const int8_t *x1, int64_t steps, int64_t safe_steps,
                     int32_t out[TILE_TOKENS][TILE_CHANNELS]) {
    const __m256i ones = _mm256_set1_epi16(1), zero = _mm256_setzero_si256();
    __m256i wide[TILE_TOKENS][TILE_CHANNELS] = {0};
    while (steps > 0) {
        __m256i a0 = zero, a1 = zero, a2 = zero, a3 = zero, b0 = zero, b1 = zero, b2 = zero, b3 = zero;
        for (int64_t left = min64(steps, safe_steps); left > 0; left--) {
            const __m256i a = load_bytes(x0), b = load_bytes(x1);
            __m256i w = load_bytes(weights);
            add_products(&a0, w, a);
            add_products(&b0, w, b);
            w = load_bytes(weights + STEP);
            add_products(&a1, w, a);
            add_products(&b1, w, b);
            w = load_bytes(weights + 2 * STEP);
            add_products(&a2, w, a);
            add_products(&b2, w, b);
            w = load_bytes(weights + 3 * STEP);
            add_products(&a3, w, a);
            add_products(&b3, w, b);
            x0 += STEP;
            x1 += STEP;
            weights += STEP_BYTES;
        }
        const __m256i narrow[TILE_TOKENS][TILE_CHANNELS] = {{a0, a1, a2, a3}, {b0, b1, b2, b3}};
        for (int t = 0; t < TILE_TOKENS; t++)
            for (int c = 0; c < TILE_CHANNELS; c++)
                wide[t][c] = _mm256_add_epi32(wide[t][c], _mm256_madd_epi16(narrow[t][c], ones));
        steps -= safe_steps;
    }
    for (int t = 0; t < TILE_TOKENS; t++) _mm_storeu_si128((__m128i *)out[t], sum_lanes(wide[t]));
}
#else
FN void product_tile(const uint8_t *weights, const int8_t *x0, const int8_t *x1, int64_t steps, int64_t safe_steps,
                     int32_t out[TILE_TOKENS][TILE_CHANNELS]) {
    (void)safe_steps;
    for (int c = 0; c < TILE_CHANNELS; c++) {
        int32_t sum0 = 0, sum1 = 0;
        for (int64_t s = 0; s < steps; s++) {
            const uint8_t *w = weights + s * STEP_BYTES + c * STEP;
            for (int j = 0; j < STEP; j++) {
                sum0 += (int16_t)w[j] * (int16_t)x0[s * STEP + j];
                sum1 += (int16_t)w[j] * (int16_t)x1[s * STEP + j];
            }
        }
        out[0][c] = sum0;
        out[1][c] = sum1;
    }
}
#endif

/* Codes padded to whole groups where the width is not a multiple of one, and the sum of each row's codes. */
FN void ternary_prepare_task(const void *argument, int64_t task, char *scratch) {
    const struct ternary_job *job = argument;
    (void)scratch;
    const int64_t first = task * job->block_rows, end = min64(first + job->block_rows, job->rows);
    for (int64_t row = first; row < end; row++) {
        const int8_t *codes = job->codes + row * job->width;
        int32_t sum = 0;
        for (int64_t k = 0; k < job->width; k++) sum += codes[k];
        job->sums[row] = sum;
        if (job->padded) {
            int8_t *out = job->padded + row * job->padded_width;
            memcpy(out, codes, (size_t)job->width);
            memset(out + job->width, 0, (size_t)(job->padded_width - job->width));
        }
    }
}

/* One row's outputs of CHANNELS channels: y = product (scale alpha) + lowrank . A + bias. */
FN void epilogue_row(const struct ternary_job *job, int64_t row, int64_t channel, const int32_t *products,
                     const float *lowrank_a /* [rank, CHANNELS] */) {
    enum { VECTORS = CHANNELS / LANES };
    const float *lowrank = job->lowrank + row * job->rank;
    v8 correction[VECTORS] = {0};
    for (int64_t r = 0; r < job->rank; r++) {
        const v8 x = splat(lowrank[r]);
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++)
            correction[i] = fmadd(x, load(lowrank_a + r * CHANNELS + i * LANES), correction[i]);
    }
    const int32_t sum = job->sums[row];
    const v8 scale = splat(job->scales[row]);
    float *y = job->y + row * job->channels;
    for (int i = 0; i < VECTORS; i++) {
        const int64_t at = channel + i * LANES, left = job->channels - at;
        if (left <= 0) break;
        v8i product;
        memcpy(&product, products + i * LANES, sizeof product);
        const v8 exact = __builtin_convertvector(product - sum, v8);
        const v8 main_term = exact * (scale * load_part(job->alpha + at, left));
        store_part(y + at, (main_term + correction[i]) + load_part(job->bias + at, left), left);
    }
}

FN void ternary_linear_task(const void *argument, int64_t task, char *scratch) {
    const struct ternary_job *job = argument;
    const int64_t channel_blocks = ceil_div(job->channels, CHANNELS), padded = job->padded_width;
    const int64_t channel = task % channel_blocks * CHANNELS, first = task / channel_blocks * job->block_rows;
    const int64_t channels = min64(CHANNELS, job->channels - channel), rows = min64(job->block_rows, job->rows - first);
    uint8_t *weights = carve(&scratch, TILE_CHANNELS * padded, sizeof *weights);
    int32_t *products = carve(&scratch, job->block_rows * CHANNELS, sizeof *products);
    float *lowrank_a = carve(&scratch, job->rank * CHANNELS, sizeof *lowrank_a);

    const int8_t *codes = (job->padded ? job->padded : job->codes) + first * padded;
    for (int64_t c = 0; c < channels; c += TILE_CHANNELS) {
        decode_channels(job, channel + c, weights);
        for (int64_t m = 0; m < rows; m += TILE_TOKENS) {
            const int64_t next = min64(m + 1, rows - 1);
            int32_t tile[TILE_TOKENS][TILE_CHANNELS];
            product_tile(weights, codes + m * padded, codes + next * padded, padded / STEP, job->safe_steps, tile);
            memcpy(products + m * CHANNELS + c, tile[0], sizeof tile[0]);
            memcpy(products + next * CHANNELS + c, tile[next - m], sizeof tile[0]);
        }
    }
    for (int64_t c = 0; c < CHANNELS; c++)
        for (int64_t r = 0; r < job->rank; r++)
            lowrank_a[r * CHANNELS + c] = c < channels ? job->lowrank_a[(channel + c) * job->rank + r] : 0.0f;
    for (int64_t m = 0; m < rows; m++) epilogue_row(job, first + m, channel, products + m * CHANNELS, lowrank_a);
}
