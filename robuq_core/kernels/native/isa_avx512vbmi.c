/* The tasks for AVX-512 with VNNI, VBMI and GFNI: permutations of bytes, transposition of bits. */
#include "isa.h"
#if BUILD_AVX512VBMI
#if defined(ROBUQ_SIMDE)
#define FN static
#else
#define FN static __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,gfni")))
#endif
#define HAVE_AVX2 1
#define HAVE_AVX512VNNI 1
#include "tasks.h"

#include "product_bits.h"
#include "product_vnni.h"

FN void ternary_bits_task(const void *job, int64_t task, char *scratch) {
    ternary_task(job, task, scratch, &bits_product);
}

#define BITS_WAY                                                                        \
    {.task = ternary_bits_task, .operand_bytes = 4 * MOST_BITS * PICKS, .panel_bytes = 2 * HALF_BYTES, \
     .panels = BIT_PANELS, .most_groups = 1, .kept_panels = 32, .block_rows = 512, .decode_rows = 24, \
     .operand_panels = 1, .least_rows = 8, .most_code = (1 << MOST_BITS) - 1}

const struct isa_tasks avx512vbmi_tasks = {SHARED_TASKS, .ways = {BITS_WAY, VNNI_WAY, DIRECT_WAY}};
#else
typedef int no_avx512vbmi_here;
#endif
