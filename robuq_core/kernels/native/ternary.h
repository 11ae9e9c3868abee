/* ternary_linear, eq. (5): 2-bit weights decoded a panel of channels at a time, an exact integer product, the epilogue.
 *
 * A task is a block of rows by some panels. For each slice of the width the rows are laid out as the product wants them
 * (operands), then panel after panel is decoded into a buffer that a level-2 cache holds and multiplied with all rows
 * of the block. The ways to multiply (struct product) differ in both layouts and are exact: they agree to the bit. */

/* Of a tile: 16 registers of sums with AVX-512, else 8. */
enum { EPILOGUE_ROWS = HAVE_AVX512VNNI ? 4 : 2, EPILOGUE_CHANNELS = 4 * LANES };

struct product {
    int adds;                   /* to products from the first slice on: they begin as zeros */
    /* Slice `group`.. of the channels `channel`.., GROUP codes each: at most GROUP * PANEL bytes a group. NULL: multiply()
     * reads the weights. */
    void (*decode)(const struct ternary_job *job, int64_t channel, int64_t group, int64_t groups, uint8_t *panel);
    /* The same slice of rows `first`.., and what to subtract from their products once all slices are summed. */
    void (*operands)(const struct ternary_job *job, int64_t first, int64_t rows, int64_t group, int64_t groups,
                     int8_t *operands, int32_t *offsets);
    /* products [rows, PANEL] += operands . panel, of that slice */
    void (*multiply)(const struct ternary_job *job, int64_t channel, int64_t group, int64_t groups, uint8_t *panel,
                     const int8_t *operands, int64_t rows, int32_t *products);
    /* What multiply() left of the rows `first`.., at most WHOLE_ROWS, to their products, `finished`; NULL: it left
     * products. */
    void (*finish)(const struct ternary_job *job, int64_t channel, int64_t first, int64_t rows, const int32_t *left,
                   const struct ternary_buffers *b);
};

/* Look-ups sum cells. A code's cell u, of 2^b from -2^(b-1) on, adds u + 1 where the weight is 1 and -u where it is -1.
 * Sums S are then smaller than those of mid-rise codes 2 u + 1 by half: sum t (2 u + 1) = 2 S - n with n weights that
 * are not 0; of mid-tread codes u, sum t u = S - p with p weights that are 1. */

/* Bias that makes the sum of two cells positive, 2 (2^(b-1) - 1): it is 0 .. 2 (2^b - 1) then. */
INLINE int pair_bias(const struct layer *layer) { return (int)layer->max_code - 1; }

/* Products of `rows` rows and a panel begin with what comes off their sums. */
INLINE void begin_products(const struct layer *layer, int64_t channel, int64_t rows, int32_t *products) {
    const int64_t count = min64(PANEL, layer->channels - channel);
    const int32_t *counts = layer->weight_counts + (layer->midrise ? 0 : layer->channels) + channel;
    int32_t first[PANEL] = {0};
    for (int64_t c = 0; c < count; c++) first[c] = -counts[c];
    for (int64_t m = 0; m < rows; m++) memcpy(products + m * PANEL, first, sizeof first);
}

/* A channel's codes; beyond the last channel, the last again. */
INLINE const uint8_t *planar_row(const struct ternary_job *job, int64_t channel) {
    return job->layer->planar + min64(channel, job->layer->channels - 1) * (job->padded_width / GROUP * GROUP_BYTES);
}

/* A row's group of GROUP codes; an incomplete one is copied to `tail`, with zeros behind. */
INLINE const int8_t *group_codes(const struct ternary_job *job, int64_t row, int64_t group, int8_t tail[GROUP]) {
    const int8_t *codes = job->codes + row * job->layer->width + group * GROUP;
    const int64_t count = job->layer->width - group * GROUP;
    if (count >= GROUP) return codes;
    memset(tail, 0, GROUP);
    memcpy(tail, codes, (size_t)count);
    return tail;
}

FN int32_t sum_codes(const int8_t *codes) {
#if HAVE_AVX2
    const __m256i ones = _mm256_set1_epi8(1), wide_ones = _mm256_set1_epi16(1);
    __m256i sums[4];
    for (int i = 0; i < 4; i++)
        sums[i] = _mm256_madd_epi16(_mm256_maddubs_epi16(ones, load_bytes(codes + i * GROUP_BYTES)), wide_ones);
    int32_t parts[4], sum = 0;
    _mm_storeu_si128((__m128i *)parts, sum_lanes(sums));
    for (int i = 0; i < 4; i++) sum += parts[i];
#elif HAVE_NEON
    int16x8_t sums = vdupq_n_s16(0);
    for (int k = 0; k < GROUP; k += 16) sums = vpadalq_s8(sums, vld1q_s8(codes + k));
    const int32_t sum = vaddlvq_s16(sums);
#else
    int32_t sum = 0;
    for (int k = 0; k < GROUP; k++) sum += codes[k];
#endif
    return sum;
}

