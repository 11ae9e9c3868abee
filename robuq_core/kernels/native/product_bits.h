/* The integer product in bit planes, for codes of up to five bits: a vector holds one bit of 512 output channels (AVX2:
 * 256).
 *
 * A code's cell of b bits is a sum of 2^i s_i / 2 with signs s_i = +-1, one per bit. A weight t adds one to the count of
 * bit i where t s_i = 1. A product is the sum of 2^i count_i, twice, less a constant of the channel (see put_products).
 *
 * Three weights of a channel and three signs add 0 to 3. A table has both bits of that sum for all channels and each of
 * the eight choices of signs: 1 KiB for three codes. The 22 tables of half a group stay in a level-1 cache. For each table
 * and bit a token picks an entry; full adders, two instructions each (AVX2: five), add the entries to the token's
 * counters. These are planes too. After the last code they are transposed to integers, some rows at a time. */

#if HAVE_AVX512VNNI
typedef __m512i vplane;
#else
typedef __m256i vplane;
#endif

enum {
    PLANE_BYTES = sizeof(vplane),
    BIT_PANELS = 8 * PLANE_BYTES / PANEL, /* of a vector */
    HALF_CODES = GROUP / 2,     /* the codes k, k + 32, k + 64, k + 96 for 16 of k, 16 of each */
    TRIPLES = HALF_CODES / 3,   /* tables of the codes t, t + 21 and t + 42; one more has the last code alone */
    PICKS = 32,                 /* of a token and a sign, each an offset in PICK_UNITs; the last ten are not used */
    PICK_UNIT = 8,              /* bytes, that an x86 address may multiply by */
    ENTRY_BYTES = 2 * PLANE_BYTES, /* of a table: the low bits of the sums, then the high ones */
    TABLE_BYTES = 8 * ENTRY_BYTES,
    HALF_BYTES = (TRIPLES + 1) * TABLE_BYTES,
    MOST_BITS = 5,
    PLANE_INTS = PLANE_BYTES / 4,
    /* Channels of the eight vectors of bytes that become planes: each has 64 neighbours, or with AVX2 every eighth. */
    VECTOR_STEP = HAVE_AVX512VNNI ? PLANE_BYTES : 1,
    CHANNEL_STEP = HAVE_AVX512VNNI ? 1 : 8,
    PASS_PLANES = 9,            /* that a pass over one or two signs adds to; carries go beyond */
};

INLINE int code_bits(const struct layer *layer) { return 64 - __builtin_clzll((uint64_t)layer->max_code); }

/* Planes of a token's counters. */
INLINE int count_planes(const struct ternary_job *job) {
    const int bits = code_bits(job->layer), passed = PASS_PLANES + (bits - 1) / 2 * 2;
    const int needed = 64 - __builtin_clzll((uint64_t)(job->layer->max_code * job->padded_width));
    return needed > passed ? needed : passed;
}

INLINE vplane load_plane(const void *p) { return *(const vplane *)p; }
INLINE void store_plane(void *p, vplane x) { *(vplane *)p = x; }

#if HAVE_AVX512VNNI
INLINE vplane unpack_low(vplane a, vplane b) { return _mm512_unpacklo_epi8(a, b); }
INLINE vplane unpack_high(vplane a, vplane b) { return _mm512_unpackhi_epi8(a, b); }

/* 16 bytes of a row in each lane, of rows 16 * stride apart. */
INLINE vplane load_rows(const uint8_t *row, int64_t stride) {
    const __m256i low = load_two(row, row + 16 * stride), high = load_two(row + 32 * stride, row + 48 * stride);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

/* The bits of each eight bytes, the last of them first, as eight bytes. */
INLINE __m512i transpose_bits(__m512i x) {
    return _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64((int64_t)0x8040201008040201u), x, 0);
}

/* Lanes of 16 bytes: 0 and 2 of a and of b, or 1 and 3. */
INLINE __m512i even_lanes_of(__m512i a, __m512i b) { return _mm512_shuffle_i32x4(a, b, 0x88); }
INLINE __m512i odd_lanes_of(__m512i a, __m512i b) { return _mm512_shuffle_i32x4(a, b, 0xDD); }

