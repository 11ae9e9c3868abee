/* Every task, compiled for the instruction set that the including file has set up (see vec.h). */
#include "vec.h"

#include "dot.h"
#include "rotate.h"
#include "ternary.h"
#include "attention.h"

#define TASK_TABLE                                                                                                 \
    {                                                                                                              \
        .rotate_quantize = rotate_quantize_task, .ternary_prepare = ternary_prepare_task,                          \
        .ternary_linear = ternary_linear_task, .attention = attention_task, .attention_int8 = attention_int8_task, \
        .linear = linear_task,                                                                                     \
    }
