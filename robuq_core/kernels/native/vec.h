/* Vectors of eight floats on GCC/clang vector extensions, for the instruction set that the including file targets.
 *
 * The includer defines FN, the specifiers of every function (static, and the target), and HAVE_AVX2, HAVE_AVX512VNNI
 * where intrinsics serve better than the generic form. The last vector of a row is padded and runs through the same operations as the
 * others, so an element's value never depends on where in the row it stands. */
#include <string.h>

#include "robuq.h"
#if defined(ROBUQ_SIMDE) && HAVE_AVX2
#include "emulated_intrinsics.h"
#elif HAVE_AVX2
#include <immintrin.h>
#endif

#define INLINE FN inline __attribute__((always_inline))

typedef float v8 __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef int16_t v8s __attribute__((vector_size(16)));
typedef int8_t v8b __attribute__((vector_size(8)));
typedef float v8_unaligned __attribute__((vector_size(32), aligned(4), may_alias));

enum { LANES = 8 };

INLINE v8 splat(float x) { return (v8){x, x, x, x, x, x, x, x}; }
INLINE v8 load(const float *p) { return *(const v8_unaligned *)p; }
INLINE void store(float *p, v8 x) { *(v8_unaligned *)p = x; }

/* A load that stays one where its value is used twice: GCC 12 would rather read memory again. */
INLINE v8 load_once(const float *p) {
    v8 x = load(p);
#if HAVE_AVX2 && !defined(ROBUQ_SIMDE)
    __asm__("" : "+x"(x));
#endif
    return x;
}

/* The first `count` elements at `p`, at most eight; the rest is zero, or stays untouched. */
INLINE v8 load_part(const float *p, int64_t count) {
    if (count >= LANES) return load(p);
    v8 x = splat(0);
    memcpy(&x, p, (size_t)count * sizeof *p);
    return x;
}

INLINE void store_part(float *p, v8 x, int64_t count) {
    if (count >= LANES) store(p, x);
    else memcpy(p, &x, (size_t)count * sizeof *p);
}

INLINE v8 choose(v8i mask, v8 yes, v8 no) { return (v8)((mask & (v8i)yes) | (~mask & (v8i)no)); }

/* The first `count` lanes of x, at most eight, and those of `other` behind them. */
INLINE v8 first_part(v8 x, int64_t count, v8 other) {
    const v8i lane = {0, 1, 2, 3, 4, 5, 6, 7};
    const int32_t n = (int32_t)min64(count, LANES);
    return choose(lane < (v8i){n, n, n, n, n, n, n, n}, x, other);
}

INLINE v8 keep_part(v8 x, int64_t count) { return first_part(x, count, splat(0)); }

INLINE v8 vabs(v8 x) {
    const v8i mask = (v8i)splat(-0.0f);
    return (v8)((v8i)x & ~mask);
}

INLINE v8i to_int(v8 x) { return __builtin_convertvector(x, v8i); }

#if HAVE_AVX2
INLINE v8 fmadd(v8 a, v8 b, v8 c) { return _mm256_fmadd_ps(a, b, c); }
INLINE v8 vmax(v8 a, v8 b) { return _mm256_max_ps(a, b); }
INLINE v8 vmin(v8 a, v8 b) { return _mm256_min_ps(a, b); }
INLINE v8 vrint(v8 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE v8 vfloor(v8 x) { return _mm256_floor_ps(x); }

/* The values must fit the narrower type. */
INLINE v8s to_int16(v8 x) {
    const __m256i i = (__m256i)to_int(x);
    return (v8s)_mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
}

INLINE v8b to_int8(v8 x) {
    const __m128i i = (__m128i)to_int16(x);
    const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(i, i));
    return (v8b)bytes;
}

/* 32 int8 codes of whole floats, as they are or, of the mid-rise grid, 2 x + 1. */
INLINE void store_codes(int8_t *out, const v8 x[4], const int midrise) {
    __m256i wide[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) wide[i] = _mm256_cvttps_epi32(x[i]);
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(wide[0], wide[1]),
                                              _mm256_packs_epi32(wide[2], wide[3]));
    __m256i code = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    if (midrise) code = _mm256_add_epi8(_mm256_add_epi8(code, code), _mm256_set1_epi8(1));
    _mm256_storeu_si256((__m256i *)out, code);
}

/* x times the Sylvester matrix of order 8. */
INLINE v8 hadamard8(v8 x) {
    x = fmadd(x, (v8){1, -1, 1, -1, 1, -1, 1, -1}, _mm256_permute_ps(x, 0xB1));
    x = fmadd(x, (v8){1, 1, -1, -1, 1, 1, -1, -1}, _mm256_permute_ps(x, 0x4E));
    return fmadd(x, (v8){1, 1, 1, 1, -1, -1, -1, -1}, _mm256_permute2f128_ps(x, x, 1));
}
#else
INLINE v8 fmadd(v8 a, v8 b, v8 c) { return a * b + c; }
INLINE v8 vmax(v8 a, v8 b) { return choose(a > b, a, b); }
INLINE v8 vmin(v8 a, v8 b) { return choose(a < b, a, b); }

/* To nearest, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction. */
INLINE v8 vrint(v8 x) { return (x + splat(12582912.0f)) - splat(12582912.0f); }

