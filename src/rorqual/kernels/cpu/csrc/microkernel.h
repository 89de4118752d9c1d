// The quantised GEMM microkernels, included by qgemm.cpp once per int8 dot instruction. The includer defines TARGET
// (function attribute), SIGNED_WEIGHTS (8-bit weights are multiplied as signed, instead of unsigned with zero point
// 128), MAX_ROWS and MAX_PANELS (what the registers hold), UNROLL (before loops), `load_f16x16`, and of the products:
// Sums<BITS> (of a record, or of all groups that share a scale), begin_sums<BITS>(zero point's correction), `dot4`, and
// end_sums<BITS>(sums, correction) → 16 INT32.

// R rows × P panels → sums [R, PANEL_BLOCK] of 16 outputs each. All rows go through a record together: the products of
// one row depend on each other, and out-of-order execution does not reach as far as the next row. Two panels share each
// load of an activation.
template <int BITS, bool SCALES, bool MINS, int R, int P>
TARGET void microkernel(const uint8_t *record, const QuantizedRows &x, RowIndex index, f32x16 *sums,
                        Prefetch prefetch) {
    constexpr i64 WEIGHT_BYTES = BITS * 64, RECORD_SIZE = WEIGHT_BYTES + 32 * SCALES + 32 * MINS;
    constexpr i64 SCALE_GROUPS = BITS == 8 && !SCALES ? INT8_SCALE_GROUPS : 1;  // groups that share a scale
    constexpr int ACCUMULATORS = R * P < 4 ? 2 : 1;  // independent sums per output, to hide latency when there are few
    const i64 panel_bytes = x.groups * RECORD_SIZE;
    f32x16 total[R][P];
    const ActivationGroup *row[R];
    UNROLL for (int r = 0; r < R; ++r) {
        row[r] = x.data + index[r] * x.groups;
        UNROLL for (int p = 0; p < P; ++p) total[r][p] = f32x16{};
    }
    const i64 lines = (prefetch.lines + x.groups - 1) / x.groups;
    for (i64 start = 0; start < x.groups; start += SCALE_GROUPS) {
        const ActivationGroup *first[R];
        Sums<BITS> acc[R][P][ACCUMULATORS];
        int32_t correction[R];  // subtracts the weights' zero point
        UNROLL for (int r = 0; r < R; ++r) {
            first[r] = row[r];
            correction[r] = MINS || (BITS == 8 && SIGNED_WEIGHTS) ? 0 : BITS == 4 ? row[r]->minus_8_sum : row[r]->minus_128_sum;
            UNROLL for (int p = 0; p < P; ++p) UNROLL
                for (int a = 0; a < ACCUMULATORS; ++a) acc[r][p][a] = begin_sums<BITS>(a ? 0 : correction[r]);
        }
        const i64 groups = SCALE_GROUPS == 1 ? 1 : std::min(SCALE_GROUPS, x.groups - start);
        const uint8_t *scales = record + WEIGHT_BYTES;
        for (i64 g = 0; g < groups; ++g, record += RECORD_SIZE) {
            prefetch.issue(lines);
            // Into L2: panels that another row block uses again gain 3 to 5 % in prefill. 2048 instead of 1024 bytes
            // ahead made decode steps of 1 and of 32 rows 5 % faster.
            UNROLL for (int p = 0; p < P; ++p)
                for (i64 line = 0; line < RECORD_SIZE; line += 64)
                    __builtin_prefetch(record + p * panel_bytes + 2048 + line);
            UNROLL for (int j = 0; j < BITS; ++j) {
                u8x64 packed[P];
                UNROLL for (int p = 0; p < P; ++p) packed[p] = load_as<u8x64>(record + p * panel_bytes + 64 * j);
                // Inputs 4j to 4j+3; at 4 bits the upper half of the bytes holds those 16 further on.
                UNROLL for (int half = 0; half < 8 / BITS; ++half) {
                    u8x64 weights[P];
                    UNROLL for (int p = 0; p < P; ++p)
                        weights[p] = BITS == 8 ? packed[p] : half ? packed[p] >> 4 : packed[p] & 15;
                    UNROLL for (int r = 0; r < R; ++r) {
                        int32_t four;
                        std::memcpy(&four, row[r]->q + 4 * j + 16 * half, sizeof four);
                        UNROLL for (int p = 0; p < P; ++p) {
                            Sums<BITS> &to = acc[r][p][(BITS == 8 ? j : half) % ACCUMULATORS];
                            to = dot4<BITS>(to, weights[p], four);
                        }
                    }
                }
            }
            UNROLL for (int r = 0; r < R; ++r) ++row[r];
        }
        f32x16 scale[P], minimum[P];
        UNROLL for (int p = 0; p < P; ++p) {
            if constexpr (SCALES) scale[p] = load_f16x16(scales + p * panel_bytes);
            if constexpr (MINS) minimum[p] = load_f16x16(scales + p * panel_bytes + 32);
        }
        UNROLL for (int r = 0; r < R; ++r) {
            UNROLL for (int p = 0; p < P; ++p) {
                if constexpr (ACCUMULATORS == 2) acc[r][p][0] += acc[r][p][1];
                const f32x16 product = to_f32(end_sums<BITS>(acc[r][p][0], correction[r]));
                if constexpr (SCALES)
                    total[r][p] += product * (scale[p] * first[r]->scale);
                else
                    total[r][p] += product * first[r]->scale;
                if constexpr (MINS) total[r][p] += minimum[p] * first[r]->scaled_sum;
            }
        }
    }
    UNROLL for (int r = 0; r < R; ++r) UNROLL
        for (int p = 0; p < P; ++p) sums[r * PANEL_BLOCK + p] = total[r][p];
}

