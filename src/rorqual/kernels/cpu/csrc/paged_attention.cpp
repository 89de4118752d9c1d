// Attention of one new token per sequence over a paged KV cache (kernels/paged_attention.py).

#include <cstdlib>
#include <omp.h>

#include "attention.h"

namespace {

// Sequence i sees the first lengths[i] tokens of the blocks in row i of `tables`. Scores are q·k + q2·k2; the second
// part is MLA's rope key, which all heads share. Distances: `_block` between blocks, `_token` between tokens of a
// block, `_group` between key/value heads.
template <class T>
void paged_attention(const T *q, const T *q2, const T *k, i64 k_block, i64 k_token, i64 k_group, const T *k2,
                     i64 k2_block, i64 k2_token, const T *v, i64 v_block, i64 v_token, i64 v_group,
                     const int32_t *tables, i64 table_row, i64 block, const int32_t *lengths, i64 rows, i64 heads,
                     i64 groups, i64 width, i64 width2, i64 value_width, float scale, T *out) {
    const i64 q_per_kv = heads / groups, full_width = width + width2, shift = std::countr_zero(uint64_t(block));
    i64 longest = 0;
    for (i64 i = 0; i < rows; ++i) longest = std::max(longest, i64(lengths[i]));
    const i64 stride = (longest + VLEN - 1) / VLEN * VLEN;
#pragma omp parallel
    {
        f32x16 *keys = static_cast<f32x16 *>(std::aligned_alloc(64, sizeof(f32x16) * full_width));
        float *queries = static_cast<float *>(std::malloc(sizeof(float) * q_per_kv * (full_width + stride)));
        float *weights = queries + q_per_kv * full_width;
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < rows * groups; ++task) {
            const i64 i = task / groups, g = task % groups, first = i * heads + g * q_per_kv, end = lengths[i];
            const int32_t *table = tables + i * table_row;
            const PagedRows<T> here{k + g * k_group, k_block, k_token, table, end, shift};
            const PagedRows<T> here2{k2, k2_block, k2_token, table, end, shift};
            for (i64 h = 0; h < q_per_kv; ++h) {
                for (i64 j = 0; j < width; ++j) queries[h * full_width + j] = load(q[(first + h) * width + j]);
                for (i64 j = 0; j < width2; ++j)
                    queries[h * full_width + width + j] = load(q2[(first + h) * width2 + j]);
            }
            attend_group(queries, here, here2, PagedRows<T>{v + g * v_group, v_block, v_token, table, end, shift}, 1,
                         q_per_kv, width, width2, value_width, scale, keys, weights, stride, out + first * value_width);
        }
        std::free(queries);
        std::free(keys);
    }
}

}  // namespace

#define PARAMETERS(T)                                                                                                \
    (const T *q, const T *q2, const T *k, i64 kb, i64 kp, i64 kg, const T *k2, i64 k2b, i64 k2p, const T *v, i64 vb, \
     i64 vp, i64 vg, const int32_t *tables, i64 tr, i64 block, const int32_t *lengths, i64 rows, i64 heads,          \
     i64 groups, i64 width, i64 width2, i64 value_width, float scale, T *out)
EXPORT_F32_BF16(void, paged_attention, PARAMETERS,
                (q, q2, k, kb, kp, kg, k2, k2b, k2p, v, vb, vp, vg, tables, tr, block, lengths, rows, heads, groups,
                 width, width2, value_width, scale, out))
#undef PARAMETERS
