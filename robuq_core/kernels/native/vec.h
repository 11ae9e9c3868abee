/* Vectors of 8 floats, 16 with AVX-512, on GCC/clang vector extensions, for the instruction set that the including file
 * targets.
 *
 * The includer defines FN, the specifiers of every function (static, and the target), and HAVE_AVX2, HAVE_AVX512VNNI,
 * HAVE_AVX512BF16, HAVE_AMX, HAVE_NEON, HAVE_DOTPROD where intrinsics serve better than the generic form. NEON gives
 * the bits of AVX2, and the generic form too where multiply-adds are fused. The last vector of a row is padded and runs
 * through the same operations as the others, so an element's value never depends on where in the row it stands. */
#include <string.h>

#include "robuq.h"
#ifndef HAVE_AVX2
#define HAVE_AVX2 0
#endif
#ifndef HAVE_AVX512VNNI
#define HAVE_AVX512VNNI 0
#endif
#ifndef HAVE_AVX512BF16
#define HAVE_AVX512BF16 0
#endif
#ifndef HAVE_AMX
#define HAVE_AMX 0
#endif
#ifndef HAVE_NEON
#define HAVE_NEON 0
#endif
#ifndef HAVE_DOTPROD
#define HAVE_DOTPROD 0
#endif
#if defined(ROBUQ_SIMDE) && HAVE_AVX2
#include "emulated_intrinsics.h"
#elif HAVE_AVX2
#include <immintrin.h>
#elif HAVE_NEON
#include <arm_neon.h>
#endif

#define INLINE FN inline __attribute__((always_inline))

enum { LANES = HAVE_AVX512VNNI ? 16 : 8 };
#if HAVE_AVX512VNNI
#define MM(operation) _mm512_##operation
#define MM_INT __m512i
#define MM_HALF __m256i
#else
#define MM(operation) _mm256_##operation
#define MM_INT __m256i
#define MM_HALF __m128i
#endif

typedef int16_t vshort __attribute__((vector_size(2 * LANES)));
typedef int8_t vbyte __attribute__((vector_size(LANES)));
typedef uint16_t vushort __attribute__((vector_size(2 * LANES)));

#if HAVE_NEON
/* Two halves: GCC would move one vector of 32 bytes through memory. */
typedef struct {
    float32x4_t low, high;
} vfloat;
typedef struct {
    int32x4_t low, high;
} vint;

