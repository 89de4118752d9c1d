// The functions of a decode step that PyTorch's operators make in several passes; built and called as rows.cpp is.

#include <cstdlib>
#include <omp.h>

#include "attend.h"

namespace {

// One new token a sequence over its past, the first lengths[i] places of the blocks in row i of `tables`. Scores are
// q·k + q2·k2, the second part being latent attention's rotated key, which all heads share; distances are between
// blocks, between places in one, and between key/value heads (`group`).
template <class T>
void past_attention(const T *q, const T *q2, const T *k, i64 k_block, i64 k_place, i64 k_group, const T *k2,
                    i64 k2_block, i64 k2_place, const T *v, i64 v_block, i64 v_place, i64 v_group,
                    const int32_t *tables, i64 table_row, i64 block, const int32_t *lengths, i64 rows, i64 heads,
                    i64 groups, i64 width, i64 width2, i64 value_width, float scale, T *out) {
    const i64 share = heads / groups, both = width + width2, shift = std::countr_zero(uint64_t(block));
    i64 longest = 0;
    for (i64 i = 0; i < rows; ++i) longest = std::max(longest, i64(lengths[i]));
    const i64 stride = (longest + L - 1) / L * L;
#pragma omp parallel
    {
        lanes *keys = static_cast<lanes *>(std::aligned_alloc(64, sizeof(lanes) * both));
        float *queries = static_cast<float *>(std::malloc(sizeof(float) * share * (both + stride)));
        float *weights = queries + share * both;
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < rows * groups; ++task) {
            const i64 i = task / groups, g = task % groups, first = i * heads + g * share, end = lengths[i];
            const int32_t *table = tables + i * table_row;
            const Places<T> here{k + g * k_group, k_block, k_place, table, end, shift};
            const Places<T> here2{k2, k2_block, k2_place, table, end, shift};
            for (i64 h = 0; h < share; ++h) {
                for (i64 j = 0; j < width; ++j) queries[h * both + j] = load(q[(first + h) * width + j]);
                for (i64 j = 0; j < width2; ++j) queries[h * both + width + j] = load(q2[(first + h) * width2 + j]);
            }
            attend(queries, here, here2, Places<T>{v + g * v_group, v_block, v_place, table, end, shift}, 1, share, width,
                   width2, value_width, scale, keys, weights, stride, out + first * value_width);
        }
        std::free(queries);
        std::free(keys);
    }
}

template <class T>
bool holds(const T *row, i64 count, float x) {
    int found = 0;
#pragma omp simd reduction(| : found)
    for (i64 j = 0; j < count; ++j) found |= load(row[j]) == x;
    return found != 0;
}

// A word a row from softmax(logits/temperature) by one uniform number: the first whose probability, added to those of
// the words before it, exceeds it. Sums of blocks first and then within one of them, so that the improbable words of a
// large vocabulary are not lost beside the sum of all. At temperature 0 the first of the most probable.
template <class T>
void draw(const T *logits, i64 rows, i64 words, float temperature, const float *uniform, i64 *token, float *logprob) {
    constexpr i64 block = 256;
    const bool greedy = temperature == 0.0f;
    const float sharpness = greedy ? 1.0f : 1.0f / temperature;
#pragma omp parallel for schedule(static) if (rows > 1)
    for (i64 i = 0; i < rows; ++i) {
        const T *row = logits + i * words;
        float top = -INFINITY;
#pragma omp simd reduction(max : top)
        for (i64 j = 0; j < words; ++j) {
            const float x = load(row[j]);
            top = x > top ? x : top;
        }
        double *sums = static_cast<double *>(std::malloc(sizeof(double) * (words / block + 1))), sum = 0;
        for (i64 start = 0; start < words; start += block) {
            const i64 end = start + block < words ? start + block : words;
            float part = 0;
#pragma omp simd reduction(+ : part)
            for (i64 j = start; j < end; ++j) part += exponential((load(row[j]) - top) * sharpness);
            sums[start / block] = part;
            sum += part;
        }
        double wanted = uniform[i] * sum;
        i64 start = 0;
        while (start + block < words && (greedy ? !holds(row + start, block, top) : sums[start / block] <= wanted)) {
            wanted -= sums[start / block];
            start += block;
        }
        const i64 end = start + block < words ? start + block : words;
        i64 chosen = start;
        double passed = 0;
        for (i64 j = start; j < end && (greedy ? load(row[chosen]) != top : passed <= wanted); ++j) {
            passed += exponential((load(row[j]) - top) * sharpness);
            chosen = j;  // past the end by rounding: the block's last word
        }
        token[i] = chosen;
        logprob[i] = (load(row[chosen]) - top) * sharpness - float(std::log(sum));
        std::free(sums);
    }
}

}  // namespace

#define P(T) (const T *q, const T *q2, const T *k, i64 kb, i64 kp, i64 kg, const T *k2, i64 k2b, i64 k2p, const T *v,  \
              i64 vb, i64 vp, i64 vg, const int32_t *tables, i64 tr, i64 block, const int32_t *lengths, i64 rows,      \
              i64 heads, i64 groups, i64 width, i64 width2, i64 value_width, float scale, T *out)
BOTH(void, past_attention, P, (q, q2, k, kb, kp, kg, k2, k2b, k2p, v, vb, vp, vg, tables, tr, block, lengths, rows,     \
                               heads, groups, width, width2, value_width, scale, out))
#undef P
#define P(T) (const T *logits, i64 rows, i64 words, float temperature, const float *uniform, i64 *token, float *logprob)
BOTH(void, draw, P, (logits, rows, words, temperature, uniform, token, logprob))
#undef P