/* Planes of a byte of all channels: of its eight bits, a bit for each channel. */
INLINE void byte_planes(const __m512i bytes[8], __m512i planes[8]) {
    uint8_t order[64];
    for (int i = 0; i < 64; i++) order[i] = (uint8_t)(i % 8 * 8 + i / 8);
    const __m512i together = _mm512_loadu_si512(order);
    __m512i x[8], pairs[8];
#pragma GCC unroll 8
    for (int p = 0; p < 8; p++) x[p] = _mm512_permutexvar_epi8(together, transpose_bits(bytes[p]));
#pragma GCC unroll 4
    for (int p = 0; p < 8; p += 2) {
        pairs[p] = _mm512_unpacklo_epi64(x[p], x[p + 1]);
        pairs[p + 1] = _mm512_unpackhi_epi64(x[p], x[p + 1]);
    }
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {
        const __m512i a = even_lanes_of(pairs[odd], pairs[odd + 2]), b = even_lanes_of(pairs[odd + 4], pairs[odd + 6]);
        const __m512i c = odd_lanes_of(pairs[odd], pairs[odd + 2]), d = odd_lanes_of(pairs[odd + 4], pairs[odd + 6]);
        planes[odd] = even_lanes_of(a, b);
        planes[2 + odd] = even_lanes_of(c, d);
        planes[4 + odd] = odd_lanes_of(a, b);
        planes[6 + odd] = odd_lanes_of(c, d);
    }
}

#else
INLINE vplane unpack_low(vplane a, vplane b) { return _mm256_unpacklo_epi8(a, b); }
INLINE vplane unpack_high(vplane a, vplane b) { return _mm256_unpackhi_epi8(a, b); }
INLINE vplane load_rows(const uint8_t *row, int64_t stride) { return load_two(row, row + 16 * stride); }

/* Bits of eight vectors: of each eight bits, one in each vector, a byte. Its own inverse. */
INLINE void transpose_bits(vplane x[8]) {
#pragma GCC unroll 3
    for (int shift = 4; shift; shift /= 2) {
        const vplane mask = _mm256_set1_epi8(shift == 4 ? 0x0F : shift == 2 ? 0x33 : 0x55);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            if (i & shift) continue;
            const vplane swap = (_mm256_srli_epi16(x[i], shift) ^ x[i + shift]) & mask;
            x[i + shift] ^= swap;
            x[i] ^= _mm256_slli_epi16(swap, shift);
        }
    }
}

INLINE void byte_planes(const vplane bytes[8], vplane planes[8]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) planes[i] = bytes[i];
    transpose_bits(planes);
}
#endif

/* Bytes of vectors in turns, twice: 16 vectors, transposed in each lane by two of it. */
INLINE void interleave_bytes(vplane x[16]) {
    vplane other[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        other[2 * i] = unpack_low(x[i], x[i + 8]);
        other[2 * i + 1] = unpack_high(x[i], x[i + 8]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        x[2 * i] = unpack_low(other[i], other[i + 8]);
        x[2 * i + 1] = unpack_high(other[i], other[i + 8]);
    }
}

/* Bytes 0 to 15 of as many rows as a vector has bytes, a vector for each. With AVX-512 each eight rows are in reverse, for
 * transpose_bits(). */
INLINE void bytes_of_rows(const uint8_t *rows, int64_t stride, vplane out[16]) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) out[i] = load_rows(rows + (HAVE_AVX512VNNI ? i ^ 7 : i) * stride, stride);
    interleave_bytes(out);
    interleave_bytes(out);
}

/* sum += b + c, bit by bit; returns the carry. In assembly: GCC moves more from register to register. */
INLINE vplane full_adder(vplane *sum, vplane b, vplane c) {
    vplane carry;
#if HAVE_AVX512VNNI && !defined(ROBUQ_SIMDE)
    __asm__("vmovdqa64 %0, %1\n\tvpternlogd $0x96, %2, %3, %0\n\tvpternlogd $0xE8, %2, %3, %1"
            : "+v"(*sum), "=&v"(carry) : "v"(b), "v"(c));
#else
    const vplane differ = *sum ^ b;
    carry = (*sum & b) | (differ & c);
    *sum = differ ^ c;
#endif
    return carry;
}

