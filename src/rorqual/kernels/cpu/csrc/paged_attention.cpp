// Attention of one new token per sequence over a paged KV cache (kernels/paged_attention.py), and what writes an FP8
// cache (kernels/kv_fp8.py).

#include <cstdlib>
#include <omp.h>

#include "attention.h"
#include "kv_fp8.h"

namespace {

// Sequence i sees the first lengths[i] tokens of the blocks in row i of `tables`. Scores are q·k + q2·k2; the second
// part is MLA's rope key, which all heads share.
template <class T>
struct PagedQueries {
    const T *q, *q2;
    const int32_t *tables;
    i64 table_row;
    const int32_t *lengths;
    i64 rows, heads, groups, width, width2;

    // attend(table, length, g, queries of the heads of group g, keys, weights, stride, first head), where scratch
    // `weights` has `copies` · stride floats a query.
    template <class F>
    void for_each_group(i64 copies, F attend) const {
        const i64 q_per_kv = heads / groups, full_width = width + width2;
        i64 longest = 0;
        for (i64 i = 0; i < rows; ++i) longest = std::max(longest, i64(lengths[i]));
        const i64 stride = (longest + VLEN - 1) / VLEN * VLEN;
#pragma omp parallel
        {
            f32x16 *keys = static_cast<f32x16 *>(std::aligned_alloc(64, sizeof(f32x16) * full_width));
            float *queries =
                static_cast<float *>(std::malloc(sizeof(float) * q_per_kv * (full_width + copies * stride)));
            float *weights = queries + q_per_kv * full_width;
#pragma omp for schedule(dynamic)
            for (i64 task = 0; task < rows * groups; ++task) {
                const i64 i = task / groups, g = task % groups, first = i * heads + g * q_per_kv;
                for (i64 h = 0; h < q_per_kv; ++h) {
                    for (i64 j = 0; j < width; ++j) queries[h * full_width + j] = load(q[(first + h) * width + j]);
                    for (i64 j = 0; j < width2; ++j)
                        queries[h * full_width + width + j] = load(q2[(first + h) * width2 + j]);
                }
                attend(tables + i * table_row, i64(lengths[i]), g, queries, keys, weights, stride, first);
            }
            std::free(queries);
            std::free(keys);
        }
    }
};

// Distances: `_block` between blocks, `_token` between tokens of a block, `_group` between key/value heads.
template <class T>
void paged_attention(const T *q, const T *q2, const T *k, i64 k_block, i64 k_token, i64 k_group, const T *k2,
                     i64 k2_block, i64 k2_token, const T *v, i64 v_block, i64 v_token, i64 v_group,
                     const int32_t *tables, i64 table_row, i64 block, const int32_t *lengths, i64 rows, i64 heads,
                     i64 groups, i64 width, i64 width2, i64 value_width, float scale, T *out) {
    const i64 shift = std::countr_zero(uint64_t(block));
    const PagedQueries<T> all{q, q2, tables, table_row, lengths, rows, heads, groups, width, width2};
    all.for_each_group(1, [&](const int32_t *table, i64 length, i64 g, const float *queries, f32x16 *keys,
                              float *weights, i64 stride, i64 first) {
        attend_group(queries, PagedRows<T>{k + g * k_group, k_block, k_token, table, length, shift},
                     PagedRows<T>{k2, k2_block, k2_token, table, length, shift},
                     PagedRows<T>{v + g * v_group, v_block, v_token, table, length, shift}, 1, heads / groups, width,
                     width2, value_width, scale, keys, weights, stride, out + first * value_width);
    });
}

// Over the FP8 cache: k, v [blocks, block, groups, bytes of a row]; k2 BF16 [blocks, block, width2].
template <class T>
void paged_attention_fp8(const T *q, const T *q2, const uint8_t *k, const uint8_t *k2, const uint8_t *v,
                         const int32_t *tables, i64 table_row, i64 block, const int32_t *lengths, i64 rows, i64 heads,
                         i64 groups, i64 width, i64 width2, float scale, T *out) {
    const PagedQueries<T> all{q, q2, tables, table_row, lengths, rows, heads, groups, width, width2};
    all.for_each_group(2, [&](const int32_t *table, i64 length, i64 g, const float *queries, f32x16 *keys,
                              float *weights, i64 stride, i64 first) {
        const Fp8Rows own{k, block, groups, g, width, table, length}, values{v, block, groups, g, width, table, length};
        const PagedRows<bf16> shared{
            reinterpret_cast<const bf16 *>(k2), block * width2, width2, table, length, own.bytes.shift};
        attend_group_fp8(queries, own, shared, values, 1, heads / groups, width2, scale, keys, weights, stride,
                         out + first * width);
    });
}

// Quantises rows [rows, groups, width] into `slots` of a store [slots, groups, bytes of a row].
template <class T>
void store_fp8(const T *from, i64 rows, i64 groups, i64 width, const i64 *slots, uint8_t *store) {
#pragma omp parallel for if (rows * groups * width > 32768)
    for (i64 task = 0; task < rows * groups; ++task)
        store_fp8_row(from + task * width, width,
                      store + (slots[task / groups] * groups + task % groups) * fp8_row_bytes(width));
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

#define PARAMETERS(T)                                                                                          \
    (const T *q, const T *q2, const uint8_t *k, const uint8_t *k2, const uint8_t *v, const int32_t *tables,    \
     i64 table_row, i64 block, const int32_t *lengths, i64 rows, i64 heads, i64 groups, i64 width, i64 width2, \
     float scale, T *out)
EXPORT_F32_BF16(void, paged_attention_fp8, PARAMETERS,
                (q, q2, k, k2, v, tables, table_row, block, lengths, rows, heads, groups, width, width2, scale, out))
#undef PARAMETERS

#define PARAMETERS(T) (const T *from, i64 rows, i64 groups, i64 width, const i64 *slots, uint8_t *store)
EXPORT_F32_BF16(void, store_fp8, PARAMETERS, (from, rows, groups, width, slots, store))
#undef PARAMETERS
