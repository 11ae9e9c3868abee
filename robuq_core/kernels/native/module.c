/* The library's C interface, called from cpu.py by ctypes.
 *
 * A backend is an instruction set and a thread pool: robuq_open(), robuq_close(); ops of several run side by side.
 * Shapes are checked in Python. Every op returns 0, or -1 where there is no memory for its working buffers. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base3.h"
#include "isa.h"
#include "robuq.h"
#include "update.h"

#define EXPORT __attribute__((visibility("default")))

/* One more whenever an argument list changes: cpu.py refuses a library built from other source than its own. */
EXPORT int robuq_interface(void) { return 15; }

EXPORT int robuq_supports(int isa) { return isa_supported(isa); }

static const struct isa_tasks *tasks_of(int isa) {
    switch (isa) {
#if BUILD_AVX2
        case ISA_AVX2: return &avx2_tasks;
#endif
#if BUILD_AVX512VNNI
        case ISA_AVX512VNNI: return &avx512vnni_tasks;
#endif
#if BUILD_AVX512VBMI
        case ISA_AVX512VBMI: return &avx512vbmi_tasks;
#endif
#if BUILD_AVX512BF16
        case ISA_AVX512BF16: return &avx512bf16_tasks;
#endif
#if BUILD_AMX
        case ISA_AMX: return &amx_tasks;
#endif
#if BUILD_NEON
        case ISA_NEON: return &neon_tasks;
        case ISA_DOTPROD: return &dotprod_tasks;
        case ISA_I8MM: return &i8mm_tasks;
#endif
        default: return &plain_tasks;
    }
}

struct backend {
    const struct isa_tasks *tasks;
    struct pool *pool;
    int threads;
};

EXPORT void *robuq_open(int isa, int threads) {
    struct backend *backend = malloc(sizeof *backend);
    struct pool *pool = isa_supported(isa) ? pool_create(threads) : NULL;
    if (!backend || !pool) {
        free(backend);
        if (pool) pool_destroy(pool);
        return NULL;
    }
    *backend = (struct backend){tasks_of(isa), pool, threads};
    return backend;
}

EXPORT void robuq_close(void *backend) {
    pool_destroy(((struct backend *)backend)->pool);
    free(backend);
}

/* What comes in front of a layer; mirrored in cpu.py. */
struct prologue {
    int64_t kind, rows_per_image;
    const float *shift, *scale;
    int64_t shift_stride, scale_stride;
    float eps;
};

static struct rotate_job rotate_job(const struct backend *backend, const struct layer *layer, const float *x,
                                    int64_t rows, const struct prologue *prologue) {
    return (struct rotate_job){
        .layer = layer, .x = x, .rows = rows, .prologue = (int)prologue->kind, .shift = prologue->shift,
        .shift_stride = prologue->shift_stride, .scale = prologue->scale, .scale_stride = prologue->scale_stride,
        .rows_per_image = prologue->rows_per_image, .eps = prologue->eps,
        .block_rows = ceil_div(rows, round_up(ceil_div(rows, ROTATE_ROWS), backend->threads)),
    };
}

static int rotate_quantize(const struct backend *backend, const struct layer *layer, const float *x, int64_t rows,
                           const struct prologue *prologue, int8_t *codes, float *scales, float *lowrank) {
    struct rotate_job job = rotate_job(backend, layer, x, rows, prologue);
    job.normalisation = (float)(1.0 / sqrt((double)layer->block));
    job.lowest = layer->midrise ? (layer->lowest - 1) / 2 : layer->lowest; /* a code is 2 cell + 1 */
    job.highest = layer->midrise ? (layer->highest - 1) / 2 : layer->highest;
    job.codes = codes, job.scales = scales, job.lowrank = lowrank;
    struct rotate_buffers unused;
    const size_t scratch = rotate_carve(NULL, &job, &unused);
    return pool_run(backend->pool, ceil_div(rows, job.block_rows), scratch, backend->tasks->rotate_quantize, &job);
}

EXPORT int robuq_rotate_quantize(
    const struct backend *backend, const struct layer *layer, const float *x, int64_t rows,
    const struct prologue *prologue, int8_t *codes, float *scales, float *lowrank) {
    if (rows == 0) return 0;
    pool_begin(backend->pool);
    const int failed = rotate_quantize(backend, layer, x, rows, prologue, codes, scales, lowrank);
    pool_end(backend->pool);
    return failed;
}

/* The cut into row and channel blocks that takes the busiest thread least time: a panel costs its rows, decoding it
 * decode_rows more, and laying out a row's operands operand_panels. */
