// Attention of new tokens over a paged KV cache, for the query heads that share a key/value head.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

#include "simd.h"

namespace {

constexpr i64 PREFETCH_TOKENS = 16;  // prefetch distance in tokens, about the latency of memory

// Sums of VLEN elements that the registers hold beside the factors; more of them would go through memory.
#if defined(__AVX512F__)
constexpr int MAX_SUMS = 16;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int MAX_SUMS = 6;
#else
constexpr int MAX_SUMS = 3;
#endif

// The hardware prefetcher does not follow tokens this far apart.
template <class T>
inline void prefetch(const T *from, i64 count) {
    for (i64 j = 0; j < count; j += 64 / i64(sizeof(T))) __builtin_prefetch(from + j);
}

// Transposes VLEN rows of `width` values → [width][VLEN]. BF16 is transposed in pairs, half the work.
template <class T>
void transpose_rows(const T *const *rows, i64 width, f32x16 *transposed) {
    i64 start = 0;
#if defined(RORQUAL_HALVES)
    if constexpr (sizeof(T) == 4) {
        float *const to = reinterpret_cast<float *>(transposed);
        for (; start + 8 <= width; start += 8)
            for (i64 half = 0; half < VLEN; half += 8) {
                __m256 block[8];
                for (i64 t = 0; t < 8; ++t) block[t] = _mm256_loadu_ps(rows[half + t] + start);
                transpose8(block);
                for (i64 t = 0; t < 8; ++t) _mm256_storeu_ps(to + (start + t) * VLEN + half, block[t]);
            }
    }
#endif
    if constexpr (sizeof(T) == 2) {
        for (; start + 2 * VLEN <= width; start += 2 * VLEN) {
            f32x16 block[VLEN];
            for (i64 t = 0; t < VLEN; ++t) block[t] = load_as<f32x16>(rows[t] + start);
            transpose16(block);
            for (i64 t = 0; t < VLEN; ++t)
                load_pair(reinterpret_cast<bf16 *>(&block[t]), transposed[start + 2 * t],
                          transposed[start + 2 * t + 1]);
        }
    }
    for (; start + VLEN <= width; start += VLEN) {
        f32x16 block[VLEN];
        for (i64 t = 0; t < VLEN; ++t) block[t] = load_f32x16(rows[t] + start);
        transpose16(block);
        for (i64 t = 0; t < VLEN; ++t) transposed[start + t] = block[t];
    }
    for (; start < width; ++start)
        for (i64 t = 0; t < VLEN; ++t) transposed[start][t] = load(rows[t][start]);
}

// N queries [N][width] × VLEN keys [width][VLEN] → scores of query n at n·stride. Two sums a query hide latency. As
// many queries go together as the registers hold sums of, which changes no bit.
template <int N>
void qk_scores(const float *queries, const f32x16 *keys, i64 width, float scale, float *weights, i64 stride) {
    if constexpr (N > 1 && 2 * N > MAX_SUMS) {
        constexpr int HALF = N / 2;
        qk_scores<HALF>(queries, keys, width, scale, weights, stride);
        qk_scores<N - HALF>(queries + HALF * width, keys, width, scale, weights + HALF * stride, stride);
    } else {
        f32x16 sum[N] = {}, other[N] = {};
        i64 j = 0;
        for (; j + 2 <= width; j += 2) {
            for (int n = 0; n < N; ++n) {
                sum[n] += queries[n * width + j] * keys[j];
                other[n] += queries[n * width + j + 1] * keys[j + 1];
            }
        }
        for (int n = 0; n < N; ++n) {
            if (j < width) sum[n] += queries[n * width + j] * keys[j];
            store_f32x16(weights + n * stride, (sum[n] + other[n]) * scale);
        }
    }
}

// The rows of a sequence's tokens in a paged store: `table` lists its blocks of 1 << shift tokens.
template <class T>
struct PagedRows {
    const T *store;
    i64 block_stride, token_stride;  // distances in elements
    const int32_t *table;
    i64 length, shift;

