/* The tasks for AArch64 with matrix products of bytes (smmla): dot products for all but the integer product. */
#include "isa.h"
#if BUILD_NEON
#define FN static __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))
#define HAVE_NEON 1
#define HAVE_DOTPROD 1
#include "tasks.h"

#include "product_i8mm.h"

FN void ternary_i8mm_task(const void *job, int64_t task, char *scratch) {
    ternary_task(job, task, scratch, &i8mm_product);
}

const struct isa_tasks i8mm_tasks = {
    SHARED_TASKS,
    .ways = {{.task = ternary_i8mm_task, .operand_bytes = GROUP, .panels = 1, .most_groups = 9, .kept_panels = 18,
              .block_rows = 128, .decode_rows = 4, .operand_panels = 1, .most_code = 128}},
};
#else
typedef int no_i8mm_here;
#endif