static void plan_blocks(struct ternary_job *job, const struct ternary_way *way, int threads) {
    enum { CANDIDATES = 6 };
    const int64_t fewest = ceil_div(job->rows, way->block_rows), panels = ceil_div(job->layer->channels, PANEL);
    const int64_t most_panels = job->slice_groups * GROUP < job->padded_width ? way->kept_panels : panels;
    int64_t best = INT64_MAX;
    for (int64_t row_blocks = fewest; row_blocks < fewest + CANDIDATES; row_blocks++) {
        for (int64_t rounds = 0; rounds <= 2; rounds++) {
            const int64_t rows = round_up(ceil_div(job->rows, row_blocks), 4);
            const int64_t wanted = max64(ceil_div(rounds * threads, row_blocks), ceil_div(panels, most_panels));
            const int64_t block_panels = round_up(ceil_div(panels, min64(wanted, panels)), way->panels);
            const int64_t tasks = ceil_div(job->rows, rows) * ceil_div(panels, block_panels);
            const int64_t task_cost =
                rows * (block_panels + way->operand_panels) + way->decode_rows * block_panels;
            const int64_t cost = ceil_div(tasks, threads) * task_cost;
            if (cost >= best) continue;
            best = cost;
            job->block_rows = rows;
            job->block_channels = block_panels * PANEL;
        }
    }
}

/* Cuts the job into slices and blocks so that its buffers fit the caches; whatever the plan, the result is the same. */
static void plan_ternary(struct ternary_job *job, const struct ternary_way *way, int threads) {
    const int64_t max_code = job->layer->max_code, groups = ceil_div(job->layer->width, GROUP);
    int64_t most_groups = way->most_groups;
    if (way->sums_bits == 16) most_groups = min64(most_groups, 65535 / (2 * max_code * GROUP / 2));
    job->padded_width = groups * GROUP;
    job->slice_groups = ceil_div(groups, ceil_div(groups, most_groups));
    job->operand_bytes = way->operand_bytes;
    job->panel_bytes = way->panel_bytes ? way->panel_bytes : job->slice_groups * GROUP * PANEL;
    job->panels = way->panels;
    job->safe_steps = 32767 / (4 * max_code); /* each takes two products of at most 2 max_code in magnitude */
    job->safe_pairs = 2;
    while (job->safe_pairs < 32 && 2 * job->safe_pairs * 2 * max_code <= 255) job->safe_pairs *= 2;
    plan_blocks(job, way, threads);
}

static int ternary_linear(const struct backend *backend, struct ternary_job *job) {
    const struct layer *layer = job->layer;
    const struct ternary_way *way = backend->tasks->ways;
    while (job->rows < way->least_rows || layer->max_code > way->most_code) way++;
    plan_ternary(job, way, backend->threads);
    struct ternary_buffers unused;
    const size_t scratch = ternary_carve(NULL, job, &unused);
    const int64_t tasks = ceil_div(job->rows, job->block_rows) * ceil_div(layer->channels, job->block_channels);
    return pool_run(backend->pool, tasks, scratch, way->task, job);
}

EXPORT int robuq_ternary_linear(
    const struct backend *backend, const struct layer *layer, const int8_t *codes, const float *scales,
    const float *lowrank, int64_t rows, float *y) {
    if (rows == 0 || layer->channels == 0) return 0;
    struct ternary_job job = {
        .layer = layer, .codes = codes, .scales = scales, .lowrank = lowrank, .rows = rows, .y = y,
    };
    pool_begin(backend->pool);
    const int failed = ternary_linear(backend, &job);
    pool_end(backend->pool);
    return failed;
}

/* Of what the first step of a layer leaves to the second. */
static int64_t quantized_bytes(const struct layer *layer, int64_t rows) {
    return round_up(rows * layer->width, ALIGNMENT) + round_up(rows * (1 + layer->rank) * (int64_t)sizeof(float), ALIGNMENT);
}

/* Both steps: y = layer(x), or y += gate * layer(x) where there is a gate. `work`: quantized_bytes(). */
static int ternary(const struct backend *backend, const struct layer *layer, const float *x, int64_t rows,
                   const struct prologue *prologue, const float *gate, int64_t gate_stride, int64_t rows_per_image,
                   float *y, char *work) {
    int8_t *codes = carve(&work, rows * layer->width, sizeof *codes);
    float *scales = (float *)work, *lowrank = scales + rows;
    struct ternary_job job = {
        .layer = layer, .codes = codes, .scales = scales, .lowrank = lowrank, .rows = rows, .gate = gate,
        .gate_stride = gate_stride, .rows_per_image = rows_per_image, .y = y,
    };
    return rotate_quantize(backend, layer, x, rows, prologue, codes, scales, lowrank) || ternary_linear(backend, &job);
}

