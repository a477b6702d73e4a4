/* Operands of the tiled products as pairs of bfloat16; see `tiles.h`, which includes this.
 *
 * A packed matrix is [panels, in / 2, PANEL] words: a word is a pair of inputs of one output.
 */
#ifndef PAIR_STRIPS_H
#define PAIR_STRIPS_H

INLINE vec load_word(const uint32_t *word) { return load_pairs(word); }
INLINE vec splat_word(uint32_t word) { return splat_pair(word); }
INLINE vec add_product(vec sum, vec x, vec w) { return add_pair(sum, x, w); }

#ifdef BLOCKS
/* Pack rows of x, MR rows at a time: [units, blocks, MR, BLOCK] words. The last unit repeats the last row. */
static void pack_rows(uint32_t *to, const float *x, int64_t stride, int64_t rows, int64_t count) {
    int64_t words = PACKED_WORDS(count), whole = count / (2 * BLOCK);
    for (int64_t first = 0; first < rows; first += MR, to += words * MR) {
        for (int64_t r = 0; r < MR; r++) {
            const float *row = x + (first + r < rows ? first + r : rows - 1) * stride;
            uint32_t *at = to + r * BLOCK;
            for (int64_t n = 0; n < whole; n++, at += MR * BLOCK, row += 2 * BLOCK)
                round_row((uint16_t *)at, row, 2 * BLOCK);
            if (whole * BLOCK == words) continue;
            memset(at, 0, BLOCK * sizeof *at);
            round_row((uint16_t *)at, row, count - whole * 2 * BLOCK);
        }
    }
}
#else
/* Pack rows of x, MR side by side: [units, count / 2, MR] words. The last unit repeats the last row. */
static void pack_rows(uint32_t *to, const float *x, int64_t stride, int64_t rows, int64_t count) {
    uint32_t block[MR][STRIP_WORDS];
    int64_t words = WORDS(count);
    for (int64_t first = 0; first < rows; first += MR, to += words * MR) {
        for (int r = 0; r < MR; r++) {
            int64_t row = first + r < rows ? first + r : rows - 1;
            round_row((uint16_t *)block[r], x + row * stride, count);
        }
        int64_t k = 0;
#if LANES >= 8
        /* As in float_strips.h: the last column is left to the loop below. */
        for (; k + 8 < words; k += 8) {
            __m256 part[8];
            for (int r = 0; r < MR; r++) part[r] = _mm256_loadu_ps((const float *)(block[r] + k));
            part[6] = part[7] = part[0];
            turn_8(part, (float *)(to + k * MR), MR);
        }
#endif
        for (; k < words; k++)
            for (int r = 0; r < MR; r++) to[k * MR + r] = block[r][k];
    }
}
#endif

/* Lanes of two vectors in turns, beginning with lane 0; the second half begins at lane LANES / 2. */
#if LANES == 16
static const uvec LOWER_HALVES = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
#elif LANES == 8
static const uvec LOWER_HALVES = {0, 8, 1, 9, 2, 10, 3, 11};
#else
static const uvec LOWER_HALVES = {0, 4, 1, 5};
#endif

/* Transpose a block of a packed matrix: pairs of inputs become pairs of outputs. `to` is [count / 2,
 * PANEL], PANEL inputs from number `input` on; the matrix has `inputs` of them. */
static void fill_turned(uint32_t *to, const Right *right, int64_t from, int64_t count, int64_t input,
                        int64_t inputs) {
    uint32_t turned[PANEL][LANES], expanded[LANES * PANEL];
    int64_t words = WORDS(right->stride), pairs = WORDS(inputs);
    memset(turned, 0, sizeof turned);
    for (int64_t k = 0; k < count; k += PANEL) {
        const uint32_t *block = expanded;
        if (right->bits)
            expand(expanded, quantised_panel(right, (from + k) / PANEL), input, inputs, right->bits, 0);
        else
            block = (const uint32_t *)right->at + ((from + k) / PANEL * words + input / 2) * PANEL;
        turn((float *)turned, LANES, (const float *)block, PANEL, pairs, PANEL);
        int64_t left = WORDS(count - k) < LANES ? WORDS(count - k) : LANES;
        for (int64_t m = 0; m < left; m++) {
            uvec first = (uvec)load_pairs(turned[2 * m]), second = (uvec)load_pairs(turned[2 * m + 1]);
            uvec even = (first & ~UPPER) | (second << 16), odd = (first >> 16) | (second & UPPER);
            uint32_t *row = to + (k / 2 + m) * PANEL;
            *(uvec_any *)row = __builtin_shuffle(even, odd, LOWER_HALVES);
            *(uvec_any *)(row + LANES) = __builtin_shuffle(even, odd, LOWER_HALVES + LANES / 2);
        }
    }
}