/* Tables of half a group, from the planes of t + 1. */
FN void half_tables(const vplane low[HALF_CODES], const vplane high[HALF_CODES], uint8_t *out) {
    for (int t = 0; t <= TRIPLES; t++, out += TABLE_BYTES) {
        vplane adds[3][2]; /* of the three codes, for a sign of -1 and of 1: where the weight is -1, and 1 */
        for (int i = 0; i < 3; i++) {
            const int code = t + i * TRIPLES;
            adds[i][0] = adds[i][1] = (vplane){0};
            if (t == TRIPLES && i < 2) continue;
            adds[i][0] = ~(low[code] | high[code]);
            adds[i][1] = high[code];
        }
#pragma GCC unroll 8
        for (int entry = 0; entry < 8; entry++) {
            vplane sum = adds[0][entry & 1];
            const vplane carry = full_adder(&sum, adds[1][entry >> 1 & 1], adds[2][entry >> 2]);
            store_plane(out + entry * ENTRY_BYTES, sum);
            store_plane(out + entry * ENTRY_BYTES + PLANE_BYTES, carry);
        }
    }
}

/* The tables of a group of codes and BIT_PANELS panels. */
FN void bits_tables(const struct ternary_job *job, int64_t channel, int64_t group, uint8_t *panel) {
    const int64_t stride = job->padded_width / GROUP * GROUP_BYTES;
    for (int64_t at = group * GROUP_BYTES; at < (group + 1) * GROUP_BYTES; at += 16, panel += HALF_BYTES) {
        vplane bytes[16][8] = {0}, low[HALF_CODES], high[HALF_CODES];
        for (int i = 0; i < 8 && channel + i * VECTOR_STEP < job->layer->channels; i++) {
            const int64_t first = channel + i * VECTOR_STEP;
            vplane part[16];
            if (first + (PLANE_BYTES - 1) * CHANNEL_STEP < job->layer->channels) {
                bytes_of_rows(job->layer->planar + first * stride + at, CHANNEL_STEP * stride, part);
            } else {
                uint8_t edge[PLANE_BYTES * 16];
                for (int row = 0; row < PLANE_BYTES; row++)
                    memcpy(edge + row * 16, planar_row(job, first + row * CHANNEL_STEP) + at, 16);
                bytes_of_rows(edge, 16, part);
            }
            for (int j = 0; j < 16; j++) bytes[j][i] = part[j];
        }
        for (int j = 0; j < 16; j++) {
            vplane planes[8];
            byte_planes(bytes[j], planes);
            for (int digit = 0; digit < 4; digit++) {
                low[digit * 16 + j] = planes[2 * digit];
                high[digit * 16 + j] = planes[2 * digit + 1];
            }
        }
        half_tables(low, high, panel);
    }
}

/* Picks of half a group of all rows, and of one more where they are odd: a token beside the last. */
INLINE int64_t half_picks(const struct layer *layer, int64_t rows) { return round_up(rows, 2) * code_bits(layer) * PICKS; }

/* Which entries each token picks: [group][half][row][bit][PICKS]. */
FN void bits_operands(const struct ternary_job *job, int64_t first, int64_t rows, int64_t group, int64_t groups,
                      int8_t *operands, int32_t *offsets) {
    const struct layer *layer = job->layer;
    const int bits = code_bits(layer);
    /* A code's cell from 0 on: (code + max_code) / 2, or code + 2^(bits - 1). */
    const __m256i lowest = _mm256_set1_epi8((char)(layer->midrise ? layer->max_code : (layer->max_code + 1) / 2));
    const __m256i one = _mm256_set1_epi8(1), no_sign = _mm256_set1_epi8(0x7F);
    uint8_t kept[2 * PICKS] = {0}; /* of a digit: the lanes of TRIPLES codes; of the third one more */
    memset(kept, 0xFF, TRIPLES);
    memset(kept + PICKS, 0xFF, TRIPLES + 1);
    memset(offsets, 0, (size_t)rows * sizeof *offsets);
    for (int64_t g = 0; g < groups; g++, operands += 2 * half_picks(layer, rows)) {
        for (int64_t row = 0; row < rows; row++) {
            int8_t tail[GROUP];
            const int8_t *codes = group_codes(job, first + row, group + g, tail);
            __builtin_prefetch(codes + 8 * layer->width);
            __builtin_prefetch(codes + 8 * layer->width + ALIGNMENT);
            uint8_t cells[2][HALF_CODES + PICKS]; /* of the halves */
            for (int i = 0; i < 4; i++) {
                __m256i cell = _mm256_add_epi8(load_bytes(codes + i * 32), lowest);
                if (layer->midrise) cell = _mm256_and_si256(_mm256_srli_epi16(cell, 1), no_sign);
                _mm_storeu_si128((__m128i *)(cells[0] + i * 16), _mm256_castsi256_si128(cell));
                _mm_storeu_si128((__m128i *)(cells[1] + i * 16), _mm256_extracti128_si256(cell, 1));
            }
            for (int half = 0; half < 2; half++) {
                uint8_t *out = (uint8_t *)operands + half * half_picks(layer, rows) + row * bits * PICKS;
                __m256i digit[3]; /* the codes t, t + 21 and t + 42; of the last table, the third alone */
                for (int i = 0; i < 3; i++)
                    digit[i] = _mm256_and_si256(load_bytes(cells[half] + i * TRIPLES), load_bytes(kept + i / 2 * PICKS));
                for (int bit = 0; bit < bits; bit++, out += PICKS) {
                    __m256i entry = _mm256_setzero_si256();
                    for (int i = 2; i >= 0; i--) {
                        entry = _mm256_add_epi8(_mm256_add_epi8(entry, entry), _mm256_and_si256(digit[i], one));
                        digit[i] = _mm256_srli_epi16(digit[i], 1);
                    }
                    store_bytes(out, _mm256_slli_epi16(entry, __builtin_ctz(ENTRY_BYTES / PICK_UNIT)));
                }
                if (row + 1 == rows && rows % 2) memset(out, 0, (size_t)(bits * PICKS));
            }
        }
    }
}