    const T *operator[](i64 s) const {
        return store + table[s >> shift] * block_stride + (s & ((i64(1) << shift) - 1)) * token_stride;
    }

    // The VLEN rows from token s on, a multiple of VLEN, so in one block; past the end the last one is repeated.
    // Prefetches PREFETCH_TOKENS ahead.
    void gather16(i64 s, i64 width, const T **rows) const {
        const T *at = (*this)[s], *next = s + PREFETCH_TOKENS < length ? (*this)[s + PREFETCH_TOKENS] : at;
        for (i64 t = 0; t < VLEN; ++t) {
            rows[t] = at + std::min(t, length - 1 - s) * token_stride;
            prefetch(next + t * token_stride, width);
        }
    }

    // Calls f(token index, row) for every token; prefetches PREFETCH_TOKENS ahead.
    template <class F>
    void for_each_token(i64 width, F f) const {
        for (i64 start = 0; start < length; start += i64(1) << shift) {
            const i64 end = std::min(length, start + (i64(1) << shift));
            const T *at = (*this)[start],
                    *next = start + PREFETCH_TOKENS < length ? (*this)[start + PREFETCH_TOKENS] : at;
            for (i64 s = start; s < end; ++s, at += token_stride, next += token_stride) {
                prefetch(next, width);
                f(s, at);
            }
        }
    }
};

// N heads' weighted sums of 2·C·VLEN columns of all values.
template <int N, int C, class T, class O>
void weighted_sum_columns(const float *weights, i64 stride, const PagedRows<T> &values, i64 width, O *out) {
    f32x16 sum[C][N] = {}, other[C][N] = {};
    values.for_each_token(2 * C * VLEN, [&](i64 s, const T *value) {
        for (int c = 0; c < C; ++c) {
            f32x16 a, b;
            load_pair(value + 2 * c * VLEN, a, b);
            for (int n = 0; n < N; ++n) {
                sum[c][n] += weights[n * stride + s] * a;
                other[c][n] += weights[n * stride + s] * b;
            }
        }
    });
    for (int c = 0; c < C; ++c)
        for (int n = 0; n < N; ++n) {
            O *to = out + n * width + 2 * c * VLEN;
            if constexpr (!std::is_same_v<T, bf16>) {
                store_f32x16(to, sum[c][n]);
                store_f32x16(to + VLEN, other[c][n]);
            } else if constexpr (std::is_same_v<O, bf16>) {
                store_pair(to, sum[c][n], other[c][n]);
            } else {  // load_pair gave even and odd elements
                store_interleaved(to, sum[c][n], other[c][n], std::make_index_sequence<VLEN>());
            }
        }
}

// N heads' weighted sums of the first `columns` of all values; `width` lies between the sums of two heads.
template <int N, class T, class O>
void weighted_sum(const float *weights, i64 stride, PagedRows<T> values, i64 columns, i64 width, O *out) {
    i64 remaining = columns;
    const auto advance = [&](i64 done) {
        values.store += done;
        out += done;
        remaining -= done;
    };
    if constexpr (4 * N <= MAX_SUMS)
        for (; remaining >= 4 * VLEN; advance(4 * VLEN))
            weighted_sum_columns<N, 2>(weights, stride, values, width, out);
    if constexpr (2 * N <= MAX_SUMS)
        for (; remaining >= 2 * VLEN; advance(2 * VLEN))
            weighted_sum_columns<N, 1>(weights, stride, values, width, out);
    for (; remaining >= VLEN; advance(VLEN)) {
        f32x16 sum[N] = {};
        values.for_each_token(VLEN, [&](i64 s, const T *value) {
            const f32x16 x = load_f32x16(value);
            for (int n = 0; n < N; ++n) sum[n] += weights[n * stride + s] * x;
        });
        for (int n = 0; n < N; ++n) store_f32x16(out + n * width, sum[n]);
    }
    for (; remaining > 0; advance(1)) {
        float sum[N] = {};
        values.for_each_token(1, [&](i64 s, const T *value) {
            for (int n = 0; n < N; ++n) sum[n] += weights[n * stride + s] * load(*value);
        });
        for (int n = 0; n < N; ++n) store(out[n * width], sum[n]);
    }
}

// Softmax of `length` scores in place; the rest up to a multiple of VLEN becomes 0.
inline void softmax(float *weights, i64 length) {
    f32x16 top = f32x16{} - INFINITY, sum = {};
    for (i64 s = length; s % VLEN; ++s) weights[s] = -INFINITY;
    for (i64 s = 0; s < length; s += VLEN) {
        const f32x16 x = load_f32x16(weights + s);
        top = greater(x, top);
    }
    const float highest = reduce(top, greater);
    for (i64 s = 0; s < length; s += VLEN) {
        const f32x16 x = load_f32x16(weights + s);
        const f32x16 e = blend(equal(x, f32x16{} - INFINITY), f32x16{}, fast_exp(x - highest));
        store_f32x16(weights + s, e);
        sum += e;
    }
    const float all = reduce(sum, [](auto a, auto b) { return a + b; });
    for (i64 s = 0; s < length; s += VLEN) store_f32x16(weights + s, load_f32x16(weights + s) / all);
}

// Causal softmax for `rows` consecutive tokens: the last sees all `length` keys, each one before it one less; what is
// masked becomes 0, up to a multiple of VLEN.
inline void softmax(float *weights, i64 stride, i64 length, i64 rows, i64 q_per_kv) {
    for (i64 h = 0; h < rows * q_per_kv; ++h) {
        float *row = weights + h * stride;
        const i64 visible = length - (rows - 1) + h / q_per_kv;
        softmax(row, visible);
        for (i64 s = (visible + VLEN - 1) / VLEN * VLEN; s < length; s += VLEN) store_f32x16(row + s, f32x16{});
    }
}

// Splits the heads into blocks of at most four; f gets the size as a constant.
template <class F>
void for_head_blocks(i64 heads, F f) {
    i64 done = 0;
    for (; done + 4 <= heads; done += 4) f(done, std::integral_constant<int, 4>());
    if (heads - done == 3) f(done, std::integral_constant<int, 3>());
    if (heads - done == 2) f(done, std::integral_constant<int, 2>());
    if (heads - done == 1) f(done, std::integral_constant<int, 1>());
}

// Attention of `rows` consecutive tokens of a sequence, for one key/value head: queries [rows, q_per_kv, width +
// width2], scores q·k + q2·k2 (the second part is MLA's rope key; width2 may be 0), the last token sees all k.length
// keys, each one before it one less → out [rows, q_per_kv, value_width]. VLEN keys are transposed at a time, so all
// queries multiply full registers. Scratch: keys [width + width2] vectors; weights `stride` floats a query, at least
// k.length rounded up to VLEN.
template <class T, class O>
void attend_group(const float *queries, const PagedRows<T> &k, const PagedRows<T> &k2, const PagedRows<T> &v, i64 rows,
                  i64 q_per_kv, i64 width, i64 width2, i64 value_width, float scale, f32x16 *keys, float *weights,
                  i64 stride, O *out) {
    const i64 full_width = width + width2, num_queries = rows * q_per_kv;
    for (i64 s = 0; s < k.length; s += VLEN) {
        const T *rows_of[VLEN];
        k.gather16(s, width, rows_of);
        transpose_rows(rows_of, width, keys);
        if (width2) {
            k2.gather16(s, width2, rows_of);
            transpose_rows(rows_of, width2, keys + width);
        }
        for_head_blocks(num_queries, [&](i64 h, auto n) {
            qk_scores<n>(queries + h * full_width, keys, full_width, scale, weights + h * stride + s, stride);
        });
    }
    softmax(weights, stride, k.length, rows, q_per_kv);
    for_head_blocks(num_queries, [&](i64 h, auto n) {
        weighted_sum<n>(weights + h * stride, stride, v, value_width, value_width, out + h * value_width);
    });
}

}  // namespace
