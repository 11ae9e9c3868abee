#ifndef ROBUQ_BASE3_H
#define ROBUQ_BASE3_H
#include <stdint.h>

/* `packed`, ceil(rows * width / 5) bytes of 0..242, to `planar`, rows * ceil(width / 128) * 32 bytes. */
void planar_from_base3(const uint8_t *packed, int64_t rows, int64_t width, uint8_t *planar);

#endif