/* A token's counters while entries are added, and what waits at each plane for a second summand. The compiler knows `full`
 * everywhere. */
struct adder {
    vplane sums[PASS_PLANES + 1], waiting[PASS_PLANES + 1];
    unsigned full;
};

#define ADD_PLANE(plane, next)                                                          \
    INLINE void add_plane##plane(struct adder *a, vplane x) {                          \
        if (!(a->full >> plane & 1)) {                                                  \
            a->waiting[plane] = x;                                                      \
            a->full |= 1u << plane;                                                     \
            return;                                                                     \
        }                                                                               \
        a->full &= ~(1u << plane);                                                      \
        next(a, full_adder(&a->sums[plane], a->waiting[plane], x));                       \
    }                                                                                   \
    /* Without a second summand. */                                                     \
    INLINE void end_plane##plane(struct adder *a) {                                     \
        if (!(a->full >> plane & 1)) return;                                            \
        const vplane carry = a->sums[plane] & a->waiting[plane];                        \
        a->sums[plane] ^= a->waiting[plane];                                            \
        next(a, carry);                                                                 \
    }

/* The carry of all. */
INLINE void add_plane9(struct adder *a, vplane x) {
    a->sums[PASS_PLANES] = x; /* once at most: all that a pass adds is less than 2^8 */
}
ADD_PLANE(8, add_plane9)
ADD_PLANE(7, add_plane8)
ADD_PLANE(6, add_plane7)
ADD_PLANE(5, add_plane6)
ADD_PLANE(4, add_plane5)
ADD_PLANE(3, add_plane4)
ADD_PLANE(2, add_plane3)
ADD_PLANE(1, add_plane2)
ADD_PLANE(0, add_plane1)
#undef ADD_PLANE

/* The entries that a token picks, or two side by side where they have no more than half as many channels. */
INLINE vplane load_entries(const uint8_t *table, const uint8_t *picks, int64_t picks_stride, const int side) {
    const uint8_t *entry = table + (size_t)picks[0] * PICK_UNIT;
    if (side == 1) return load_plane(entry);
    const uint8_t *beside = table + (size_t)picks[picks_stride] * PICK_UNIT;
#if HAVE_AVX512VNNI
    return _mm512_inserti64x4(_mm512_castsi256_si512(load_bytes(entry)), load_bytes(beside), 1);
#else
    return load_two(entry, beside);
#endif
}

INLINE void add_entries(struct adder *a, const uint8_t *tables, const uint8_t *picks, int64_t picks_stride, int t,
                        const int two, const int side) {
    const uint8_t *second = picks + PICKS, *own = tables + t * TABLE_BYTES;
    add_plane0(a, load_entries(own, picks + t, picks_stride, side));
    if (two) add_plane1(a, load_entries(own, second + t, picks_stride, side));
    if (t == TRIPLES) return;
    add_plane1(a, load_entries(own + ENTRY_BYTES / 2, picks + t, picks_stride, side));
    if (two) add_plane2(a, load_entries(own + ENTRY_BYTES / 2, second + t, picks_stride, side));
}