EXPORT int robuq_ternary(
    const struct backend *backend, const struct layer *layer, const float *x, int64_t rows,
    const struct prologue *prologue, const float *gate, int64_t gate_stride, int64_t rows_per_image, float *y) {
    if (rows == 0 || layer->channels == 0) return 0;
    pool_begin(backend->pool);
    char *work = pool_shared(backend->pool, (size_t)quantized_bytes(layer, rows));
    const int failed =
        !work || ternary(backend, layer, x, rows, prologue, gate, gate_stride, rows_per_image, y, work);
    pool_end(backend->pool);
    return failed;
}

static int attention(const struct backend *backend, const float *qkv, int64_t images, int64_t length, int64_t width,
                     int64_t heads, int quantized, float *out) {
    const int64_t head_dim = width / heads;
    const struct attention_job job = {
        qkv, length, width, heads, head_dim, (float)(1.0 / sqrt((double)head_dim)), out,
    };
    task_function *function = quantized ? backend->tasks->attention_int8 : backend->tasks->attention;
    struct attention_buffers unused;
    const size_t scratch = attention_carve(NULL, length, head_dim, &unused);
    return pool_run(backend->pool, images * heads, scratch, function, &job);
}

EXPORT int robuq_attention(
    const struct backend *backend, const float *qkv, int64_t images, int64_t length, int64_t width, int64_t heads,
    int quantized, float *out) {
    pool_begin(backend->pool);
    const int failed = attention(backend, qkv, images, length, width, heads, quantized, out);
    pool_end(backend->pool);
    return failed;
}

/* A block of a network; mirrored in cpu.py. */
struct block {
    const struct layer *qkv, *proj, *fc1, *fc2;
    int64_t heads, quantized;   /* of its attention */
    float eps1, eps2;           /* of its norms */
};

/* A whole block in place on x [images, length, width]. `modulation`: shift, scale and gate of the attention, then of the
 * MLP; each is [images, width], `entry` apart, its rows `stride` apart. */
EXPORT int robuq_block(const struct backend *backend, const struct block *block, float *x, int64_t images, int64_t length,
                       const float *modulation, int64_t entry, int64_t stride) {
    enum { SHIFT1, SCALE1, GATE1, SHIFT2, SCALE2, GATE2 };
    const int64_t rows = images * length, width = block->proj->channels, hidden = block->fc1->channels;
    if (rows == 0) return 0;
    const struct prologue none = {.kind = PROLOGUE_NONE}, gelu = {.kind = PROLOGUE_GELU};
    const struct prologue norm1 = {
        PROLOGUE_MODULATE, length, modulation + SHIFT1 * entry, modulation + SCALE1 * entry, stride, stride, block->eps1,
    };
    const struct prologue norm2 = {
        PROLOGUE_MODULATE, length, modulation + SHIFT2 * entry, modulation + SCALE2 * entry, stride, stride, block->eps2,
    };
    int64_t work_bytes = max64(quantized_bytes(block->qkv, rows), quantized_bytes(block->proj, rows));
    work_bytes = max64(work_bytes, max64(quantized_bytes(block->fc1, rows), quantized_bytes(block->fc2, rows)));
    const int64_t wide_bytes = round_up(rows * max64(3 * width, hidden) * (int64_t)sizeof *x, ALIGNMENT);

    pool_begin(backend->pool);
    char *work = pool_shared(backend->pool, (size_t)(work_bytes + wide_bytes + rows * width * (int64_t)sizeof *x));
    float *wide = (float *)(work + work_bytes), *heads = (float *)(work + work_bytes + wide_bytes);
    const int failed =
        !work || ternary(backend, block->qkv, x, rows, &norm1, NULL, 0, 1, wide, work) ||
        attention(backend, wide, images, length, width, block->heads, (int)block->quantized, heads) ||
        ternary(backend, block->proj, heads, rows, &none, modulation + GATE1 * entry, stride, length, x, work) ||
        ternary(backend, block->fc1, x, rows, &norm2, NULL, 0, 1, wide, work) ||
        ternary(backend, block->fc2, wide, rows, &gelu, modulation + GATE2 * entry, stride, length, x, work);
    pool_end(backend->pool);
    return failed;
}

static int linear(const struct backend *backend, const struct linear_job *job) {
    const int64_t count = ceil_div(job->rows, LINEAR_ROWS) * ceil_div(job->channels, LINEAR_CHANNELS);
    return pool_run(backend->pool, count, 0, backend->tasks->linear, job);
}

