/* The integer product by AMX tiles: 16 tokens by 16 channels by 64 codes an instruction, on panels as product_vnni.h
 * decodes them, four codes of a channel side by side. Tiles 0-3 hold sums of 2 x 2 such blocks, 4-5 codes, 6-7 weights.
 *
 * A panel is decoded slice by slice of the width, short enough for the level-1 cache: it serves all rows from there.
 * After the last slice the outputs of 32 rows follow at once. Rows beyond the last of a block are multiplied and
 * forgotten: buffers are long enough for whole tiles. */

/* Groups of a slice: its 16 KiB of weights stay in a level-1 cache of 48, through which pass 16 for each 32 rows, codes
 * and sums. */
enum { AMX_GROUPS = 2, TILE = TILE_ROWS * TILE_BYTES };

/* Groups of each slice but the last of `groups`. */
INLINE int64_t amx_slice(int64_t groups) { return ceil_div(groups, ceil_div(groups, AMX_GROUPS)); }

/* Operands as tiles, [rows / 16][codes / 64][16][64], for weights t + 1: a row's offset is the sum of its codes. */
FN void amx_codes(const struct ternary_job *job, int64_t first, int64_t rows, int64_t group, int64_t groups,
                  int8_t *operands, int32_t *offsets) {
    const __m512i ones = _mm512_set1_epi8(1);
    for (int64_t row = 0; row < rows; row++) {
        int8_t *out = operands + row / TILE_ROWS * TILE_ROWS * groups * GROUP + row % TILE_ROWS * TILE_BYTES;
        __m512i sums = _mm512_setzero_si512();
        for (int64_t g = 0; g < groups; g++) {
            int8_t tail[GROUP];
            const int8_t *codes = group_codes(job, first + row, group + g, tail);
            for (int k = 0; k < GROUP; k += TILE_BYTES, out += TILE) {
                const __m512i part = _mm512_loadu_si512(codes + k);
                _mm512_storeu_si512(out, part);
                sums = _mm512_dpbusd_epi32(sums, ones, part);
            }
        }
        int32_t lanes[TILE_BYTES / 4], sum = group ? offsets[row] : 0;
        _mm512_storeu_si512(lanes, sums);
        for (int i = 0; i < TILE_BYTES / 4; i++) sum += lanes[i];
        offsets[row] = sum;
    }
}

/* products[tokens, channels] = before + codes . weights, for one or two tiles of tokens, `next` bytes apart, and two of
 * channels; `before`: NULL for zeros. */
INLINE void amx_tile(const uint8_t *panel, const int8_t *codes, int64_t next, int64_t groups, const int32_t *before,
                     int32_t *products, const int pair) {
    enum { LINE = PANEL * sizeof *products, ROWS = TILE_ROWS * PANEL };
    const uint8_t *panel_end = panel + groups * GROUP * BLOCK_CHANNELS;
    tile_barrier();
    if (before) {
        _tile_loadd(0, before, LINE);
        _tile_loadd(1, before + BLOCK_CHANNELS, LINE);
        if (pair) {
            _tile_loadd(2, before + ROWS, LINE);
            _tile_loadd(3, before + ROWS + BLOCK_CHANNELS, LINE);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (const uint8_t *weights = panel; weights < panel_end; weights += TILE, codes += TILE) {
        _tile_loadd(4, codes, TILE_BYTES);
        _tile_loadd(6, weights, QUAD_BYTES);
        _tile_loadd(7, weights + (panel_end - panel), QUAD_BYTES);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        if (pair) {
            _tile_loadd(5, codes + next, TILE_BYTES);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, products, LINE);
    _tile_stored(1, products + BLOCK_CHANNELS, LINE);
    if (pair) {
        _tile_stored(2, products + ROWS, LINE);
        _tile_stored(3, products + ROWS + BLOCK_CHANNELS, LINE);
    }
}

/* The same for up to 32 tokens and a panel. */
INLINE void amx_rows(const uint8_t *panel, const int8_t *codes, int64_t next, int64_t groups, int64_t rows,
                     const int32_t *before, int32_t *products) {
    for (int c = 0; c < PANEL; c += 2 * BLOCK_CHANNELS) {
        const uint8_t *weights = panel + c * groups * GROUP;
        const int32_t *sums = before ? before + c : NULL;
        if (rows > TILE_ROWS) amx_tile(weights, codes, next, groups, sums, products + c, 1);
        else amx_tile(weights, codes, next, groups, sums, products + c, 0);
    }
}

/* All slices but the last of the width, which is only decoded. */
FN void amx_multiply(const struct ternary_job *job, int64_t channel, int64_t group, int64_t groups,
                     uint8_t *panel, const int8_t *codes, int64_t rows, int32_t *products) {
    const int64_t slice = amx_slice(groups), next = TILE_ROWS * groups * GROUP, all = job->padded_width / GROUP;
    for (int64_t at = 0; at < groups; at += slice, codes += slice * GROUP * TILE_ROWS) {
        const int64_t count = min64(slice, groups - at);
        vnni_decode(job, channel, group + at, count, panel);
        if (group + at + count == all) break;
        for (int64_t row = 0; row < rows; row += 2 * TILE_ROWS) {
            int32_t *out = products + row * PANEL;
            amx_rows(panel, codes + row * groups * GROUP, next, count, rows - row, group + at ? out : NULL, out);
        }
    }
}

FN void amx_finish(const struct ternary_job *job, int64_t channel, int64_t first, int64_t rows, const int32_t *left,
                   const struct ternary_buffers *b) {
    const int64_t all = job->padded_width / GROUP, groups = (all - 1) % job->slice_groups + 1;
    const int64_t count = (groups - 1) % amx_slice(groups) + 1, next = TILE_ROWS * groups * GROUP;
    const int8_t *codes = b->operands + first * groups * GROUP + (groups - count) * GROUP * TILE_ROWS;
    (void)channel;
    amx_rows(b->panel, codes, next, count, rows, count < all ? left + first * PANEL : NULL, b->finished);
}

static const struct product amx_product = {.operands = amx_codes, .multiply = amx_multiply, .finish = amx_finish};
