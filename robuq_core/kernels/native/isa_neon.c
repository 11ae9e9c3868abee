/* The tasks for any AArch64. */
#include "isa.h"
#if BUILD_NEON
#define FN static
#define HAVE_NEON 1
#include "tasks.h"

FN void ternary_tbl_task(const void *job, int64_t task, char *scratch) { ternary_task(job, task, scratch, &tbl_product); }

#define TBL_WAY                                                                         \
    {.task = ternary_tbl_task, .operand_bytes = 8 * GROUP, .panels = 1, .most_groups = 9, .kept_panels = 18, \
     .block_rows = 64, .decode_rows = 2, .operand_panels = 2, .least_rows = 8, .most_code = 63, .sums_bits = 16}

const struct isa_tasks neon_tasks = {SHARED_TASKS, .ways = {TBL_WAY, DIRECT_WAY}};
#else
typedef int no_neon_here;
#endif
