/* What the processor and the operating system support: on x86 by cpuid and xgetbv, since compilers differ in the names
 * they know, on AArch64 by what Linux says. */
#include "isa.h"

#if defined(__x86_64__) && !defined(ROBUQ_SIMDE)
#include <cpuid.h>
#include <stdint.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

struct cpuid {
    unsigned a, b, c, d;
};

static struct cpuid cpuid_part(unsigned leaf, unsigned part) {
    struct cpuid id = {0, 0, 0, 0};
    if (!__get_cpuid_count(leaf, part, &id.a, &id.b, &id.c, &id.d)) return (struct cpuid){0, 0, 0, 0};
    return id;
}

static struct cpuid cpuid_of(unsigned leaf) { return cpuid_part(leaf, 0); }

/* Register states that the system saves on a context switch (XCR0). */
static uint64_t saved_states(void) {
    uint32_t low, high;
    if (!(cpuid_of(1).c >> 27 & 1)) return 0; /* OSXSAVE */
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static int saves(uint64_t states) { return (saved_states() & states) == states; }

static int has_avx2(void) {
    return saves(0x6) && cpuid_of(1).c >> 12 & 1 /* FMA */ && cpuid_of(7).b >> 5 & 1;
}

static int has_avx512vnni(void) {
    const unsigned f_bw_vl = 1u << 16 | 1u << 30 | 1u << 31;
    const struct cpuid id = cpuid_of(7);
    return has_avx2() && saves(0xE6) && (id.b & f_bw_vl) == f_bw_vl && id.c >> 11 & 1;
}

/* And GFNI, which came with it, but for Intel's first processor. */
static int has_avx512vbmi(void) { return has_avx512vnni() && cpuid_of(7).c >> 1 & cpuid_of(7).c >> 8 & 1; }

static int has_bf16(void) { return cpuid_of(7).a >= 1 && cpuid_part(7, 1).a >> 5 & 1; }

/* Of AMD: Intel's vdpbf16ps takes as long as two multiply-adds of floats. */
static int has_fast_bf16(void) {
    const struct cpuid id = cpuid_of(0);
    return has_bf16() && id.b == signature_AMD_ebx && id.d == signature_AMD_edx && id.c == signature_AMD_ecx;
}

/* Linux hands out the 8 KiB of tile registers on request, once for a process. */
static int may_use_tiles(void) {
#if defined(__linux__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}

static int has_amx(void) {
    const unsigned tiles = 1u << 22 | 1u << 24 | 1u << 25; /* of bfloat16, at all, of bytes */
    return has_avx512vnni() && has_bf16() && saves(0x60000) && (cpuid_of(7).d & tiles) == tiles && may_use_tiles();
}

int isa_supported(int isa) {
    switch (isa) {
        case ISA_PLAIN: return 1;
        case ISA_AVX2: return has_avx2();
        case ISA_AVX512VNNI: return BUILD_AVX512VNNI && has_avx512vnni();
        case ISA_AVX512VBMI: return BUILD_AVX512VBMI && has_avx512vbmi();
        case ISA_AVX512BF16: return BUILD_AVX512BF16 && has_avx512vbmi() && has_fast_bf16();
        case ISA_AMX: return BUILD_AMX && has_amx();
        default: return 0;
    }
}
#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
static int has_dotprod(void) { return getauxval(AT_HWCAP) >> 20 & 1; /* HWCAP_ASIMDDP */ }
static int has_i8mm(void) { return getauxval(AT_HWCAP2) >> 13 & 1; /* HWCAP2_I8MM */ }
#else /* what the compiler takes for granted */
static int has_dotprod(void) {
#if defined(__ARM_FEATURE_DOTPROD)
    return 1;
#else
    return 0;
#endif
}
static int has_i8mm(void) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return 1;
#else
    return 0;
#endif
}
#endif

int isa_supported(int isa) {
    switch (isa) {
        case ISA_PLAIN: return 1;
        case ISA_NEON: return BUILD_NEON;
        case ISA_DOTPROD: return BUILD_NEON && has_dotprod();
        case ISA_I8MM: return BUILD_NEON && has_dotprod() && has_i8mm();
        default: return 0;
    }
}
#else
int isa_supported(int isa) {
    return isa == ISA_PLAIN || (isa == ISA_AVX512VNNI && BUILD_AVX512VNNI) ||
           (isa == ISA_AVX512VBMI && BUILD_AVX512VBMI) || (isa == ISA_AVX512BF16 && BUILD_AVX512BF16) ||
           (isa == ISA_AMX && BUILD_AMX);
}
#endif