/* Operands as they are, [rows, groups * GROUP], for weights t + 1: a row's offset is the sum of its codes. */
FN inline void copy_codes(const struct ternary_job *job, int64_t first, int64_t rows, int64_t group, int64_t groups,
                   int8_t *operands, int32_t *offsets) {
    for (int64_t row = 0; row < rows; row++) {
        int32_t sum = group ? offsets[row] : 0;
        for (int64_t g = 0; g < groups; g++, operands += GROUP) {
            int8_t tail[GROUP];
            const int8_t *codes = group_codes(job, first + row, group + g, tail);
            memcpy(operands, codes, GROUP);
            sum += sum_codes(codes);
        }
        offsets[row] = sum;
    }
}

/* lowrank_a of a panel's channels, transposed to [rank / ROW_PAIR, PANEL]; zeros beyond the last channel. */
FN void transpose_lowrank(const struct layer *layer, int64_t channel, float *out) {
    const int64_t rank = layer->rank, channels = min64(PANEL, layer->channels - channel);
    for (int64_t c = 0; c < PANEL; c += LANES) {
        for (int64_t r = 0; r < rank; r += LANES * ROW_PAIR) {
            vfloat tile[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                tile[i] = c + i < channels ? load_pairs(layer->lowrank_a + (channel + c + i) * rank + r, rank - r)
                                           : splat(0);
            transpose(tile);
            for (int i = 0; i < LANES && (HAVE_AMX || r + i * ROW_PAIR < rank); i++)
                store(out + (r / ROW_PAIR + i) * PANEL + c, tile[i]);
        }
    }
}

/* Outputs of `rows` rows and EPILOGUE_CHANNELS channels, product (scale alpha) + lowrank . A + bias, then the gated
 * residual where asked for; `whole`: there are as many channels. */
INLINE void epilogue_tile(const struct ternary_job *job, int64_t row, int64_t channel, const int32_t *products,
                          const int32_t *offsets, const row_value *lowrank, const float *lowrank_a, const int rows,
                          const int whole) {
    enum { VECTORS = EPILOGUE_CHANNELS / LANES };
    const struct layer *layer = job->layer;
    vfloat correction[EPILOGUE_ROWS][VECTORS] = {0};
#if HAVE_AMX /* which has multiplied already */
    (void)lowrank;
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++) correction[m][i] = load(lowrank_a + m * PANEL + i * LANES);
#else
    for (int64_t r = 0; r < layer->rank; r += ROW_PAIR, lowrank_a += PANEL) {
        vfloat a[VECTORS];
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++) a[i] = once(load(lowrank_a + i * LANES));
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            const vfloat x = splat_term(lowrank + m * lowrank_stride(layer->rank) + r);
#pragma GCC unroll 4
            for (int i = 0; i < VECTORS; i++) correction[m][i] = add_terms(x, a[i], correction[m][i]);
        }
    }
#endif
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++, row++, products += PANEL) {
        const vfloat scale = splat(job->scales[row]);
        float *y = job->y + row * layer->channels;
        const float *gate = job->gate ? job->gate + row / job->rows_per_image * job->gate_stride : NULL;
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++) {
            const int64_t at = channel + i * LANES, left = whole ? LANES : layer->channels - at;
            if (left <= 0) break;
            const vfloat exact = to_float(sub_int(load_int(products + i * LANES), splat_int(offsets[m])));
            const vfloat main_term = mul(exact, mul(scale, load_part(layer->alpha + at, left)));
            vfloat result = add(add(main_term, correction[m][i]), load_part(layer->bias + at, left));
            if (gate) result = add(load_part(y + at, left), mul(result, load_part(gate + at, left)));
            store_part(y + at, result, left);
        }
    }
}

