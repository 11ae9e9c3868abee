/* The integer product by AMX tiles: 16 tokens by 16 channels by 64 codes an instruction, on panels as product_vnni.h
 * decodes them, four codes of a channel side by side. Tiles 0-3 hold sums of 2 x 2 such blocks, 4-5 codes, 6-7 weights.
 *
 * Rows beyond the last of a block are multiplied and forgotten: buffers are long enough for whole tiles. */

/* products[tokens, channels] += codes . weights, for one or two tiles of tokens and two of channels. */
INLINE void amx_tile(const uint8_t *panel, const int8_t *codes, int64_t width, int32_t *products, const int pair) {
    enum { STRIDE = PANEL * sizeof *products };
    const uint8_t *next_panel = panel + width * BLOCK_CHANNELS;
    int32_t *next_products = products + TILE_ROWS * PANEL;
    _tile_loadd(0, products, STRIDE);
    _tile_loadd(1, products + BLOCK_CHANNELS, STRIDE);
    if (pair) {
        _tile_loadd(2, next_products, STRIDE);
        _tile_loadd(3, next_products + BLOCK_CHANNELS, STRIDE);
    }
    for (int64_t k = 0; k < width; k += TILE_BYTES) {
        _tile_loadd(4, codes + k, width);
        _tile_loadd(6, panel + k * BLOCK_CHANNELS, QUAD_BYTES);
        _tile_loadd(7, next_panel + k * BLOCK_CHANNELS, QUAD_BYTES);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        if (pair) {
            _tile_loadd(5, codes + TILE_ROWS * width + k, width);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, products, STRIDE);
    _tile_stored(1, products + BLOCK_CHANNELS, STRIDE);
    if (pair) {
        _tile_stored(2, next_products, STRIDE);
        _tile_stored(3, next_products + BLOCK_CHANNELS, STRIDE);
    }
}

FN void amx_multiply(const struct ternary_job *job, int64_t channel, int64_t group, int64_t groups,
                     uint8_t *panel, const int8_t *codes, int64_t rows, int32_t *products) {
    const int64_t width = groups * GROUP;
    (void)job, (void)channel, (void)group;
    configure_tiles(0);
    for (int64_t row = 0; row < rows; row += 2 * TILE_ROWS) {
        for (int c = 0; c < PANEL; c += 2 * BLOCK_CHANNELS) {
            const uint8_t *weights = panel + c * width;
            int32_t *out = products + row * PANEL + c;
            if (rows - row > TILE_ROWS) amx_tile(weights, codes + row * width, width, out, 1);
            else amx_tile(weights, codes + row * width, width, out, 0);
        }
    }
    release_tiles();
}

static const struct product amx_product = {
    .adds = 1, .decode = vnni_decode, .operands = copy_codes, .multiply = amx_multiply};
