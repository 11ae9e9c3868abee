/* Every task, compiled for the instruction set that the including file has set up (see vec.h). */
#include "vec.h"

#include "dot.h"
#include "hadamard.h"
#include "rotate.h"
#include "ternary.h"
#if HAVE_AVX2
#include "product_lookup.h"
#include "product_direct.h"
#else
#include "product_plain.h"
#endif
#include "attention.h"

#if HAVE_AVX2
FN void ternary_lookup_task(const void *job, int64_t task, char *scratch) {
    ternary_task(job, task, scratch, &lookup_product);
}

FN void ternary_any_task(const void *job, int64_t task, char *scratch) {
    ternary_task(job, task, scratch, &direct_product);
}
#else
#define ternary_lookup_task NULL

FN void ternary_any_task(const void *job, int64_t task, char *scratch) {
    ternary_task(job, task, scratch, &plain_product);
}
#endif

#define TASK_TABLE                                                                                                 \
    {                                                                                                              \
        .rotate_quantize = rotate_quantize_task, .ternary_any = ternary_any_task,                                  \
        .ternary_lookup = ternary_lookup_task, .attention = attention_task, .attention_int8 = attention_int8_task, \
        .linear = linear_task,                                                                                     \
    }
