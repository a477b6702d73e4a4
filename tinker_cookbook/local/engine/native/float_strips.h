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
        /* Stores of eight overwrite places of the next column, which is written later; the last column has
         * no next one, so it is left to the loop below. Of one column, the last rows are written first. */
        for (; k + 8 < count; k += 8) {
            for (int r = (MR - 1) / 8 * 8; r >= 0; r -= 8) {
                __m256 part[8];
                for (int i = 0; i < 8; i++) part[i] = _mm256_loadu_ps(row[r + i < MR ? r + i : r] + k);
                turn_8(part, to + k * MR + r, MR);
            }
        }
#endif
        for (; k < count; k++)
            for (int r = 0; r < MR; r++) to[k * MR + r] = row[r][k];
    }
}

/* Transpose a square block in bfloat16 into `to`: `outs` inputs become outputs, `count` outputs the sum's rows. */
INLINE void turn_half(float *to, const uint16_t *block, int64_t count, int64_t outs) {
    float words[LANES * PANEL]; /* two numbers each: of outputs half a panel apart */
    if (outs < PANEL) memset(words, 0, sizeof words);
    turn(words, PANEL, (const float *)(const void *)block, LANES, outs, LANES);
    for (int64_t j = 0; j < LANES && j < count; j++) {
        for (int c = 0; c < PANEL; c += LANES) {
            vec pair[2];
            load_pair(words + j * PANEL + c, 0, 1, pair);
            store(to + j * PANEL + c, pair[0]);
            if (j + LANES < count) store(to + (j + LANES) * PANEL + c, pair[1]);
        }
    }
}

/* Transpose a block of a packed matrix into `to`: PANEL outputs from `out` on, summed over its rows. */
static void fill_turned(float *to, const Right *right, int64_t from, int64_t count, int64_t out,
                        int64_t outs) {
    float expanded[PANEL * PANEL];
    for (int64_t k = 0; k < count; k += PANEL) {
        int64_t at = ((from + k) / PANEL * right->stride + out) * PANEL;
        int64_t rows = count - k < PANEL ? count - k : PANEL;
        if (right->half) {
            turn_half(to + k * PANEL, (const uint16_t *)right->at + at, rows, outs);
            continue;
        }
        const float *block = right->bits ? expanded : (const float *)right->at + at;
        if (right->bits)
            expand(expanded, quantised_panel(right, (from + k) / PANEL), out, outs, right->bits, 0);
        turn(to + k * PANEL, PANEL, block, PANEL, outs, rows);
    }
}

/* Return where a panel in bfloat16 has what a tile can turn into a strip while it multiplies; NULL for others. */
INLINE const uint16_t *half_strip(const Right *right, int64_t from, int64_t out) {
    if (right->layout != PANELS || right->bits || !right->half) return 0;
    return (const uint16_t *)right->at + (out / PANEL * right->stride + from) * PANEL;
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

/* Return the cache lines of a run. */
INLINE int64_t run_lines(const Right *right, int64_t count) {
    int64_t rows = right->layout == PANELS ? count : PANEL;
    if (right->bits) return (rows + PANEL - 1) / PANEL * square_lines(right);
    return rows * PANEL * (right->half ? 2 : 4) / 64;
}

/* Return the beginning of run `n` of the strip from row `from` and output `out` on. */
INLINE const char *source_run(const Right *right, int64_t from, int64_t out, int64_t n) {
    if (right->bits) return quantised_run(right, from, out, n);
    int64_t at = right->layout == PANELS ? out / PANEL * right->stride + from
                                         : (from / PANEL + n) * right->stride + out;
    return (const char *)right->at + at * PANEL * (right->half ? 2 : 4);
}

INLINE vec load_word(const float *word) { return load(word); }
INLINE vec splat_word(float word) { return splat(word); }
INLINE vec add_product(vec sum, vec x, vec w) { return FUSED(x, w, sum); }

#endif
