/* rotate_quantize, fused: prologue, sign flip, Hadamard transform, low-rank product, codes and scale, eq. (1), (4).
 *
 * A block of base * 2^k (the whole width, unless the layer says less) is seen as a matrix [base, 2^k]: H_base (x)
 * Sylvester(2^k) is butterflies along its rows, then the base matrix down its columns. Rows are padded with zeros to whole vectors. */

/* x / (1 + 2^-u): SiLU, u = x / ln 2, or the tanh form of GELU, x (1 + tanh z) / 2 with u = 2 z / ln 2. */
INLINE vfloat activate(vfloat x, const int prologue) {
    const vfloat slope = splat(prologue == PROLOGUE_GELU ? -2.30220819f : -1.44269504f);
    const vfloat u = mul(x, prologue == PROLOGUE_GELU ? fmadd(mul(x, x), splat(-0.102943240f), slope) : slope);
    const vfloat limited = vmin(vmax(u, splat(-126)), splat(126)), n = vrint(limited);
    return divide(x, add(splat(1), exp2_parts(n, sub(limited, n))));
}

/* Sum over a row of x - shift, or of its squares; four chains, as one would wait for each addition. */
INLINE float row_sum(const float *x, int64_t width, float shift, const int squares) {
    vfloat sum[4] = {0};
    int64_t k = 0;
    for (; k + 4 * LANES <= width; k += 4 * LANES) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const vfloat part = sub(load(x + k + i * LANES), splat(shift));
            sum[i] = squares ? fmadd(part, part, sum[i]) : add(sum[i], part);
        }
    }
    for (; k < width; k += LANES) {
        const vfloat part = keep_part(sub(load_part(x + k, width - k), splat(shift)), width - k);
        sum[0] = squares ? fmadd(part, part, sum[0]) : add(sum[0], part);
    }
    return vsum(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}

struct modulation_row {
    const float *shift, *scale;
    float mean, inverse_deviation;
};

INLINE vfloat prologue_vector(const struct rotate_job *job, const float *x, const struct modulation_row *m, int64_t k,
                          int64_t left, const int prologue) {
    vfloat y = load_part(x + k, left);
    if (prologue == PROLOGUE_MODULATE) {
        const vfloat normed = mul(sub(y, splat(m->mean)), splat(m->inverse_deviation));
        y = fmadd(normed, add(splat(1), load_part(m->scale + k, left)), load_part(m->shift + k, left));
    } else if (prologue != PROLOGUE_NONE) {
        y = activate(y, prologue);
    }
    if (!job->layer->signs) return y;
    return mul(y, mul(load_part(job->layer->signs + k, left), splat(job->normalisation)));
}

/* Prologue, sign flip and 1 / sqrt(block) of row `row`, into the padded `out`; without signs the prologue alone. */
INLINE void prologue_row_of(const struct rotate_job *job, int64_t row, float *out, const int prologue) {
    const int64_t width = job->layer->width;
    const float *x = job->x + row * width;
    struct modulation_row m = {0};
    if (prologue == PROLOGUE_MODULATE) {
        const int64_t image = row / job->rows_per_image;
        m.shift = job->shift + image * job->shift_stride;
        m.scale = job->scale + image * job->scale_stride;
        m.mean = row_sum(x, width, 0, 0) / (float)width;
        m.inverse_deviation = 1.0f / __builtin_sqrtf(row_sum(x, width, m.mean, 1) / (float)width + job->eps);
    }
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES) {
        __builtin_prefetch(x + width + k); /* of the next row */
        store(out + k, prologue_vector(job, x, &m, k, LANES, prologue));
    }
    if (k < width) store(out + k, prologue_vector(job, x, &m, k, width - k, prologue));
}

