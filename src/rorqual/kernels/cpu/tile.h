// The body of lowbit.cpp, included once for every way to multiply bytes. TARGET is the attribute of its functions,
// SIGNED whether 8-bit weights are multiplied as they are or moved up by 128; `dot` and `halves_at` come before it.

// Columns 4j to 4j+3 of a record's 16 rows, as bytes from 0 on.
template <int BITS>
TARGET inline bytes some_columns(const uint8_t *record, int j) {
    bytes x;
    std::memcpy(&x, record + 64 * (BITS == 4 ? j & 3 : j), sizeof x);
    if constexpr (BITS == 8) return x;
    return j < 4 ? x & 15 : x >> 4;
}

// R rows of quantised numbers against a panel: the sums [R] of its 16 outputs.
template <int BITS, bool SCALES, bool MINS, int R>
TARGET void tile(const uint8_t *record, const Quantised &x, Which which, lanes *sums) {
    constexpr i64 WEIGHTS = BITS * 64, SIZE = WEIGHTS + 32 * SCALES + 32 * MINS;
    constexpr int32_t UP = MINS ? 0 : BITS == 4 ? 8 : SIGNED ? 0 : 128;
    lanes sum[R] = {};
    i64 row[R];
    for (int r = 0; r < R; ++r) row[r] = which[r] * x.groups;
    for (i64 g = 0; g < x.groups; ++g, record += SIZE) {
        if constexpr (R == 1)  // what comes from memory is read once, in order: ask for it in time
            for (i64 line = 0; line < SIZE; line += 64) __builtin_prefetch(record + 2048 + line);
        bytes weights[8];
        for (int j = 0; j < 8; ++j) weights[j] = some_columns<BITS>(record, j);
        lanes scale, least;
        if constexpr (SCALES) scale = halves_at(record + WEIGHTS);
        if constexpr (MINS) least = halves_at(record + WEIGHTS + 32);
        for (int r = 0; r < R; ++r) {
            const i64 at = row[r] + g;
            const int32_t *four = reinterpret_cast<const int32_t *>(x.numbers + at * GROUP);
            integers sum_a = integers{} - UP * x.sums[at], sum_b = {};  // two, since one would wait for itself
            for (int j = 0; j < 8; j += 2) {
                sum_a = dot<BITS>(sum_a, weights[j], four[j]);
                sum_b = dot<BITS>(sum_b, weights[j + 1], four[j + 1]);
            }
            const lanes product = __builtin_convertvector(sum_a + sum_b, lanes);
            if constexpr (SCALES)
                sum[r] += product * (scale * x.scales[at]);
            else
                sum[r] += product * x.scales[at];
            if constexpr (MINS) sum[r] += least * (x.scales[at] * float(x.sums[at]));
        }
    }
    for (int r = 0; r < R; ++r) sums[r] = sum[r];
}

template <int BITS, bool SCALES, bool MINS>
TARGET void rows_against(const uint8_t *panel, const Quantised &x, Which which, i64 rows, lanes *sums) {
    i64 r = 0;
    for (; r + 16 <= rows; r += 16) tile<BITS, SCALES, MINS, 16>(panel, x, which + r, sums + r);
    for (; r + 8 <= rows; r += 8) tile<BITS, SCALES, MINS, 8>(panel, x, which + r, sums + r);
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
