// The state of a decode step: what all threads share (Step), and one thread (Decoder).
#pragma once

#include <initializer_list>
#include <omp.h>
#include <vector>

#include "../attention.h"
#include "../kv_fp8.h"
#include "../kv_int8.h"
#include "../thread_team.h"
#include "arena.h"
#include "block_tables.h"
#include "ops.h"

namespace {

// Widths over all layers: what the buffers have to hold.
template <class T>
struct Widths {
    i64 inner = 0;      // SwiGLU, of dense layers, shared and routed experts
    i64 q_a = 0;        // low-rank queries
    i64 attention = 0;  // concatenated heads, the input of o
    i64 q, kv;          // projections; the same in every layer
    i64 cache;          // a key of the cache: grouped-query attention's width, or MLA's latent and rope key
    i64 input;          // the widest row that is quantised

    explicit Widths(const Network<T> &net)
        : q(net.layers[0].q.outputs), kv(net.layers[0].k.outputs), cache(net.latent_dim + net.rope_dim) {
        for (i64 l = 0; l < net.num_layers; ++l) {
            const Layer<T> &layer = net.layers[l];
            inner = std::max({inner, layer.gate.outputs, layer.experts_out.width});
            q_a = std::max(q_a, layer.q_a.outputs);
            attention = std::max(attention, layer.o.width);
            RORQUAL_ASSERT(layer.q.outputs == q && layer.k.outputs == kv && layer.v.outputs == kv);
        }
        input = std::max({net.hidden * (net.join ? 2 : 1), inner, q_a, attention});
    }
};

template <class T>
struct Step {
    Step(const Network<T> &net, const Scalars &scalars, const BlockTables &tables, i64 rows)
        : net(net),
          scalars(scalars),
          tables(tables),
          rows(rows),
          format(net.head.format),
          replicate(rows <= 2),
          widths(net),
          arena([&](auto &buffer) {
              const auto quantized = [&](uint8_t *&pointer, i64 n, i64 width) {
                  buffer(pointer, QuantizedRows::bytes(n, width, format));
              };
              const i64 routed = rows * net.top_k, inner = widths.inner;
              quantized(input, rows, widths.input);
              quantized(dense_inner, rows, inner);
              quantized(expert_inner, routed, inner);
              buffer(x, rows * net.hidden);
              buffer(q_a, rows * widths.q_a);
              buffer(q, rows * widths.q);
              buffer(k, rows * widths.kv);
              buffer(v, rows * widths.kv);
              buffer(kv_a, rows * widths.cache);
              buffer(heads, rows * widths.attention);
              buffer(cos, rows * net.rope_dim / 2);
              buffer(sin, rows * net.rope_dim / 2);
              buffer(router_scores, rows * net.experts);
              buffer(biased_scores, rows * net.experts);
              buffer(expert_of, routed);
              buffer(expert_weights, routed);
              buffer(expert_gate_up, routed * 2 * inner);
              buffer(gates, rows * (inner + VLEN));
          }) {
        const i64 q_per_kv = net.latent_dim ? net.heads : net.heads / net.kv_heads;
        const i64 max_run = std::max(i64(1), std::min(i64(8), 24 / q_per_kv));
        for (i64 r = 0; r < rows; ++r) {
            const bool same = r > 0 && tables.continues(r);
            one_token_each = one_token_each && !same;
            if (!same || r - runs.back() == max_run) runs.push_back(r);
            RORQUAL_ASSERT(tables.lengths[r] > 0);
        }
        runs.push_back(rows);
        for (size_t i = 1; i < runs.size(); ++i) longest_run = std::max(longest_run, runs[i] - runs[i - 1]);
        RORQUAL_ASSERT(std::has_single_bit(uint64_t(tables.block)) && tables.block >= VLEN &&
                       (!net.int8_kv || tables.block == VLEN));
    }

    const Network<T> &net;
    const Scalars &scalars;
    const BlockTables &tables;
    const i64 rows, format;  // the format of all weights; if they differ, none is INT8
    const bool replicate;    // few rows: every thread makes small results for itself, which is quicker than a barrier
    bool one_token_each = true;  // no two rows belong to one sequence
    std::vector<i64> runs;       // first rows of runs of one sequence, and the end; a run shares transposed keys
    i64 longest_run = 1;
    const Widths<T> widths;
    ThreadTeam team{omp_get_max_threads()};
    // Buffers, a row each for every row of the step, or for every (row, expert) pair.
    uint8_t *input, *dense_inner, *expert_inner;  // quantised rows
    float *x, *q_a, *q, *k, *v, *kv_a, *heads, *cos, *sin, *router_scores, *biased_scores, *expert_weights,
        *expert_gate_up;
    float *gates;
    int32_t *expert_of;
    const Arena arena;
};

// One thread of a step.
template <class T>
struct Decoder {
    explicit Decoder(Step<T> &step)
        : step(step),
          net(step.net),
          rows(step.rows),
          worker(step.team, omp_get_thread_num(), size),
          stride((step.tables.longest(step.rows) + VLEN - 1) / VLEN * VLEN),
          heads_at_once(net.latent_dim ? (rows >= size ? net.heads : (net.heads + size - 1) / size)
                                       : net.heads / net.kv_heads),
          q8(nullptr, net.rope_dim, INT8_GROUPS),
          arena([&](auto &buffer) {
              const i64 queries_at_once = step.longest_run * heads_at_once, width = step.widths.cache;
              uint8_t *q8_data = nullptr;
              buffer(own_input, QuantizedRows::bytes(step.replicate ? rows : 0, step.widths.input, step.format));
              buffer(keys, width);
              buffer(row, step.widths.input);
              buffer(q8_data, QuantizedRows::bytes(net.int8_kv ? queries_at_once : 0, net.rope_dim, INT8_GROUPS));
              buffer(queries, queries_at_once * width);
              buffer(weights, queries_at_once * stride * (net.fp8_kv ? 2 : 1));
              buffer(outputs, queries_at_once * width);
              q8.data = reinterpret_cast<ActivationGroup *>(q8_data);
          }) {}

