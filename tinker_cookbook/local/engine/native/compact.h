/* Frozen bfloat16 matrices in 12 bits per number, without loss.
 *
 * The exponents of a matrix's numbers are concentrated on few values, so 4 bits name them: a panel has a table of
 * its 16 most frequent exponents, and lists its few numbers with others as exceptions. Sign and mantissa take 8
 * bits. (Zhang et al., "70% Size, 100% Accuracy: Lossless LLM Compression", arXiv:2504.11651, also shortens only
 * exponents, to codes of different lengths.) Expanded numbers have the bits of the original ones.
 *
 * A panel is a header and then units of UNIT inputs, which are two steps of a sum. A step of PANEL outputs is two
 * vectors of PANEL numbers each: neighbouring outputs, with the two inputs of an output side by side. A unit has
 *
 *     [2 steps][2 PANEL] bytes: signs and mantissas; 8 of the first vector and 8 of the second one in turns
 *     [PANEL] words of 16 bits: the exponents' numbers in the table; word i has those of number i of the first
 *                               step's vectors in its lower byte and those of the second step's in the upper one
 *
 * Only for products of pairs.
 */
#ifndef COMPACT_H
#define COMPACT_H
#include "pairs.h"

#define COMPACT_BITS 12 /* the `bits` of such a matrix */
#define UNIT 4
#define UNIT_BYTES (6 * PANEL)
#define GROUP_INPUTS 32 /* inputs with one list of exceptions */

typedef struct {
    uint16_t exponents[32]; /* the table, twice, at the place of a bfloat16's exponent */
    int64_t exceptions;     /* offset in bytes of a list that begins with an index for each group and one more;
                             * entries [list[g], list[g + 1]) of the list are those of group g. An entry has the
                             * number's place in the expanded group in its upper half, and the number below. */
    char unused[56];
} CompactHeader;

INLINE int64_t compact_panel_bytes(int64_t inputs) {
    return (int64_t)sizeof(CompactHeader) + (inputs + UNIT - 1) / UNIT * UNIT_BYTES;
}

INLINE const CompactHeader *header_of(const char *panel) {
    return (const CompactHeader *)(const void *)panel;
}

INLINE const uint32_t *exceptions_of(const char *panel) {
    return (const uint32_t *)(const void *)(panel + header_of(panel)->exceptions);
}

/* Return unit `n` of a panel. */
INLINE const char *unit_of(const char *panel, int64_t n) {
    return panel + sizeof(CompactHeader) + n * UNIT_BYTES;
}

/* Return the place of number `i` of vector `v` among the bytes of a step. */
INLINE int64_t mantissa_at(int64_t v, int64_t i) { return i / 8 * 16 + v * 8 + i % 8; }

/* Return number `i` of vector `v` in step `s` of a unit. */
INLINE uint16_t number_of(const char *unit, const uint16_t *exponents, int64_t s, int64_t v,
                          int64_t i) {
    uint32_t byte = (uint8_t)unit[s * 2 * PANEL + mantissa_at(v, i)];
    uint16_t codes;
    memcpy(&codes, unit + 4 * PANEL + 2 * i, 2);
    return (uint16_t)((byte & 0x80) << 8 | (byte & 0x7f) |
                      exponents[codes >> (8 * s + 4 * v) & 15]);
}

#if LANES == 16 && defined(__AVX512BW__)
#define FAST_UNITS
/* Expand vector `v` of step `s`. `bytes` are the step's signs and mantissas. */
INLINE vec unit_vector(__m512i bytes, __m512i codes, __m512i table, const int s, const int v) {
    __m512i twice = v ? _mm512_unpackhi_epi8(bytes, bytes) : _mm512_unpacklo_epi8(bytes, bytes);
    __m512i code = s || v ? _mm512_srli_epi16(codes, 8 * s + 4 * v) : codes;
    __m512i exponent = _mm512_permutexvar_epi16(code, table); /* reads 5 bits: the table is there twice */
    return (vec)_mm512_ternarylogic_epi64(twice, _mm512_set1_epi32((int)0x807f807fu), exponent, 0xea);
}
#endif

/* Expand the first `steps` steps of a unit. */
INLINE void expand_unit(uint32_t *to, const char *unit, const uint16_t *exponents, int64_t steps) {
#ifdef FAST_UNITS
    __m512i table = _mm512_loadu_si512(exponents), codes = _mm512_loadu_si512(unit + 4 * PANEL);
    __m512i bytes = _mm512_loadu_si512(unit);
    *(uvec_any *)to = (uvec)unit_vector(bytes, codes, table, 0, 0);
    *(uvec_any *)(to + LANES) = (uvec)unit_vector(bytes, codes, table, 0, 1);
    if (steps < 2) return;
    bytes = _mm512_loadu_si512(unit + 2 * PANEL);
    *(uvec_any *)(to + PANEL) = (uvec)unit_vector(bytes, codes, table, 1, 0);
    *(uvec_any *)(to + PANEL + LANES) = (uvec)unit_vector(bytes, codes, table, 1, 1);
#else
    for (int64_t s = 0; s < steps; s++)
        for (int64_t n = 0; n < PANEL; n++) { /* a word is a pair of inputs */
            int64_t v = n / LANES, i = n % LANES * 2;
            to[s * PANEL + n] = number_of(unit, exponents, s, v, i) |
                                (uint32_t)number_of(unit, exponents, s, v, i + 1) << 16;
        }
#endif
}

/* Expand `count` inputs of a panel from input `from` (a multiple of UNIT) on: [count / 2, PANEL] pairs. */
static void expand_compact(uint32_t *to, const char *panel, int64_t from, int64_t count,
                           int64_t ahead) {
    const uint16_t *exponents = header_of(panel)->exponents;
    int64_t steps = (count + 1) / 2;
    for (int64_t k = 0; k < steps; k += 2) {
        const char *unit = unit_of(panel, (from + 2 * k) / UNIT);
        if (ahead)
            for (int64_t at = 0; at < UNIT_BYTES; at += 64) PREFETCH(unit + ahead + at);
        expand_unit(to + k * PANEL, unit, exponents, steps - k);
    }
    const uint32_t *list = exceptions_of(panel);
    for (int64_t g = from / GROUP_INPUTS; g * GROUP_INPUTS < from + count; g++)
        for (uint32_t n = list[g]; n < list[g + 1]; n++) {
            int64_t place = (g * GROUP_INPUTS - from) * PANEL + (list[n] >> 16);
            uint16_t number = (uint16_t)list[n];
            if (place >= 0 && place < 2 * steps * PANEL)
                memcpy((char *)to + 2 * place, &number, sizeof number);
        }
}

#endif
