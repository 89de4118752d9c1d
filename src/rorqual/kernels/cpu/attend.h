// Attention of one new token over a sequence's past, for the heads that share keys and values.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

#include "lanes.h"

namespace {

constexpr i64 AHEAD = 16;  // places after which what is asked for now has come from memory

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
template <int N, int C, class T, class O>
void mix_some(const float *weights, i64 stride, const Places<T> &values, i64 width, O *out) {
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
        for (int n = 0; n < N; ++n) {
            O *to = out + n * width + 2 * c * L;
            if constexpr (std::is_same_v<T, O>) {
                store_two(to, sum[c][n], other[c][n]);
            } else {  // BF16 values came even and odd
                store_in_turn(to, sum[c][n], other[c][n], std::make_index_sequence<L>());
            }
        }
}

// N heads' weighted sums of the values of all places.
template <int N, class T, class O>
void mix(const float *weights, i64 stride, Places<T> values, i64 width, O *out) {
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
    const float highest = fold(top, [](auto a, auto b) { return b > a ? b : a; });
    for (i64 s = 0; s < places; s += L) {
        const lanes x = load_lanes(weights + s), e = x == -INFINITY ? lanes{} : exponential(x - highest);
        store_lanes(weights + s, e);
        sum += e;
    }
    const float all = fold(sum, [](auto a, auto b) { return a + b; });
    for (i64 s = 0; s < places; s += L) store_lanes(weights + s, load_lanes(weights + s) / all);
}

// The weights of `rows` tokens' queries, the last of which sees all `places`, each before it one less; as far as a multiple
// of L.
inline void softmax(float *weights, i64 stride, i64 places, i64 rows, i64 share) {
    for (i64 h = 0; h < rows * share; ++h) {
        float *row = weights + h * stride;
        const i64 seen = places - (rows - 1) + h / share;
        softmax(row, seen);
        for (i64 s = (seen + L - 1) / L * L; s < places; s += L) store_lanes(row + s, lanes{});
    }
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

// The `share` heads' queries [rows, share, width + width2] of one or several new tokens of a sequence, scores being
// q·k + q2·k2; the last token sees all k.count places, each before it one less → out [rows, share, value_width]. L keys
// are turned on their side at a time, so that the queries that share them multiply whole registers. Room: keys for
// width + width2 lanes, weights for `stride` floats a query, at least k.count up to a multiple of L.
template <class T, class O>
void attend(const float *queries, const Places<T> &k, const Places<T> &k2, const Places<T> &v, i64 rows, i64 share,
            i64 width, i64 width2, i64 value_width, float scale, lanes *keys, float *weights, i64 stride, O *out) {
    const i64 both = width + width2, all = rows * share;
    for (i64 s = 0; s < k.count; s += L) {
        const T *rows_of[L];
        k.some(s, width, rows_of);
        turn_rows(rows_of, width, keys);
        if (width2) {
            k2.some(s, width2, rows_of);
            turn_rows(rows_of, width2, keys + width);
        }
        by_heads(all, [&](i64 h, auto n) {
            score<n>(queries + h * both, keys, both, scale, weights + h * stride + s, stride);
        });
    }
    softmax(weights, stride, k.count, rows, share);
    by_heads(all, [&](i64 h, auto n) { mix<n>(weights + h * stride, stride, v, value_width, out + h * value_width); });
}

}  // namespace
