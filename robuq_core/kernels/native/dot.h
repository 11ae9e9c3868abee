/* Float products of rows with rows: out[i][j] = x_i . w_j (+ bias_j).
 *
 * Each element is one chain of vectors down the width, then one sum of the lanes, whatever tile computes it. */

enum { DOT_SUMS = HAVE_AVX512VNNI ? 24 : 12 /* of a tile: they and their operands fill the registers */ };

/* sums[i][j] += lanes of x_i * w_j; beyond the last row of either, the last again. */
INLINE void dot_sums(const float *x, int64_t x_stride, int64_t x_last, const float *w, int64_t w_stride,
                     int64_t w_last, int64_t width, vfloat *sums, const int rows, const int columns) {
    const float *x_rows[6], *w_rows[6];
    for (int i = 0; i < rows; i++) x_rows[i] = x + min64(i, x_last) * x_stride;
    for (int j = 0; j < columns; j++) w_rows[j] = w + min64(j, w_last) * w_stride;
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES) {
        if (rows < columns) {
            vfloat xk[6];
#pragma GCC unroll 6
            for (int i = 0; i < rows; i++) xk[i] = load(x_rows[i] + k);
#pragma GCC unroll 6
            for (int j = 0; j < columns; j++) {
                const vfloat wk = load_once(w_rows[j] + k);
#pragma GCC unroll 6
                for (int i = 0; i < rows; i++) sums[i * columns + j] = fmadd(xk[i], wk, sums[i * columns + j]);
            }
        } else {
            vfloat wk[6];
#pragma GCC unroll 6
            for (int j = 0; j < columns; j++) wk[j] = load(w_rows[j] + k);
#pragma GCC unroll 6
            for (int i = 0; i < rows; i++) {
                const vfloat xk = load_once(x_rows[i] + k);
#pragma GCC unroll 6
                for (int j = 0; j < columns; j++) sums[i * columns + j] = fmadd(xk, wk[j], sums[i * columns + j]);
            }
        }
    }
    if (k == width) return;
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 6
        for (int j = 0; j < columns; j++)
            sums[i * columns + j] = fmadd(load_part(x_rows[i] + k, width - k), load_part(w_rows[j] + k, width - k),
                                          sums[i * columns + j]);
}

struct dot_job {
    const float *x, *w, *bias;  /* [rows, width], [columns, width], [columns] or NULL */
    int64_t x_stride, w_stride, rows, columns, width;
    float *out;                 /* [rows, columns] */
    int64_t out_stride;
    vfloat *kept;                   /* work, dot_kept() vectors: wider rows go slice by slice. NULL: they do not */
};

enum { DOT_SLICE = 256 };       /* of a dozen rows of x and four of w: half a level-1 cache */

static inline int64_t dot_kept(int64_t rows, int64_t columns) { return round_up(rows, 12) * round_up(columns, 12); }

/* At the edges a tile repeats its last row and drops the result. */
INLINE void dot_tiles(const struct dot_job *job, const int rows, const int columns) {
    const int64_t slice = job->kept ? DOT_SLICE : job->width;
    for (int64_t at = 0; at < job->width; at += slice) {
        const int64_t count = min64(slice, job->width - at);
        vfloat *kept = job->kept;
        for (int64_t j0 = 0; j0 < job->columns; j0 += columns) {
            for (int64_t i0 = 0; i0 < job->rows; i0 += rows) {
                vfloat sums[DOT_SUMS];
#pragma GCC unroll 24
                for (int s = 0; s < DOT_SUMS; s++) sums[s] = at ? kept[s] : splat(0);
                dot_sums(job->x + i0 * job->x_stride + at, job->x_stride, job->rows - 1 - i0,
                         job->w + j0 * job->w_stride + at, job->w_stride, job->columns - 1 - j0, count, sums, rows,
                         columns);
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
FN void dot_block(const struct dot_job *job) {
#if HAVE_AVX512VNNI
    if (tile_count(job, 6, 4) <= tile_count(job, 4, 6)) dot_tiles(job, 6, 4);
    else dot_tiles(job, 4, 6);
#else
    const int64_t tall = tile_count(job, 6, 2), even = tile_count(job, 4, 3), wide = tile_count(job, 3, 4);
    if (tall <= even && tall <= wide) dot_tiles(job, 6, 2);
    else if (even <= wide) dot_tiles(job, 4, 3);
    else dot_tiles(job, 3, 4);
#endif
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
        for (int v = 0; v < vectors; v++) wp[v] = load_once(w + v * LANES);
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
