// Multi-head latent attention of a decode step, in its absorbed form (model/attention.py).
#pragma once

#include "step.h"

namespace {

template <class T>
void Decoder<T>::latent_attention(const Layer<T> &layer) {
    const i64 H = net.heads, C = net.latent_dim, N = net.nope_dim, R = net.rope_dim, V = net.value_dim, half = R / 2;
    const QuantizedRows from = normed(step.x, layer.attn_norm, net.hidden, step.scalars.eps);
    project(from, {{layer.q_a ? &layer.q_a : &layer.q, layer.q_a ? step.q_a : step.q}, {&layer.kv_a, step.kv_a}},
            false);
    uint8_t *const fp8_latents = reinterpret_cast<uint8_t *>(layer.a);
    bf16 *const bf16_rope_keys = reinterpret_cast<bf16 *>(layer.b);
    worker.parallel_for(rows, [&](i64 r) {
        const float *kv = step.kv_a + r * (C + R);
        const i64 at = step.tables.slot(r);
        rms_norm(kv, layer.kv_a_norm, C, step.scalars.latent_eps, queries);
        if (net.fp8_kv)
            store_fp8_row(queries, C, fp8_latents + at * fp8_row_bytes(C));
        else
            store_row(queries, C, layer.a + at * C);
        apply_rope(kv + C, step.cos + r * half, step.sin + r * half, R, net.interleave, queries);
        if (net.fp8_kv)
            store_row(queries, R, bf16_rope_keys + at * R);
        else
            store_row(queries, R, layer.b + at * R);
    });
    barrier();
    if (layer.q_a)
        project(normed(step.q_a, layer.q_a_norm, layer.q_a.outputs, step.scalars.latent_eps), {{&layer.q, step.q}},
                false);
    const i64 head_blocks = (H + heads_at_once - 1) / heads_at_once;
    worker.parallel_for(rows * head_blocks, [&](i64 task) {
        const i64 r = task / head_blocks, first = task % head_blocks * heads_at_once,
                  count = std::min(heads_at_once, H - first);
        for (i64 h = 0; h < count; ++h) {
            const float *query = step.q + (r * H + first + h) * (N + R);
            gemv_transposed(query, layer.kv_b + (first + h) * (N + V) * C, N, C, queries + h * (C + R));
            apply_rope(query + N, step.cos + r * half, step.sin + r * half, R, net.interleave,
                       queries + h * (C + R) + C);
        }
        const int32_t *table = step.tables.table(r);
        const i64 length = step.tables.lengths[r], block = step.tables.block, shift = step.tables.shift();
        if (net.fp8_kv) {
            const Fp8Rows a{fp8_latents, block, 1, 0, C, table, length};
            const PagedRows<bf16> b{bf16_rope_keys, block * R, R, table, length, shift};
            attend_group_fp8(queries, a, b, a, 1, count, R, step.scalars.softmax_scale, keys, weights, stride, outputs);
        } else {
            const PagedRows<T> a{layer.a, block * C, C, table, length, shift};
            const PagedRows<T> b{layer.b, block * R, R, table, length, shift};
            attend_group(queries, a, b, a, 1, count, C, R, C, step.scalars.softmax_scale, keys, weights, stride,
                         outputs);
        }
        for (i64 h = 0; h < count; ++h) {
            const T *up = layer.kv_b + ((first + h) * (N + V) + N) * C;
            float *to = step.heads + (r * H + first + h) * V;
            for (i64 n = 0; n < V; n += VLEN) {
                const i64 valid = std::min(VLEN, V - n);
                store_partial(to + n, gemv16(up + n * C, valid, C, outputs + h * C), valid);
            }
        }
    });
    barrier();
    output_projection(layer);
}

}  // namespace