INLINE v8 vfloor(v8 x) {
    v8 nearest = vrint(x);
    return nearest - choose(nearest > x, splat(1), splat(0));
}

INLINE v8s to_int16(v8 x) { return __builtin_convertvector(to_int(x), v8s); }
INLINE v8b to_int8(v8 x) { return __builtin_convertvector(to_int(x), v8b); }

INLINE void store_codes(int8_t *out, const v8 x[4], const int midrise) {
    for (int i = 0; i < 4; i++) {
        const v8b code = to_int8(midrise ? x[i] + x[i] + splat(1) : x[i]);
        memcpy(out + i * LANES, &code, sizeof code);
    }
}

INLINE v8 hadamard8(v8 x) {
    v8 a = {x[0] + x[1], x[0] - x[1], x[2] + x[3], x[2] - x[3], x[4] + x[5], x[4] - x[5], x[6] + x[7], x[6] - x[7]};
    v8 b = {a[0] + a[2], a[1] + a[3], a[0] - a[2], a[1] - a[3], a[4] + a[6], a[5] + a[7], a[4] - a[6], a[5] - a[7]};
    return (v8){b[0] + b[4], b[1] + b[5], b[2] + b[6], b[3] + b[7],
                b[0] - b[4], b[1] - b[5], b[2] - b[6], b[3] - b[7]};
}
#endif

#if HAVE_AVX2
INLINE __m256i load_bytes(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE void store_bytes(void *p, __m256i x) { _mm256_storeu_si256((__m256i *)p, x); }
INLINE __m256i load_two(const void *low, const void *high) { /* 16 bytes each */
    const __m256i first = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)low));
    return _mm256_inserti128_si256(first, _mm_loadu_si128((const __m128i *)high), 1);
}
INLINE __m256i both_halves(__m128i x) { return _mm256_broadcastsi128_si256(x); }

/* Sums of the 32-bit lanes of four vectors. */
INLINE __m128i sum_lanes(const __m256i sums[4]) {
    const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
}
#endif

/* Transposes eight vectors in place. */
INLINE void transpose8(v8 x[LANES]) {
#if HAVE_AVX2
    v8 a[LANES], b[LANES];
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 2) {
        a[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < LANES; i += 4) {
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xEE);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xEE);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        x[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
#else
    for (int i = 0; i < LANES; i++) {
        for (int j = 0; j < i; j++) {
            const float above = x[j][i];
            x[j][i] = x[i][j];
            x[i][j] = above;
        }
    }
#endif
}

/* Sum of the eight lanes, in one order. */
INLINE float vsum(v8 x) {
#if HAVE_AVX2
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
#endif
}

/* Sums of the lanes of four vectors, in another order than vsum's. */
INLINE void vsum4(const v8 x[4], float out[4]) {
#if HAVE_AVX2
    const v8 ab = _mm256_unpacklo_ps(x[0], x[1]) + _mm256_unpackhi_ps(x[0], x[1]);
    const v8 cd = _mm256_unpacklo_ps(x[2], x[3]) + _mm256_unpackhi_ps(x[2], x[3]);
    const v8 halves = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xEE);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#else
    for (int i = 0; i < 4; i++)
        out[i] = ((x[i][0] + x[i][2]) + (x[i][1] + x[i][3])) + ((x[i][4] + x[i][6]) + (x[i][5] + x[i][7]));
#endif
}

INLINE float vmax_lane(v8 x) {
#if HAVE_AVX2
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
#else
    float top = x[0];
    for (int i = 1; i < LANES; i++) top = x[i] > top ? x[i] : top;
    return top;
#endif
}

/* The elements of both in turn. */
INLINE void store_interleaved(int16_t *out, v8s even, v8s odd) {
#if HAVE_AVX2
    _mm_storeu_si128((__m128i *)out, _mm_unpacklo_epi16((__m128i)even, (__m128i)odd));
    _mm_storeu_si128((__m128i *)(out + LANES), _mm_unpackhi_epi16((__m128i)even, (__m128i)odd));
#else
    for (int i = 0; i < LANES; i++) {
        out[2 * i] = even[i];
        out[2 * i + 1] = odd[i];
    }
#endif
}

/* 2^(n + f) to about 2 ulp for whole n in -126 .. 127 and |f| <= 1/2: a polynomial in f, then n onto the exponent. */
INLINE v8 exp2_parts(v8 n, v8 f) {
    const v8 f2 = f * f;
    v8 high = fmadd(f, splat(1.3268213952e-3f), splat(9.6715111285e-3f));
    v8 middle = fmadd(f, splat(5.5507216603e-2f), splat(2.4022242427e-1f));
    v8 low = fmadd(f, splat(6.9314700365e-1f), splat(1));
    low = fmadd(fmadd(high, f2, middle), f2, low);
    return (v8)((v8i)low + (to_int(n) << 23));
}

/* e^x to about 2 ulp for x <= 88; below -87.3 as there. */
INLINE v8 vexp(v8 x) {
    x = vmax(x, splat(-87.3f));
    const v8 n = vrint(x * splat(1.44269504f));
    v8 r = fmadd(n, splat(-0.693359375f), x); /* ln(2) in two parts: the first product is exact */
    r = fmadd(n, splat(2.12194440e-4f), r);
    return exp2_parts(n, r * splat(1.44269504f));
}
