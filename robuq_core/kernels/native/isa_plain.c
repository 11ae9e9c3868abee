/* The tasks in portable C with vector extensions: for ARM, and for x86 without AVX2. */
#define FN static
#include "tasks.h"

const struct isa_tasks plain_tasks = {SHARED_TASKS, .ways = {DIRECT_WAY}};
