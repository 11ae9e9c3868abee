/* The tasks for AMX with tiles of bytes and bfloat16: AVX-512 with VNNI for all but their products. */
#include "isa.h"
#if BUILD_AMX
#if defined(ROBUQ_SIMDE)
#define FN static
#else
#define FN static __attribute__(( \
    target("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-bf16")))
#endif
#define HAVE_AVX2 1
#define HAVE_AVX512VNNI 1
#define HAVE_AMX 1
#include "tasks.h"

#include "product_vnni.h"

#include "product_amx.h"

FN void ternary_amx_task(const void *job, int64_t task, char *scratch) {
    ternary_task(job, task, scratch, &amx_product);
}

#define AMX_WAY                                                                         \
    {.task = ternary_amx_task, .operand_bytes = GROUP, .panel_bytes = AMX_GROUPS * GROUP * PANEL, .panels = 1, \
     .most_groups = 9, .kept_panels = 18, .block_rows = 512, .decode_rows = 24, .operand_panels = 1, .least_rows = 16, \
     .most_code = 128}

const struct isa_tasks amx_tasks = {SHARED_TASKS, .ways = {AMX_WAY, VNNI_WAY, DIRECT_WAY}};
#else
typedef int no_amx_here;
#endif