    // Waits for all threads. `next`: the weights read after it; those the thread probably begins with are prefetched.
    void barrier(const QuantizedLinear<T> *next = nullptr) {
        arena.check();
        if (!next || !*next) return worker.barrier([] {});
        const i64 panels = next->panels(), chunk = panels_per_task(panels, size, rows);
        const i64 first = worker.begin((panels + chunk - 1) / chunk) * chunk;
        Prefetch prefetch{next->panel(first),
                          std::min(chunk, panels - first) * next->groups() * RECORD_BYTES[next->format] / 64};
        worker.barrier([&] { prefetch.issue(4); });
    }

    // Rows quantised by f(rows, r), shared by all threads or, where there are few, by each thread for itself.
    template <class F>
    QuantizedRows quantized(i64 width, F f) {
        RORQUAL_ASSERT(width <= step.widths.input);
        const QuantizedRows to(step.replicate ? own_input : step.input, width, step.format);
        if (step.replicate) {
            for (i64 r = 0; r < rows; ++r) f(to, r);
        } else {
            worker.parallel_for(rows, [&](i64 r) { f(to, r); });
            barrier();
        }
        return to;
    }

    // RMSNorm, quantised. kept: where the FP32 rows are stored too [rows, width], by one thread each, or null.
    QuantizedRows normed(const float *from, const T *weight, i64 width, float eps, float *kept = nullptr) {
        if (step.replicate && !worker.is_first()) kept = nullptr;
        return quantized(width, [&](const QuantizedRows &to, i64 r) {
            float *y = kept ? kept + r * width : row;
            rms_norm(from + r * width, weight, width, eps, y);
            quantize_row(y, width, to, r);
        });
    }

    struct Projection {
        const QuantizedLinear<T> *weights;
        float *to;  // [rows, outputs]
    };

    // Rows × several weights, each result stored in or added to its buffer.
    void project(const QuantizedRows &from, std::initializer_list<Projection> projections, bool add,
                 const QuantizedLinear<T> *next_weights = nullptr) {
        i64 panels = 0;
        for (const Projection &projection : projections) panels += projection.weights->panels();
        worker.parallel_for_stealing(panels, panels_per_task(panels, size, rows), [&](i64 start, i64 end, i64 next) {
            project_panels(from, projections, start, end, next, add);
        });
        barrier(next_weights);
    }

    // Panels [start, end) of the concatenated weights; `next` is where the thread probably continues.
    void project_panels(const QuantizedRows &from, std::initializer_list<Projection> projections, i64 start, i64 end,
                        i64 next, bool add) {
        for (const Projection &projection : projections) {
            const i64 panels = projection.weights->panels(), outputs = projection.weights->outputs;
            if (start < panels && end > 0)
                projection.weights->gemm(std::max(i64(0), start), std::min(end, panels), next < panels ? next : -1,
                                         from, {0, nullptr}, rows, [&](i64 p, i64 r, f32x16 y, i64 valid) {
                                             float *to = projection.to + r * outputs + p * VLEN;
                                             if (add)
                                                 add_partial(to, y, valid);
                                             else
                                                 store_partial(to, y, valid);
                                         });
            start -= panels;
            end -= panels;
            next -= panels;
        }
    }

    static void add_partial(float *to, f32x16 y, i64 count) {
        if (count == VLEN) return store_f32x16(to, load_f32x16(to) + y);
        for (i64 t = 0; t < count; ++t) to[t] += y[t];
    }

    void run(const i64 *tokens, const float *states, float *hidden, const int32_t *wanted, i64 count, float *logits);
    void embed(const i64 *tokens);                      // fused_decode.cpp
    void join(const i64 *tokens, const float *states);  // fused_decode.cpp
    void grouped_attention(const Layer<T> &layer);      // gqa.h
    void latent_attention(const Layer<T> &layer);       // mla.h
    void output_projection(const Layer<T> &layer);      // gqa.h
    void feed_forward(const Layer<T> &layer);           // ffn.h
    static i64 gate_panels(const QuantizedRows &to);    // ffn.h
    void gate_up(const Layer<T> &layer, const QuantizedRows &from, i64 start, i64 end, i64 next,
                 const QuantizedRows &to);
    void mixture_of_experts(const Layer<T> &layer);  // moe.h
    void sort_by_expert();                           // moe.h

    const GemmScope scope;
    Step<T> &step;
    const Network<T> &net;
    const i64 rows;
    const int size = omp_get_num_threads();
    Worker worker;
    const i64 stride, heads_at_once;  // stride: of attention weights
    uint8_t *own_input;               // quantised rows, if step.replicate
    f32x16 *keys;                     // transposed
    float *row;                       // one row of activations
    float *queries, *weights, *outputs;
    QuantizedRows q8;                           // queries, keys and values for the int8 cache
    std::vector<int32_t> sorted, ends, active;  // sort_by_expert
    const Arena arena;
};

}  // namespace