INLINE vfloat add(vfloat a, vfloat b) { return (vfloat){vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
INLINE vfloat sub(vfloat a, vfloat b) { return (vfloat){vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
INLINE vfloat mul(vfloat a, vfloat b) { return (vfloat){vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
INLINE vfloat divide(vfloat a, vfloat b) { return (vfloat){vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
INLINE vint sub_int(vint a, vint b) { return (vint){vsubq_s32(a.low, b.low), vsubq_s32(a.high, b.high)}; }
INLINE vfloat vabs(vfloat x) { return (vfloat){vabsq_f32(x.low), vabsq_f32(x.high)}; }

INLINE vfloat splat(float x) { return (vfloat){vdupq_n_f32(x), vdupq_n_f32(x)}; }
INLINE vfloat load(const float *p) { return (vfloat){vld1q_f32(p), vld1q_f32(p + 4)}; }
INLINE void store(float *p, vfloat x) {
    vst1q_f32(p, x.low);
    vst1q_f32(p + 4, x.high);
}
INLINE vint splat_int(int32_t x) { return (vint){vdupq_n_s32(x), vdupq_n_s32(x)}; }
INLINE vint load_int(const int32_t *p) { return (vint){vld1q_s32(p), vld1q_s32(p + 4)}; }
INLINE void store_int(int32_t *p, vint x) {
    vst1q_s32(p, x.low);
    vst1q_s32(p + 4, x.high);
}
INLINE vfloat to_float(vint x) { return (vfloat){vcvtq_f32_s32(x.low), vcvtq_f32_s32(x.high)}; }
INLINE vint to_int(vfloat x) { return (vint){vcvtq_s32_f32(x.low), vcvtq_s32_f32(x.high)}; }

INLINE float32x4_t scale4(float32x4_t x, float32x4_t n) {
    return (float32x4_t)vaddq_s32((int32x4_t)x, vshlq_n_s32(vcvtq_s32_f32(n), 23));
}
/* x 2^n for whole n, where neither x nor the result is zero or subnormal. */
INLINE vfloat scale_by_power(vfloat x, vfloat n) { return (vfloat){scale4(x.low, n.low), scale4(x.high, n.high)}; }

/* The first `count` lanes of x, at most all, and those of `other` behind them. */
INLINE vfloat first_part(vfloat x, int64_t count, vfloat other) {
    const int32x4_t n = vdupq_n_s32((int32_t)min64(count, LANES)), lane = {0, 1, 2, 3}, next = {4, 5, 6, 7};
    return (vfloat){vbslq_f32(vcltq_s32(lane, n), x.low, other.low), vbslq_f32(vcltq_s32(next, n), x.high, other.high)};
}
#else
typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef int32_t vint __attribute__((vector_size(4 * LANES)));
typedef float vfloat_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vfloat add(vfloat a, vfloat b) { return a + b; }
INLINE vfloat sub(vfloat a, vfloat b) { return a - b; }
INLINE vfloat mul(vfloat a, vfloat b) { return a * b; }
INLINE vfloat divide(vfloat a, vfloat b) { return a / b; }
INLINE vint sub_int(vint a, vint b) { return a - b; }

INLINE vfloat splat(float x) { return x - (vfloat){0}; }
INLINE vfloat load(const float *p) { return *(const vfloat_unaligned *)p; }
INLINE void store(float *p, vfloat x) { *(vfloat_unaligned *)p = x; }
INLINE vint splat_int(int32_t x) { return x + (vint){0}; }
INLINE vint load_int(const int32_t *p) {
    vint x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE void store_int(int32_t *p, vint x) { memcpy(p, &x, sizeof x); }
INLINE vfloat to_float(vint x) { return __builtin_convertvector(x, vfloat); }
INLINE vint to_int(vfloat x) { return __builtin_convertvector(x, vint); }

INLINE vfloat vabs(vfloat x) {
    const vint mask = (vint)splat(-0.0f);
    return (vfloat)((vint)x & ~mask);
}

/* x 2^n for whole n, where neither x nor the result is zero or subnormal. */
INLINE vfloat scale_by_power(vfloat x, vfloat n) { return (vfloat)((vint)x + (to_int(n) << 23)); }

INLINE vfloat choose(vint mask, vfloat yes, vfloat no) { return (vfloat)((mask & (vint)yes) | (~mask & (vint)no)); }

#if HAVE_AVX512VNNI
INLINE uint16_t first_lanes(int64_t count) { return (uint16_t)((1u << min64(count, LANES)) - 1); }

INLINE vfloat first_part(vfloat x, int64_t count, vfloat other) {
    return _mm512_mask_blend_ps(first_lanes(count), other, x);
}
#else
INLINE vfloat first_part(vfloat x, int64_t count, vfloat other) {
    const vint lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return choose(lane < splat_int((int32_t)min64(count, LANES)), x, other);
}
#endif
#endif

/* Floats of bfloat16, their upper halves. */
INLINE vfloat widen(vushort x) {
#if HAVE_AVX2
    return (vfloat)MM(slli_epi32)(MM(cvtepu16_epi32)((MM_HALF)x), 16);
#elif HAVE_NEON
    return (vfloat){(float32x4_t)vshll_n_u16(vget_low_u16((uint16x8_t)x), 16),
                    (float32x4_t)vshll_high_n_u16((uint16x8_t)x, 16)};
#else
    return (vfloat)(__builtin_convertvector(x, vint) << 16);
#endif
}

/* The first `count` at `p`, at most a vector; the rest is zero. */
INLINE vfloat load_bf16(const uint16_t *p, int64_t count) {
    vushort x = {0};
    if (count >= LANES) memcpy(&x, p, sizeof x);
    else memcpy(&x, p, (size_t)count * sizeof *p);
    return widen(x);
}

INLINE vfloat keep_part(vfloat x, int64_t count) { return first_part(x, count, splat(0)); }

/* A value in a register where it is used twice: GCC 12 would rather read memory again. */
INLINE vfloat once(vfloat x) {
#if HAVE_AVX2 && !defined(ROBUQ_SIMDE)
    __asm__("" : "+v"(x));
#endif
    return x;
}

/* The first `count` elements at `p`, at most a vector; the rest is zero, or stays untouched. */
INLINE vfloat load_part(const float *p, int64_t count) {
    if (count >= LANES) return load(p);
#if HAVE_AVX512VNNI
    return _mm512_maskz_loadu_ps(first_lanes(count), p);
#else
    vfloat x = splat(0);
    memcpy(&x, p, (size_t)count * sizeof *p);
    return x;
#endif
}

INLINE void store_part(float *p, vfloat x, int64_t count) {
    if (count >= LANES) store(p, x);
#if HAVE_AVX512VNNI
    else _mm512_mask_storeu_ps(p, first_lanes(count), x);
#else
    else memcpy(p, &x, (size_t)count * sizeof *p);
#endif
}

#if HAVE_AVX2
INLINE vfloat fmadd(vfloat a, vfloat b, vfloat c) { return MM(fmadd_ps)(a, b, c); }
INLINE vfloat vmax(vfloat a, vfloat b) { return MM(max_ps)(a, b); }
INLINE vfloat vmin(vfloat a, vfloat b) { return MM(min_ps)(a, b); }

#if HAVE_AVX512VNNI
INLINE vfloat vrint(vfloat x) { return _mm512_roundscale_ps(x, 0x08); } /* to the nearest */
INLINE vfloat vfloor(vfloat x) { return _mm512_roundscale_ps(x, 0x09); } /* down */

/* The values must fit the narrower type. */
INLINE vshort to_int16(vfloat x) { return __builtin_convertvector(to_int(x), vshort); }
INLINE vbyte to_int8(vfloat x) { return __builtin_convertvector(to_int(x), vbyte); }

/* x times the Sylvester matrix of order 16. */
INLINE vfloat hadamard_lanes(vfloat x) {
    x = fmadd(x, (vfloat){1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1}, _mm512_shuffle_ps(x, x, 0xB1));
    x = fmadd(x, (vfloat){1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1}, _mm512_shuffle_ps(x, x, 0x4E));
    x = fmadd(x, (vfloat){1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1}, _mm512_shuffle_f32x4(x, x, 0xB1));
    return fmadd(x, (vfloat){1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1}, _mm512_shuffle_f32x4(x, x, 0x4E));
}
#else
INLINE vfloat vrint(vfloat x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vfloat vfloor(vfloat x) { return _mm256_floor_ps(x); }

INLINE vshort to_int16(vfloat x) {
    const __m256i i = (__m256i)to_int(x);
    return (vshort)_mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
}

INLINE vbyte to_int8(vfloat x) {
    const __m128i i = (__m128i)to_int16(x);
    const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(i, i));
    return (vbyte)bytes;
}

INLINE vfloat hadamard_lanes(vfloat x) {
    x = fmadd(x, (vfloat){1, -1, 1, -1, 1, -1, 1, -1}, _mm256_permute_ps(x, 0xB1));
    x = fmadd(x, (vfloat){1, 1, -1, -1, 1, 1, -1, -1}, _mm256_permute_ps(x, 0x4E));
    return fmadd(x, (vfloat){1, 1, 1, 1, -1, -1, -1, -1}, _mm256_permute2f128_ps(x, x, 1));
}
#endif
#elif HAVE_NEON
INLINE vfloat fmadd(vfloat a, vfloat b, vfloat c) {
    return (vfloat){vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
INLINE float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
INLINE float32x4_t smaller(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
INLINE vfloat vmax(vfloat a, vfloat b) { return (vfloat){larger(a.low, b.low), larger(a.high, b.high)}; }
INLINE vfloat vmin(vfloat a, vfloat b) { return (vfloat){smaller(a.low, b.low), smaller(a.high, b.high)}; }
INLINE vfloat vrint(vfloat x) { return (vfloat){vrndnq_f32(x.low), vrndnq_f32(x.high)}; }
INLINE vfloat vfloor(vfloat x) { return (vfloat){vrndmq_f32(x.low), vrndmq_f32(x.high)}; }

INLINE vshort to_int16(vfloat x) {
    const vint i = to_int(x);
    return (vshort)vuzp1q_s16((int16x8_t)i.low, (int16x8_t)i.high);
}
INLINE vbyte to_int8(vfloat x) { return (vbyte)vmovn_s16((int16x8_t)to_int16(x)); }

/* Products by 1 and -1 are exact. */
INLINE float32x4_t hadamard4(float32x4_t x) {
    x = vfmaq_f32(vrev64q_f32(x), x, (float32x4_t){1, -1, 1, -1});
    return vfmaq_f32(vextq_f32(x, x, 2), x, (float32x4_t){1, 1, -1, -1});
}
INLINE vfloat hadamard_lanes(vfloat x) {
    const float32x4_t a = hadamard4(x.low), b = hadamard4(x.high);
    return (vfloat){vaddq_f32(a, b), vsubq_f32(a, b)};
}
#else
#if defined(__aarch64__) /* fused, as every AArch64 can: the bits of NEON and of AVX2 */
INLINE vfloat fmadd(vfloat a, vfloat b, vfloat c) {
    for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}
#else
INLINE vfloat fmadd(vfloat a, vfloat b, vfloat c) { return a * b + c; }
#endif
INLINE vfloat vmax(vfloat a, vfloat b) { return choose(a > b, a, b); }
INLINE vfloat vmin(vfloat a, vfloat b) { return choose(a < b, a, b); }

/* To nearest, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction. */
INLINE vfloat vrint(vfloat x) { return (x + splat(12582912.0f)) - splat(12582912.0f); }

INLINE vfloat vfloor(vfloat x) {
    vfloat nearest = vrint(x);
    return nearest - choose(nearest > x, splat(1), splat(0));
}

INLINE vshort to_int16(vfloat x) { return __builtin_convertvector(to_int(x), vshort); }
INLINE vbyte to_int8(vfloat x) { return __builtin_convertvector(to_int(x), vbyte); }

INLINE vfloat hadamard_lanes(vfloat x) {
    vfloat a = {x[0] + x[1], x[0] - x[1], x[2] + x[3], x[2] - x[3], x[4] + x[5], x[4] - x[5], x[6] + x[7], x[6] - x[7]};
    vfloat b = {a[0] + a[2], a[1] + a[3], a[0] - a[2], a[1] - a[3], a[4] + a[6], a[5] + a[7], a[4] - a[6], a[5] - a[7]};
    return (vfloat){b[0] + b[4], b[1] + b[5], b[2] + b[6], b[3] + b[7],
                    b[0] - b[4], b[1] - b[5], b[2] - b[6], b[3] - b[7]};
}
#endif

/* Codes of four vectors: x rounded or, of the mid-rise grid, 2 floor(x) + 1, with the whole number limited to a byte's
 * `lowest` .. `highest`. Before that it fits 32 bits: it is at most a row's width over the quantiser's step. */
INLINE void store_codes(int8_t *out, const vfloat x[4], int lowest, int highest, const int midrise) {
#if HAVE_AVX2
    MM_INT whole[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) whole[i] = (MM_INT)to_int(midrise ? vfloor(x[i]) : vrint(x[i]));
    const MM_INT packed = MM(packs_epi16)(MM(packs_epi32)(whole[0], whole[1]), MM(packs_epi32)(whole[2], whole[3]));
#if HAVE_AVX512VNNI
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i code = _mm512_permutexvar_epi32(order, packed);
#else
    __m256i code = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
#endif
    code = MM(max_epi8)(MM(min_epi8)(code, MM(set1_epi8)((char)highest)), MM(set1_epi8)((char)lowest));
    if (midrise) code = MM(add_epi8)(MM(add_epi8)(code, code), MM(set1_epi8)(1));
    memcpy(out, &code, sizeof code);
#else
    vfloat whole[4];
    const float top = (float)highest + (midrise ? 0.5f : 0.0f);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const vfloat limited = vmax(vmin(x[i], splat(top)), splat((float)lowest));
        whole[i] = midrise ? vfloor(limited) : vrint(limited);
    }
#if HAVE_NEON
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2) {
        int8x16_t code = vuzp1q_s8((int8x16_t)to_int16(whole[i]), (int8x16_t)to_int16(whole[i + 1]));
        if (midrise) code = vaddq_s8(vaddq_s8(code, code), vdupq_n_s8(1));
        vst1q_s8(out + i * LANES, code);
    }
#else
    for (int i = 0; i < 4; i++) {
        const vbyte code = to_int8(midrise ? whole[i] + whole[i] + splat(1) : whole[i]);
        memcpy(out + i * LANES, &code, sizeof code);
    }
#endif
#endif
}

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

/* Transposes as many vectors as one has lanes, in place. */
INLINE void transpose(vfloat x[LANES]) {
#if HAVE_AVX2
    vfloat a[LANES], b[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        a[i] = MM(unpacklo_ps)(x[i], x[i + 1]);
        a[i + 1] = MM(unpackhi_ps)(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) {
        b[i] = MM(shuffle_ps)(a[i], a[i + 2], 0x44);
        b[i + 1] = MM(shuffle_ps)(a[i], a[i + 2], 0xEE);
        b[i + 2] = MM(shuffle_ps)(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = MM(shuffle_ps)(a[i + 1], a[i + 3], 0xEE);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
#if HAVE_AVX512VNNI
        const vfloat even = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
        const vfloat odd = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xDD);
        const vfloat next_even = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
        const vfloat next_odd = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xDD);
        x[i] = _mm512_shuffle_f32x4(even, next_even, 0x88);
        x[i + 4] = _mm512_shuffle_f32x4(odd, next_odd, 0x88);
        x[i + 8] = _mm512_shuffle_f32x4(even, next_even, 0xDD);
        x[i + 12] = _mm512_shuffle_f32x4(odd, next_odd, 0xDD);
#else
        x[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
#endif
    }
#elif HAVE_NEON
    float32x4_t rows[2][LANES]; /* transposed halves: [which half][row of it, then of the other four vectors] */
#pragma GCC unroll 2
    for (int i = 0; i < LANES; i += 4) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            float32x4_t part[4], pair[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) part[j] = half ? x[i + j].high : x[i + j].low;
#pragma GCC unroll 2
            for (int j = 0; j < 4; j += 2) {
                pair[j] = vtrn1q_f32(part[j], part[j + 1]);
                pair[j + 1] = vtrn2q_f32(part[j], part[j + 1]);
            }
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                rows[half][i + j] = (float32x4_t)vtrn1q_f64((float64x2_t)pair[j], (float64x2_t)pair[j + 2]);
                rows[half][i + j + 2] = (float32x4_t)vtrn2q_f64((float64x2_t)pair[j], (float64x2_t)pair[j + 2]);
            }
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        x[j] = (vfloat){rows[0][j], rows[0][j + 4]};
        x[j + 4] = (vfloat){rows[1][j], rows[1][j + 4]};
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

#if HAVE_AVX512VNNI
#define HALVES(operation, x) \
    _mm256_##operation(_mm512_castps512_ps256(x), (__m256)_mm512_extractf64x4_pd((__m512d)(x), 1))
#else
#define HALVES(operation, x) (x)
#endif

/* Sum of the lanes, in one order. */
INLINE float vsum(vfloat x) {
#if HAVE_AVX2
    const __m256 half = HALVES(add_ps, x);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#elif HAVE_NEON
    const float32x4_t s = vaddq_f32(x.low, x.high);
    return vpadds_f32(vadd_f32(vget_low_f32(s), vget_high_f32(s)));
#else
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
#endif
}

/* Sums of the lanes of four vectors, in another order than vsum's. */
INLINE void vsum4(const vfloat x[4], float out[4]) {
#if HAVE_AVX2
    const vfloat ab = MM(unpacklo_ps)(x[0], x[1]) + MM(unpackhi_ps)(x[0], x[1]);
    const vfloat cd = MM(unpacklo_ps)(x[2], x[3]) + MM(unpackhi_ps)(x[2], x[3]);
    const vfloat quarters = MM(shuffle_ps)(ab, cd, 0x44) + MM(shuffle_ps)(ab, cd, 0xEE);
    const __m256 half = HALVES(add_ps, quarters);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif HAVE_NEON
    float32x4_t halves[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        float64x2_t part[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) part[i] = (float64x2_t)(half ? x[i].high : x[i].low);
        const float32x4_t ab = (float32x4_t)vtrn1q_f64(part[0], part[1]) + (float32x4_t)vtrn2q_f64(part[0], part[1]);
        const float32x4_t cd = (float32x4_t)vtrn1q_f64(part[2], part[3]) + (float32x4_t)vtrn2q_f64(part[2], part[3]);
        halves[half] = vpaddq_f32(ab, cd);
    }
    vst1q_f32(out, vaddq_f32(halves[0], halves[1]));
#else
    for (int i = 0; i < 4; i++)
        out[i] = ((x[i][0] + x[i][2]) + (x[i][1] + x[i][3])) + ((x[i][4] + x[i][6]) + (x[i][5] + x[i][7]));
#endif
}

INLINE float vmax_lane(vfloat x) {
#if HAVE_AVX2
    const __m256 half = HALVES(max_ps, x);
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
#elif HAVE_NEON
    return vmaxnmvq_f32(larger(x.low, x.high));
#else
    float top = x[0];
    for (int i = 1; i < LANES; i++) top = x[i] > top ? x[i] : top;
    return top;
#endif
}

#if !HAVE_AVX512VNNI
/* The elements of both in turn. */
INLINE void store_interleaved(int16_t *out, vshort even, vshort odd) {
#if HAVE_AVX2
    _mm_storeu_si128((__m128i *)out, _mm_unpacklo_epi16((__m128i)even, (__m128i)odd));
    _mm_storeu_si128((__m128i *)(out + LANES), _mm_unpackhi_epi16((__m128i)even, (__m128i)odd));
#elif HAVE_NEON
    const int16x8x2_t both = {{(int16x8_t)even, (int16x8_t)odd}};
    vst2q_s16(out, both);
#else
    for (int i = 0; i < LANES; i++) {
        out[2 * i] = even[i];
        out[2 * i + 1] = odd[i];
    }
#endif
}
#endif

/* 2^(n + f) to about 2 ulp for whole n in -126 .. 127 and |f| <= 1/2: a polynomial in f, then n onto the exponent. */
INLINE vfloat exp2_parts(vfloat n, vfloat f) {
    const vfloat f2 = mul(f, f);
    vfloat high = fmadd(f, splat(1.3268213952e-3f), splat(9.6715111285e-3f));
    vfloat middle = fmadd(f, splat(5.5507216603e-2f), splat(2.4022242427e-1f));
    vfloat low = fmadd(f, splat(6.9314700365e-1f), splat(1));
    low = fmadd(fmadd(high, f2, middle), f2, low);
    return scale_by_power(low, n);
}

/* e^x to about 2 ulp for x <= 88; below -87.3 as there. */
INLINE vfloat vexp(vfloat x) {
    x = vmax(x, splat(-87.3f));
    const vfloat n = vrint(mul(x, splat(1.44269504f)));
    vfloat r = fmadd(n, splat(-0.693359375f), x); /* ln(2) in two parts: the first product is exact */
    r = fmadd(n, splat(2.12194440e-4f), r);
    return exp2_parts(n, mul(r, splat(1.44269504f)));
}
