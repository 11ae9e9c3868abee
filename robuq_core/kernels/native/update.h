#ifndef ROBUQ_UPDATE_H
#define ROBUQ_UPDATE_H
#include <stdint.h>

/* A row's step of its sampler, see diffusion/update.py; mirrored in cpu.py. Rows of values; NULL where there is none. */
struct row_step {
    const float *x, *cond, *uncond, *previous, *noise;
    float x0_on_xt, x0_on_output, on_xt, on_x0, on_previous_x0, std, scale, padding;
};

/* `following` and `x0`, both [rows, values]; guidance acts on the first `guided` values. */
void update_rows(const struct row_step *steps, int64_t rows, int64_t values, int64_t guided, int clip,
                 float *following, float *x0);

#endif