INLINE void end_adder(struct adder *a, int32_t *counters, const int level, int planes) {
    a->sums[PASS_PLANES] = (vplane){0};
    end_plane0(a);
    end_plane1(a);
    end_plane2(a);
    end_plane3(a);
    end_plane4(a);
    end_plane5(a);
    end_plane6(a);
    end_plane7(a);
    end_plane8(a);
#pragma GCC unroll 9
    for (int p = 0; p < PASS_PLANES; p++) store_plane(counters + (level + p) * PLANE_INTS, a->sums[p]);
    vplane carry = a->sums[PASS_PLANES];
    for (int p = level + PASS_PLANES; p < planes; p++) {
        int32_t *at = counters + p * PLANE_INTS;
        const vplane before = load_plane(at);
        store_plane(at, before ^ carry);
        carry &= before;
    }
}

/* Adds picks of one or two bits to counters from the plane `level` on, of one or two tokens, `side`. */
INLINE void add_picks(const uint8_t *tables, const uint8_t *picks, int64_t picks_stride, int32_t *counters,
                      const int level, int planes, const int two, const int side) {
    struct adder a;
    a.full = 0;
#pragma GCC unroll 9
    for (int p = 0; p < PASS_PLANES; p++) a.sums[p] = load_plane(counters + (level + p) * PLANE_INTS);
#pragma GCC unroll 22
    for (int t = 0; t <= TRIPLES; t++) add_entries(&a, tables, picks, picks_stride, t, two, side);
    end_adder(&a, counters, level, planes);
}

/* Functions of their own: the compiler then keeps all of an adder in registers. */
#define PICK_FUNCTIONS(side)                                                                                          \
    FN __attribute__((noinline)) void add_two_bits##side(const uint8_t *tables, const uint8_t *picks,                \
                                                         int64_t picks_stride, int32_t *counters, int planes) {       \
        add_picks(tables, picks, picks_stride, counters, 0, planes, 1, side);                                         \
    }                                                                                                                 \
    FN __attribute__((noinline)) void add_bits##side(const uint8_t *tables, const uint8_t *picks,                    \
                                                     int64_t picks_stride, int32_t *counters, int planes, int level,  \
                                                     int two) {                                                       \
        if (two) add_picks(tables, picks, picks_stride, counters, level, planes, 1, side);                            \
        else add_picks(tables, picks, picks_stride, counters, level, planes, 0, side);                                \
    }
PICK_FUNCTIONS(1)
PICK_FUNCTIONS(2)
#undef PICK_FUNCTIONS

/* All bits of half a group of codes. */
FN void add_tokens(const uint8_t *tables, const uint8_t *picks, int64_t picks_stride, int32_t *counters, int planes,
                   int bits, int side) {
    if (bits > 1) {
        if (side == 1) add_two_bits1(tables, picks, picks_stride, counters, planes);
        else add_two_bits2(tables, picks, picks_stride, counters, planes);
    }
    for (int bit = bits > 1 ? 2 : 0; bit < bits; bit += 2) {
        const uint8_t *further = picks + bit * PICKS;
        const int two = bit + 1 < bits;
        if (side == 1) add_bits1(tables, further, picks_stride, counters, planes, bit, two);
        else add_bits2(tables, further, picks_stride, counters, planes, bit, two);
    }
}

