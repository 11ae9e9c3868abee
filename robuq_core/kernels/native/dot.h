/* Float products of rows with rows: out[i][j] = x_i . w_j (+ bias_j).
 *
 * Each element is one chain of vectors down the width, then one sum of the lanes, whatever tile computes it. */

enum { DOT_SUMS = HAVE_AVX512VNNI ? 24 : 12 /* of a tile: they and their operands fill the registers */ };

/* Operands at `k` of a row of x and of w. */
INLINE vfloat dot_values(const void *x, int64_t k, int64_t count, const int narrow) {
    return narrow ? load_values((const lowrank_value *)x + k, count) : load_part((const float *)x + k, count);
}
INLINE vfloat dot_factors(const void *w, int64_t k, int64_t count, const int narrow) {
    return narrow ? load_factors((const uint16_t *)w + k, count) : load_part((const float *)w + k, count);
}
INLINE void dot_add(vfloat *sum, vfloat x, vfloat w, const int narrow) {
    *sum = narrow ? add_terms(x, w, *sum) : fmadd(x, w, *sum);
}

struct dot_job {
    const void *x, *w;          /* [rows, width], [columns, width]: floats, or where they are ... */
    int narrow;                 /* ... lowrank_value and bfloat16 */
    int64_t x_stride, w_stride, rows, columns, width;
    const float *bias;          /* [columns] or NULL */
    float *out;                 /* [rows, columns] */
    int64_t out_stride;
    vfloat *kept;               /* work, dot_kept() vectors: wider rows go slice by slice. NULL: they do not */
};

/* sums[i][j] += lanes of x_i * w_j for `count` columns; beyond the last row of either, the last again. */
INLINE void dot_sums(const struct dot_job *job, int64_t i0, int64_t j0, int64_t at, int64_t count, vfloat *sums,
                     const int rows, const int columns, const int narrow) {
    const int64_t x_size = narrow ? sizeof(lowrank_value) : sizeof(float);
    const int64_t w_size = narrow ? sizeof(uint16_t) : sizeof(float), step = narrow ? LANES * LOWRANK_PAIR : LANES;
    const char *x[6], *w[6];
    for (int i = 0; i < rows; i++)
        x[i] = (const char *)job->x + (min64(i0 + i, job->rows - 1) * job->x_stride + at) * x_size;
    for (int j = 0; j < columns; j++)
        w[j] = (const char *)job->w + (min64(j0 + j, job->columns - 1) * job->w_stride + at) * w_size;
    int64_t k = 0;
    for (; k + step <= count; k += step) {
        if (rows < columns) {
            vfloat xk[6];
#pragma GCC unroll 6
            for (int i = 0; i < rows; i++) xk[i] = dot_values(x[i], k, step, narrow);
#pragma GCC unroll 6
            for (int j = 0; j < columns; j++) {
                const vfloat wk = once(dot_factors(w[j], k, step, narrow));
#pragma GCC unroll 6
                for (int i = 0; i < rows; i++) dot_add(&sums[i * columns + j], xk[i], wk, narrow);
            }
        } else {
            vfloat wk[6];
#pragma GCC unroll 6
            for (int j = 0; j < columns; j++) wk[j] = dot_factors(w[j], k, step, narrow);
#pragma GCC unroll 6
            for (int i = 0; i < rows; i++) {
                const vfloat xk = once(dot_values(x[i], k, step, narrow));
#pragma GCC unroll 6
                for (int j = 0; j < columns; j++) dot_add(&sums[i * columns + j], xk, wk[j], narrow);
            }
        }
    }
    if (k == count) return;
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 6
        for (int j = 0; j < columns; j++)
            dot_add(&sums[i * columns + j], dot_values(x[i], k, count - k, narrow),
                    dot_factors(w[j], k, count - k, narrow), narrow);
}

enum { DOT_SLICE = HAVE_AVX512BF16 ? 1152 : 256 }; /* of a dozen rows of x and four of w, for a level-1 cache */

static inline int64_t dot_kept(int64_t rows, int64_t columns) { return round_up(rows, 12) * round_up(columns, 12); }

/* At the edges a tile repeats its last row and drops the result. */
INLINE void dot_tiles(const struct dot_job *job, const int rows, const int columns, const int narrow) {
    const int64_t slice = job->kept ? DOT_SLICE : job->width;
    for (int64_t at = 0; at < job->width; at += slice) {
        const int64_t count = min64(slice, job->width - at);
        vfloat *kept = job->kept;
        for (int64_t j0 = 0; j0 < job->columns; j0 += columns) {
            for (int64_t i0 = 0; i0 < job->rows; i0 += rows) {
                vfloat sums[DOT_SUMS];
#pragma GCC unroll 24
                for (int s = 0; s < DOT_SUMS; s++) sums[s] = at ? kept[s] : splat(0);
                dot_sums(job, i0, j0, at, count, sums, rows, columns, narrow);
                if (at + count < job->width) {
#pragma GCC unroll 24
                    for (int s = 0; s < DOT_SUMS; s++) kept[s] = sums[s];
                    kept += DOT_SUMS;
                    continue;
                }
                if (kept) kept += DOT_SUMS;
                float tile[DOT_SUMS];
#pragma GCC unroll 6
                for (int s = 0; s < DOT_SUMS; s += 4) vsum4(sums + s, tile + s);
                for (int i = 0; i < rows && i0 + i < job->rows; i++)
                    for (int j = 0; j < columns && j0 + j < job->columns; j++)
                        job->out[(i0 + i) * job->out_stride + j0 + j] =
                            tile[i * columns + j] + (job->bias ? job->bias[j0 + j] : 0.0f);
            }
        }
    }
}

