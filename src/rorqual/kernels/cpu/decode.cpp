// The functions of a decode step that PyTorch's operators make in several passes; built and called as rows.cpp is.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <omp.h>
#include <type_traits>

#include "lanes.h"

namespace {

constexpr i64 AHEAD = 32;  // places after which what is asked for now has come from memory

// The processor's own prefetching does not see places this far apart.
template <class T>
inline void ask(const T *from, i64 count) {
    for (i64 j = 0; j < count; j += 64 / i64(sizeof(T))) __builtin_prefetch(from + j);
}

// L rows of `width` numbers, at the places given, on their side: turned [width][L]. BF16 numbers turn in pairs, which is
// half the work.
template <class T>
void turn_rows(const T *const *rows, i64 width, lanes *turned) {
    i64 start = 0;
    if constexpr (sizeof(T) == 2) {
        for (; start + 2 * L <= width; start += 2 * L) {
            lanes block[L];
            for (i64 t = 0; t < L; ++t) std::memcpy(&block[t], rows[t] + start, sizeof(lanes));
            turn(block);
            for (i64 t = 0; t < L; ++t)
                load_two(reinterpret_cast<bf16 *>(&block[t]), turned[start + 2 * t], turned[start + 2 * t + 1]);
        }
    }
    for (; start + L <= width; start += L) {
        lanes block[L];
        for (i64 t = 0; t < L; ++t) block[t] = load_lanes(rows[t] + start);
        turn(block);
        for (i64 t = 0; t < L; ++t) turned[start + t] = block[t];
    }
    for (; start < width; ++start)
        for (i64 t = 0; t < L; ++t) turned[start][t] = load(rows[t][start]);
}

// N heads against L keys: keys [width][L], queries [N][width], weights of head n at n·stride. Two sums a head, since one
// would wait for itself.
template <int N>
void score(const float *queries, const lanes *keys, i64 width, float scale, float *weights, i64 stride) {
    lanes sum[N] = {}, other[N] = {};
    i64 j = 0;
    for (; j + 2 <= width; j += 2) {
        for (int n = 0; n < N; ++n) {
            sum[n] += queries[n * width + j] * keys[j];
            other[n] += queries[n * width + j + 1] * keys[j + 1];
        }
    }
    for (int n = 0; n < N; ++n) {
        if (j < width) sum[n] += queries[n * width + j] * keys[j];
        store_lanes(weights + n * stride, (sum[n] + other[n]) * scale);
    }
}

// Where the tokens of a sequence lie in a store: `table` lists its blocks of 1 << shift places.
template <class T>
struct Places {
    const T *store;
    i64 block, place;  // distances
    const int32_t *table;
    i64 count, shift;

    const T *operator[](i64 s) const { return store + table[s >> shift] * block + (s & ((i64(1) << shift) - 1)) * place; }

    // The L places from s on, a multiple of L, which lie in one block; past the end the last one again. What comes AHEAD
    // of them is asked for.
    void some(i64 s, i64 width, const T **rows) const {
        const T *at = (*this)[s], *next = s + AHEAD < count ? (*this)[s + AHEAD] : at;
        for (i64 t = 0; t < L; ++t) {
            rows[t] = at + std::min(t, count - 1 - s) * place;
            ask(next + t * place, width);
        }
    }