#if HAVE_AVX512VNNI
/* Eight planes of 512 bits, the highest first, to bytes: out[m] holds 16 channels of every lane, those of a panel. */
INLINE void planes_to_bytes(const __m512i planes[8], __m512i out[8]) {
    uint8_t order[64];
    for (int i = 0; i < 64; i++) order[i] = (uint8_t)(i / 2 % 8 * 8 + i % 2 * 4 + i / 16);
    const __m512i bytes = _mm512_loadu_si512(order);
    __m512i other[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) out[i] = _mm512_permutexvar_epi8(bytes, planes[i]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        other[2 * i] = _mm512_unpacklo_epi8(out[i], out[i + 4]);
        other[2 * i + 1] = _mm512_unpackhi_epi8(out[i], out[i + 4]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        out[2 * i] = _mm512_unpacklo_epi8(other[i], other[i + 4]);
        out[2 * i + 1] = _mm512_unpackhi_epi8(other[i], other[i + 4]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        other[2 * i] = _mm512_unpacklo_epi8(out[i], out[i + 4]);
        other[2 * i + 1] = _mm512_unpackhi_epi8(out[i], out[i + 4]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) out[i] = transpose_bits(other[i]);
}

INLINE __m512i widen_half(__m512i x, const int second) {
    return _mm512_cvtepu16_epi32(second ? _mm512_extracti64x4_epi64(x, 1) : _mm512_castsi512_si256(x));
}

/* Counters of `side` tokens to products, panels `stride` apart. With n weights that are not 0, p of them 1,
 * and m = 2^b - 1, the sum c of all 2^i count_i gives sum t (2 u + 1) = 2 c - m n on the mid-rise grid, and
 * sum t u = c - p - n (m - 1) / 2 on the mid-tread one. */
INLINE void put_products(const struct ternary_job *job, const int32_t *counters, int32_t *products, int64_t stride,
                         int planes, const int32_t *offsets, int panels, int side, int64_t rows) {
    const int twice = job->layer->midrise;
    __m512i sums[3][BIT_PANELS];
#pragma GCC unroll 3
    for (int byte = 0; byte < 3; byte++) {
        __m512i part[8];
        if (8 * byte >= planes) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) sums[byte][i] = _mm512_setzero_si512();
            continue;
        }
        for (int i = 0; i < 8; i++) {
            const int plane = 8 * byte + 7 - i;
            part[i] = plane < planes ? _mm512_loadu_si512(counters + plane * PLANE_INTS) : _mm512_setzero_si512();
        }
        planes_to_bytes(part, sums[byte]);
    }
    const __m512i zero = _mm512_setzero_si512();
    for (int i = 0; i < BIT_PANELS; i++) {
        const int token = i / (BIT_PANELS / side), p = i % (BIT_PANELS / side);
        if (p >= panels || token >= rows) continue;
        int32_t *out = products + p * stride + token * PANEL;
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const __m512i low = half ? _mm512_unpackhi_epi8(sums[0][i], sums[1][i])
                                     : _mm512_unpacklo_epi8(sums[0][i], sums[1][i]);
            const __m512i high = half ? _mm512_unpackhi_epi8(sums[2][i], zero) : _mm512_unpacklo_epi8(sums[2][i], zero);
#pragma GCC unroll 2
            for (int quarter = 0; quarter < 2; quarter++) {
                const int at = half * 32 + quarter * 16;
                __m512i sum = widen_half(low, quarter);
                if (planes > 16) sum = _mm512_add_epi32(sum, _mm512_slli_epi32(widen_half(high, quarter), 16));
                if (twice) sum = _mm512_add_epi32(sum, sum);
                _mm512_storeu_si512(out + at, _mm512_sub_epi32(sum, _mm512_loadu_si512(offsets + p * PANEL + at)));
            }
        }
    }
}
#else
/* Eight planes, the lowest first, to bytes: out[i] holds the channels 16 i .. 16 i + 15, and 128 more. */
INLINE void planes_to_bytes(vplane x[8]) {
    transpose_bits(x);
#pragma GCC unroll 3
    for (int stage = 0; stage < 3; stage++) {
        vplane other[8];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            other[2 * i] = unpack_low(x[i], x[i + 4]);
            other[2 * i + 1] = unpack_high(x[i], x[i + 4]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) x[i] = other[i];
    }
}

INLINE __m128i half_of(__m256i x, int upper) {
    return upper ? _mm256_extracti128_si256(x, 1) : _mm256_castsi256_si128(x);
}