FN void prologue_row(const struct rotate_job *job, int64_t row, float *out) {
    switch (job->prologue) {
        case PROLOGUE_MODULATE: prologue_row_of(job, row, out, PROLOGUE_MODULATE); break;
        case PROLOGUE_GELU: prologue_row_of(job, row, out, PROLOGUE_GELU); break;
        case PROLOGUE_SILU: prologue_row_of(job, row, out, PROLOGUE_SILU); break;
        default: prologue_row_of(job, row, out, PROLOGUE_NONE);
    }
}

/* mean|x| of a rotated row. */
FN float mean_magnitude(const float *x, int64_t width) {
    vfloat sum[4] = {0};
    int64_t k = 0;
    for (; k + 4 * LANES <= width; k += 4 * LANES) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sum[i] = add(sum[i], vabs(load(x + k + i * LANES)));
    }
    for (; k < width; k += LANES) sum[0] = add(sum[0], vabs(keep_part(load(x + k), width - k)));
    return vsum(add(add(sum[0], sum[1]), add(sum[2], sum[3]))) / (float)width;
}

/* Codes of a row; in its place, what the low-rank product wants. */
INLINE void quantize_vectors(const struct rotate_job *job, float *x, float step, int8_t *codes, const int midrise) {
    enum { TURN = 4 * LANES };
    const int64_t width = job->layer->width;
    lowrank_value *lowrank = job->layer->rank ? (lowrank_value *)x : NULL;
    const vfloat inverse = splat(1.0f / (step > 1e-30f ? step : 1e-30f));
    for (int64_t k = 0; k < width; k += TURN) { /* rows are padded by as much */
        vfloat values[4], q[4];
        int8_t last[TURN], *out = k + TURN <= width ? codes + k : last;
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            values[i] = load(x + k + i * LANES);
            q[i] = mul(values[i], inverse);
        }
        if (lowrank) {
            put_values(lowrank + k, values[0], values[1]);
            put_values(lowrank + k + 2 * LANES, values[2], values[3]);
        }
        store_codes(out, q, job->lowest, job->highest, midrise);
        if (out == last) memcpy(codes + k, last, (size_t)(width - k));
    }
}

/* Codes of a rotated row, eq. (4); the formulas are those of quant/activation.py. */
FN void quantize_row(const struct rotate_job *job, int64_t row, float *x) {
    const int midrise = job->layer->midrise;
    const float step = mean_magnitude(x, job->layer->width) * job->layer->step_factor;
    int8_t *codes = job->codes + row * job->layer->width;
    if (midrise) quantize_vectors(job, x, step, codes, 1);
    else quantize_vectors(job, x, step, codes, 0);
    job->scales[row] = midrise ? step * 0.5f : step;
}

FN void rotate_quantize_task(const void *argument, int64_t task, char *scratch) {
    const struct rotate_job *job = argument;
    const struct layer *layer = job->layer;
    const int64_t first = task * job->block_rows, rows = min64(job->block_rows, job->rows - first);
    struct rotate_buffers b;
    rotate_carve(scratch, job, &b);
    for (int64_t i = 0; i < rows; i++) {
        float *x = b.rotated + i * b.stride;
        prologue_row(job, first + i, x);
        hadamard_row(layer, x);
        quantize_row(job, first + i, x);
    }
    const struct dot_job lowrank = {
        .x = b.rotated, .x_stride = b.stride * LOWRANK_PAIR, .rows = rows, .w = layer->lowrank_b,
        .w_stride = layer->width, .columns = layer->rank, .width = layer->width, .narrow = 1,
        .out = job->lowrank + first * layer->rank, .out_stride = layer->rank,
        .kept = layer->width > DOT_SLICE ? (vfloat *)b.kept : NULL,
    };
    dot_block(&lowrank);
}

/* The prologue alone, into rows of whole vectors. */
FN void prologue_task(const void *argument, int64_t task, char *scratch) {
    const struct rotate_job *job = argument;
    const int64_t first = task * job->block_rows, end = min64(first + job->block_rows, job->rows);
    (void)scratch;
    for (int64_t row = first; row < end; row++)
        prologue_row(job, row, job->values + row * round_up(job->layer->width, FLOAT_LANES));
}
