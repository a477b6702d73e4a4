/* Packing of bfloat16 matrices in 12 bits per number, and reading of their rows; see `compact.h`. */
#include "vectors.h"
#define PANEL (2 * LANES)
#include "compact.h"

#define TABLE 16

INLINE uint32_t exponent_of(uint16_t number) { return number >> 7 & 0xff; }

/* Count the exponents of a panel; return how many numbers have none of the TABLE most frequent ones, which are
 * written to `table`, the most frequent first. */
static int64_t choose_exponents(const uint16_t *numbers, int64_t count, uint32_t *table) {
    int64_t counts[256] = {0}, left = count;
    for (int64_t n = 0; n < count; n++) counts[exponent_of(numbers[n])]++;
    for (int64_t t = 0; t < TABLE; t++) {
        uint32_t best = 0;
        for (uint32_t e = 1; e < 256; e++)
            if (counts[e] > counts[best]) best = e;
        table[t] = best;
        left -= counts[best] > 0 ? counts[best] : 0;
        counts[best] = -1;
    }
    return left;
}

/* Count the exceptions of each panel of a matrix of pairs [panels, steps, PANEL, 2]. */
void compact_count(const uint16_t *pairs, int64_t panels, int64_t steps, int64_t *exceptions,
                   int64_t threads) {
    int64_t size = steps * 2 * PANEL;
#pragma omp parallel for schedule(dynamic) num_threads((int)threads)
    for (int64_t p = 0; p < panels; p++) {
        uint32_t table[TABLE];
        exceptions[p] = choose_exponents(pairs + p * size, size, table);
    }
}

/* Pack one step of a unit whose bytes are 0. Append its exceptions to the list at `end`; return the new end. */
static uint32_t pack_step(char *unit, int64_t s, const uint16_t *numbers, const int8_t *code_of,
                          uint32_t place, uint32_t *list, uint32_t end) {
    for (int64_t v = 0; v < 2; v++)
        for (int64_t i = 0; i < PANEL; i++) {
            uint16_t number = numbers[v * PANEL + i], codes;
            int code = code_of[exponent_of(number)];
            unit[s * 2 * PANEL + mantissa_at(v, i)] = (char)((number >> 8 & 0x80) | (number & 0x7f));
            if (code < 0)
                list[end++] = (place + (uint32_t)(v * PANEL + i)) << 16 | number;
            else {
                memcpy(&codes, unit + 4 * PANEL + 2 * i, 2);
                codes |= (uint16_t)(code << (8 * s + 4 * v));
                memcpy(unit + 4 * PANEL + 2 * i, &codes, 2);
            }
        }
    return end;
}

static void pack_panel(const uint16_t *pairs, int64_t steps, char *panel, uint32_t *list) {
    uint32_t table[TABLE];
    int8_t code_of[256];
    choose_exponents(pairs, steps * 2 * PANEL, table);
    memset(code_of, -1, sizeof code_of);
    memset(panel, 0, (size_t)compact_panel_bytes(2 * steps));
    CompactHeader *header = (CompactHeader *)(void *)panel;
    for (int t = 0; t < TABLE; t++) {
        code_of[table[t]] = (int8_t)t;
        header->exponents[t] = header->exponents[t + TABLE] = (uint16_t)(table[t] << 7);
    }
    header->exceptions = (const char *)list - panel;
    int64_t groups = (2 * steps + GROUP_INPUTS - 1) / GROUP_INPUTS;
    uint32_t end = (uint32_t)groups + 1;
    list[0] = end;
    for (int64_t k = 0; k < steps; k++) {
        int64_t group = 2 * k / GROUP_INPUTS;
        uint32_t place = (uint32_t)((2 * k - group * GROUP_INPUTS) * PANEL);
        char *unit = (char *)unit_of(panel, 2 * k / UNIT);
        end = pack_step(unit, k % 2, pairs + k * 2 * PANEL, code_of, place, list, end);
        list[group + 1] = end;
    }
}

/* Pack a matrix of pairs. `lists` has the byte offset of each panel's list of exceptions in `to`. */
void compact_pack(const uint16_t *pairs, int64_t panels, int64_t steps, char *to,
                  const int64_t *lists, int64_t threads) {
    int64_t bytes = compact_panel_bytes(2 * steps);
#pragma omp parallel for schedule(dynamic) num_threads((int)threads)
    for (int64_t p = 0; p < panels; p++)
        pack_panel(pairs + p * steps * 2 * PANEL, steps, to + p * bytes,
                   (uint32_t *)(void *)(to + lists[p]));
}

/* Read row `lane` of a panel. */
static void read_row(const char *panel, int64_t lane, int64_t inputs, float *to) {
    const uint32_t *list = exceptions_of(panel);
    int64_t v = lane / LANES, i = lane % LANES * 2;
    for (int64_t k = 0; k < inputs; k++) {
        const char *unit = unit_of(panel, k / UNIT);
        uint32_t bits = number_of(unit, header_of(panel)->exponents, k % UNIT / 2, v, i + k % 2);
        bits <<= 16;
        memcpy(to + k, &bits, sizeof bits);
    }
    for (int64_t g = 0; g * GROUP_INPUTS < inputs; g++)
        for (uint32_t n = list[g]; n < list[g + 1]; n++) {
            int64_t place = list[n] >> 16, step = place / (2 * PANEL), at = place % (2 * PANEL);
            int64_t k = g * GROUP_INPUTS + 2 * step + at % 2;
            uint32_t bits = list[n] << 16;
            if (at / 2 == lane && k < inputs) memcpy(to + k, &bits, sizeof bits);
        }
}

/* Read rows of a packed matrix: [count, inputs] in float32. */
void compact_rows(const char *panels, int64_t inputs, const int64_t *rows, int64_t count, float *to) {
    for (int64_t n = 0; n < count; n++)
        read_row(panels + rows[n] / PANEL * compact_panel_bytes(inputs), rows[n] % PANEL, inputs,
                 to + n * inputs);
}

int64_t compact_bytes(int64_t inputs) { return compact_panel_bytes(inputs); }
int64_t compact_groups(int64_t inputs) { return (inputs + GROUP_INPUTS - 1) / GROUP_INPUTS; }
