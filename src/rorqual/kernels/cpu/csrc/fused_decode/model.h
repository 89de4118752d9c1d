// The model as a fused decode step reads it. kernels/fused_decode.py writes these structs as rows of int64, field by
// field, under the same names and in the same order; what a layer lacks is 0.
#pragma once

#include "../quantized_weight.h"

namespace {

// LayerWeights of kernels/fused_decode.py.
template <class T>
struct Layer {
    const T *attn_norm;
    // Grouped-query attention has q, k, v, o. MLA has q_a and q_a_norm if queries are low-rank, q, kv_a, kv_a_norm,
    // kv_b (the up-projections [heads, nope + value, latent]) and o.
    QuantizedLinear<T> q_a;
    const T *q_a_norm;
    QuantizedLinear<T> q, k, v, kv_a;
    const T *kv_a_norm, *kv_b;
    QuantizedLinear<T> o;
    const T *ffn_norm;
    QuantizedLinear<T> gate, up, down;  // of a dense layer, or of the shared experts
    const float *router, *correction;   // [experts, hidden], [experts]
    QuantizedLinear<T> experts_in, experts_out;
    // The KV cache: keys and values [blocks, block, groups, width], or MLA's latents and rope keys; or as in kv_int8.h
    // or kv_fp8.h.
    T *a, *b;
};

// After the layers ModelSizes of kernels/fused_decode.py, from `hidden` to `fp8_kv`, then addresses.
template <class T>
struct Network {
    const Layer<T> *layers;
    i64 num_layers;
    i64 hidden, heads, kv_heads;
    i64 rope_dim, interleave;             // rotary width of a head: all of it, or MLA's rope part; how pairs lie
    i64 latent_dim, nope_dim, value_dim;  // MLA
    // Mixture of experts: how many, how many a token, and how the router chooses them (model/moe.py).
    i64 experts, top_k, expert_groups, groups_kept, softmax, correction_bias, group_limited, normalise;
    i64 int8_kv, fp8_kv;  // the KV cache is int8, or FP8
    const T *norm;
    QuantizedLinear<T> embedding, head;
    const float *frequencies;  // [rope_dim / 2]
    // Of an MTP module, or 0: norms of the embedding and of the previous hidden state, and the projection of both.
    const T *embedding_norm, *state_norm;
    QuantizedLinear<T> join;
};

struct Scalars {
    float rope_factor, softmax_scale, eps, latent_eps, routed_factor;
};

}  // namespace
