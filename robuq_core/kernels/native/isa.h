/* Which instruction sets this compiler can build for. Functions carry their target: no file needs -m options.
 *
 * With ROBUQ_SIMDE the AVX-512 and AMX files are built on emulated instructions instead, to be tested anywhere. */
#ifndef ROBUQ_ISA_H
#define ROBUQ_ISA_H

/* Mirrored in cpu.py; each set of a processor family includes those before it. */
enum {
    ISA_PLAIN = 0, ISA_AVX2 = 1, ISA_AVX512VNNI = 2, ISA_AVX512VBMI = 3, ISA_AVX512BF16 = 4, ISA_AMX = 5,
    ISA_NEON = 6, ISA_DOTPROD = 7, ISA_I8MM = 8,
};

#if defined(__x86_64__)
#define BUILD_AVX2 1
#else
#define BUILD_AVX2 0
#endif

#if defined(ROBUQ_SIMDE)
#define BUILD_AVX512VNNI 1
#define BUILD_AVX512BF16 1
#define BUILD_AMX 1
#elif defined(__x86_64__) && defined(__clang__)
#define BUILD_AVX512VNNI (__clang_major__ >= 8)
#define BUILD_AVX512BF16 (__clang_major__ >= 9)
#define BUILD_AMX (__clang_major__ >= 12)
#elif defined(__x86_64__)
#define BUILD_AVX512VNNI (__GNUC__ >= 8)
#define BUILD_AVX512BF16 (__GNUC__ >= 10)
#define BUILD_AMX (__GNUC__ >= 11)
#else
#define BUILD_AVX512VNNI 0
#define BUILD_AVX512BF16 0
#define BUILD_AMX 0
#endif

#define BUILD_AVX512VBMI BUILD_AVX512VNNI

#if defined(__aarch64__) && defined(__ARM_NEON) && (defined(__clang__) || __GNUC__ >= 11)
#define BUILD_NEON 1 /* with dot products and matrix products */
#else
#define BUILD_NEON 0
#endif

/* Whether the library has the set and the processor and the system run it. */
int isa_supported(int isa);

#endif
