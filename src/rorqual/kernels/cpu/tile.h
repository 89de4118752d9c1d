// The body of lowbit.cpp, included once for every way to multiply bytes. TARGET is the attribute of its functions,
// SIGNED whether 8-bit weights are multiplied as they are or moved up by 128, MOST the rows that registers have room for;
// `dot` and `halves_at` come before it.

// R rows of activations against a panel: the sums [R] of its 16 outputs. Rows go through a record side by side: a row's
// own products wait for each other, and the processor does not look far enough ahead for another's.
template <int BITS, bool SCALES, bool MINS, int R>
TARGET void tile(const uint8_t *record, const Quantised &x, Which which, lanes *sums) {
    constexpr i64 WEIGHTS = BITS * 64, SIZE = WEIGHTS + 32 * SCALES + 32 * MINS;
    constexpr int APART = R < 4 ? 2 : 1;  // sums a row, where there are few of them
    lanes sum[R] = {};
    const Group *row[R];
    for (int r = 0; r < R; ++r) row[r] = x.data + which[r] * x.groups;
    for (i64 g = 0; g < x.groups; ++g, record += SIZE) {
        // What comes from memory is read once, in order: asking for it in time bought 6 % with 32 rows.
        for (i64 line = 0; line < SIZE; line += 64) __builtin_prefetch(record + 2048 + line);
        integers part[R][APART] = {};
        if constexpr (!MINS && (BITS == 4 || !SIGNED))  // weights lie 8 or 128 too high
            UNROLL for (int r = 0; r < R; ++r) part[r][0] = (integers{} + row[r]->less) << (BITS == 4 ? 0 : 4);
        UNROLL for (int j = 0; j < BITS; ++j) {
            bytes some;
            std::memcpy(&some, record + 64 * j, sizeof some);
            UNROLL for (int half = 0; half < 8 / BITS; ++half) {  // columns 4j to 4j+3 and, at 4 bits, 16 further on
                const bytes weights = BITS == 8 ? some : half ? some >> 4 : some & 15;
                UNROLL for (int r = 0; r < R; ++r) {
                    int32_t four;
                    std::memcpy(&four, row[r]->numbers + 4 * j + 16 * half, sizeof four);
                    integers &to = part[r][(BITS == 8 ? j : half) % APART];
                    to = dot<BITS>(to, weights, four);
                }
            }
        }
        lanes scale, least;
        if constexpr (SCALES) scale = halves_at(record + WEIGHTS);
        if constexpr (MINS) least = halves_at(record + WEIGHTS + 32);
        UNROLL for (int r = 0; r < R; ++r) {
            if constexpr (APART == 2) part[r][0] += part[r][1];
            const lanes product = __builtin_convertvector(part[r][0], lanes);
            if constexpr (SCALES)
                sum[r] += product * (scale * row[r]->scale);
            else
                sum[r] += product * row[r]->scale;
            if constexpr (MINS) sum[r] += least * row[r]->scaled_sum;
            ++row[r];
        }
    }
    for (int r = 0; r < R; ++r) sums[r] = sum[r];
}

template <int BITS, bool SCALES, bool MINS>
TARGET void rows_against(const uint8_t *panel, const Quantised &x, Which which, i64 rows, lanes *sums) {
    i64 r = 0;
    for (; r + MOST <= rows; r += MOST) tile<BITS, SCALES, MINS, MOST>(panel, x, which + r, sums + r);
    for (; MOST > 8 && r + 8 <= rows; r += 8) tile<BITS, SCALES, MINS, 8>(panel, x, which + r, sums + r);
    for (; r + 4 <= rows; r += 4) tile<BITS, SCALES, MINS, 4>(panel, x, which + r, sums + r);
    for (; r + 2 <= rows; r += 2) tile<BITS, SCALES, MINS, 2>(panel, x, which + r, sums + r);
    if (r < rows) tile<BITS, SCALES, MINS, 1>(panel, x, which + r, sums + r);
}

TARGET void against(i64 format, const uint8_t *panel, const Quantised &x, Which which, i64 rows, lanes *sums) {
    if (format == INT4) rows_against<4, true, false>(panel, x, which, rows, sums);
    if (format == INT4_MINS) rows_against<4, true, true>(panel, x, which, rows, sums);
    if (format == INT8) rows_against<8, false, false>(panel, x, which, rows, sums);
    if (format == INT8_GROUPS) rows_against<8, true, false>(panel, x, which, rows, sums);
}
