// Grouped-query attention of a decode step.
#pragma once

#include "step.h"

namespace {

template <class T>
void Decoder<T>::grouped_attention(const Layer<T> &layer) {
    const i64 G = net.kv_heads, W = net.rope_dim, q_per_kv = net.heads / G, half = W / 2;
    project(normed(step.x, layer.attn_norm, net.hidden, step.scalars.eps),
            {{&layer.q, step.q}, {&layer.k, step.k}, {&layer.v, step.v}}, false);
    const i64 head_bytes = QuantizedRows::groups_of(W) * KV_RECORD_BYTES;  // of a head in an int8 block
    // A (row, head) pair's key and value into the cache.
    const auto write = [&](i64 task) {
        const i64 r = task / G, g = task % G, at = step.tables.slot(r);
        apply_rope(step.k + task * W, step.cos + r * half, step.sin + r * half, W, net.interleave, row);
        if (net.int8_kv) {
            const i64 to = (at / VLEN * G + g) * head_bytes;
            quantize_row(row, W, q8, 0);
            store_key(q8, at % VLEN, reinterpret_cast<uint8_t *>(layer.a) + to);
            quantize_row(step.v + task * W, W, q8, 0);
            store_value(q8, at % VLEN, reinterpret_cast<uint8_t *>(layer.b) + to);
        } else if (net.fp8_kv) {
            const i64 to = (at * G + g) * fp8_row_bytes(W);
            store_fp8_row(row, W, reinterpret_cast<uint8_t *>(layer.a) + to);
            store_fp8_row(step.v + task * W, W, reinterpret_cast<uint8_t *>(layer.b) + to);
        } else {
            store_row(row, W, layer.a + (at * G + g) * W);
            store_row(step.v + task * W, W, layer.b + (at * G + g) * W);
        }
    };
    if (!step.one_token_each) {  // a row reads what another row writes
        worker.parallel_for(rows * G, write);
        barrier();
    }
    const auto int8_blocks = [&](const T *store, i64 task) {
        const i64 last = step.runs[task / G + 1] - 1;
        return Int8Blocks{reinterpret_cast<const uint8_t *>(store) + task % G * head_bytes, G * head_bytes,
                          step.tables.table(last), (step.tables.lengths[last] + VLEN - 1) / VLEN};
    };
    // All queries of a run of tokens that share key/value head g.
    const auto run_group = [&](i64 task, i64 next) {
        const i64 g = task % G, first = step.runs[task / G], end = step.runs[task / G + 1], count = end - first;
        const i64 token_stride = G * W, block_stride = step.tables.block * token_stride,
                  length = step.tables.lengths[end - 1];
        const int32_t *table = step.tables.table(end - 1);
        RORQUAL_ASSERT(count <= step.longest_run && length <= stride);
        if (step.one_token_each) write(first * G + g);
        for (i64 i = 0; i < count * q_per_kv; ++i) {
            const i64 r = first + i / q_per_kv, h = g * q_per_kv + i % q_per_kv;
            float *query = net.int8_kv ? row : queries + i * W;
            apply_rope(step.q + (r * net.heads + h) * W, step.cos + r * half, step.sin + r * half, W, net.interleave,
                       query);
            if (net.int8_kv) quantize_row(query, W, q8, i);
        }
        float *out = count == 1 ? step.heads + (first * net.heads + g * q_per_kv) * W : outputs;
        if (net.int8_kv) {
            attend_group_int8(q8, int8_blocks(layer.a, task), int8_blocks(layer.b, task),
                              next < 0 ? Int8Blocks{} : int8_blocks(layer.a, next), length, count, q_per_kv, W,
                              step.scalars.softmax_scale, weights, stride, out);
        } else if (net.fp8_kv) {
            const auto fp8_rows = [&](const T *store) {
                return Fp8Rows{reinterpret_cast<const uint8_t *>(store), step.tables.block, G, g, W, table, length};
            };
            attend_group_fp8(queries, fp8_rows(layer.a), PagedRows<bf16>{}, fp8_rows(layer.b), count, q_per_kv, 0,
                             step.scalars.softmax_scale, keys, weights, stride, out);
        } else {
            const PagedRows<T> k{layer.a + g * W, block_stride, token_stride, table, length, step.tables.shift()};
            const PagedRows<T> v{layer.b + g * W, block_stride, token_stride, table, length, k.shift};
            attend_group(queries, k, k, v, count, q_per_kv, W, 0, W, step.scalars.softmax_scale, keys, weights, stride,
                         out);
        }
        for (i64 i = 0; out == outputs && i < count; ++i)
            std::copy_n(outputs + i * q_per_kv * W, q_per_kv * W,
                        step.heads + ((first + i) * net.heads + g * q_per_kv) * W);
    };
    // The heads of a token are contiguous in memory: the thread that reads one has half of the next in cache.
    const i64 tasks = (i64(step.runs.size()) - 1) * G;
    worker.parallel_for_stealing(tasks, tasks >= 8 * G ? G : 1, [&](i64 start, i64 end, i64 next) {
        for (i64 task = start; task < end; ++task) run_group(task, task + 1 < end ? task + 1 : next);
    });
    barrier(&layer.o);
    output_projection(layer);
}

// Adds the heads' projection to the residual stream.
template <class T>
void Decoder<T>::output_projection(const Layer<T> &layer) {
    const i64 width = layer.o.width;
    const auto quantize = [&](const QuantizedRows &to, i64 r) { quantize_row(step.heads + r * width, width, to, r); };
    project(quantized(width, quantize), {{&layer.o, step.x}}, true, &layer.gate);
}

}  // namespace
