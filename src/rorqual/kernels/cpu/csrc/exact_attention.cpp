// softmax(q·kᵀ·scale)·v in FP32, one query at a time over the keys that it sees, in their order. Keys that it does not
// see are skipped, so a packed row, a prefill chunk and a paged KV cache give the same bits (exact_math.h).
//
// A score is the sum of 16 chains over k's width, then over k2's; the sum of the weights is one of 16 chains over keys;
// an output is one chain over keys.

#include <algorithm>
#include <vector>

#include "exact_math.h"

namespace {

// Rows of keys or values, by slot and head.
struct Store {
    const float *base;
    i64 by_slot, by_head, width;

    const float *row(i64 slot, i64 head) const { return base + slot * by_slot + head * by_head; }
};

constexpr i64 VECS = 4;  // of an output, in registers

// out [R, columns] from weights [R, keys] of R heads: V vectors of columns.
template <int R, int V>
void mix_vecs(const float *weights, i64 keys, const Store &v, const i64 *slots, i64 head, i64 first, const float *sums,
              float *out, i64 out_stride) {
    vec sum[R][V] = {};
    for (i64 j = 0; j < keys; ++j) {
        const float *const from = v.row(slots[j], head) + first;
        for (int c = 0; c < V; ++c) {
            const vec value = load_vec(from + c * WIDTH);
            for (int r = 0; r < R; ++r) sum[r][c] = fma(broadcast(weights[r * keys + j]), value, sum[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < V; ++c) store_vec(out + r * out_stride + first + c * WIDTH, sum[r][c] / sums[r]);
}

template <int R>
void mix(const float *weights, i64 keys, const Store &v, const i64 *slots, i64 head, const float *sums, float *out,
         i64 out_stride) {
    i64 first = 0;
    for (; first + VECS * WIDTH <= v.width; first += VECS * WIDTH)
        mix_vecs<R, VECS>(weights, keys, v, slots, head, first, sums, out, out_stride);
    for (; first + WIDTH <= v.width; first += WIDTH)
        mix_vecs<R, 1>(weights, keys, v, slots, head, first, sums, out, out_stride);
    for (; first < v.width; ++first) {
        for (int r = 0; r < R; ++r) {
            float sum = 0;
            for (i64 j = 0; j < keys; ++j) sum = fma(weights[r * keys + j], v.row(slots[j], head)[first], sum);
            out[r * out_stride + first] = sum / sums[r];
        }
    }
}

// R query heads that share the key head `head`; q [R, k.width + k2.width], scores [R, keys].
template <int R>
void attend(const float *q, const Store &k, const Store &k2, const Store &v, const std::vector<i64> &slots, i64 head,
            float scale, float *scores, float *out) {
    const i64 keys = i64(slots.size()), width = k.width + k2.width;
    for (i64 j = 0; j < keys; ++j) {
        const float *const key = k.row(slots[j], head), *const key2 = k2.row(slots[j], head);
        for (int r = 0; r < R; ++r) {
            Chains chains;
            add_dot(chains, q + r * width, key, k.width);
            if (k2.width) add_dot(chains, q + r * width + k.width, key2, k2.width);
            scores[r * keys + j] = chains.sum() * scale;
        }
    }
    float sums[R];
    for (int r = 0; r < R; ++r) {
        float *const row = scores + r * keys;
        float top = row[0];
#pragma omp simd reduction(max : top)  // the largest, in whatever order
        for (i64 j = 0; j < keys; ++j) top = row[j] > top ? row[j] : top;
#pragma omp simd
        for (i64 j = 0; j < keys; ++j) row[j] = exact_exp(row[j] - top);
        sums[r] = sum_of(row, keys);
    }
    mix<R>(scores, keys, v, slots.data(), head, sums, out, v.width);
}

// Which slots the queries see.
struct Keys {
    const int32_t *tables;  // paged: of query i, block tables [·, by_table] and lengths
    i64 by_table, block;
    const int32_t *lengths;
    const bool *mask;  // packed: [queries / tokens or 1, tokens, keys]; null: the last `tokens` of the keys, causal
    i64 by_sequence, by_token, tokens, keys;

    void slots(i64 i, std::vector<i64> &found) const {
        found.clear();
        if (tables) {
            for (i64 j = 0; j < lengths[i]; ++j) found.push_back(tables[i * by_table + j / block] * block + j % block);
            return;
        }
        const i64 sequence = i / tokens, token = i % tokens, end = mask ? keys : keys - tokens + token + 1;
        const bool *const seen = mask + sequence * by_sequence + token * by_token;
        for (i64 j = 0; j < end; ++j)
            if (!mask || seen[j]) found.push_back(sequence * keys + j);
    }
};

void attention(const float *q, Store k, Store k2, Store v, Keys seen, i64 queries, i64 heads, i64 groups, float scale,
               float *out) {
    const i64 width = k.width + k2.width, share = heads / groups;
#pragma omp parallel
    {
        std::vector<i64> slots;
        std::vector<float> scores;
#pragma omp for schedule(dynamic, 4)
        for (i64 i = 0; i < queries; ++i) {
            seen.slots(i, slots);
            if (slots.empty()) {
                std::fill(out + i * heads * v.width, out + (i + 1) * heads * v.width, 0.0f);
                continue;
            }
            scores.resize(slots.size() * 3);
            for (i64 h = 0; h < heads;) {
                const i64 group = h / share, here = std::min<i64>(3, (group + 1) * share - h);
                const float *const own = q + (i * heads + h) * width;
                float *const to = out + (i * heads + h) * v.width;
                const auto run = here == 3 ? attend<3> : here == 2 ? attend<2> : attend<1>;
                run(own, k, k2, v, slots, group, scale, scores.data(), to);
                h += here;
            }
        }
    }
}

}  // namespace

extern "C" {
// q [queries, heads, k width + k2 width]; k, k2 and v: distances of slots and heads, and width; see Keys.
void exact_attention_f32(const float *q, const float *k, i64 k_slot, i64 k_head, i64 k_width, const float *k2,
                         i64 k2_slot, i64 k2_width, const float *v, i64 v_slot, i64 v_head, i64 v_width,
                         const int32_t *tables, i64 by_table, i64 block, const int32_t *lengths, const bool *mask,
                         i64 by_sequence, i64 by_token, i64 tokens, i64 keys, i64 queries, i64 heads, i64 groups,
                         float scale, float *out) {
    attention(q, {k, k_slot, k_head, k_width}, {k2, k2_slot, 0, k2_width}, {v, v_slot, v_head, v_width},
              {tables, by_table, block, lengths, mask, by_sequence, by_token, tokens, keys}, queries, heads, groups,
              scale, out);
}
}
