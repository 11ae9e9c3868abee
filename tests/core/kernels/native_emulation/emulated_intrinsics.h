/* The intrinsics that the native sources use for AVX-512 and AMX, emulated: SIMDe for the vectors, and the tile
 * instructions of 8-bit AMX here, after Intel's description of them. For tests on processors that lack both. */
#ifndef ROBUQ_EMULATED_INTRINSICS_H
#define ROBUQ_EMULATED_INTRINSICS_H

#define SIMDE_ENABLE_NATIVE_ALIASES
#define SIMDE_NO_NATIVE /* all of it emulated, whatever the processor has */
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>
#include <simde/x86/gfni.h>

#ifndef _MM_FROUND_NO_EXC /* which SIMDe names with its prefix only */
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC
#endif

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef _mm512_cvtepu16_epi32 /* which SIMDe 0.7 lacks */
static inline __m512i _mm512_cvtepu16_epi32(__m256i x) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i low = _mm256_unpacklo_epi16(x, zero), high = _mm256_unpackhi_epi16(x, zero);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_permute2x128_si256(low, high, 0x20)),
                              _mm256_permute2x128_si256(low, high, 0x31), 1);
}
#endif

#ifndef _mm512_shuffle_f32x4 /* which it names with its prefix only */
#define _mm512_shuffle_f32x4 simde_mm512_shuffle_f32x4
#endif

#ifndef _mm512_maskz_loadu_ps /* which it lacks too */
static inline __m512 _mm512_maskz_loadu_ps(uint16_t mask, const float *p) {
    float out[16];
    for (int i = 0; i < 16; i++) out[i] = mask >> i & 1 ? p[i] : 0;
    return _mm512_loadu_ps(out);
}

static inline void _mm512_mask_storeu_ps(float *p, uint16_t mask, __m512 x) {
    float in[16];
    memcpy(in, &x, sizeof x);
    for (int i = 0; i < 16; i++) {
        if (mask >> i & 1) p[i] = in[i];
    }
}
#endif

/* Bfloat16 after Intel's description, which SIMDe follows in part only: each fused multiply-add rounds to nearest, the
 * odd value of a pair goes first, and subnormal numbers are zero. */
#undef __m512bh
#undef __m256bh
#undef _mm512_dpbf16_ps
#define __m512bh __m512i
#define __m256bh __m256i

static inline float emulated_flushed(float x) { return -0x1p-126f < x && x < 0x1p-126f ? x * 0.0f : x; }

static inline float emulated_bf16(uint32_t upper_half) {
    float x;
    memcpy(&x, &upper_half, sizeof x);
    return emulated_flushed(x);
}

static inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    float sums[16];
    uint32_t x[16], y[16];
    memcpy(sums, &sum, sizeof sums);
    memcpy(x, &a, sizeof x);
    memcpy(y, &b, sizeof y);
    for (int i = 0; i < 16; i++) {
        const float odd_x = emulated_bf16(x[i] & 0xFFFF0000), odd_y = emulated_bf16(y[i] & 0xFFFF0000);
        const float odd = emulated_flushed(fmaf(odd_x, odd_y, emulated_flushed(sums[i])));
        sums[i] = emulated_flushed(fmaf(emulated_bf16(x[i] << 16), emulated_bf16(y[i] << 16), odd));
    }
    return _mm512_loadu_ps(sums);
}

static inline __m256bh _mm512_cvtneps_pbh(__m512 x) {
    uint32_t in[16];
    uint16_t out[16];
    memcpy(in, &x, sizeof in);
    for (int i = 0; i < 16; i++) {
        const uint32_t magnitude = in[i] & 0x7FFFFFFF;
        if (magnitude > 0x7F800000) out[i] = (uint16_t)(in[i] >> 16 | 0x40);
        else if (magnitude < 0x00800000) out[i] = (uint16_t)(in[i] >> 16 & 0x8000);
        else out[i] = (uint16_t)((in[i] + 0x7FFF + (in[i] >> 16 & 1)) >> 16);
    }
    return _mm256_loadu_si256((const __m256i *)out);
}

static inline __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtneps_pbh(low)), _mm512_cvtneps_pbh(high), 1);
}

struct emulated_tile {
    uint8_t bytes[16][64];
};

static _Thread_local struct {
    int configured;
    uint16_t row_bytes[8];
    uint8_t rows[8];
    struct emulated_tile tiles[8];
} emulated_amx;

/* As the processor faults on a tile that was not configured, or on shapes that do not fit each other. */
static inline void emulated_check(int holds) {
    if (!holds) abort();
}

