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

/* Whole tiles; but for an `edge` that is not 0, tile 6 holds rows of so many packs of four codes, tile 7 so many rows.
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

INLINE void release_tiles(void) {
    tile_barrier();
    _tile_release();
}