/* See above. */
INLINE void put_products(const struct ternary_job *job, const int32_t *counters, int32_t *products, int64_t stride,
                         int planes, const int32_t *offsets, int panels, int side, int64_t rows) {
    const vplane zero = {0};
    const __m128i twice = _mm_cvtsi32_si128(job->layer->midrise);
    vplane sums[3][8];
#pragma GCC unroll 3
    for (int byte = 0; byte < 3; byte++) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            sums[byte][i] = 8 * byte + i < planes ? load_plane(counters + (8 * byte + i) * PLANE_INTS) : zero;
        if (8 * byte < planes) planes_to_bytes(sums[byte]);
    }
    for (int at = 0; at < 8 * PLANE_BYTES; at += 8) {
        const int i = at / 16 % 8, token = at / (8 * PLANE_BYTES / side), channel = at % (8 * PLANE_BYTES / side);
        const int p = channel / PANEL;
        if (p >= panels || token >= rows) continue;
        const vplane low = at % 16 ? unpack_high(sums[0][i], sums[1][i]) : unpack_low(sums[0][i], sums[1][i]);
        const vplane high = at % 16 ? unpack_high(sums[2][i], zero) : unpack_low(sums[2][i], zero);
        const int upper = at / 128;
        __m256i sum = _mm256_cvtepu16_epi32(half_of(low, upper));
        sum = _mm256_add_epi32(sum, _mm256_slli_epi32(_mm256_cvtepu16_epi32(half_of(high, upper)), 16));
        sum = _mm256_sub_epi32(_mm256_sll_epi32(sum, twice), load_bytes(offsets + channel));
        store_bytes(products + p * stride + token * PANEL + channel % PANEL, sum);
    }
}
#endif

/* Tokens side by side in a vector. */
INLINE int tokens_beside(const struct layer *layer, int64_t channel) {
    return layer->channels - channel > BIT_PANELS / 2 * PANEL ? 1 : 2;
}

/* Counters [rows / side][plane] of all groups; tables of a group in `panel`. */
FN void bits_multiply(const struct ternary_job *job, int64_t channel, int64_t group, int64_t groups, uint8_t *panel,
                      const int8_t *operands, int64_t rows, int32_t *counters) {
    const struct layer *layer = job->layer;
    const int bits = code_bits(layer), planes = count_planes(job), picks_stride = bits * PICKS;
    const int side = tokens_beside(layer, channel);
    for (int64_t at = 0; at < 2 * groups; at++) {
        const uint8_t *picks = (const uint8_t *)operands + at * half_picks(layer, rows);
        if (at % 2 == 0) bits_tables(job, channel, group + at / 2, panel);
        int32_t *own = counters;
        for (int64_t row = 0; row < rows; row += side, picks += side * picks_stride, own += planes * PLANE_INTS) {
            for (int p = 0; at == 0 && p < planes; p++)
                store_plane(own + p * PLANE_INTS, (vplane){0});
            add_tokens(panel + at % 2 * HALF_BYTES, picks, picks_stride, own, planes, bits, side);
        }
    }
}

FN void bits_finish(const struct ternary_job *job, int64_t channel, int64_t first, int64_t rows,
                    const int32_t *counters, const struct ternary_buffers *b) {
    const struct layer *layer = job->layer;
    const int planes = count_planes(job), side = tokens_beside(layer, channel);
    const int panels = (int)min64(ceil_div(layer->channels - channel, PANEL), BIT_PANELS);
    int32_t offsets[BIT_PANELS * PANEL] = {0};
    const int32_t *nonzero = layer->weight_counts + channel, *ones = nonzero + layer->channels;
    const int32_t most = (int32_t)layer->max_code;
    for (int64_t c = 0; c < min64(BIT_PANELS * PANEL, layer->channels - channel); c++)
        offsets[c] = layer->midrise ? most * nonzero[c] : ones[c] + nonzero[c] * ((most - 1) / 2);
    counters += first / side * planes * PLANE_INTS;
    for (int64_t row = 0; row < rows; row += side, counters += planes * PLANE_INTS)
        put_products(job, counters, b->finished + row * PANEL, WHOLE_ROWS * PANEL, planes, offsets, panels, side,
                     rows - row);
}

static const struct product bits_product = {
    .operands = bits_operands, .multiply = bits_multiply, .finish = bits_finish};

FN void ternary_bits_task(const void *job, int64_t task, char *scratch) {
    ternary_task(job, task, scratch, &bits_product);
}

/* More than two bits take twice as long, so that dot products win with few rows. */
#define BITS_WAY(bits, rows)                                                            \
    {.task = ternary_bits_task, .operand_bytes = 2 * MOST_BITS * PICKS, .panel_bytes = 2 * HALF_BYTES, \
     .panels = BIT_PANELS, .most_groups = INT32_MAX, .block_rows = 512, .decode_rows = 24, \
     .operand_panels = 1, .least_rows = rows, .most_code = (1 << bits) - 1}

#define BITS_WAYS {BITS_WAY(2, 8), BITS_WAY(MOST_BITS, 40), VNNI_WAY, DIRECT_WAY}
