/* What the files of the native library share: the jobs, the tasks that work on them, and the thread pool.
 *
 * An op is a job (its arguments, read-only but for the outputs) cut into numbered tasks. Tasks split rows, channels or
 * heads, never a sum: whichever thread runs a task, and however many there are, every output has the same bits.
 *
 * isa_*.c compile the same headers, once for each instruction set; module.c picks one.
 */
#ifndef ROBUQ_H
#define ROBUQ_H

#include <stddef.h>
#include <stdint.h>

/* Mirrored in cpu.py. */
enum { PROLOGUE_NONE = 0, PROLOGUE_MODULATE = 1, PROLOGUE_GELU = 2, PROLOGUE_SILU = 3 };

enum {
    MAX_BASE = 36,          /* largest base order of a Hadamard matrix, see quant/hadamard.py */
    ROTATE_ROWS = 12,       /* most rows of a rotate_quantize task */
    GROUP = 128,            /* weights of a planar group, 2 bits each ... */
    GROUP_BYTES = 32,       /* ... in this many bytes; also the stride of the integer product */
    PANEL = 64,             /* output channels that are decoded and multiplied at a time */
    WHOLE_ROWS = 32,        /* of whole tiles, of every way to multiply: buffers are so long */
    MOST_QUERIES = 16,      /* that attention takes at a time */
    LINEAR_ROWS = 12,       /* rows and channels of a linear task: such rows stay in a level-1 cache */
    LINEAR_CHANNELS = 64,
    FLOAT_LANES = 16,       /* most lanes of a vector: rows between jobs and in attention are padded to them */
    ALIGNMENT = 64,
    MAX_THREADS = 256,
};

static inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
static inline int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }
static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

/* Takes `count` objects of `size` bytes from a scratch area, aligned; `*cursor` moves on. */
static inline void *carve(char **cursor, int64_t count, size_t size) {
    char *start = *cursor;
    *cursor = start + round_up(count * (int64_t)size, ALIGNMENT);
    return start;
}

/* A packed linear, see ops.py; mirrored in cpu.py. Tensors are contiguous. */
struct layer {
    const uint8_t *planar;      /* [channels, ceil(width / GROUP) * GROUP_BYTES] */
    const float *alpha, *bias;  /* [channels] */
    const float *signs;         /* [width] */
    const uint16_t *lowrank_a;  /* [channels, rank], bfloat16 */
    const uint16_t *lowrank_b;  /* [rank, width], bfloat16 */
    const int32_t *weight_counts; /* [2, channels]: how many weights are not 0, and how many are 1 */
    const float *base_matrix;   /* +-1, [base, base]; block = base * 2^k */
    int64_t width, channels, rank, base;
    int64_t block;              /* each run of this many inputs is rotated by itself; 1: none is */
    int64_t max_code;           /* largest magnitude of a code of its input */
    float step_factor;          /* quantiser step = step_factor * mean|x| */
    int32_t midrise;            /* the grid: codes 2 floor + 1, or rounded ones */
    int32_t lowest, highest;    /* codes */
};

struct rotate_job {
    const struct layer *layer;
    const float *x;             /* [rows, width] */
    int64_t rows;
    int prologue;
    const float *shift, *scale; /* [images, width], of PROLOGUE_MODULATE; rows of them lie apart by ... */
    int64_t shift_stride, scale_stride;
    int64_t rows_per_image;
    float eps;
    float normalisation;        /* 1 / sqrt(block) */
    int lowest, highest;        /* of x / step, floored (mid-rise) or rounded */
    int64_t block_rows;         /* of a task */
    int8_t *codes;              /* out [rows, width] */
    float *scales;              /* out [rows] */
    float *lowrank;             /* out [rows, rank] */
    float *values;              /* out [rows, width rounded up to FLOAT_LANES], of the prologue alone */
};

struct ternary_job {
    const struct layer *layer;
    const int8_t *codes;        /* [rows, width] */
    const float *scales;        /* [rows] */
    const float *lowrank;       /* [rows, rank] */
    int64_t rows;
    const float *gate;          /* [images, channels], rows of it gate_stride apart: y += gate * result; NULL: y = result */
    int64_t gate_stride, rows_per_image;
    float *y;                   /* out [rows, channels] */

