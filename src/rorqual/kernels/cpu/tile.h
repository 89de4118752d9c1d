// The body of lowbit.cpp, included once for every way to multiply bytes. TARGET is the attribute of its functions,
// SIGNED whether 8-bit weights are multiplied as they are or moved up by 128, MOST the rows that registers have room for
// and WIDE the panels; `dot` and `halves_at` come before it.

// R rows of activations against P panels: the sums [R, BESIDE] of their 16 outputs each. Rows go through a record side by
// side: a row's own products wait for each other, and the processor does not look far enough ahead for another's. Two
// panels side by side read an activation once for both.
template <int BITS, bool SCALES, bool MINS, int R, int P>
TARGET void tile(const uint8_t *record, const Quantised &x, Which which, lanes *sums, Ahead ahead) {
    constexpr i64 WEIGHTS = BITS * 64, SIZE = WEIGHTS + 32 * SCALES + 32 * MINS;
    constexpr i64 SHARED = BITS == 8 && !SCALES ? COMMON : 1;  // groups that share a scale
    constexpr int APART = R * P < 4 ? 2 : 1;  // sums a row, where there are few of them
    const i64 panel = x.groups * SIZE;
    lanes sum[R][P];
    const Group *row[R];
    UNROLL for (int r = 0; r < R; ++r) {
        row[r] = x.data + which[r] * x.groups;
        UNROLL for (int p = 0; p < P; ++p) sum[r][p] = lanes{};
    }
    const i64 lines = (ahead.lines + x.groups - 1) / x.groups;
    for (i64 start = 0; start < x.groups; start += SHARED) {
        const Group *first[R];
        integers part[R][P][APART] = {};
        UNROLL for (int r = 0; r < R; ++r) {
            first[r] = row[r];
            if constexpr (!MINS && (BITS == 4 || !SIGNED))  // weights lie 8 or 128 too high
                UNROLL for (int p = 0; p < P; ++p)
                    part[r][p][0] = integers{} + (BITS == 4 ? row[r]->less_by_8 : row[r]->less_by_128);
        }
        const i64 some = SHARED == 1 ? 1 : std::min(SHARED, x.groups - start);
        const uint8_t *scales = record + WEIGHTS;
        for (i64 g = 0; g < some; ++g, record += SIZE) {
            ahead.ask(lines);
            // From the second-nearest cache, when rows meet a panel again (3 to 5 % in prompts), or from memory: 2048 bytes on
            // instead of 1024 made steps of one and of 32 rows 5 % faster.
            UNROLL for (int p = 0; p < P; ++p)
                for (i64 line = 0; line < SIZE; line += 64) __builtin_prefetch(record + p * panel + 2048 + line);
            UNROLL for (int j = 0; j < BITS; ++j) {
                bytes both[P];
                UNROLL for (int p = 0; p < P; ++p) std::memcpy(&both[p], record + p * panel + 64 * j, sizeof(bytes));
                UNROLL for (int half = 0; half < 8 / BITS; ++half) {  // inputs 4j to 4j+3 and, at 4 bits, 16 further on
                    bytes weights[P];
                    UNROLL for (int p = 0; p < P; ++p)
                        weights[p] = BITS == 8 ? both[p] : half ? both[p] >> 4 : both[p] & 15;
                    UNROLL for (int r = 0; r < R; ++r) {
                        int32_t four;
                        std::memcpy(&four, row[r]->numbers + 4 * j + 16 * half, sizeof four);
                        UNROLL for (int p = 0; p < P; ++p) {
                            integers &to = part[r][p][(BITS == 8 ? j : half) % APART];
                            to = dot<BITS>(to, weights[p], four);
                        }
                    }
                }
            }
            UNROLL for (int r = 0; r < R; ++r) ++row[r];
        }
        lanes scale[P], least[P];
        UNROLL for (int p = 0; p < P; ++p) {
            if constexpr (SCALES) scale[p] = halves_at(scales + p * panel);
            if constexpr (MINS) least[p] = halves_at(scales + p * panel + 32);
        }
        UNROLL for (int r = 0; r < R; ++r) {
            UNROLL for (int p = 0; p < P; ++p) {
                if constexpr (APART == 2) part[r][p][0] += part[r][p][1];
                const lanes product = __builtin_convertvector(part[r][p][0], lanes);
                if constexpr (SCALES)
                    sum[r][p] += product * (scale[p] * first[r]->scale);
                else
                    sum[r][p] += product * first[r]->scale;
                if constexpr (MINS) sum[r][p] += least[p] * first[r]->scaled_sum;
            }
        }
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int p = 0; p < P; ++p) sums[r * BESIDE + p] = sum[r][p];
}

using Tile = void (*)(const uint8_t *, const Quantised &, Which, lanes *, Ahead);

// As many rows at a time as there is room for, and as evenly as can be.
template <int BITS, bool SCALES, bool MINS, int P, size_t... R>
TARGET void rows_against(const uint8_t *panel, const Quantised &x, Which which, i64 rows, lanes *sums, Ahead ahead,
                         std::index_sequence<R...>) {
    static constexpr Tile TILES[] = {tile<BITS, SCALES, MINS, R + 1, P>...};
    const i64 tiles = (rows + MOST<BITS> - 1) / MOST<BITS>;
    for (i64 t = 0; t < tiles; ++t) {
        const i64 r = t * rows / tiles;
        TILES[(t + 1) * rows / tiles - r - 1](panel, x, which + r, sums + r * BESIDE, ahead.part(t, tiles));
    }
}

template <int BITS, bool SCALES, bool MINS>
TARGET void panels_against(const uint8_t *panel, i64 panels, const Quantised &x, Which which, i64 rows, lanes *sums,
                           Ahead ahead) {
    constexpr std::make_index_sequence<MOST<BITS>> most;
    // Rows that meet a panel but once wait for memory, which gives one stream sooner than two: 3 to 7 % with one to eight.
    if (panels == WIDE<BITS> && rows > MOST<BITS>)
        return rows_against<BITS, SCALES, MINS, WIDE<BITS>>(panel, x, which, rows, sums, ahead, most);
    const i64 size = x.groups * (BITS * 64 + 32 * SCALES + 32 * MINS);
    for (i64 p = 0; p < panels; ++p)
        rows_against<BITS, SCALES, MINS, 1>(panel + p * size, x, which, rows, sums + p, ahead.part(p, panels), most);
}

TARGET void against(i64 format, const uint8_t *panel, i64 panels, const Quantised &x, Which which, i64 rows,
                    lanes *sums, Ahead ahead) {
    if (format == INT4) panels_against<4, true, false>(panel, panels, x, which, rows, sums, ahead);
    if (format == INT4_MINS) panels_against<4, true, true>(panel, panels, x, which, rows, sums, ahead);
    if (format == INT8) panels_against<8, false, false>(panel, panels, x, which, rows, sums, ahead);
    if (format == INT8_GROUPS) panels_against<8, true, false>(panel, panels, x, which, rows, sums, ahead);
}
