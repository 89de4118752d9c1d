// Mixture of experts of a decode step. An expert reads only its own rows, so a step costs the weights of the chosen
// ones.
#pragma once

#include "ffn.h"

namespace {

template <class T>
void Decoder<T>::mixture_of_experts(const Layer<T> &layer) {
    const i64 E = net.experts, K = net.top_k, D = net.hidden, F = layer.experts_out.width;
    const i64 shared_width = layer.gate ? layer.gate.outputs : 0;
    const QuantizedRows from = quantized(D, [&](const QuantizedRows &to, i64 r) {
        rms_norm(step.x + r * D, layer.ffn_norm, D, step.scalars.eps, row);
        quantize_row(row, D, to, r);
    });
    // The router, VLEN experts at a time, and the shared experts, which do not depend on it.
    const QuantizedRows shared(step.dense_inner, shared_width, step.format);
    const i64 router_tasks = (E + VLEN - 1) / VLEN, chunk = gate_panels(shared);
    const i64 shared_tasks = layer.gate ? (layer.gate.panels() + chunk - 1) / chunk : 0;
    worker.parallel_for(rows * router_tasks + shared_tasks, [&](i64 task) {
        if (const i64 p = chunk * (task - rows * router_tasks); p >= 0)
            return gate_up(layer, from, p, std::min(p + chunk, layer.gate.panels()), p + chunk, shared);
        const i64 r = task / router_tasks, e = task % router_tasks * VLEN, valid = std::min(VLEN, E - e);
        rms_norm(step.x + r * D, layer.ffn_norm, D, step.scalars.eps, row);
        store_partial(step.router_scores + r * E + e, gemv16(layer.router + e * D, valid, D, row), valid);
    });
    barrier();
    worker.parallel_for(rows, [&](i64 r) {
        if (layer.gate && shared.plane_bytes)
            quantize_row(step.gates + r * layer.gate.panels() * VLEN, shared_width, shared, r);
        route_topk(net, layer.correction, step.scalars.routed_factor, step.router_scores + r * E,
                   step.biased_scores + r * E, step.expert_of + r * K, step.expert_weights + r * K);
    });
    barrier();
    sort_by_expert();
    const i64 num_active = i64(active.size()), in_panels = layer.experts_in.panels(),
              out_panels = layer.experts_out.panels();
    const auto begin = [&](i64 e) { return e ? ends[e - 1] : 0; };
    const int32_t *row_of = sorted.data() + rows * K;
    worker.parallel_for(num_active * in_panels, [&](i64 task) {
        const i64 e = active[task / in_panels], p = task % in_panels, at = e * in_panels + p, first = begin(e);
        layer.experts_in.gemm(at, at + 1, p + 1 < in_panels ? at + 1 : -1, from, {0, row_of + first}, ends[e] - first,
                              [&](i64, i64 i, f32x16 y, i64 valid) {
                                  store_partial(step.expert_gate_up + (first + i) * 2 * F + p * VLEN, y, valid);
                              });
    });
    barrier();
    const QuantizedRows inner(step.expert_inner, F, step.format);
    worker.parallel_for(rows * K, [&](i64 i) {
        float *gate = step.expert_gate_up + i * 2 * F;
        quantize_swiglu(gate, gate + F, F, inner, i);
    });
    barrier();
    worker.parallel_for(out_panels, [&](i64 p) {  // one thread adds all experts' outputs of a panel, in order
        for (i64 e : active) {
            const i64 first = begin(e), at = e * out_panels + p;
            layer.experts_out.gemm(
                at, at + 1, -1, inner, {first, nullptr}, ends[e] - first, [&](i64, i64 i, f32x16 y, i64 valid) {
                    const i64 entry = sorted[first + i];
                    add_partial(step.x + entry / K * D + p * VLEN, y * step.expert_weights[entry], valid);
                });
        }
        if (layer.gate)
            layer.down.gemm(p, p + 1, -1, shared, {0, nullptr}, rows,
                            [&](i64, i64 r, f32x16 y, i64 valid) { add_partial(step.x + r * D + p * VLEN, y, valid); });
    });
    barrier();
}

// Counting sort of the (row, expert) pairs: `sorted` holds the pairs, then their rows, in order of experts; expert e's
// end at ends[e]; `active` lists the experts that have any.
template <class T>
void Decoder<T>::sort_by_expert() {
    const i64 K = net.top_k, count = rows * K;
    ends.assign(net.experts, 0);
    active.clear();
    sorted.resize(2 * count);
    for (i64 i = 0; i < count; ++i) {
        RORQUAL_ASSERT(step.expert_of[i] >= 0 && step.expert_of[i] < net.experts);
        ++ends[step.expert_of[i]];
    }
    int32_t sum = 0;
    for (i64 e = 0; e < net.experts; ++e) {
        if (ends[e]) active.push_back(int32_t(e));
        sum += std::exchange(ends[e], sum);
    }
    for (i64 i = 0; i < count; ++i) {
        const int32_t at = ends[step.expert_of[i]]++;
        sorted[at] = int32_t(i);
        sorted[count + at] = int32_t(i / K);
    }
}

}  // namespace
