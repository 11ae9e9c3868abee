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

FN void ternary_vnni_task(const void *job, int64_t task, char *scratch) {
    ternary_task(job, task, scratch, &vnni_product);
}

const struct isa_tasks avx512vnni_tasks = {
    SHARED_TASKS,
    .direct = DIRECT_WAY,
    .panel = {.task = ternary_vnni_task, .operand_bytes = GROUP, .most_groups = 9, .block_rows = 128,
              .decode_rows = 4, .least_rows = 8, .most_code = 128},
};
#else
typedef int no_avx512vnni_here;
#endif
