/* Operands of the tiled products in float32; see `tiles.h`, which includes this. */
#ifndef FLOAT_STRIPS_H
#define FLOAT_STRIPS_H

/* Pack rows of x, MR side by side: [units, count, MR]. The last unit repeats the last row. */
static void pack_rows(float *to, const float *x, int64_t stride, int64_t rows, int64_t count) {
    for (int64_t first = 0; first < rows; first += MR, to += count * MR) {
        const float *row[MR];
        for (int r = 0; r < MR; r++)
            row[r] = x + (first + r < rows ? first + r : rows - 1) * stride;
        int64_t k = 0;
#if defined(__AVX2__)
        /* Stores of eight overwrite two places of the next column, which is written later; the last
         * column has no next one, so it is left to the loop below. */
        for (; k + 8 < count; k += 8) {
            __m256 part[8];
            for (int r = 0; r < MR; r++) part[r] = _mm256_loadu_ps(row[r] + k);
            part[6] = part[7] = part[0];
            turn_8(part, to + k * MR, MR);
        }
#endif
        for (; k < count; k++)
            for (int r = 0; r < MR; r++) to[k * MR + r] = row[r][k];
    }
}

/* Transpose a block of a packed matrix into `to`: PANEL outputs from `out` on, summed over its rows. */
static void fill_turned(float *to, const Right *right, int64_t from, int64_t count, int64_t out,
                        int64_t outs) {
    float block[PANEL * PANEL];
    for (int64_t k = 0; k < count; k += PANEL) {
        int64_t at = ((from + k) / PANEL * right->stride + out) * PANEL;
        if (right->bits)
            expand(block, quantised_panel(right, (from + k) / PANEL), out, outs, right->bits, 0);
        for (int64_t i = 0; i < outs && !right->bits; i++) {
            vec pair[2];
            load_pair(right->at, at + i * PANEL, right->half != 0, pair);
            store(block + i * PANEL, pair[0]);
            store(block + i * PANEL + LANES, pair[1]);
        }
        turn(to + k * PANEL, PANEL, block, PANEL, outs, count - k < PANEL ? count - k : PANEL);
    }
}

/* Return the strip [count, PANEL] of a right side from row `from` and output `out` on. It is copied to
 * `to` unless memory already has it in this layout. Missing outputs are 0 or never read. */
static const float *strip(float *to, const Right *right, int64_t from, int64_t count, int64_t out,
                          int64_t all_outs) {
    int64_t outs = all_outs - out < PANEL ? all_outs - out : PANEL;
    if (right->layout == PANELS && right->bits) {
        expand(to, quantised_panel(right, out / PANEL), from, count, right->bits, 0);
        return to;
    }
    if (right->layout == PANELS) {
        int64_t at = (out / PANEL * right->stride + from) * PANEL;
        if (!right->half) return (const float *)right->at + at;
        for (int64_t k = 0; k < count; k++) {
            vec pair[2];
            load_pair(right->at, at + k * PANEL, 1, pair);
            store(to + k * PANEL, pair[0]);
            store(to + k * PANEL + LANES, pair[1]);
        }
        return to;
    }
    if (outs < PANEL) memset(to, 0, (size_t)count * PANEL * sizeof(float));
    if (right->layout == PANELS_TURNED) {
        fill_turned(to, right, from, count, out, outs);
    } else if (right->layout == ROWS) {
        const float *row = (const float *)right->at + from * right->stride + out;
        for (int64_t k = 0; k < count; k++)
            memcpy(to + k * PANEL, row + k * right->stride, (size_t)outs * sizeof(float));
    } else {
        turn(to, PANEL, (const float *)right->at + out * right->stride + from, right->stride, outs,
             count);
    }
    return to;
}

/* Return the cache lines of the memory that holds a strip of a packed matrix. */
INLINE int64_t source_lines(const Right *right, int64_t count) {
    if (right->bits) return (count + PANEL - 1) / PANEL * square_lines(right);
    return count * PANEL * (right->half ? 2 : 4) / 64;
}

/* Return cache line `n` of the memory that holds the strip from output `out` on. */
static const char *source_line(const Right *right, int64_t from, int64_t out, int64_t n) {
    int64_t size = right->half ? 2 : 4, at = 0;
    if (right->bits) return quantised_line(right, from, out, n);
    if (right->layout == PANELS) {
        at = (out / PANEL * right->stride + from) * PANEL * size + n * 64;
    } else { /* PANELS_TURNED: a square block of every panel */
        int64_t lines = PANEL * PANEL * size / 64;
        at = ((from / PANEL + n / lines) * right->stride + out) * PANEL * size + n % lines * 64;
    }
    return (const char *)right->at + at;
}

INLINE vec load_word(const float *word) { return load(word); }
INLINE vec splat_word(float word) { return splat(word); }
INLINE vec add_product(vec sum, vec x, vec w) { return FUSED(x, w, sum); }

#endif
