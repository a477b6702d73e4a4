/* Sums of pairs in blocks of 32 inputs: the arithmetic of AMX, Intel's matrix tiles.
 *
 * AMX multiplies 16 rows of 16 pairs by 16 pairs of 16 outputs in one instruction, which adds to each sum
 *
 *     even + odd,  even = chain of fused sums over the even inputs of the block, odd = the same for the odd ones
 *
 * ("TDPBF16PS", Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2). This order differs from
 * that of `pairs.h`, so both have their own results, and kernels that must agree use the same one. BLOCKS selects
 * it. Without AMX instructions the same sums are computed in vectors: what tests compare AMX with. (AMX takes
 * sums below 2^-126 for 0.)
 *
 * Packed rows are [blocks][MR][BLOCK] words, and strips [blocks][BLOCK][PANEL]; both are filled up with zeros.
 */
#ifndef BLOCKS_H
#define BLOCKS_H
#include "pairs.h"

#define BLOCK 16     /* words in a block */
#define TILE_ROWS 16 /* rows of a tile register */
#define MR (2 * TILE_ROWS)
#define NUM_BLOCKS(words) (((words) + BLOCK - 1) / BLOCK)

/* Sums of up to MR rows and PANEL outputs. AMX holds them in its registers between begin_blocks and end_blocks. */
typedef float Sums[MR][PANEL] __attribute__((aligned(64)));

/* Rows that are multiplied. */
typedef struct {
    const uint32_t *at;
    int64_t stride; /* words from one row to the next */
    int64_t step;   /* words from one block to the next */
} BlockRows;

#if LANES == 16 && defined(__AMX_BF16__)
/* Registers 0 to 3 are sums: rows 0 to 15 of outputs 0 to 15, and of 16 to 31; then rows 16 to 31 of both. Rows to
 * be multiplied are in 4 and 5, outputs in 6 and 7. */
#define TILE_LOAD(n, from, stride)                                                                    \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #n : : "r"(from), "r"((int64_t)(stride)) : "memory")
#define TILE_STORE(n, to, stride)                                                                     \
    __asm__ volatile("tilestored %%tmm" #n ", (%0,%1,1)" : : "r"(to), "r"((int64_t)(stride)) : "memory")
#define TILE_ZERO(n) __asm__ volatile("tilezero %%tmm" #n : : : "memory")
#define TILE_MULTIPLY(sum, x, w)                                                                      \
    __asm__ volatile("tdpbf16ps %%tmm" #w ", %%tmm" #x ", %%tmm" #sum : : : "memory")

typedef struct {
    uint8_t palette, start, unused[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileShapes;

/* Give this thread's tile registers the shapes for up to `rows` rows. Their content is lost. */
INLINE void open_blocks(int64_t rows) {
    TileShapes shapes = {.palette = 1};
    uint8_t first = (uint8_t)(rows < TILE_ROWS ? rows : TILE_ROWS);
    uint8_t second = (uint8_t)(rows > TILE_ROWS && rows < MR ? rows - TILE_ROWS : TILE_ROWS);
    const uint8_t heights[8] = {first, first, second, second, first, second, BLOCK, BLOCK};
    for (int n = 0; n < 8; n++) shapes.rows[n] = heights[n], shapes.row_bytes[n] = 64;
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
}

/* Mark this thread's tile registers as unused, so that the system need not save them. */
INLINE void close_blocks(void) { __asm__ volatile("tilerelease" : : : "memory"); }

INLINE void begin_blocks(int64_t rows, Sums sums, int first) {
    if (first) {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
        return;
    }
    TILE_LOAD(0, sums[0], 4 * PANEL);
    TILE_LOAD(1, sums[0] + LANES, 4 * PANEL);
    if (rows <= TILE_ROWS) return;
    TILE_LOAD(2, sums[TILE_ROWS], 4 * PANEL);
    TILE_LOAD(3, sums[TILE_ROWS] + LANES, 4 * PANEL);
}

/* Add `blocks` blocks of x . w to the sums. */
INLINE void add_blocks(int64_t rows, Sums sums, BlockRows x, const uint32_t *w, int64_t blocks) {
    (void)sums;
    const uint32_t *at = x.at, *lower = at + TILE_ROWS * x.stride;
    if (rows <= TILE_ROWS) {
        for (int64_t n = 0; n < blocks; n++, at += x.step, w += BLOCK * PANEL) {
            TILE_LOAD(6, w, 4 * PANEL);
            TILE_LOAD(4, at, 4 * x.stride);
            TILE_MULTIPLY(0, 4, 6);
            TILE_LOAD(7, w + LANES, 4 * PANEL);
            TILE_MULTIPLY(1, 4, 7);
        }
        return;
    }
    for (int64_t n = 0; n < blocks; n++, at += x.step, lower += x.step, w += BLOCK * PANEL) {
        TILE_LOAD(6, w, 4 * PANEL);
        TILE_LOAD(4, at, 4 * x.stride);
        TILE_MULTIPLY(0, 4, 6);
        TILE_LOAD(7, w + LANES, 4 * PANEL);
        TILE_MULTIPLY(1, 4, 7);
        TILE_LOAD(5, lower, 4 * x.stride);
        TILE_MULTIPLY(2, 5, 6);
        TILE_MULTIPLY(3, 5, 7);
    }
}

/* Write the sums to memory. */
INLINE void end_blocks(int64_t rows, Sums sums) {
    TILE_STORE(0, sums[0], 4 * PANEL);
    TILE_STORE(1, sums[0] + LANES, 4 * PANEL);
    if (rows <= TILE_ROWS) return;
    TILE_STORE(2, sums[TILE_ROWS], 4 * PANEL);
    TILE_STORE(3, sums[TILE_ROWS] + LANES, 4 * PANEL);
}
#else
INLINE void open_blocks(int64_t rows) { (void)rows; }
INLINE void close_blocks(void) {}

INLINE void begin_blocks(int64_t rows, Sums sums, int first) {
    if (first) memset(sums, 0, (size_t)(rows * PANEL) * sizeof(float));
}

/* Add one block of a row to the sums of LANES outputs. */
INLINE void add_block_of(float *sums, const uint32_t *x, const uint32_t *w) {
    vec even = {0}, odd = {0};
    for (int64_t k = 0; k < BLOCK; k++) {
        vec value = splat_pair(x[k]), column = load_pairs(w + k * PANEL);
        even = FUSED((vec)((uvec)value << 16), (vec)((uvec)column << 16), even);
        odd = FUSED((vec)((uvec)value & UPPER), (vec)((uvec)column & UPPER), odd);
    }
    store(sums, load(sums) + (even + odd));
}

INLINE void add_blocks(int64_t rows, Sums sums, BlockRows x, const uint32_t *w, int64_t blocks) {
    for (int64_t n = 0; n < blocks; n++, x.at += x.step, w += BLOCK * PANEL)
        for (int64_t r = 0; r < rows; r++)
            for (int c = 0; c < PANEL; c += LANES) add_block_of(sums[r] + c, x.at + r * x.stride, w + c);
}

INLINE void end_blocks(int64_t rows, Sums sums) { (void)rows, (void)sums; }
#endif

#endif