#define ROWS_AHEAD 24

/* Pair up rows of float32: [count, outs] becomes [count / 2, PANEL] words. */
static void fill_rows(uint32_t *to, const Right *right, int64_t from, int64_t count, int64_t out,
                      int64_t outs) {
    float first[PANEL] = {0}, second[PANEL] = {0};
    for (int64_t k = 0; k < count; k += 2, to += PANEL) {
        const float *row = (const float *)right->at + (from + k) * right->stride + out;
        if (outs == PANEL && k + 1 < count) {
            for (int c = 0; c < PANEL; c += 16) { /* rows are far apart in memory: fetch later ones */
                PREFETCH(row + ROWS_AHEAD * right->stride + c);
                PREFETCH(row + (ROWS_AHEAD + 1) * right->stride + c);
            }
            for (int c = 0; c < PANEL; c += LANES)
                *(uvec_any *)(to + c) = rounded_words(load(row + c), load(row + right->stride + c));
            continue;
        }
        memcpy(first, row, (size_t)outs * sizeof(float));
        if (k + 1 < count)
            memcpy(second, row + right->stride, (size_t)outs * sizeof(float));
        else
            memset(second, 0, sizeof second);
        for (int c = 0; c < PANEL; c += LANES)
            *(uvec_any *)(to + c) = rounded_words(load(first + c), load(second + c));
    }
}

/* Round columns of float32, [outs, count], to pairs, and transpose them: [count / 2, PANEL] words. */
static void fill_columns(uint32_t *to, const Right *right, int64_t from, int64_t count, int64_t out,
                         int64_t outs) {
    uint32_t rows[PANEL][STRIP_WORDS];
    for (int64_t i = 0; i < outs; i++)
        round_row((uint16_t *)rows[i], (const float *)right->at + (out + i) * right->stride + from,
                  count);
    turn((float *)to, PANEL, (const float *)rows, STRIP_WORDS, outs, WORDS(count));
}

/* Bring a strip [count / 2, PANEL] into memory; see `strip`. */
static void fill_strip(uint32_t *to, const Right *right, int64_t from, int64_t count, int64_t out,
                       int64_t outs) {
    if (outs < PANEL) memset(to, 0, (size_t)WORDS(count) * PANEL * sizeof *to);
    if (right->layout == PANELS_TURNED)
        fill_turned(to, right, from, count, out, outs);
    else if (right->layout == ROWS)
        fill_rows(to, right, from, count, out, outs);
    else
        fill_columns(to, right, from, count, out, outs);
}

/* Strips of pairs are read where they are. */
INLINE const uint16_t *half_strip(const Right *right, int64_t from, int64_t out) {
    (void)right, (void)from, (void)out;
    return 0;
}

/* Return the strip [count / 2, PANEL] of a right side from row `from` (an even number) and output `out`
 * on, as `strip` in float_strips.h does. */
static const uint32_t *strip(uint32_t *to, const Right *right, int64_t from, int64_t count,
                             int64_t out, int64_t all_outs) {
    int64_t missing = PACKED_WORDS(count) - WORDS(count);
    if (right->layout == PANELS && right->bits) {
        expand(to, quantised_panel(right, out / PANEL), from, count, right->bits, 0);
    } else if (right->layout == PANELS) {
        const uint32_t *panel = (const uint32_t *)right->at + out / PANEL * WORDS(right->stride) * PANEL;
        if (!missing) return panel + from / 2 * PANEL;
        memcpy(to, panel + from / 2 * PANEL, (size_t)(WORDS(count) * PANEL) * sizeof *to);
    } else {
        fill_strip(to, right, from, count, out, all_outs - out < PANEL ? all_outs - out : PANEL);
    }
    if (missing) memset(to + WORDS(count) * PANEL, 0, (size_t)(missing * PANEL) * sizeof *to);
    return to;
}

/* Return the cache lines of a run. */
INLINE int64_t run_lines(const Right *right, int64_t count) {
    int64_t rows = right->layout == PANELS ? count : PANEL;
    if (right->bits) return (rows + PANEL - 1) / PANEL * square_lines(right);
    return WORDS(rows) * PANEL * 4 / 64;
}

/* Return the beginning of run `n` of the strip from row `from` and output `out` on. */
INLINE const char *source_run(const Right *right, int64_t from, int64_t out, int64_t n) {
    if (right->bits) return quantised_run(right, from, out, n);
    int64_t words = WORDS(right->stride);
    int64_t at = right->layout == PANELS ? out / PANEL * words + from / 2
                                         : (from / PANEL + n) * words + out / 2;
    return (const char *)right->at + at * PANEL * 4;
}

#endif
