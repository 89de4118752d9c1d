// A whole decode step of a network with packed weights in one call: some new tokens of a few sequences, from token ids
// to logits. With PyTorch's operators a step spends as much time between them as in them.
//
// All threads stay in the step from beginning to end (thread_team.h). Between two barriers they take small tasks.
//
// fused_decode/: model.h (structs that Python writes), ops.h (small functions), step.h (buffers, and products of rows
// with weights), attention.h, mla.h, ffn.h and moe.h (layers).

#include "fused_decode/gqa.h"
#include "fused_decode/ffn.h"
#include "fused_decode/mla.h"
#include "fused_decode/moe.h"
#include "fused_decode/step.h"

namespace {

// Token embeddings, and the angles of rotary embedding.
template <class T>
void Decoder<T>::embed(const i64 *tokens) {
    worker.parallel_for(rows, [&](i64 r) {
        RORQUAL_ASSERT(tokens[r] >= 0 && tokens[r] < net.embedding.outputs);
        if (!net.join) dequantize_row(net.embedding, tokens[r], step.x + r * net.hidden);
        const i64 half = net.rope_dim / 2;
        for (i64 j = 0; j < half; ++j) {
            const float angle = float(step.tables.lengths[r] - 1) * net.frequencies[j];
            step.cos[r * half + j] = std::cos(angle) * step.scalars.rope_factor;
            step.sin[r * half + j] = std::sin(angle) * step.scalars.rope_factor;
        }
    });
    barrier();
}

// The input of an MTP module: the normed embedding and previous hidden state, projected (DeepSeek-V3, eq. 21).
template <class T>
void Decoder<T>::join(const i64 *tokens, const float *states) {
    const i64 D = net.hidden;
    const auto both = [&](const QuantizedRows &to, i64 r) {
        dequantize_row(net.embedding, tokens[r], row);
        rms_norm(row, net.embedding_norm, D, step.scalars.eps, row);
        rms_norm(states + r * D, net.state_norm, D, step.scalars.eps, row + D);
        quantize_row(row, 2 * D, to, r);
    };
    project(quantized(2 * D, both), {{&net.join, step.x}}, false);
}

template <class T>
void Decoder<T>::run(const i64 *tokens, const float *states, float *hidden, const int32_t *wanted, i64 count,
                     float *logits) {
    embed(tokens);
    if (net.join) join(tokens, states);
    for (i64 l = 0; l < net.num_layers; ++l) {
        const Layer<T> &layer = net.layers[l];
        if (layer.kv_a)
            latent_attention(layer);
        else
            grouped_attention(layer);
        if (layer.router)
            mixture_of_experts(layer);
        else
            feed_forward(layer);
    }
    const QuantizedRows last = normed(step.x, net.norm, net.hidden, step.scalars.eps, hidden);
    const i64 panels = net.head.panels();
    worker.parallel_for_stealing(panels, panels_per_task(panels, size, count), [&](i64 start, i64 end, i64 next) {
        net.head.gemm(start, end, next, last, {0, wanted}, count, [&](i64 p, i64 i, f32x16 y, i64 valid) {
            store_partial(logits + i * net.head.outputs + p * VLEN, y, valid);
        });
    });
}

// tokens [rows], each the last of the lengths[i] tokens of its sequence; tokens of one sequence are adjacent and in
// order. states [rows, hidden]: an MTP module's previous hidden states, else null. → hidden [rows, hidden] after the
// last norm, and logits [count, vocabulary] of the rows listed in `wanted` (null: the first `count`).
template <class T>
void fused_decode(const Network<T> *network, const i64 *tokens, const float *states, i64 rows, const int32_t *tables,
                  i64 table_stride, i64 block, const int32_t *lengths, const Scalars *scalars, float *hidden,
                  const int32_t *wanted, i64 count, float *logits) {
    const BlockTables block_tables{tables, table_stride, block, lengths};
    Step<T> step(*network, *scalars, block_tables, rows);
#pragma omp parallel
    Decoder<T>(step).run(tokens, states, hidden, wanted, count, logits);
}

}  // namespace

#define PARAMETERS(T)                                                                                    \
    (const Network<T> *network, const i64 *tokens, const float *states, i64 rows, const int32_t *tables, \
     i64 table_stride, i64 block, const int32_t *lengths, const Scalars *scalars, float *hidden,         \
     const int32_t *wanted, i64 count, float *logits)
EXPORT_F32_BF16(void, fused_decode, PARAMETERS,
                (network, tokens, states, rows, tables, table_stride, block, lengths, scalars, hidden, wanted, count,
                 logits))
#undef PARAMETERS