/* Outputs of a block of rows and a panel. */
FN void epilogue(const struct ternary_job *job, int64_t first, int64_t rows, int64_t channel, const int32_t *products,
                 const int32_t *offsets, const row_value *lowrank, const float *lowrank_a) {
    const int64_t stride = lowrank_stride(job->layer->rank), line = HAVE_AMX ? PANEL : 0;
#if HAVE_AMX
    float corrections[WHOLE_ROWS * PANEL] __attribute__((aligned(ALIGNMENT)));
    tile_corrections(lowrank, lowrank_a, rows, stride, corrections);
    lowrank_a = corrections;
#endif
    for (int c = 0; c < PANEL; c += EPILOGUE_CHANNELS) {
        const int whole = channel + c + EPILOGUE_CHANNELS <= job->layer->channels;
        const int64_t even = whole ? rows / EPILOGUE_ROWS * EPILOGUE_ROWS : 0;
        for (int64_t m = 0; m < even; m += EPILOGUE_ROWS)
            epilogue_tile(job, first + m, channel + c, products + m * PANEL + c, offsets + m, lowrank + m * stride,
                          lowrank_a + m * line + c, EPILOGUE_ROWS, 1);
        for (int64_t m = even; m < rows; m++)
            epilogue_tile(job, first + m, channel + c, products + m * PANEL + c, offsets + m, lowrank + m * stride,
                          lowrank_a + m * line + c, 1, 0);
    }
}

/* Outputs of a block of rows and the panels that were multiplied together. */
INLINE void put_outputs(const struct ternary_job *job, int64_t first, int64_t rows, int64_t channel,
                        const int32_t *products, const struct ternary_buffers *b, const struct product *product) {
    enum { STRIDE = WHOLE_ROWS * PANEL };
    const struct layer *layer = job->layer;
    const int64_t panels = min64(job->panels, ceil_div(layer->channels - channel, PANEL));
    const int64_t line = ALIGNMENT / (int64_t)sizeof *job->y, end = min64(channel + panels * PANEL, layer->channels);
    for (int64_t p = 0; p < panels; p++)
        transpose_lowrank(layer, channel + p * PANEL, b->lowrank_a + p * layer->rank * PANEL);
    for (int64_t m = 0; m < rows; m += WHOLE_ROWS) {
        const int64_t count = min64(WHOLE_ROWS, rows - m);
        for (int64_t row = first + m; row < first + m + count; row++)
            for (int64_t c = channel; c < end; c += line) __builtin_prefetch(job->y + row * layer->channels + c, 0, 2);
        if (product->finish) product->finish(job, channel, m, count, products, b);
        for (int64_t p = 0; p < panels; p++)
            epilogue(job, first + m, count, channel + p * PANEL,
                     product->finish ? b->finished + p * STRIDE : products + m * PANEL, b->offsets + m,
                     (const row_value *)b->lowrank + m * lowrank_stride(layer->rank),
                     b->lowrank_a + p * layer->rank * PANEL);
    }
}

INLINE void ternary_task(const struct ternary_job *job, int64_t task, char *scratch, const struct product *product) {
    const int64_t channels = job->layer->channels, channel_blocks = ceil_div(channels, job->block_channels);
    const int64_t channel = task % channel_blocks * job->block_channels;
    const int64_t end = min64(channel + job->block_channels, channels);
    const int64_t first = task / channel_blocks * job->block_rows, rows = min64(job->block_rows, job->rows - first);
    struct ternary_buffers b;
    ternary_carve(scratch, job, &b);
#if HAVE_AMX
    configure_tiles(0);
#endif
    const int64_t rank = job->layer->rank;
    b.lowrank = lowrank_rows(job->lowrank + first * rank, rows, rank, (void *)b.lowrank);

    const int64_t groups = job->padded_width / GROUP, stride = round_up(rows, WHOLE_ROWS) * PANEL;
    for (int64_t group = 0; group < groups; group += job->slice_groups) {
        const int64_t count = min64(job->slice_groups, groups - group);
        const int last = group + count == groups;
        product->operands(job, first, rows, group, count, b.operands, b.offsets);
        for (int64_t c = channel; c < end; c += job->panels * PANEL) {
            /* One slice: panels are done before the next. Several: the products of all panels are kept. */
            int32_t *products = b.products + (count == groups ? 0 : (c - channel) / PANEL * stride);
            if (!group && product->adds) memset(products, 0, (size_t)stride * sizeof *products);
            if (product->decode) product->decode(job, c, group, count, b.panel);
            product->multiply(job, c, group, count, b.panel, b.operands, rows, products);
            if (last) put_outputs(job, first, rows, c, products, &b, product);
        }
    }
#if HAVE_AMX
    release_tiles();
#endif
}
