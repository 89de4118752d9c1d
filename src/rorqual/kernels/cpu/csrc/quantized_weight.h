// Weights of 4 or 8 bits as they are stored, and their product with quantised activations.
//
// Weights lie in panels of 16 outputs, a panel in records of 32 inputs. A record holds, for every four inputs, the
// weights of 16 outputs interleaved (at 4 bits inputs 4j… in the lower and 4j+16… in the upper half of each byte), then
// 16 FP16 scales and 16 FP16 minima, where the format has them.
#pragma once

#include <algorithm>

#include "quantized_rows.h"

constexpr i64 ROW_BLOCK = 24;       // rows multiplied together with each panel, where there are many
constexpr i64 MAX_TASK_PANELS = 6;  // panels a thread takes at a time, at most
constexpr i64 PANEL_BLOCK = 2;      // panels per microkernel call

extern "C" void begin_gemm(), end_gemm();

// Configures AMX tiles for the calling thread; needed around every gemm.
struct GemmScope {
    GemmScope() { begin_gemm(); }
    ~GemmScope() { end_gemm(); }
};

// Indices of rows: first, first + 1, …, or those of `list` if it is not null.
struct RowIndex {
    i64 first;
    const int32_t *list;

    i64 operator[](i64 i) const { return list ? list[i] : first + i; }
    RowIndex operator+(i64 i) const { return {first + i, list ? list + i : nullptr}; }
};

// Cache lines that the thread will read next, prefetched while it computes.
struct Prefetch {
    const uint8_t *from;
    i64 lines;

    Prefetch slice(i64 i, i64 of) const { return {from + i * lines / of * 64, (i + 1) * lines / of - i * lines / of}; }
    void issue(i64 count) {
        count = std::min(count, lines);
        for (i64 i = 0; i < count; ++i, from += 64) __builtin_prefetch(from, 0, 2);
        lines -= count;
    }
};

// Rows × one or PANEL_BLOCK panels → sums [rows, PANEL_BLOCK] of 16 outputs each, before per-channel scales.
using QgemmPanels = void (*)(i64 format, const uint8_t *panel, i64 panels, const QuantizedRows &x, RowIndex index,
                             i64 rows, f32x16 *sums, Prefetch prefetch);
extern "C" const QgemmPanels qgemm_panels;

// Applied to a panel's outputs: y · scale + bias; `valid` of the 16 outputs exist.
struct Epilogue {
    f32x16 scale, bias;
    i64 valid;
};

#if defined(__AVX512F__)
#include "amx.h"
#endif

namespace {

// Weights of a linear layer or of several experts; `channels`: FP32 scales per output (INT8), or null; `bias` or null.
// kernels/fused_decode.py writes this as six int64.
template <class T>
struct QuantizedLinear {
    const uint8_t *data;
    const float *channels;
    const T *bias;
    i64 format, outputs, width;

    explicit operator bool() const { return data != nullptr; }
    i64 panels() const { return (outputs + VLEN - 1) / VLEN; }
    i64 groups() const { return QuantizedRows::groups_of(width); }
    const uint8_t *panel(i64 p) const { return data + p * groups() * RECORD_BYTES[format]; }

    // Rows × panels [start, end) of one expert; calls f(p, i, y, valid) with the outputs y of panel p for the i-th row.
    // A block of rows that fits L1 passes over all panels before the next block. The first block prefetches the
    // following panels (10 % faster with 32 rows and 8 bits), the last one those from `next` on, where the thread
    // probably continues (negative: unknown).
    template <class F>
    void gemm(i64 start, i64 end, i64 next, const QuantizedRows &x, RowIndex index, i64 rows, F f) const {
        const i64 expert_start = start / panels() * panels();  // first panel of this expert
        const auto epilogue_of = [&](i64 p) {
            const i64 output = (p - expert_start) * VLEN;
            Epilogue y{f32x16{} + 1.0f, f32x16{}, std::min(VLEN, outputs - output)};
            if (channels) y.scale = load_f32x16(channels + p * VLEN);
            for (i64 t = 0; bias && t < y.valid; ++t) y.bias[t] = load(bias[output + t]);
            return y;
        };
#if defined(__AVX512F__)
        if (x.plane_bytes)
            return amx::gemm(data, start, end, next < 0 ? nullptr : panel(next), x, index, rows, epilogue_of, f);
#endif
        const i64 lines = groups() * RECORD_BYTES[format] / 64, block_rows = rows <= 2 * ROW_BLOCK ? rows : ROW_BLOCK;
        for (i64 first = 0; first < rows; first += block_rows) {
            const i64 count = std::min(block_rows, rows - first);
            for (i64 p = start; p < end; p += PANEL_BLOCK) {
                const i64 block_panels = std::min(PANEL_BLOCK, end - p);
                f32x16 sums[2 * ROW_BLOCK * PANEL_BLOCK];
                Prefetch prefetch{panel(p + PANEL_BLOCK),
                                  first == 0 ? lines * std::min(PANEL_BLOCK, end - p - PANEL_BLOCK) : 0};
                if (p + PANEL_BLOCK >= end)
                    prefetch = {panel(next), first + block_rows >= rows && next >= 0 ? lines * block_panels : 0};
                qgemm_panels(format, panel(p), block_panels, x, index + first, count, sums, prefetch);
                for (i64 c = 0; c < block_panels; ++c) {
                    const Epilogue to = epilogue_of(p + c);
                    for (i64 r = 0; r < count; ++r)
                        f(p + c, first + r, sums[r * PANEL_BLOCK + c] * to.scale + to.bias, to.valid);
                }
            }
        }
    }
};

// Panels a thread takes at a time: an even number that gives each thread about three tasks. With many rows and no AMX
// the minimum, so that threads finish together (3 to 5 % faster with 31 rows).
inline i64 panels_per_task(i64 panels, i64 threads, i64 rows) {
    return rows > 8 && !has_amx
               ? PANEL_BLOCK
               : std::clamp(panels / (3 * threads) / PANEL_BLOCK * PANEL_BLOCK, PANEL_BLOCK, MAX_TASK_PANELS);
}

}  // namespace
