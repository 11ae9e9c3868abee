/* The library's C interface, called from cpu.py by ctypes, and the init function that makes it an extension module.
 *
 * A backend is an instruction set and a thread pool: robuq_open(), robuq_close(); ops of several run side by side.
 * Shapes are checked in Python. Every op returns 0, or -1 where there is no memory for its working buffers. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdlib.h>

#include "robuq.h"

#define EXPORT __attribute__((visibility("default")))

/* One more whenever an argument list changes: cpu.py refuses a library built from other source than its own. */
EXPORT int robuq_interface(void) { return 2; }

EXPORT int robuq_has_avx2(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 0;
#endif
}

static const struct isa_tasks *tasks_of(int isa) {
#if defined(__x86_64__)
    if (isa == ISA_AVX2) return &avx2_tasks;
#endif
    (void)isa;
    return &plain_tasks;
}

struct backend {
    const struct isa_tasks *tasks;
    struct pool *pool;
};

EXPORT void *robuq_open(int isa, int threads) {
    struct backend *backend = malloc(sizeof *backend);
    struct pool *pool = pool_create(threads);
    if (!backend || !pool) {
        free(backend);
        if (pool) pool_destroy(pool);
        return NULL;
    }
    *backend = (struct backend){tasks_of(isa), pool};
    return backend;
}

EXPORT void robuq_close(void *backend) {
    pool_destroy(((struct backend *)backend)->pool);
    free(backend);
}

EXPORT int robuq_rotate_quantize(
    const struct backend *backend, const float *x, int64_t rows, int64_t width, const float *signs, const float *base_matrix,
    int64_t base, int prologue, const float *shift, const float *scale, int64_t rows_per_image, float eps,
    const float *lowrank_b, int64_t rank, float step_factor, int midrise, int lowest, int highest, int8_t *codes,
    float *scales, float *lowrank) {
    const struct rotate_job job = {
        x, rows, width, signs, base_matrix, base, width / base, prologue, shift, scale, rows_per_image, eps,
        lowrank_b, rank, step_factor, midrise, (float)lowest, (float)highest, codes, scales, lowrank,
    };
    const size_t scratch = ROTATE_ROWS * (size_t)round_up(width, 16) * sizeof(float);
    return pool_run(backend->pool, ceil_div(rows, ROTATE_ROWS), scratch, backend->tasks->rotate_quantize, &job);
}

EXPORT int robuq_ternary_linear(
    const struct backend *backend, const int8_t *codes, const float *scales, const float *lowrank, int64_t rows, int64_t width,
    const uint8_t *planar, const float *alpha, const float *bias, const float *lowrank_a, int64_t channels,
    int64_t rank, int max_code, float *y) {
    if (rows == 0 || channels == 0) return 0;
    const int64_t padded_width = round_up(width, GROUP);
    /* A block of tokens stays in a 512 KiB level-2 cache, beside the weights, while the channels pass by. */
    const int64_t cache_rows = max64(min64(256 * 1024 / padded_width, 128), 8) / TILE_TOKENS * TILE_TOKENS;
    /* A 16-bit lane takes two products of at most 2 * max_code in magnitude at each step. */
    const int64_t safe_steps = 32767 / (4 * max_code);
    struct ternary_job job = {
        codes, scales, lowrank, rows, width, planar, alpha, bias, lowrank_a, channels, rank,
        padded_width, safe_steps, min64(rows, cache_rows), NULL, NULL, y,
    };
    const int64_t padded_bytes = padded_width == width ? 0 : round_up(rows * padded_width, ALIGNMENT);
    char *buffer = aligned_alloc(ALIGNMENT, (size_t)(padded_bytes + round_up(rows * 4, ALIGNMENT)));
    if (!buffer) return -1;
    job.padded = padded_bytes ? (int8_t *)buffer : NULL;
    job.sums = (int32_t *)(buffer + padded_bytes);

    const int64_t row_blocks = ceil_div(rows, job.block_rows);
    const size_t scratch = (size_t)(round_up(TILE_CHANNELS * padded_width, ALIGNMENT) +
                                    job.block_rows * CHANNELS * 4 + rank * CHANNELS * 4 + 2 * ALIGNMENT);
    const struct isa_tasks *tasks = backend->tasks;
    int failed = pool_run(backend->pool, row_blocks, 0, tasks->ternary_prepare, &job);
    if (!failed) {
        const int64_t count = row_blocks * ceil_div(channels, CHANNELS);
        failed = pool_run(backend->pool, count, scratch, tasks->ternary_linear, &job);
    }
    free(buffer);
    return failed;
}

EXPORT int robuq_attention(
    const struct backend *backend, const float *qkv, int64_t images, int64_t length, int64_t width, int64_t heads,
    int quantized, float *out) {
    const int64_t head_dim = width / heads;
    const struct attention_job job = {
        qkv, length, width, heads, head_dim, (float)(1.0 / sqrt((double)head_dim)), out,
    };
    const struct isa_tasks *tasks = backend->tasks;
    task_function *function = quantized ? tasks->attention_int8 : tasks->attention;
    struct attention_buffers unused;
    const size_t scratch = attention_carve(NULL, length, head_dim, &unused);
    return pool_run(backend->pool, images * heads, scratch, function, &job);
}

EXPORT int robuq_linear(
    const struct backend *backend, const float *x, const float *weight, const float *bias, int64_t rows, int64_t width,
    int64_t channels, float *y) {
    const struct linear_job job = {x, weight, bias, rows, width, channels, y};
    const int64_t count = ceil_div(rows, LINEAR_ROWS) * ceil_div(channels, LINEAR_CHANNELS);
    return pool_run(backend->pool, count, 0, backend->tasks->linear, &job);
}

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "Native CPU kernels; robuq_core.kernels.cpu calls them by ctypes.", -1, NULL,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&definition); }