static inline void _tile_loadconfig(const void *config) {
    const uint8_t *bytes = config;
    emulated_check(bytes[0] == 1);
    for (int i = 0; i < 8; i++) {
        memcpy(&emulated_amx.row_bytes[i], bytes + 16 + 2 * i, 2);
        emulated_amx.rows[i] = bytes[48 + i];
        emulated_check(emulated_amx.row_bytes[i] <= 64 && emulated_amx.rows[i] <= 16);
    }
    memset(emulated_amx.tiles, 0, sizeof emulated_amx.tiles);
    emulated_amx.configured = 1;
}

static inline void _tile_release(void) { memset(&emulated_amx, 0, sizeof emulated_amx); }

static inline void _tile_loadd(int tile, const void *base, int64_t stride) {
    emulated_check(emulated_amx.configured);
    for (int row = 0; row < emulated_amx.rows[tile]; row++)
        memcpy(emulated_amx.tiles[tile].bytes[row], (const char *)base + row * stride, emulated_amx.row_bytes[tile]);
}

static inline void _tile_stored(int tile, void *base, int64_t stride) {
    emulated_check(emulated_amx.configured);
    for (int row = 0; row < emulated_amx.rows[tile]; row++)
        memcpy((char *)base + row * stride, emulated_amx.tiles[tile].bytes[row], emulated_amx.row_bytes[tile]);
}

static inline void _tile_zero(int tile) {
    emulated_check(emulated_amx.configured);
    memset(&emulated_amx.tiles[tile], 0, sizeof emulated_amx.tiles[tile]);
}

/* sums[m][n] += sum over k of a[m][k] times b[k / 4][4 n + k % 4], of signed bytes or unsigned ones. */
#define EMULATED_PRODUCT(name, a_type, b_type)                                                        \
    static inline void name(int sums, int a, int b) {                                                 \
        const int rows = emulated_amx.rows[sums], columns = emulated_amx.row_bytes[sums] / 4;         \
        const int depth = emulated_amx.row_bytes[a];                                                  \
        emulated_check(emulated_amx.configured && sums != a && sums != b && a != b);                  \
        emulated_check(emulated_amx.rows[a] == rows && emulated_amx.row_bytes[b] == 4 * columns);     \
        emulated_check(emulated_amx.rows[b] * 4 == depth);                                            \
        for (int m = 0; m < rows; m++) {                                                              \
            for (int n = 0; n < columns; n++) {                                                       \
                int32_t sum;                                                                          \
                memcpy(&sum, &emulated_amx.tiles[sums].bytes[m][4 * n], sizeof sum);                  \
                for (int k = 0; k < depth; k++)                                                       \
                    sum += (a_type)emulated_amx.tiles[a].bytes[m][k] *                                \
                           (int32_t)(b_type)emulated_amx.tiles[b].bytes[k / 4][4 * n + k % 4];        \
                memcpy(&emulated_amx.tiles[sums].bytes[m][4 * n], &sum, sizeof sum);                  \
            }                                                                                         \
        }                                                                                             \
    }

EMULATED_PRODUCT(_tile_dpbssd, int8_t, int8_t)
EMULATED_PRODUCT(_tile_dpbsud, int8_t, uint8_t)
EMULATED_PRODUCT(_tile_dpbusd, uint8_t, int8_t)

/* sums[m][n] += the sum over even k plus that over odd k of a[m][k] times b[k / 2][2 n + k % 2], of bfloat16. */
static inline void _tile_dpbf16ps(int sums, int a, int b) {
    const int rows = emulated_amx.rows[sums], columns = emulated_amx.row_bytes[sums] / 4;
    const int pairs = emulated_amx.row_bytes[a] / 4;
    emulated_check(emulated_amx.configured && sums != a && sums != b && a != b);
    emulated_check(emulated_amx.rows[a] == rows && emulated_amx.row_bytes[b] == 4 * columns);
    emulated_check(emulated_amx.rows[b] == pairs);
    for (int m = 0; m < rows; m++) {
        for (int n = 0; n < columns; n++) {
            uint8_t *at = &emulated_amx.tiles[sums].bytes[m][4 * n];
            float even = 0, odd = 0, sum;
            for (int k = 0; k < pairs; k++) {
                uint32_t x, y;
                memcpy(&x, &emulated_amx.tiles[a].bytes[m][4 * k], sizeof x);
                memcpy(&y, &emulated_amx.tiles[b].bytes[k][4 * n], sizeof y);
                even = emulated_flushed(fmaf(emulated_bf16(x << 16), emulated_bf16(y << 16), even));
                odd = emulated_flushed(fmaf(emulated_bf16(x & 0xFFFF0000), emulated_bf16(y & 0xFFFF0000), odd));
            }
            memcpy(&sum, at, sizeof sum);
            sum = emulated_flushed(emulated_flushed(sum) + emulated_flushed(even + odd));
            memcpy(at, &sum, sizeof sum);
        }
    }
}

#endif
