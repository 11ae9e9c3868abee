/* x H for H = H_base (x) Sylvester(2^k), without the factor 1 / sqrt(block): a block as a matrix [base, 2^k]. */

/* Butterflies within each run of 1, 2 or 4 vectors, in registers. */
INLINE void sylvester_vectors(float *x, int64_t width, const int vectors) {
    for (float *p = x; p < x + width; p += vectors * LANES) {
        vfloat part[4];
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) part[i] = hadamard_lanes(load(p + i * LANES));
#pragma GCC unroll 2
        for (int stride = 1; stride < vectors; stride *= 2) {
#pragma GCC unroll 4
            for (int i = 0; i < vectors; i++) {
                if (i & stride) continue;
                const vfloat a = part[i], b = part[i + stride];
                part[i] = add(a, b);
                part[i + stride] = sub(a, b);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) store(p + i * LANES, part[i]);
    }
}

/* Butterflies within each run of `power` >= LANES elements: the first strides in registers, then two strides a pass. */
FN void sylvester_rows(float *x, int64_t width, int64_t power) {
    int64_t h = min64(power, 4 * LANES);
    if (h == LANES) sylvester_vectors(x, width, 1);
    else if (h == 2 * LANES) sylvester_vectors(x, width, 2);
    else sylvester_vectors(x, width, 4);
    for (; h * 4 <= power; h *= 4) {
        for (int64_t start = 0; start < width; start += 4 * h) {
            for (float *p = x + start; p < x + start + h; p += LANES) {
                const vfloat a = load(p), b = load(p + h), c = load(p + 2 * h), d = load(p + 3 * h);
                store(p, add(add(a, b), add(c, d)));
                store(p + h, add(sub(a, b), sub(c, d)));
                store(p + 2 * h, sub(add(a, b), add(c, d)));
                store(p + 3 * h, sub(sub(a, b), sub(c, d)));
            }
        }
    }
    if (h < power) {
        for (int64_t start = 0; start < width; start += 2 * h) {
            for (float *p = x + start; p < x + start + h; p += LANES) {
                const vfloat a = load(p), b = load(p + h);
                store(p, add(a, b));
                store(p + h, sub(a, b));
            }
        }
    }
}

/* Paley's matrices have a core of Legendre symbols: chi(d) z_d summed over d != 0 is 2 (sum over the residues) - (sum
 * over all d != 0), and the sums over shifted residues share pairs. Order 36 takes 344 additions a column for 1296,
 * order 12 takes 66 for 144. */

/* out = C in, C the symmetric conference matrix of order 18 (q = 17); residues 1 2, 8 9, 15 16 and 4 13. */
INLINE void conference18(const vfloat in[18], vfloat out[18]) {
    enum { Q = 17 };
    const vfloat *z = in + 1;
    vfloat next[Q], across[Q], sum[4] = {z[0], z[1], z[2], z[3]};
#pragma GCC unroll 17
    for (int m = 0; m < Q; m++) {
        next[m] = add(z[m], z[(m + 1) % Q]);
        across[m] = add(z[m], z[(m + 9) % Q]);
    }
#pragma GCC unroll 17
    for (int m = 4; m < Q; m++) sum[m % 4] = add(sum[m % 4], z[m]);
    out[0] = add(add(sum[0], sum[1]), add(sum[2], sum[3]));
    const vfloat border = sub(in[0], out[0]);
#pragma GCC unroll 17
    for (int i = 0; i < Q; i++) {
        const vfloat residues =
            add(add(next[(i + 1) % Q], next[(i + 8) % Q]), add(next[(i + 15) % Q], across[(i + 4) % Q]));
        out[1 + i] = fmadd(residues, splat(2), add(z[i], border));
    }
}

/* Order 36, Paley's second construction: C (x) [1 1; 1 -1] + I (x) [1 -1; -1 -1]. Rows lie `stride` apart. */
FN void paley36(float *x, int64_t stride) {
    vfloat sums[18], differences[18], product[18];
#pragma GCC unroll 18
    for (int i = 0; i < 18; i++) {
        const vfloat a = load(x + 2 * i * stride), b = load(x + (2 * i + 1) * stride);
        sums[i] = add(a, b);
        differences[i] = sub(a, b);
    }
    conference18(sums, product);
#pragma GCC unroll 18
    for (int i = 0; i < 18; i++) store(x + 2 * i * stride, add(product[i], differences[i]));
    conference18(differences, product);
#pragma GCC unroll 18
    for (int i = 0; i < 18; i++) store(x + (2 * i + 1) * stride, sub(product[i], sums[i]));
}

/* Order 12, Paley's first construction (q = 11): residues 1 4 5 and 3 9, with 0 beside them. */
FN void paley12(float *x, int64_t stride) {
    enum { Q = 11 };
    vfloat z[Q], next[Q], sum = splat(0);
#pragma GCC unroll 11
    for (int m = 0; m < Q; m++) {
        z[m] = load(x + (m + 1) * stride);
        sum = add(sum, z[m]);
    }
#pragma GCC unroll 11
    for (int m = 0; m < Q; m++) next[m] = add(z[m], z[(m + 1) % Q]);
    const vfloat border = sub(load(x), sum);
    store(x, border);
#pragma GCC unroll 11
    for (int j = 0; j < Q; j++) {
        const vfloat residues = add(add(next[j], next[(j + 4) % Q]), add(z[(j + 3) % Q], z[(j + 9) % Q]));
        store(x + (j + 1) * stride, fmadd(residues, splat(2), border));
    }
}

/* Any base matrix: y_j = sum_l H[l][j] x_l; +-1 times x is exact. */
FN void base_column(float *x, const float *h, int64_t base, int64_t stride) {
    enum { OUTPUTS = 4 }; /* divides every base */
    vfloat in[MAX_BASE];
    for (int64_t l = 0; l < base; l++) in[l] = load(x + l * stride);
    for (int64_t j = 0; j < base; j += OUTPUTS) {
        vfloat sum[OUTPUTS] = {0};
        for (int64_t l = 0; l < base; l++) {
#pragma GCC unroll 4
            for (int i = 0; i < OUTPUTS; i++) sum[i] = fmadd(splat(h[l * base + j + i]), in[l], sum[i]);
        }
        for (int i = 0; i < OUTPUTS; i++) store(x + (j + i) * stride, sum[i]);
    }
}

/* Powers below LANES, whose rows are shorter than a vector: the same two steps, one element at a time. */
FN void hadamard_narrow(float *x, const float *h, int64_t base, int64_t power) {
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

FN void hadamard_block(const struct layer *layer, float *x) {
    const int64_t base = layer->base, power = layer->block / base;
    if (power < LANES) {
        hadamard_narrow(x, layer->base_matrix, base, power);
        return;
    }
    sylvester_rows(x, layer->block, power);
    for (int64_t p = 0; p < power && base > 1; p += LANES) {
        if (base == 36) paley36(x + p, power);
        else if (base == 12) paley12(x + p, power);
        else base_column(x + p, layer->base_matrix, base, power);
    }
}

FN void hadamard_row(const struct layer *layer, float *x) {
    if (layer->block == 1) return;
    for (int64_t k = 0; k < layer->width; k += layer->block) hadamard_block(layer, x + k);
}
