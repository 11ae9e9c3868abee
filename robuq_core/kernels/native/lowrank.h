/* Arithmetic of the low-rank branch, whose factors are bfloat16: products of floats or, where the processor has
 * vdpbf16ps, of two neighbouring values at a time, rounded to bfloat16 and summed in float32. */

#if HAVE_AVX512BF16
typedef uint16_t lowrank_value; /* what a factor is multiplied with */
enum { LOWRANK_PAIR = 2 };

/* Pairs travel as floats do; at most 2 LANES values, zeros behind them. */
INLINE vfloat load_factors(const uint16_t *p, int64_t count) {
    vfloat x = {0};
    if (count >= 2 * LANES) return load((const float *)p);
    memcpy(&x, p, (size_t)count * sizeof *p);
    return x;
}
INLINE vfloat load_values(const lowrank_value *p, int64_t count) { return load_factors(p, count); }
INLINE vfloat splat_term(const lowrank_value *p) {
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return (vfloat)splat_int(pair);
}
INLINE vfloat add_terms(vfloat x, vfloat factors, vfloat sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)factors);
}

/* Rounds 2 LANES values. */
INLINE void put_values(lowrank_value *out, vfloat low, vfloat high) {
    store((float *)out, (vfloat)_mm512_cvtne2ps_pbh(high, low));
}

/* Rows of `rank` values as a product wants them, lowrank_stride() apart. */
INLINE int64_t lowrank_stride(int64_t rank) { return round_up(rank, LANES); }
FN const lowrank_value *lowrank_rows(const float *x, int64_t rows, int64_t rank, void *out) {
    lowrank_value *to = out;
    for (int64_t row = 0; row < rows; row++, x += rank, to += lowrank_stride(rank))
        for (int64_t r = 0; r < rank; r += LANES) {
            const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(load_part(x + r, rank - r));
            memcpy(to + r, &rounded, sizeof rounded);
        }
    return out;
}
#else
typedef float lowrank_value;
enum { LOWRANK_PAIR = 1 };

INLINE vfloat load_factors(const uint16_t *p, int64_t count) { return load_bf16(p, count); }
INLINE vfloat load_values(const lowrank_value *p, int64_t count) { return load_part(p, count); }
INLINE vfloat splat_term(const lowrank_value *p) { return splat(*p); }
INLINE vfloat add_terms(vfloat x, vfloat factors, vfloat sum) { return fmadd(x, factors, sum); }
INLINE void put_values(lowrank_value *out, vfloat low, vfloat high) { (void)out, (void)low, (void)high; }
INLINE int64_t lowrank_stride(int64_t rank) { return rank; }
INLINE const lowrank_value *lowrank_rows(const float *x, int64_t rows, int64_t rank, void *out) {
    (void)rows, (void)rank, (void)out;
    return x;
}
#endif
