/* The tasks for AArch64 with dot products of bytes (sdot). */
#include "isa.h"
#if BUILD_NEON
#define FN static __attribute__((target("arch=armv8.2-a+dotprod")))
#define HAVE_NEON 1
#define HAVE_DOTPROD 1
#include "tasks.h"

#include "product_dotprod.h"

FN void ternary_dotprod_task(const void *job, int64_t task, char *scratch) {
    ternary_task(job, task, scratch, &dotprod_product);
}

const struct isa_tasks dotprod_tasks = {
    SHARED_TASKS,
    .ways = {{.task = ternary_dotprod_task, .operand_bytes = GROUP, .panels = 1, .most_groups = 9, .kept_panels = 18,
              .block_rows = 128, .decode_rows = 3, .operand_panels = 1, .most_code = 128}},
};
#else
typedef int no_dotprod_here;
#endif
