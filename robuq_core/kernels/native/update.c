/* The samplers' step of all rows in one pass: each element through the same operations in the same order as in torch,
 * without contraction, so that the results are the same to the bit. */
#include "update.h"

enum { CHUNK = 1024 }; /* values that stay in the level-1 cache between the loops */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* `count` values from `at` on of a row that lies from `first` on; guidance acts on `mixed` of them. */
static void update_chunk(const struct update *u, const struct row_step *s, int64_t first, int64_t at, int64_t count,
                         int64_t mixed, const float *restrict cond, const float *restrict uncond) {
    const float *restrict x = u->x + first + at, *restrict previous = u->previous + first + at;
    float *restrict following = u->following + first + at, *restrict x0 = u->x0 + first + at;
    cond += at, uncond += at;
    for (int64_t i = 0; i < mixed; i++)
        x0[i] = s->x0_on_xt * x[i] + s->x0_on_output * (uncond[i] + s->scale * (cond[i] - uncond[i]));
    for (int64_t i = mixed; i < count; i++) x0[i] = s->x0_on_xt * x[i] + s->x0_on_output * cond[i];
    if (u->clip) { /* NaN stays NaN */
        for (int64_t i = 0; i < count; i++) x0[i] = x0[i] < -1.0f ? -1.0f : x0[i] > 1.0f ? 1.0f : x0[i];
    }
    for (int64_t i = 0; i < count; i++) following[i] = s->on_xt * x[i] + s->on_x0 * x0[i];
    if (s->multistep) {
        for (int64_t i = 0; i < count; i++) following[i] += s->on_previous_x0 * previous[i];
    }
    if (s->noise) {
        const float *restrict noise = s->noise + at;
        for (int64_t i = 0; i < count; i++) following[i] += s->std * noise[i];
    }
}

void update_rows(const struct update *u, const struct row_step *steps) {
    const float *cond = u->output, *uncond = cond + u->rows * u->output_values;
    for (int64_t row = 0; row < u->rows; row++, cond += u->output_values) {
        const struct row_step *s = steps + row;
        const int64_t mixed = s->guided ? u->mixed : 0;
        for (int64_t at = 0; at < u->values; at += CHUNK) {
            const int64_t count = least(CHUNK, u->values - at), part = mixed > at ? least(mixed - at, count) : 0;
            update_chunk(u, s, row * u->values, at, count, part, cond, uncond);
        }
        uncond += s->guided ? u->output_values : 0;
    }
}