    /* The plan, see plan_ternary(). */
    int64_t padded_width;       /* width rounded up to whole groups */
    int64_t slice_groups;       /* groups of a slice of the width */
    int64_t block_rows, block_channels; /* of a task */
    int64_t operand_bytes;      /* of a row's group of codes, as the product wants them */
    int64_t panel_bytes;        /* of the decoded weights of a slice of the panels that are multiplied at a time */
    int64_t panels;             /* that are multiplied at a time */
    int64_t safe_steps;         /* vpmaddubsw products that a 16-bit lane holds */
    int64_t safe_pairs;         /* table entries that a byte holds: a power of two from 2 on */
};

struct attention_job {
    const float *qkv;           /* [images, length, 3 * width] */
    int64_t length, width, heads, head_dim;
    float logit_scale;          /* head_dim^-1/2 */
    float *out;                 /* [images, length, width] */
};

struct linear_job {
    const float *x, *weight, *bias; /* [rows, width], rows of it x_stride apart; [channels, width]; [channels] */
    int64_t x_stride, rows, width, channels;
    const float *position;          /* [length, channels], added to the rows of each image; or NULL */
    int64_t length;
    float *y;                       /* out [rows, channels] */
};

/* Images [images, channels, side * patch, side * patch] from or to tokens [images, side * side, channels * patch^2]. */
struct patch_job {
    float *images, *tokens;
    int64_t channels, side, patch;
    int negated;                    /* what goes to the images */
};

typedef void task_function(const void *job, int64_t task, char *scratch);

/* A way to compute the integer product of ternary_linear, and the plan that suits it. */
struct ternary_way {
    task_function *task;        /* block_rows rows x block_channels channels each, channels fastest */
    int operand_bytes;          /* of a row's group of codes, as the product wants them */
    int panel_bytes;            /* of decoded weights that are kept at a time; 0: a byte for each weight of a slice */
    int panels;                 /* that are multiplied at a time */
    int most_groups;            /* of a slice of the width */
    int kept_panels;            /* most of a task, where their sums wait for the last slice */
    int block_rows;             /* most rows of a task */
    int decode_rows;            /* decoding a panel costs about as much as multiplying this many rows, */
    int operand_panels;         /* and laying out a row's operands as multiplying it with this many panels */
    int least_rows, most_code;  /* it serves from this many rows on, and for codes up to this magnitude */
    int sums_bits;              /* 16: 65535 / (2 codes) table entries are all that a slice may sum; 0: no limit */
};

struct isa_tasks {
    task_function *rotate_quantize; /* block_rows rows each */
    task_function *attention;       /* one head of one image each */
    task_function *attention_int8;
    task_function *linear;          /* LINEAR_ROWS x LINEAR_CHANNELS each, rows fastest */
    task_function *prologue;        /* of rotate_quantize alone, block_rows rows each */
    struct ternary_way ways[4];     /* the first that serves is taken; the last serves all */
};

extern const struct isa_tasks plain_tasks, avx2_tasks, avx512vnni_tasks, avx512vbmi_tasks, avx512bf16_tasks, amx_tasks;
extern const struct isa_tasks neon_tasks, dotprod_tasks, i8mm_tasks;

/* Working buffers of a rotate_quantize task. */
struct rotate_buffers {
    float *rotated;             /* [block_rows, stride], each row padded by 272 at least */
    int64_t stride;
    void *kept;                 /* sums of the low-rank product, see dot.h: 12 vectors a tile of 12 */
};

static inline size_t rotate_carve(char *scratch, const struct rotate_job *job, struct rotate_buffers *b) {
    char *cursor = scratch;
    /* Rows a power of two apart would compete for few sets of the level-1 cache: 1088 bytes off a page is none. */
    b->stride = round_up(job->layer->width, 1024) + 272;
    b->rotated = carve(&cursor, job->block_rows * b->stride, sizeof *b->rotated);
    b->kept = carve(&cursor, round_up(job->block_rows, 12) * round_up(job->layer->rank, 12), ALIGNMENT);
    return (size_t)(cursor - scratch);
}

/* Working buffers of a ternary_linear task. */
struct ternary_buffers {
    uint8_t *panel;             /* [panel_bytes] */
    int8_t *operands;           /* [block_rows, slice_groups, operand_bytes] */
    int32_t *offsets;           /* [block_rows] */
    int32_t *products;          /* [panels, block_rows, PANEL]; of those multiplied together where there is one slice */
    int32_t *finished;          /* [panels, WHOLE_ROWS, PANEL], see struct product */
    float *lowrank_a;           /* [panels, rank, PANEL], floats or pairs of bfloat16 */
    const void *lowrank;        /* the rows' low-rank values, see lowrank_rows() */
};

