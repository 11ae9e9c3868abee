/* Arithmetic of the low-rank branch, whose factors are bfloat16. The first half, x . B, multiplies floats or, with a fast
 * vdpbf16ps, two neighbouring values at a time, rounded to bfloat16 and summed in float32; the second half, that by A,
 * does so on AMX as well, by tiles. */

#if HAVE_AVX512BF16 || HAVE_AMX
typedef uint16_t row_value; /* of the first half's sums, for the second half */
enum { ROW_PAIR = 2 };

/* Pairs travel as floats do; at most 2 LANES values, zeros behind them. */
INLINE vfloat load_pairs(const uint16_t *p, int64_t count) {
    vfloat x = {0};
    if (count >= 2 * LANES) return load((const float *)p);
    memcpy(&x, p, (size_t)count * sizeof *p);
    return x;
}
INLINE vfloat splat_term(const row_value *p) {
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return (vfloat)splat_int(pair);
}

/* Rows of `rank` values as a product wants them, lowrank_stride() apart, zeros behind them. */
INLINE int64_t lowrank_stride(int64_t rank) { return round_up(rank, HAVE_AMX ? 2 * LANES : LANES); }
FN const row_value *lowrank_rows(const float *x, int64_t rows, int64_t rank, void *out) {
    row_value *to = out;
    for (int64_t row = 0; row < rows; row++, x += rank, to += lowrank_stride(rank))
        for (int64_t r = 0; r < lowrank_stride(rank); r += LANES) {
            const vfloat values = r < rank ? load_part(x + r, rank - r) : splat(0);
            const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(values);
            memcpy(to + r, &rounded, sizeof rounded);
        }
    return out;
}
#else
typedef float row_value;
enum { ROW_PAIR = 1 };

INLINE vfloat load_pairs(const uint16_t *p, int64_t count) { return load_bf16(p, count); }
INLINE vfloat splat_term(const row_value *p) { return splat(*p); }
INLINE int64_t lowrank_stride(int64_t rank) { return rank; }
INLINE const row_value *lowrank_rows(const float *x, int64_t rows, int64_t rank, void *out) {
    (void)rows, (void)rank, (void)out;
    return x;
}
#endif

#if HAVE_AVX512BF16
typedef uint16_t lowrank_value; /* what a factor of the first half is multiplied with */
enum { LOWRANK_PAIR = 2 };

INLINE vfloat load_factors(const uint16_t *p, int64_t count) { return load_pairs(p, count); }
INLINE vfloat load_values(const lowrank_value *p, int64_t count) { return load_pairs(p, count); }
INLINE vfloat add_terms(vfloat x, vfloat factors, vfloat sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)factors);
}

/* Rounds 2 LANES values. */
INLINE void put_values(lowrank_value *out, vfloat low, vfloat high) {
    store((float *)out, (vfloat)_mm512_cvtne2ps_pbh(high, low));
}
#else
typedef float lowrank_value;
enum { LOWRANK_PAIR = 1 };

INLINE vfloat load_factors(const uint16_t *p, int64_t count) { return load_bf16(p, count); }
INLINE vfloat load_values(const lowrank_value *p, int64_t count) { return load_part(p, count); }
INLINE vfloat add_terms(vfloat x, vfloat factors, vfloat sum) { return fmadd(x, factors, sum); }
INLINE void put_values(lowrank_value *out, vfloat low, vfloat high) { (void)out, (void)low, (void)high; }
#endif
