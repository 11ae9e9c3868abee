/* The tasks for AVX2 with FMA. */
#include "isa.h"
#if BUILD_AVX2
#define FN static __attribute__((target("avx2,fma")))
#define HAVE_AVX2 1
#define HAVE_AVX512VNNI 0
#include "tasks.h"

const struct isa_tasks avx2_tasks = {
    SHARED_TASKS,
    .direct = DIRECT_WAY,
    .panel = {.task = ternary_lookup_task, .operand_bytes = 8 * GROUP, .most_groups = 9, .block_rows = 96,
              .decode_rows = 4, .least_rows = 8, .most_code = 31, .sums_bits = 16},
};
#else
typedef int no_avx2_here; /* ISO C forbids an empty file */
#endif
