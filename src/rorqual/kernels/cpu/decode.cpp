// The functions of a decode step that PyTorch's operators make in several passes; built and called as rows.cpp is.

#include <cmath>
#include <cstdlib>
#include <omp.h>

#include "numbers.h"

namespace {

// One new token a sequence over its past. Scores are q·k + q2·k2, the second part being latent attention's rotated key,
// which all heads share; `place` strides are between tokens, `group` strides between key/value heads.
template <class T>
void past_attention(const T *q, const T *q2, const T *k, i64 k_row, i64 k_place, i64 k_group, const T *k2, i64 k2_row,
                    i64 k2_place, const T *v, i64 v_row, i64 v_place, i64 v_group, const bool *mask, i64 mask_row,
                    i64 rows, i64 heads, i64 groups, i64 places, i64 width, i64 width2, i64 value_width, float scale,
                    T *out) {
    const i64 share = heads / groups;
#pragma omp parallel
    {
        float *weights = static_cast<float *>(std::malloc(sizeof(float) * share * (places + value_width)));
        float *sums = weights + share * places;
#pragma omp for schedule(dynamic, 8)
        for (i64 task = 0; task < rows * groups; ++task) {
            const i64 i = task / groups, g = task % groups;
            const bool *seen = mask + i * mask_row;
            for (i64 s = 0; s < places; ++s) {
                const T *key = k + i * k_row + s * k_place + g * k_group, *key2 = k2 + i * k2_row + s * k2_place;
                for (i64 h = 0; h < share; ++h) {
                    float dot = -INFINITY;
                    if (seen[s]) {
                        const T *query = q + (i * heads + g * share + h) * width;
                        const T *query2 = q2 + (i * heads + g * share + h) * width2;
                        dot = 0;
#pragma omp simd reduction(+ : dot)
                        for (i64 j = 0; j < width; ++j) dot += load(query[j]) * load(key[j]);
#pragma omp simd reduction(+ : dot)
                        for (i64 j = 0; j < width2; ++j) dot += load(query2[j]) * load(key2[j]);
                    }
                    weights[h * places + s] = dot * scale;
                }
            }
            for (i64 h = 0; h < share; ++h) {
                float *mine = weights + h * places, top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
                for (i64 s = 0; s < places; ++s) top = mine[s] > top ? mine[s] : top;
#pragma omp simd reduction(+ : sum)
                for (i64 s = 0; s < places; ++s) {
                    mine[s] = exponential(mine[s] - top);
                    sum += mine[s] = seen[s] ? mine[s] : 0.0f;
                }
                const float each = 1.0f / sum;
                for (i64 j = 0; j < value_width; ++j) sums[h * value_width + j] = 0;
#pragma omp simd
                for (i64 s = 0; s < places; ++s) mine[s] *= each;
            }
            for (i64 s = 0; s < places; ++s) {
                if (!seen[s]) continue;
                const T *value = v + i * v_row + s * v_place + g * v_group;
                for (i64 h = 0; h < share; ++h) {
                    const float weight = weights[h * places + s];
                    float *sum = sums + h * value_width;
#pragma omp simd
                    for (i64 j = 0; j < value_width; ++j) sum[j] += weight * load(value[j]);
                }
            }
            T *to = out + (i * heads + g * share) * value_width;
#pragma omp simd
            for (i64 j = 0; j < share * value_width; ++j) store(to[j], sums[j]);
        }
        std::free(weights);
    }
}

// A word a row from softmax(logits/temperature) by one uniform number: the first whose probability, added to those of
// the words before it, exceeds it.
template <class T>
void draw(const T *logits, i64 rows, i64 words, float temperature, const float *uniform, i64 *token, float *logprob) {
    const float sharpness = 1.0f / temperature;
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < rows; ++i) {
        const T *row = logits + i * words;
        float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
        for (i64 j = 0; j < words; ++j) {
            const float x = load(row[j]);
            top = x > top ? x : top;
        }
        // In blocks, so that the second pass is over one of them.
        constexpr i64 block = 256;
        float *sums = static_cast<float *>(std::malloc(sizeof(float) * (words / block + 1)));
        for (i64 start = 0; start < words; start += block) {
            const i64 end = start + block < words ? start + block : words;
            float part = 0;
#pragma omp simd reduction(+ : part)
            for (i64 j = start; j < end; ++j) part += exponential((load(row[j]) - top) * sharpness);
            sums[start / block] = part;
            sum += part;
        }
        const float wanted = uniform[i] * sum;
        float passed = 0;
        i64 start = 0, chosen = words - 1;
        while (start + block < words && passed + sums[start / block] <= wanted) {
            passed += sums[start / block];
            start += block;
        }
        for (i64 j = start; j < words; ++j) {
            passed += exponential((load(row[j]) - top) * sharpness);
            if (passed > wanted) {
                chosen = j;
                break;
            }
        }
        token[i] = chosen;
        logprob[i] = (load(row[chosen]) - top) * sharpness - std::log(sum);
        std::free(sums);
    }
}

}  // namespace

#define P(T) (const T *q, const T *q2, const T *k, i64 kr, i64 kp, i64 kg, const T *k2, i64 k2r, i64 k2p, const T *v,  \
              i64 vr, i64 vp, i64 vg, const bool *mask, i64 mr, i64 rows, i64 heads, i64 groups, i64 places,           \
              i64 width, i64 width2, i64 value_width, float scale, T *out)
BOTH(void, past_attention, P, (q, q2, k, kr, kp, kg, k2, k2r, k2p, v, vr, vp, vg, mask, mr, rows, heads, groups,       \
                               places, width, width2, value_width, scale, out))
#undef P
#define P(T) (const T *logits, i64 rows, i64 words, float temperature, const float *uniform, i64 *token, float *logprob)
BOTH(void, draw, P, (logits, rows, words, temperature, uniform, token, logprob))
#undef P
