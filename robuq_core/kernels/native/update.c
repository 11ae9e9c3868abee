/* The samplers' step of all rows in one pass: each element through the same operations in the same order as in torch,
 * without contraction, so that the results are the same to the bit. */
#include "update.h"

enum { CHUNK = 1024 }; /* values that stay in the level-1 cache between the loops */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static void update_chunk(const struct row_step *s, int64_t at, int64_t count, int64_t guided, int clip,
                         float *restrict following, float *restrict x0) {
    const float *restrict x = s->x + at, *restrict cond = s->cond + at;
    for (int64_t i = 0; i < guided; i++) {
        const float uncond = s->uncond[at + i];
        x0[i] = s->x0_on_xt * x[i] + s->x0_on_output * (uncond + s->scale * (cond[i] - uncond));
    }
    for (int64_t i = guided; i < count; i++) x0[i] = s->x0_on_xt * x[i] + s->x0_on_output * cond[i];
    if (clip) { /* NaN stays NaN */
        for (int64_t i = 0; i < count; i++) x0[i] = x0[i] < -1.0f ? -1.0f : x0[i] > 1.0f ? 1.0f : x0[i];
    }
    for (int64_t i = 0; i < count; i++) following[i] = s->on_xt * x[i] + s->on_x0 * x0[i];
    if (s->previous) {
        const float *restrict previous = s->previous + at;
        for (int64_t i = 0; i < count; i++) following[i] += s->on_previous_x0 * previous[i];
    }
    if (s->noise) {
        const float *restrict noise = s->noise + at;
        for (int64_t i = 0; i < count; i++) following[i] += s->std * noise[i];
    }
}

void update_rows(const struct row_step *steps, int64_t rows, int64_t values, int64_t guided, int clip,
                 float *following, float *x0) {
    for (int64_t row = 0; row < rows; row++) {
        const int64_t mixed = steps[row].uncond ? guided : 0;
        for (int64_t at = 0; at < values; at += CHUNK) {
            const int64_t count = least(CHUNK, values - at), part = mixed > at ? least(mixed - at, count) : 0;
            update_chunk(steps + row, at, count, part, clip, following + row * values + at, x0 + row * values + at);
        }
    }
}