using Microkernel = void (*)(const uint8_t *, const QuantizedRows &, RowIndex, f32x16 *, Prefetch);

// Splits the rows into blocks of at most MAX_ROWS, as evenly as possible.
template <int BITS, bool SCALES, bool MINS, int P, size_t... R>
TARGET void qgemm_rows(const uint8_t *panel, const QuantizedRows &x, RowIndex index, i64 rows, f32x16 *sums,
                       Prefetch prefetch, std::index_sequence<R...>) {
    static constexpr Microkernel MICROKERNELS[] = {microkernel<BITS, SCALES, MINS, R + 1, P>...};
    const i64 blocks = (rows + MAX_ROWS<BITS> - 1) / MAX_ROWS<BITS>;
    for (i64 t = 0; t < blocks; ++t) {
        const i64 r = t * rows / blocks;
        MICROKERNELS[(t + 1) * rows / blocks - r - 1](panel, x, index + r, sums + r * PANEL_BLOCK,
                                                      prefetch.slice(t, blocks));
    }
}

template <int BITS, bool SCALES, bool MINS>
TARGET void qgemm_format(const uint8_t *panel, i64 panels, const QuantizedRows &x, RowIndex index, i64 rows,
                         f32x16 *sums, Prefetch prefetch) {
    constexpr std::make_index_sequence<MAX_ROWS<BITS>> max_rows;
    // Rows that use a panel only once are bound by memory, which delivers one stream faster than two: 3 to 7 % with one
    // to eight rows.
    if (panels == MAX_PANELS<BITS> && rows > MAX_ROWS<BITS>)
        return qgemm_rows<BITS, SCALES, MINS, MAX_PANELS<BITS>>(panel, x, index, rows, sums, prefetch, max_rows);
    const i64 panel_bytes = x.groups * (BITS * 64 + 32 * SCALES + 32 * MINS);
    for (i64 p = 0; p < panels; ++p)
        qgemm_rows<BITS, SCALES, MINS, 1>(panel + p * panel_bytes, x, index, rows, sums + p, prefetch.slice(p, panels),
                                          max_rows);
}

TARGET void qgemm_panels(i64 format, const uint8_t *panel, i64 panels, const QuantizedRows &x, RowIndex index, i64 rows,
                         f32x16 *sums, Prefetch prefetch) {
    if (format == INT4) qgemm_format<4, true, false>(panel, panels, x, index, rows, sums, prefetch);
    if (format == INT4_MINS) qgemm_format<4, true, true>(panel, panels, x, index, rows, sums, prefetch);
    if (format == INT8) qgemm_format<8, false, false>(panel, panels, x, index, rows, sums, prefetch);
    if (format == INT8_GROUPS) qgemm_format<8, true, false>(panel, panels, x, index, rows, sums, prefetch);
}