/* Lays the buffers out from `scratch` on; returns their size. */
static inline size_t ternary_carve(char *scratch, const struct ternary_job *job, struct ternary_buffers *b) {
    const int64_t rows = round_up(job->block_rows, WHOLE_ROWS), rank = round_up(job->layer->rank, 2 * FLOAT_LANES);
    const int64_t block_panels = round_up(ceil_div(job->block_channels, PANEL), job->panels);
    const int64_t kept = job->slice_groups * GROUP == job->padded_width ? job->panels : block_panels;
    char *cursor = scratch;
    b->panel = carve(&cursor, job->panel_bytes, 1);
    b->operands = carve(&cursor, rows * job->slice_groups, (size_t)job->operand_bytes);
    b->offsets = carve(&cursor, rows, sizeof *b->offsets);
    b->products = carve(&cursor, kept * rows * PANEL, sizeof *b->products);
    b->finished = carve(&cursor, job->panels * WHOLE_ROWS * PANEL, sizeof *b->finished);
    b->lowrank_a = carve(&cursor, job->panels * rank * PANEL, sizeof *b->lowrank_a);
    b->lowrank = carve(&cursor, rows * rank, sizeof(uint16_t));
    return (size_t)(cursor - scratch);
}

/* Working buffers of an attention task; rows are padded to whole vectors, codes of whole packs: bytes or int16. The
 * last three hold MOST_QUERIES rows. */
struct attention_buffers {
    void *q;                    /* codes [length, padded head_dim], and rows of a last tile */
    void *k;                    /* codes [padded head_dim / pack, padded length, pack] */
    float *q_scale, *k_scale;   /* [padded length] */
    int32_t *offsets;           /* [the longer of padded length and padded head_dim], of the products with a column */
    void *v_codes;              /* [padded length / pack, padded head_dim, pack] */
    float *columns, *v;         /* unquantised: K [head_dim, padded length], V [length, padded head_dim] */
    float *logits;              /* then their exponentials [MOST_QUERIES, padded length] */
    int32_t *products;          /* [MOST_QUERIES, the longer of padded length and padded head_dim] */
    void *p_codes;              /* [MOST_QUERIES, padded length] */
};

enum { PACK_ROWS = 4, PACK_VECTORS = 3 /* of a tile of sums */ };

/* Lays the buffers out from `scratch` on; returns their size. */
static inline size_t attention_carve(char *scratch, int64_t length, int64_t head_dim, struct attention_buffers *b) {
    const int64_t padded_length = round_up(length, FLOAT_LANES), padded_dim = round_up(head_dim, FLOAT_LANES);
    const int64_t code_bytes = round_up(head_dim * (int64_t)sizeof(int16_t), ALIGNMENT);
    char *cursor = scratch;
    b->columns = b->q = carve(&cursor, padded_length * code_bytes, 1); /* and the memory of k */
    b->k = carve(&cursor, padded_length * code_bytes, 1);
    b->q_scale = carve(&cursor, padded_length, sizeof *b->q_scale);
    b->k_scale = carve(&cursor, padded_length, sizeof *b->k_scale);
    b->offsets = carve(&cursor, max64(padded_length, padded_dim), sizeof *b->offsets);
    b->v_codes = b->v = carve(&cursor, padded_dim * padded_length, sizeof *b->v);
    b->logits = carve(&cursor, MOST_QUERIES * padded_length, sizeof *b->logits);
    b->products = carve(&cursor, MOST_QUERIES * max64(padded_length, padded_dim), sizeof *b->products);
    b->p_codes = carve(&cursor, MOST_QUERIES * padded_length, sizeof(int16_t));
    return (size_t)(cursor - scratch);
}

struct pool;

/* A pool of at most `threads` threads, the callers of its jobs among them; NULL where there is no memory. */
struct pool *pool_create(int threads);

/* No job of the pool may be running. */
void pool_destroy(struct pool *pool);

/* An op on the pool: its jobs run between these two. Ops of one pool take turns; pools run side by side. */
void pool_begin(struct pool *pool);
void pool_end(struct pool *pool);

/* Memory for what one job of an op leaves to the next; NULL where there is none. */
void *pool_shared(struct pool *pool, size_t bytes);

/* Runs tasks 0..tasks-1 of `job`; each thread owns `scratch_bytes` of aligned scratch. Returns when all are done: 0, or
 * -1 where there is no memory. */
int pool_run(struct pool *pool, int64_t tasks, size_t scratch_bytes, task_function *function, const void *job);

#endif
