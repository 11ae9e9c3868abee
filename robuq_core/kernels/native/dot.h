/* Float products of rows with rows: out[i][j] = x_i . w_j (+ bias_j).
 *
 * Each element is one chain of eight lanes down the width, then one sum of the lanes, whatever tile computes it. */

enum { DOT_ROWS = 3, DOT_COLUMNS = 4 };

INLINE void dot_tile(const float *const x[DOT_ROWS], const float *const w[DOT_COLUMNS], int64_t width,
                     float out[DOT_ROWS][DOT_COLUMNS]) {
    v8 sum[DOT_ROWS][DOT_COLUMNS] = {0};
    const int64_t whole = width / LANES * LANES;
    for (int64_t k = 0; k < whole; k += LANES) {
#pragma GCC unroll 4
        for (int j = 0; j < DOT_COLUMNS; j++) {
            const v8 wk = load(w[j] + k);
#pragma GCC unroll 3
            for (int i = 0; i < DOT_ROWS; i++) sum[i][j] = fmadd(load(x[i] + k), wk, sum[i][j]);
        }
    }
    if (whole < width) {
        for (int j = 0; j < DOT_COLUMNS; j++)
            for (int i = 0; i < DOT_ROWS; i++)
                sum[i][j] = fmadd(load_part(x[i] + whole, width - whole), load_part(w[j] + whole, width - whole),
                                  sum[i][j]);
    }
    for (int i = 0; i < DOT_ROWS; i++)
        for (int j = 0; j < DOT_COLUMNS; j++) out[i][j] = vsum(sum[i][j]);
}

/* `rows` rows of x by `columns` rows of w; at the edges a tile repeats its last row and drops the result. */
FN void dot_block(const float *x, int64_t x_stride, int64_t rows, const float *w, int64_t w_stride, int64_t columns,
                  int64_t width, const float *bias, float *out, int64_t out_stride) {
    for (int64_t j0 = 0; j0 < columns; j0 += DOT_COLUMNS) {
        const float *w_rows[DOT_COLUMNS];
        for (int j = 0; j < DOT_COLUMNS; j++) w_rows[j] = w + min64(j0 + j, columns - 1) * w_stride;
        for (int64_t i0 = 0; i0 < rows; i0 += DOT_ROWS) {
            const float *x_rows[DOT_ROWS];
            for (int i = 0; i < DOT_ROWS; i++) x_rows[i] = x + min64(i0 + i, rows - 1) * x_stride;
            float tile[DOT_ROWS][DOT_COLUMNS];
            dot_tile(x_rows, w_rows, width, tile);
            for (int i = 0; i < DOT_ROWS && i0 + i < rows; i++)
                for (int j = 0; j < DOT_COLUMNS && j0 + j < columns; j++)
                    out[(i0 + i) * out_stride + j0 + j] = tile[i][j] + (bias ? bias[j0 + j] : 0.0f);
        }
    }
}

FN void linear_task(const void *argument, int64_t task, char *scratch) {
    const struct linear_job *job = argument;
    (void)scratch;
    const int64_t row_blocks = ceil_div(job->rows, LINEAR_ROWS);
    const int64_t row = task % row_blocks * LINEAR_ROWS, channel = task / row_blocks * LINEAR_CHANNELS;
    dot_block(job->x + row * job->width, job->width, min64(LINEAR_ROWS, job->rows - row),
              job->weight + channel * job->width, job->width, min64(LINEAR_CHANNELS, job->channels - channel),
              job->width, job->bias + channel, job->y + row * job->channels + channel, job->channels);
}
