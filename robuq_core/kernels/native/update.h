#ifndef ROBUQ_UPDATE_H
#define ROBUQ_UPDATE_H
#include <stdint.h>

/* A row's step of its sampler, see diffusion/update.py; mirrored in cpu.py. `noise` may be NULL. */
struct row_step {
    const float *noise;
    float x0_on_xt, x0_on_output, on_xt, on_x0, on_previous_x0, std, log_beta, log_posterior, scale;
    int8_t guided, multistep;
};

/* Rows of `values`; those of `output` are `output_values` apart, and the unconditional ones of guided rows follow the
 * others. Guidance acts on the first `mixed` values. */
struct update {
    const float *x, *previous, *output;
    int64_t rows, values, output_values, mixed, clip;
    float *following, *x0;
};

void update_rows(const struct update *u, const struct row_step *steps);

#endif