EXPORT int robuq_linear(
    const struct backend *backend, const float *x, const float *weight, const float *bias, int64_t rows, int64_t width,
    int64_t channels, float *y) {
    const struct linear_job job = {
        .x = x, .weight = weight, .bias = bias, .x_stride = width, .rows = rows, .width = width, .channels = channels, .y = y,
    };
    pool_begin(backend->pool);
    const int failed = linear(backend, &job);
    pool_end(backend->pool);
    return failed;
}

/* A full-precision linear layer; mirrored in cpu.py. */
struct dense {
    const float *weight, *bias;
    int64_t channels, width;
};

/* The layers of a network before and behind its blocks; mirrored in cpu.py. */
struct ends {
    struct dense embedder, last, modulation; /* modulation: the last layer's shift and scale */
    const float *position;                   /* [side * side, width] */
    int64_t side, patch, in_channels, out_channels, negated;
    float eps;
};

/* An image's row of patches each; a token has its channels first, or last. */
static void to_tokens_task(const void *argument, int64_t task, char *scratch) {
    const struct patch_job *job = argument;
    const int64_t patch = job->patch, line = job->side * patch, values = job->channels * patch * patch;
    const float *image = job->images + task / job->side * job->channels * line * line + task % job->side * patch * line;
    float *token = job->tokens + task * job->side * values;
    (void)scratch;
    for (int64_t column = 0; column < job->side; column++)
        for (int64_t c = 0; c < job->channels; c++)
            for (int64_t y = 0; y < patch; y++, token += patch)
                memcpy(token, image + (c * line + y) * line + column * patch, (size_t)patch * sizeof *token);
}

static void to_images_task(const void *argument, int64_t task, char *scratch) {
    const struct patch_job *job = argument;
    const int64_t patch = job->patch, line = job->side * patch, values = job->channels * patch * patch;
    float *image = job->images + task / job->side * job->channels * line * line + task % job->side * patch * line;
    const float *token = job->tokens + task * job->side * values;
    (void)scratch;
    for (int64_t column = 0; column < job->side; column++, token += values)
        for (int64_t c = 0; c < job->channels; c++)
            for (int64_t y = 0; y < patch; y++) {
                const float *from = token + y * patch * job->channels + c;
                float *to = image + (c * line + y) * line + column * patch;
                for (int64_t x = 0; x < patch; x++, from += job->channels) to[x] = job->negated ? -*from : *from;
            }
}

/* Tokens [images, side * side, width] of images, with their positions. */
EXPORT int robuq_embed(const struct backend *backend, const struct ends *ends, const float *images, int64_t count,
                       float *tokens) {
    const int64_t length = ends->side * ends->side, rows = count * length;
    const struct dense *of = &ends->embedder;
    pool_begin(backend->pool);
    float *patches = pool_shared(backend->pool, (size_t)(rows * of->width) * sizeof *patches);
    const struct patch_job cut = {
        .images = (float *)images, .tokens = patches, .channels = ends->in_channels, .side = ends->side, .patch = ends->patch,
    };
    const struct linear_job job = {
        .x = patches, .weight = of->weight, .bias = of->bias, .x_stride = of->width, .rows = rows, .width = of->width,
        .channels = of->channels, .position = ends->position, .length = length, .y = tokens,
    };
    const int failed = !patches || pool_run(backend->pool, count * ends->side, 0, to_tokens_task, &cut) ||
                       linear(backend, &job);
    pool_end(backend->pool);
    return failed;
}

/* A prologue and a full-precision layer; `work`: after_bytes(). */
static int64_t after_bytes(const struct dense *of, int64_t rows) {
    return rows * round_up(of->width, FLOAT_LANES) * (int64_t)sizeof(float);
}

static int linear_after(const struct backend *backend, const struct prologue *prologue, const struct dense *of,
                        const float *x, int64_t rows, float *work, float *y) {
    const struct layer bare = {.width = of->width};
    struct rotate_job before = rotate_job(backend, &bare, x, rows, prologue);
    before.values = work;
    const struct linear_job job = {
        .x = work, .weight = of->weight, .bias = of->bias, .x_stride = round_up(of->width, FLOAT_LANES), .rows = rows,
        .width = of->width, .channels = of->channels, .y = y,
    };
    return pool_run(backend->pool, ceil_div(rows, before.block_rows), 0, backend->tasks->prologue, &before) ||
           linear(backend, &job);
}

