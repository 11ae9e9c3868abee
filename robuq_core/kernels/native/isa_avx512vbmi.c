/* The tasks for AVX-512 with VNNI, VBMI and GFNI: permutations of bytes, transposition of bits. */
#include "isa.h"
#if BUILD_AVX512VBMI
#if defined(ROBUQ_SIMDE)
#define FN static
#else
#define FN static __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,gfni")))
#endif
#define HAVE_AVX2 1
#define HAVE_AVX512VNNI 1
#include "tasks.h"

#include "product_bits.h"
#include "product_vnni.h"

const struct isa_tasks avx512vbmi_tasks = {SHARED_TASKS, .ways = BITS_WAYS};
#else
typedef int no_avx512vbmi_here;
#endif
