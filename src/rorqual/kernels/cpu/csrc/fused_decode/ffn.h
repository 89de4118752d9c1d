// SwiGLU feed-forward of a decode step: dense layers and shared experts.
#pragma once

#include "step.h"

namespace {

template <class T>
void Decoder<T>::feed_forward(const Layer<T> &layer) {
    const QuantizedRows from = normed(step.x, layer.ffn_norm, net.hidden, step.scalars.eps);
    const QuantizedRows inner(step.dense_inner, layer.gate.outputs, step.format);
    const i64 panels = layer.gate.panels(), chunk = std::max(panels_per_task(panels, size, rows), gate_panels(inner));
    worker.parallel_for_stealing(panels, chunk,
                                 [&](i64 start, i64 end, i64 next) { gate_up(layer, from, start, end, next, inner); });
    barrier(&layer.down);
    if (inner.plane_bytes) {
        worker.parallel_for(rows,
                            [&](i64 r) { quantize_row(step.gates + r * panels * VLEN, layer.gate.outputs, inner, r); });
        barrier();
    }
    project(inner, {{&layer.down, step.x}}, true);
}

// Panels of gates that share a quantisation scale, so one thread makes them.
template <class T>
i64 Decoder<T>::gate_panels(const QuantizedRows &to) {
    return to.plane_bytes ? PANEL_BLOCK : to.scale_groups * GROUP_SIZE / VLEN;
}

// silu(gate) · up of panels [start, end), `start` a multiple of gate_panels, quantised at once: in FP32 they would not
// fit the near caches. INT16 rows have one scale, so they stay in step.gates until all panels are done.
template <class T>
void Decoder<T>::gate_up(const Layer<T> &layer, const QuantizedRows &from, i64 start, i64 end, i64 next,
                         const QuantizedRows &to) {
    const i64 panels = layer.gate.panels(), block_rows = rows <= 2 * ROW_BLOCK ? rows : ROW_BLOCK,
              scale_panels = gate_panels(to);
    f32x16 block[2 * ROW_BLOCK * INT8_SCALE_GROUPS * GROUP_SIZE / VLEN];
    if (next >= panels) next = -1;
    if (to.plane_bytes) {
        const auto gate = [&](i64 p, i64 r) { return step.gates + (r * panels + p) * VLEN; };
        layer.gate.gemm(start, end, next, from, {0, nullptr}, rows,
                        [&](i64 p, i64 r, f32x16 y, i64) { store_f32x16(gate(p, r), silu(y)); });
        layer.up.gemm(start, end, next, from, {0, nullptr}, rows,
                      [&](i64 p, i64 r, f32x16 y, i64) { store_f32x16(gate(p, r), load_f32x16(gate(p, r)) * y); });
        return;
    }
    for (i64 first = 0; first < rows; first += block_rows) {
        const i64 count = std::min(block_rows, rows - first);
        for (i64 p = start; p < end; p += PANEL_BLOCK) {
            const i64 last = std::min(end, p + PANEL_BLOCK), begin = p / scale_panels * scale_panels;
            const bool prefetches = last < end ? first == 0 : first + block_rows >= rows;
            const i64 following = !prefetches ? -1 : last < end ? last : next;
            const RowIndex index{first, nullptr};
            const auto gate = [&](i64 q, i64 r) -> f32x16 & { return block[r * scale_panels + q - begin]; };
            layer.gate.gemm(p, last, following, from, index, count,
                            [&](i64 q, i64 r, f32x16 y, i64) { gate(q, r) = y; });
            layer.up.gemm(p, last, following, from, index, count, [&](i64 q, i64 r, f32x16 y, i64 valid) {
                f32x16 &x = gate(q, r);
                x = silu(x) * y;
                for (i64 t = valid; t < VLEN; ++t) x[t] = 0;
            });
            if (last < end && last - begin < scale_panels) continue;
            const i64 groups = (last - begin + 1) * VLEN / GROUP_SIZE;
            for (i64 r = 0; r < count; ++r) {
                if (last - begin < groups * GROUP_SIZE / VLEN) gate(last, r) = f32x16{};
                quantize_groups(
                    groups, [&](i64 i) { return gate(begin + i, r); }, to,
                    (first + r) * to.groups + begin * VLEN / GROUP_SIZE);
            }
        }
    }
}

}  // namespace