INLINE int64_t tile_count(const struct dot_job *job, int64_t rows, int64_t columns) {
    return ceil_div(job->rows, rows) * ceil_div(job->columns, columns);
}

/* The tile shape that needs fewest tiles. Few columns are preferred: columns a power of two apart share the sets of a
 * level-1 cache. */
INLINE void dot_shapes(const struct dot_job *job, const int narrow) {
#if HAVE_AVX512VNNI
    if (tile_count(job, 6, 4) <= tile_count(job, 4, 6)) dot_tiles(job, 6, 4, narrow);
    else dot_tiles(job, 4, 6, narrow);
#else
    const int64_t tall = tile_count(job, 6, 2), even = tile_count(job, 4, 3), wide = tile_count(job, 3, 4);
    if (tall <= even && tall <= wide) dot_tiles(job, 6, 2, narrow);
    else if (even <= wide) dot_tiles(job, 4, 3, narrow);
    else dot_tiles(job, 3, 4, narrow);
#endif
}

FN void dot_block(const struct dot_job *job) {
    if (job->narrow) dot_shapes(job, 1);
    else dot_shapes(job, 0);
}

/* out [rows, columns] = x w, columns a multiple of LANES: each element is one chain down `depth`. */
enum { OUTER_ROWS = HAVE_AVX512VNNI ? 8 : 4, OUTER_VECTORS = 3 }; /* of a tile */

INLINE void outer_tile(const float *const x[OUTER_ROWS], const float *w, int64_t columns, int64_t depth, float *out,
                       const int rows, const int vectors) {
    vfloat sum[OUTER_ROWS][OUTER_VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < OUTER_ROWS; i++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sum[i][v] = splat(0);
    for (int64_t p = 0; p < depth; p++, w += columns) {
        vfloat wp[OUTER_VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) wp[v] = once(load(w + v * LANES));
#pragma GCC unroll 8
        for (int i = 0; i < OUTER_ROWS; i++)
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++) sum[i][v] = fmadd(splat(x[i][p]), wp[v], sum[i][v]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < OUTER_ROWS; i++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++)
            if (i < rows) store(out + i * columns + v * LANES, sum[i][v]);
}

/* Beyond the last row a tile repeats it. */
FN void outer_block(const float *x, int64_t x_stride, int64_t rows, const float *w, int64_t columns, int64_t depth,
                    float *out) {
    for (int64_t first = 0; first < rows; first += OUTER_ROWS) {
        const int count = (int)min64(rows - first, OUTER_ROWS);
        const float *from[OUTER_ROWS];
        for (int i = 0; i < OUTER_ROWS; i++) from[i] = x + (first + min64(i, count - 1)) * x_stride;
        for (int64_t c = 0; c < columns; c += OUTER_VECTORS * LANES) {
            float *tile = out + first * columns + c;
            switch (min64((columns - c) / LANES, OUTER_VECTORS)) {
                case 1: outer_tile(from, w + c, columns, depth, tile, count, 1); break;
                case 2: outer_tile(from, w + c, columns, depth, tile, count, 2); break;
                default: outer_tile(from, w + c, columns, depth, tile, count, 3);
            }
        }
    }
}

FN void linear_task(const void *argument, int64_t task, char *scratch) {
    const struct linear_job *job = argument;
    (void)scratch;
    const int64_t row_blocks = ceil_div(job->rows, LINEAR_ROWS);
    const int64_t row = task % row_blocks * LINEAR_ROWS, channel = task / row_blocks * LINEAR_CHANNELS;
    const struct dot_job block = {
        .x = job->x + row * job->x_stride, .x_stride = job->x_stride, .rows = min64(LINEAR_ROWS, job->rows - row),
        .w = job->weight + channel * job->width, .w_stride = job->width,
        .columns = min64(LINEAR_CHANNELS, job->channels - channel), .width = job->width,
        .bias = job->bias + channel, .out = job->y + row * job->channels + channel, .out_stride = job->channels,
    };
    dot_block(&block);    if (!job->position) return;
    for (int64_t i = 0; i < block.rows; i++) {
        const float *position = job->position + (row + i) % job->length * job->channels + channel;
        for (int64_t j = 0; j < block.columns; j++) block.out[i * block.out_stride + j] += position[j];
    }
}
