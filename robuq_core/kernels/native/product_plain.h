/* The integer product in portable C. Weights enter as t + 1 in {0, 1, 2}; subtracting the sum of a token's codes makes
 * them t again. */

/* Weights of a panel: [channels][codes]. */
FN void plain_decode(const struct ternary_job *job, int64_t channel, int64_t group, int64_t groups, uint8_t *panel) {
    for (int i = 0; i < PANEL; i++) {
        const uint8_t *planar = planar_row(job, channel + i) + group * GROUP_BYTES;
        for (int64_t g = 0; g < groups; g++, planar += GROUP_BYTES, panel += GROUP)
            for (int plane = 0; plane < 4; plane++)
                for (int j = 0; j < GROUP_BYTES; j++)
                    panel[plane * GROUP_BYTES + j] = (planar[j] >> (2 * plane)) & 3;
    }
}

FN void plain_multiply(const struct ternary_job *job, int64_t channel, int64_t group, int64_t groups,
                       uint8_t *panel, const int8_t *codes, int64_t rows, int32_t *products) {
    (void)job, (void)channel, (void)group;
    const int64_t width = groups * GROUP;
    for (int c = 0; c < PANEL; c++) {
        const uint8_t *restrict weights = panel + c * width;
        for (int64_t row = 0; row < rows; row++) {
            const int8_t *restrict x = codes + row * width;
            int32_t sum = 0;
            for (int64_t k = 0; k < width; k++) sum += (int16_t)weights[k] * (int16_t)x[k];
            products[row * PANEL + c] += sum;
        }
    }
}

static const struct product direct_product = {
    .adds = 1, .decode = plain_decode, .operands = copy_codes, .multiply = plain_multiply};
