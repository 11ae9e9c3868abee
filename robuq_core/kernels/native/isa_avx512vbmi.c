/* The tasks for AVX-512 with VNNI and VBMI: byte permutations over two vectors. */
#include "isa.h"
#if BUILD_AVX512VBMI
#if defined(ROBUQ_SIMDE)
#define FN static
#else
#define FN static __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")))
#endif
#define HAVE_AVX2 1
#define HAVE_AVX512VNNI 1
#include "tasks.h"

#include "product_quads.h"
#include "product_vnni.h"

FN void ternary_quads_task(const void *job, int64_t task, char *scratch) {
    ternary_task(job, task, scratch, &quads_product);
}

#define QUADS_WAY                                                                       \
    {.task = ternary_quads_task, .operand_bytes = GROUP_QUADS / 2 * PAIR_TABLES, .panels = QUAD_PANELS, \
     .most_groups = 1, .kept_panels = 72, .block_rows = 192, .decode_rows = 11, .operand_panels = 4, .least_rows = 8, \
     .most_code = 31}

const struct isa_tasks avx512vbmi_tasks = {SHARED_TASKS, .ways = {QUADS_WAY, VNNI_WAY, DIRECT_WAY}};
#else
typedef int no_avx512vbmi_here;
#endif
