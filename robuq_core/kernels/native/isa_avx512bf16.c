/* The tasks of isa_avx512vbmi.c on processors that multiply bfloat16 twice as fast as floats. */
#include "isa.h"
#if BUILD_AVX512BF16
#if defined(ROBUQ_SIMDE)
#define FN static
#else
#define FN static __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,gfni,avx512bf16")))
#endif
#define HAVE_AVX2 1
#define HAVE_AVX512VNNI 1
#define HAVE_AVX512BF16 1
#include "tasks.h"

#include "product_bits.h"
#include "product_vnni.h"

const struct isa_tasks avx512bf16_tasks = {SHARED_TASKS, .ways = BITS_WAYS};
#else
typedef int no_avx512bf16_here;
#endif
