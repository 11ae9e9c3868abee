/* The tasks for AVX-512 with VNNI. */
#include "isa.h"
#if BUILD_AVX512VNNI
#if defined(ROBUQ_SIMDE)
#define FN static
#else
#define FN static __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni")))
#endif
#define HAVE_AVX2 1
#define HAVE_AVX512VNNI 1
#include "tasks.h"

#include "product_vnni.h"

const struct isa_tasks avx512vnni_tasks = {SHARED_TASKS, .ways = {VNNI_WAY, DIRECT_WAY}};
#else
typedef int no_avx512vnni_here;
#endif
