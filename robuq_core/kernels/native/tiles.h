/* The tiles of AMX: eight registers of up to 16 rows of 64 bytes. A product adds rows of codes by columns of weights to
 * a tile of sums; a row of the weights' tile holds four weights of each column, side by side. */

enum { TILE_ROWS = 16, TILE_BYTES = 64 };

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* Compilers do not see that tile instructions read memory: what they read is written before. */
INLINE void tile_barrier(void) { __asm__ volatile("" ::: "memory"); }

/* Whole tiles; but for an `edge` that is not 0, tile 6 holds rows of `edge` packs of four codes, tile 7 `edge` rows.
 * A thread that holds tiles for long makes its switches dear: release them. */
INLINE void configure_tiles(int64_t edge) {
    struct tile_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.rows[i] = TILE_ROWS;
        config.row_bytes[i] = TILE_BYTES;
    }
    if (edge) {
        config.row_bytes[6] = (uint16_t)(4 * edge);
        config.rows[7] = (uint8_t)edge;
    }
    __asm__ volatile("" ::"r"(&config) : "memory"); /* a barrier that knows of this object */
    _tile_loadconfig(&config);
}

/* out [rows, PANEL] = values [rows, depth] . factors [depth / 2, PANEL, 2], bfloat16, by whole tiles of both. */
INLINE void tile_corrections(const uint16_t *values, const float *factors, int64_t rows, int64_t depth, float *out) {
    enum { LINE = PANEL * sizeof *out, PAIRS = TILE_BYTES / sizeof *factors };
    tile_barrier();
    for (; rows > 0; rows -= TILE_ROWS, values += TILE_ROWS * depth, out += TILE_ROWS * PANEL) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < depth; k += 2 * PAIRS) {
            const float *from = factors + k / 2 * PANEL;
            _tile_loadd(4, values + k, depth * (int64_t)sizeof *values);
            _tile_loadd(5, from, LINE);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, from + PAIRS, LINE);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(5, from + 2 * PAIRS, LINE);
            _tile_dpbf16ps(2, 4, 5);
            _tile_loadd(6, from + 3 * PAIRS, LINE);
            _tile_dpbf16ps(3, 4, 6);
        }
        _tile_stored(0, out, LINE);
        _tile_stored(1, out + PAIRS, LINE);
        _tile_stored(2, out + 2 * PAIRS, LINE);
        _tile_stored(3, out + 3 * PAIRS, LINE);
    }
}

INLINE void release_tiles(void) {
    tile_barrier();
    _tile_release();
}
