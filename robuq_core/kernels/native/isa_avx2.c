/* The tasks for AVX2 with FMA. */
#include "isa.h"
#if BUILD_AVX2
#define FN static __attribute__((target("avx2,fma")))
#define HAVE_AVX2 1
#include "tasks.h"

#include "product_bits.h"

FN void ternary_lookup_task(const void *job, int64_t task, char *scratch) {
    ternary_task(job, task, scratch, &lookup_product);
}

#define LOOKUP_WAY                                                                      \
    {.task = ternary_lookup_task, .operand_bytes = 8 * GROUP, .panels = 1, .most_groups = 9, .kept_panels = 18, \
     .block_rows = 96, .decode_rows = 4, .operand_panels = 1, .least_rows = 8, .most_code = 63, .sums_bits = 16}

const struct isa_tasks avx2_tasks = {SHARED_TASKS, .ways = {BITS_WAY(2, 40), LOOKUP_WAY, DIRECT_WAY}};
#else
typedef int no_avx2_here; /* ISO C forbids an empty file */
#endif