    // Calls f with each place's number and address; what comes AHEAD is asked for on the way.
    template <class F>
    void each(i64 width, F f) const {
        for (i64 start = 0; start < count; start += i64(1) << shift) {
            const i64 end = std::min(count, start + (i64(1) << shift));
            const T *at = (*this)[start], *next = start + AHEAD < count ? (*this)[start + AHEAD] : at;
            for (i64 s = start; s < end; ++s, at += place, next += place) {
                ask(next, width);
                f(s, at);
            }
        }
    }
};

// N heads' weighted sums of 2·C·L of the values of all places.
template <int N, int C, class T>
void mix_some(const float *weights, i64 stride, const Places<T> &values, i64 width, T *out) {
    lanes sum[C][N] = {}, other[C][N] = {};
    values.each(2 * C * L, [&](i64 s, const T *value) {
        for (int c = 0; c < C; ++c) {
            lanes a, b;
            load_two(value + 2 * c * L, a, b);
            for (int n = 0; n < N; ++n) {
                sum[c][n] += weights[n * stride + s] * a;
                other[c][n] += weights[n * stride + s] * b;
            }
        }
    });
    for (int c = 0; c < C; ++c)
        for (int n = 0; n < N; ++n) store_two(out + n * width + 2 * c * L, sum[c][n], other[c][n]);
}

// N heads' weighted sums of the values of all places.
template <int N, class T>
void mix(const float *weights, i64 stride, Places<T> values, i64 width, T *out) {
    i64 left = width;
    const auto past = [&](i64 done) {
        values.store += done;
        out += done;
        left -= done;
    };
    for (; left >= 4 * L; past(4 * L)) mix_some<N, 2>(weights, stride, values, width, out);
    for (; left >= 2 * L; past(2 * L)) mix_some<N, 1>(weights, stride, values, width, out);
    for (; left >= L; past(L)) {
        lanes sum[N] = {};
        values.each(L, [&](i64 s, const T *value) {
            const lanes x = load_lanes(value);
            for (int n = 0; n < N; ++n) sum[n] += weights[n * stride + s] * x;
        });
        for (int n = 0; n < N; ++n) store_lanes(out + n * width, sum[n]);
    }
    for (; left > 0; past(1)) {
        float sum[N] = {};
        values.each(1, [&](i64 s, const T *value) {
            for (int n = 0; n < N; ++n) sum[n] += weights[n * stride + s] * load(*value);
        });
        for (int n = 0; n < N; ++n) store(out[n * width], sum[n]);
    }
}

// The first `places` weights → softmax of them; those up to a multiple of L → 0.
inline void softmax(float *weights, i64 places) {
    lanes top = lanes{} - INFINITY, sum = {};
    for (i64 s = places; s % L; ++s) weights[s] = -INFINITY;
    for (i64 s = 0; s < places; s += L) {
        const lanes x = load_lanes(weights + s);
        top = x > top ? x : top;
    }
    const float highest = fold(top, [](float a, float b) { return b > a ? b : a; });
    for (i64 s = 0; s < places; s += L) {
        const lanes x = load_lanes(weights + s), e = x == -INFINITY ? lanes{} : exponential(x - highest);
        store_lanes(weights + s, e);
        sum += e;
    }
    const float all = fold(sum, [](float a, float b) { return a + b; });
    for (i64 s = 0; s < places; s += L) store_lanes(weights + s, load_lanes(weights + s) / all);
}

// Calls what it is given with the number of heads, four at most, as a constant.
template <class F>
void by_heads(i64 heads, F call) {
    i64 done = 0;
    for (; done + 4 <= heads; done += 4) call(done, std::integral_constant<int, 4>());
    if (heads - done == 3) call(done, std::integral_constant<int, 3>());
    if (heads - done == 2) call(done, std::integral_constant<int, 2>());
    if (heads - done == 1) call(done, std::integral_constant<int, 1>());
}

// One new token a sequence over its past, the first lengths[i] places of the blocks in row i of `tables`. Scores are
// q·k + q2·k2, the second part being latent attention's rotated key, which all heads share; distances are between
// blocks, between places in one, and between key/value heads (`group`). L keys are turned on their side at a time, so
// that the heads that share them multiply whole registers.
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
            for (i64 s = 0; s < end; s += L) {
                const T *rows_of[L];
                here.some(s, width, rows_of);
                turn_rows(rows_of, width, keys);
                if (width2) {
                    here2.some(s, width2, rows_of);
                    turn_rows(rows_of, width2, keys + width);
                }
                by_heads(share, [&](i64 h, auto n) {
                    score<n>(queries + h * both, keys, both, scale, weights + h * stride + s, stride);
                });
            }
            for (i64 h = 0; h < share; ++h) softmax(weights + h * stride, end);
            by_heads(share, [&](i64 h, auto n) {
                mix<n>(weights + h * stride, stride, Places<T>{v + g * v_group, v_block, v_place, table, end, shift},
                       value_width, out + (first + h) * value_width);
            });
        }
        std::free(queries);
        std::free(keys);
    }
}

// A word a row from softmax(logits/temperature) by one uniform number: the first whose probability, added to those of
// the words before it, exceeds it. Sums of blocks first and then within one of them, so that the improbable words of a
// large vocabulary are not lost beside the sum of all.
template <class T>
void draw(const T *logits, i64 rows, i64 words, float temperature, const float *uniform, i64 *token, float *logprob) {
    constexpr i64 block = 256;
    const float sharpness = 1.0f / temperature;
#pragma omp parallel for schedule(static)
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
        while (start + block < words && sums[start / block] <= wanted) {
            wanted -= sums[start / block];
            start += block;
        }
        const i64 end = start + block < words ? start + block : words;
        i64 chosen = start;
        double passed = 0;
        for (i64 j = start; j < end && passed <= wanted; ++j) {
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