/* The last layer's images of tokens; `modulation`: shift and scale, as of robuq_block(). */
EXPORT int robuq_output(const struct backend *backend, const struct ends *ends, const float *tokens, int64_t count,
                        const float *modulation, int64_t entry, int64_t stride, float *images) {
    const int64_t length = ends->side * ends->side, rows = count * length;
    const struct prologue norm = {PROLOGUE_MODULATE, length, modulation, modulation + entry, stride, stride, ends->eps};
    const int64_t before = round_up(after_bytes(&ends->last, rows), ALIGNMENT);
    pool_begin(backend->pool);
    char *work = pool_shared(backend->pool, (size_t)(before + rows * ends->last.channels * (int64_t)sizeof *tokens));
    const struct patch_job cut = {
        .images = images, .tokens = (float *)(work + before), .channels = ends->out_channels, .side = ends->side,
        .patch = ends->patch, .negated = (int)ends->negated,
    };
    const int failed = !work || linear_after(backend, &norm, &ends->last, tokens, rows, (float *)work, cut.tokens) ||
                       pool_run(backend->pool, count * ends->side, 0, to_images_task, &cut);
    pool_end(backend->pool);
    return failed;
}

/* A layer's outputs [rows, entries * width] to the entries of a table [entries, slots, width]. */
static void put_modulations(const float *from, const int64_t *slots, int64_t rows, int64_t entries, int64_t width,
                            float *table, int64_t entry) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t e = 0; e < entries; e++, from += width)
            memcpy(table + e * entry + slots[row] * width, from, (size_t)width * sizeof *from);
}

/* Modulations of the conditions c [rows, width] to their slots of a table: six entries of each of `depth` layers, then the
 * last layer's two; `entry`: from one to the next. */
EXPORT int robuq_modulate(const struct backend *backend, const struct ends *ends, const struct layer *const *layers,
                          int64_t depth, const float *c, int64_t rows, const int64_t *slots, float *table,
                          int64_t entry) {
    enum { ENTRIES = 6 };
    const struct prologue silu = {.kind = PROLOGUE_SILU};
    const int64_t width = ends->modulation.width, outputs = rows * ENTRIES * width * (int64_t)sizeof *c;
    int64_t work_bytes = after_bytes(&ends->modulation, rows);
    for (int64_t i = 0; i < depth; i++) work_bytes = max64(work_bytes, quantized_bytes(layers[i], rows));
    pool_begin(backend->pool);
    char *work = pool_shared(backend->pool, (size_t)(round_up(outputs, ALIGNMENT) + work_bytes));
    float *y = (float *)work;
    int failed = !work;
    work += round_up(outputs, ALIGNMENT);
    for (int64_t i = 0; i < depth && !failed; i++, table += ENTRIES * entry) {
        failed = ternary(backend, layers[i], c, rows, &silu, NULL, 0, 1, y, work);
        if (!failed) put_modulations(y, slots, rows, ENTRIES, width, table, entry);
    }
    failed = failed || linear_after(backend, &silu, &ends->modulation, c, rows, (float *)work, y);
    if (!failed) put_modulations(y, slots, rows, 2, width, table, entry);
    pool_end(backend->pool);
    return failed;
}

EXPORT int robuq_update(const float *x, const float *previous, const float *output, const struct row_step *steps,
                        int64_t rows, int64_t values, int64_t output_values, int64_t mixed, int clip,
                        float *following, float *x0) {
    update_rows(&(struct update){x, previous, output, rows, values, output_values, mixed, clip, following, x0}, steps);
    return 0;
}

EXPORT int robuq_planar_from_base3(const uint8_t *packed, int64_t rows, int64_t width, uint8_t *planar) {
    planar_from_base3(packed, rows, width, planar);
    return 0;
}

/* Of each channel the weights that are not 0, then those that are 1. Codes are t + 1, and padding is t = 0. */
EXPORT int robuq_weight_counts(const uint8_t *planar, int64_t channels, int64_t row_bytes, int32_t *counts) {
    for (int64_t c = 0; c < channels; c++, planar += row_bytes) {
        int64_t nonzero = 0, ones = 0; /* of the two bits that are set, t = 1 has the higher and t = 0 the lower */
        for (int64_t at = 0; at < row_bytes; at += 8) {
            uint64_t word;
            memcpy(&word, planar + at, sizeof word);
            nonzero += __builtin_popcountll(~word & 0x5555555555555555u);
            ones += __builtin_popcountll(word & 0xAAAAAAAAAAAAAAAAu);
        }
        counts[c] = (int32_t)nonzero;
        counts[channels + c] = (int32_t)ones;
    }
    return 0;
}
