/* rotate_quantize, fused: prologue, sign flip, Hadamard transform, low-rank product, codes and scale, eq. (1), (4).
 *
 * A width of base * 2^k is seen as a matrix [base, 2^k]: H_base (x) Sylvester(2^k) is butterflies along its rows, then
 * the base matrix down its columns. Rows are padded with zeros to whole vectors. */

INLINE v8 activate(v8 x, int prologue) {
    if (prologue == PROLOGUE_NONE) return x;
    v8 u = x;
    if (prologue == PROLOGUE_GELU) { /* x (1 + tanh z) / 2 = x / (1 + e^-2z) */
        const v8 cubed = x * x * x;
        u = fmadd(cubed, splat(0.044715f), x) * splat(1.5957691216f);
    }
    return x / (splat(1) + vexp(-u));
}

/* LayerNorm statistics of a row: mean and 1 / sqrt(variance + eps). */
FN void normalise_statistics(const float *x, int64_t width, float eps, float *mean, float *inverse_deviation) {
    v8 sum = splat(0), squares = splat(0);
    for (int64_t k = 0; k < width; k += LANES) sum += load_part(x + k, width - k);
    *mean = vsum(sum) / (float)width;
    for (int64_t k = 0; k < width; k += LANES) {
        const v8 centred = keep_part(load_part(x + k, width - k) - splat(*mean), width - k);
        squares = fmadd(centred, centred, squares);
    }
    *inverse_deviation = 1.0f / __builtin_sqrtf(vsum(squares) / (float)width + eps);
}

/* Prologue and sign flip of row `row`, into the padded `out`. */
FN void prologue_row(const struct rotate_job *job, int64_t row, float *out) {
    const int64_t width = job->width;
    const float *x = job->x + row * width;
    if (job->prologue == PROLOGUE_MODULATE) {
        const int64_t image = row / job->rows_per_image * width;
        float mean, inverse_deviation;
        normalise_statistics(x, width, job->eps, &mean, &inverse_deviation);
        for (int64_t k = 0; k < width; k += LANES) {
            const int64_t left = width - k;
            v8 normed = (load_part(x + k, left) - splat(mean)) * splat(inverse_deviation);
            v8 y = fmadd(normed, splat(1) + load_part(job->scale + image + k, left),
                         load_part(job->shift + image + k, left));
            store(out + k, y * load_part(job->signs + k, left));
        }
        return;
    }
    for (int64_t k = 0; k < width; k += LANES) {
        const int64_t left = width - k;
        store(out + k, activate(load_part(x + k, left), job->prologue) * load_part(job->signs + k, left));
    }
}

/* Butterflies within each run of `power` >= 8 elements; strides 1, 2, 4 inside a vector, then two strides a pass. */
FN void sylvester_rows(float *x, int64_t width, int64_t power) {
    for (int64_t k = 0; k < width; k += LANES) store(x + k, hadamard8(load(x + k)));
    int64_t h = LANES;
    for (; h * 4 <= power; h *= 4) {
        for (int64_t start = 0; start < width; start += 4 * h) {
            for (float *p = x + start; p < x + start + h; p += LANES) {
                const v8 a = load(p), b = load(p + h), c = load(p + 2 * h), d = load(p + 3 * h);
                store(p, (a + b) + (c + d));
                store(p + h, (a - b) + (c - d));
                store(p + 2 * h, (a + b) - (c + d));
                store(p + 3 * h, (a - b) - (c - d));
            }
        }
    }
    if (h < power) {
        for (int64_t start = 0; start < width; start += 2 * h) {
            for (float *p = x + start; p < x + start + h; p += LANES) {
                const v8 a = load(p), b = load(p + h);
                store(p, a + b);
                store(p + h, a - b);
            }
        }
    }
}

/* The base matrix down `vectors` (1 or 2) vectors of columns: y_j = sum_l H[l][j] x_l; +-1 times x is exact. */
INLINE void base_columns(float *x, const float *h, int64_t base, int64_t power, const int vectors) {
    enum { OUTPUTS = 4 }; /* divides every base */
    v8 in[MAX_BASE][2];
    for (int64_t l = 0; l < base; l++)
        for (int c = 0; c < vectors; c++) in[l][c] = load(x + l * power + c * LANES);
    for (int64_t j = 0; j < base; j += OUTPUTS) {
        v8 sum[OUTPUTS][2] = {0};
        for (int64_t l = 0; l < base; l++) {
#pragma GCC unroll 4
            for (int i = 0; i < OUTPUTS; i++) {
                const v8 sign = splat(h[l * base + j + i]);
#pragma GCC unroll 2
                for (int c = 0; c < vectors; c++) sum[i][c] = fmadd(sign, in[l][c], sum[i][c]);
            }
        }
        for (int i = 0; i < OUTPUTS; i++)
            for (int c = 0; c < vectors; c++) store(x + (j + i) * power + c * LANES, sum[i][c]);
    }
}

