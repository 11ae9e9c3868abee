/* A file's ternary weights, five to a byte in base 3, to the planar form that the kernels read: see quant/packing.py. */
#include "base3.h"

#include <string.h>

enum { TRITS = 5, GROUP = 128, PLANE = GROUP / 4, VALUES = 243, SLOT = 8 };

/* The five digits of every byte, the first the lowest, in a word of eight, so that one store writes them all. Bytes above
 * 242 stand for no digits; the caller has refused them. */
static void fill_table(uint8_t table[256][SLOT]) {
    memset(table, 0, 256 * SLOT);
    for (int value = 0; value < VALUES; value++)
        for (int i = 0, rest = value; i < TRITS; i++, rest /= 3) table[value][i] = (uint8_t)(rest % 3);
}

/* GROUP digits of 0..2 to PLANE bytes, eight at a time: no shift of a digit leaves its byte. */
static void pack_group(const uint8_t *digits, uint8_t *planar) {
    for (int at = 0; at < PLANE; at += 8) {
        uint64_t plane[4], word = 0;
        for (int i = 0; i < 4; i++) memcpy(&plane[i], digits + i * PLANE + at, 8);
        for (int i = 0; i < 4; i++) word |= plane[i] << (2 * i);
        memcpy(planar + at, &word, 8);
    }
}

void planar_from_base3(const uint8_t *packed, int64_t rows, int64_t width, uint8_t *planar) {
    uint8_t table[256][SLOT];
    uint8_t buffer[GROUP + 2 * SLOT];
    fill_table(table);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t column = 0; column < width; column += GROUP, planar += PLANE) {
            int64_t first = row * width + column, count = width - column < GROUP ? width - column : GROUP;
            int64_t skip = first % TRITS, bytes = (skip + count + TRITS - 1) / TRITS;
            for (int64_t i = 0; i < bytes; i++) memcpy(buffer + TRITS * i, table[packed[first / TRITS + i]], SLOT);
            memset(buffer + skip + count, 1, (size_t)(GROUP - count)); /* padding is weight 0 */
            pack_group(buffer + skip, planar);
        }
}
