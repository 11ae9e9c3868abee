/* The tasks for AVX2 with FMA. Only functions carry the target, so the file compiles without -mavx2. */
#if defined(__x86_64__)
#define FN static __attribute__((target("avx2,fma")))
#define HAVE_AVX2 1
#include "tasks.h"

const struct isa_tasks avx2_tasks = TASK_TABLE;
#else
typedef int no_avx2_here; /* ISO C forbids an empty file */
#endif