/* Powers below 8, whose rows are shorter than a vector: the same two steps, one element at a time. */
FN void rotate_narrow(float *x, const float *h, int64_t base, int64_t power) {
    for (int64_t stride = 1; stride < power; stride *= 2) {
        for (int64_t i = 0; i < base * power; i++) {
            if (i & stride) continue;
            const float a = x[i], b = x[i + stride];
            x[i] = a + b;
            x[i + stride] = a - b;
        }
    }
    for (int64_t p = 0; p < power; p++) {
        float column[MAX_BASE];
        for (int64_t l = 0; l < base; l++) column[l] = x[l * power + p];
        for (int64_t j = 0; j < base; j++) {
            float sum = 0;
            for (int64_t l = 0; l < base; l++) sum += h[l * base + j] * column[l];
            x[j * power + p] = sum;
        }
    }
}

/* x H, without the factor 1 / sqrt(width). */
FN void hadamard_row(const struct rotate_job *job, float *x) {
    const int64_t power = job->power, base = job->base;
    if (power < LANES) {
        rotate_narrow(x, job->base_matrix, base, power);
        return;
    }
    sylvester_rows(x, job->width, power);
    if (base == 1) return;
    if (power == LANES) base_columns(x, job->base_matrix, base, power, 1);
    else
        for (int64_t p = 0; p < power; p += 2 * LANES) base_columns(x + p, job->base_matrix, base, power, 2);
}

/* Scales x by 1 / sqrt(width) in place and returns mean|x|. */
FN float normalise_row(float *x, int64_t width) {
    const v8 factor = splat((float)(1.0 / __builtin_sqrt((double)width)));
    v8 sum[4] = {0};
    for (int64_t k = 0; k < width; k += 4 * LANES) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            if (k + i * LANES >= width) break;
            const v8 y = load(x + k + i * LANES) * factor;
            store(x + k + i * LANES, y);
            sum[i] += vabs(y);
        }
    }
    return vsum((sum[0] + sum[1]) + (sum[2] + sum[3])) / (float)width;
}

/* Codes of a rotated row, eq. (4); the formulas are those of quant/activation.py. */
FN void quantize_row(const struct rotate_job *job, int64_t row, const float *x, float mean_abs) {
    const float step = mean_abs * job->step_factor;
    const v8 inverse = splat(1.0f / (step > 1e-30f ? step : 1e-30f));
    const v8 lowest = splat(job->lowest), highest = splat(job->highest);
    int8_t *codes = job->codes + row * job->width;
    for (int64_t k = 0; k < job->width; k += LANES) {
        v8 q = vmax(vmin(load(x + k) * inverse, splat(512)), splat(-512)); /* far outside every grid */
        q = job->midrise ? vfloor(q) * splat(2) + splat(1) : vrint(q);
        const v8b code = to_int8(vmax(vmin(q, highest), lowest));
        if (job->width - k >= LANES) memcpy(codes + k, &code, sizeof code);
        else memcpy(codes + k, &code, (size_t)(job->width - k));
    }
    job->scales[row] = job->midrise ? step * 0.5f : step;
}

FN void rotate_quantize_task(const void *argument, int64_t task, char *scratch) {
    const struct rotate_job *job = argument;
    const int64_t first = task * ROTATE_ROWS, rows = min64(ROTATE_ROWS, job->rows - first);
    const int64_t stride = round_up(job->width, 2 * LANES);
    float *rotated = (float *)scratch;
    for (int64_t i = 0; i < rows; i++) {
        float *x = rotated + i * stride;
        prologue_row(job, first + i, x);
        hadamard_row(job, x);
        quantize_row(job, first + i, x, normalise_row(x, job->width));
    }
    dot_block(rotated, stride, rows, job->lowrank_b, job->width, job->rank, job->width, NULL,
              job->lowrank + first * job->rank, job->rank);
}
