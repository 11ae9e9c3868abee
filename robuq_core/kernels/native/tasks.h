/* Every task, compiled for the instruction set that the including file has set up (see vec.h). */
#include "vec.h"

#if HAVE_AMX
#include "tiles.h"
#endif

#include "lowrank.h"

#include "dot.h"
#include "hadamard.h"
#include "rotate.h"
#include "ternary.h"
#if HAVE_AVX512VNNI
#include "product_direct.h"
#elif HAVE_AVX2
#include "product_lookup.h"
#include "product_direct.h"
#elif HAVE_NEON && !HAVE_DOTPROD
#include "product_tbl.h"
#elif !HAVE_NEON
#include "product_plain.h"
#endif
#include "attention.h"

#define SHARED_TASKS                                                                    \
    .rotate_quantize = rotate_quantize_task, .attention = attention_task,               \
    .attention_int8 = attention_int8_task, .linear = linear_task, .prologue = prologue_task

#if !HAVE_DOTPROD
FN void ternary_direct_task(const void *job, int64_t task, char *scratch) {
    ternary_task(job, task, scratch, &direct_product);
}

#define DIRECT_WAY                                                                      \
    {.task = ternary_direct_task, .operand_bytes = GROUP, .panels = 1, .most_groups = INT32_MAX, .block_rows = 96, \
     .operand_panels = 1, .most_code = 128}
#endif
