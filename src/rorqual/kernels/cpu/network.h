// A network with packed weights as the decode step reads it, and the small functions between its products.
#pragma once

#include <cmath>

#include "lowbit.h"

namespace {

// What follows is written by Python as rows of int64 (kernels/fused_decode.py), in this order; what a layer lacks is 0.
template <class T>
struct Layer {
    const T *norm;
    // Grouped-query attention has q, k, v, o; latent attention q (of queries' low rank, where there is one), kv_a, the
    // up-projections [heads, nope + value, latent] and o.
    Weights<T> q_a;
    const T *q_a_norm;
    Weights<T> q, k, v, kv_a;
    const T *kv_a_norm, *up;
    Weights<T> o;
    const T *norm2;
    Weights<T> gate, up_proj, down;    // of a dense layer, or of the shared experts
    const float *router, *correction;  // [experts, hidden], [experts]
    Weights<T> experts_in, experts_out;
    T *a, *b;  // of the cache: keys and values [blocks, block, groups, width] (in 8 bits: cache8.h), or latents and rotated keys
};

template <class T>
struct Network {
    const Layer<T> *layers;
    i64 depth, hidden, heads, groups, width, interleave;  // `width` is what is rotated of a head: all, or `rope`
    i64 latent, nope, value;
    i64 experts, chosen, expert_groups, groups_kept, softmax, biased, within_groups, normalise, eight;
    const T *norm;
    Weights<T> embedding, head;
    const float *frequencies;  // [width / 2]
    // Of a multi-token module, which begins with another network's states: norms of embedding and state, and what makes
    // a row of both.
    const T *embedding_norm, *state_norm;
    Weights<T> join;
};

struct Numbers {
    float rope_factor, scale, eps, latent_eps, routed_factor;
};

// x / rms(x) · weight.
template <class T>
void normed(const float *x, const T *weight, i64 width, float eps, float *out) {
    lanes sum = {};
    i64 j = 0;
    for (; j + L <= width; j += L) {
        const lanes a = load_lanes(x + j);
        sum += a * a;
    }
    float all = fold(sum, [](auto a, auto b) { return a + b; });
    for (; j < width; ++j) all += x[j] * x[j];
    const float scale = 1.0f / std::sqrt(all / float(width) + eps);
    for (j = 0; j + L <= width; j += L) store_lanes(out + j, load_lanes(x + j) * scale * load_lanes(weight + j));
    for (; j < width; ++j) out[j] = x[j] * scale * load(weight[j]);
}

template <class V>
inline V silu(V x) {
    return x / (1.0f + exponential(-x));
}

// silu(gate) · up → bytes, group by group, or digits, for which `gate` makes room.
inline void quantise_gated(float *gate, const float *up, i64 width, const Quantised &to, i64 row) {
    const auto gated = [](auto a, auto b) { return silu(a) * b; };
    if (to.line) {
        i64 j = 0;
        for (; j + L <= width; j += L) store_lanes(gate + j, gated(load_lanes(gate + j), load_lanes(up + j)));
        for (; j < width; ++j) gate[j] = gated(gate[j], up[j]);
        return quantise_row(gate, width, to, row);
    }
    for (i64 g = 0; g < to.groups; g += to.common) {
        const i64 some = std::min(to.common, to.groups - g), left = width - g * GROUP;
        const float *a = gate + g * GROUP, *b = up + g * GROUP;
        lanes y[2 * COMMON];
        for (i64 i = 0; i < 2 * some; ++i) {
            if (left >= (i + 1) * L) {
                y[i] = gated(load_lanes(a + i * L), load_lanes(b + i * L));
            } else {
                y[i] = lanes{};
                for (i64 j = i * L; j < left; ++j) y[i][j - i * L] = gated(a[j], b[j]);
            }
        }
        quantise(some, [&](i64 i) { return y[i]; }, to, row * to.groups + g);
    }
}

// Row r of packed weights, as numbers.
template <class T>
void unpack_row(const Weights<T> &w, i64 r, float *out) {
    const i64 p = r / L, t = r % L;
    const bool four = w.format == INT4 || w.format == INT4_MINS;
    for (i64 g = 0; g < w.groups(); ++g) {
        const uint8_t *record = w.panel(p) + g * RECORD[w.format], *after = record + (four ? 256 : 512);
        const float scale = w.format == INT8 ? w.channels[r] : halves_plain(after)[t];
        const float least = w.format == INT4_MINS ? halves_plain(after + 32)[t] : scale * (four ? -8.0f : -128.0f);
        for (i64 j = 0; j < std::min(GROUP, w.width - g * GROUP); ++j) {
            const i64 four_of = j / 4, at = (four ? four_of % 4 : four_of) * 64 + t * 4 + j % 4;
            const int q = !four ? record[at] : four_of < 4 ? record[at] & 15 : record[at] >> 4;
            out[g * GROUP + j] = scale * float(q) + least;
        }
    }
}

// Turns the pairs of a head, side by side or in two halves, by their angles (RoFormer); the result is in two halves, as
// kernels/rotary.py leaves it.
inline void turn_pairs(const float *x, const float *cos, const float *sin, i64 width, bool interleave, float *out) {
    const i64 half = width / 2;
    const auto turn = [&](i64 j, auto a, auto b, auto c, auto s, auto put) {
        put(out + j, a * c - b * s);
        put(out + half + j, b * c + a * s);
    };
    i64 j = 0;
    for (; !interleave && j + L <= half; j += L)
        turn(j, load_lanes(x + j), load_lanes(x + half + j), load_lanes(cos + j), load_lanes(sin + j),
             [](float *to, lanes y) { store_lanes(to, y); });
    for (; j < half; ++j) {
        const i64 first = interleave ? 2 * j : j, second = interleave ? 2 * j + 1 : half + j;
        turn(j, x[first], x[second], cos[j], sin[j], [](float *to, float y) { *to = y; });
    }
}

// A row of the cache.
template <class T>
void keep_row(const float *x, i64 width, T *to) {
    i64 j = 0;
    for (; j + L <= width; j += L) store_lanes(to + j, load_lanes(x + j));
    for (; j < width; ++j) store(to[j], x[j]);
}

// Up to L rows [count, width] times x.
template <class T>
lanes rows_times(const T *rows, i64 count, i64 width, const float *x) {
    const T *row[L];
    for (i64 t = 0; t < L; ++t) row[t] = rows + std::min(t, count - 1) * width;
    lanes sums[L] = {}, all = {};
    i64 j = 0;
    for (; j + L <= width; j += L) {
        const lanes some = load_lanes(x + j);
        for (i64 t = 0; t < L; ++t) sums[t] += some * load_lanes(row[t] + j);
    }
    turn(sums);
    for (i64 t = 0; t < L; ++t) all += sums[t];
    for (; j < width; ++j)
        for (i64 t = 0; t < L; ++t) all[t] += x[j] * load(row[t][j]);
    return all;
}

// The sum of rows [count, width], each times its number in x.
template <class T>
void times_rows(const float *x, const T *rows, i64 count, i64 width, float *out) {
    i64 j = 0;
    const auto some = [&](auto n) {
        lanes sums[n] = {};
        for (i64 i = 0; i < count; ++i)
            for (int t = 0; t < n; ++t) sums[t] += x[i] * load_lanes(rows + i * width + j + t * L);
        for (int t = 0; t < n; ++t) store_lanes(out + j + t * L, sums[t]);
        j += n * L;
    };
    while (j + 8 * L <= width) some(std::integral_constant<int, 8>());
    while (j + L <= width) some(std::integral_constant<int, 1>());
    for (; j < width; ++j) {
        out[j] = 0.0f;
        for (i64 i = 0; i < count; ++i) out[j] += x[i] * load(rows[i * width + j]);
    }
}

// The router's choice for one token from its logits [experts], as model/moe.py makes it: `chosen` and their weights.
// Room: experts floats.
template <class T>
void choose(const Network<T> &net, const float *correction, float factor, float *scores, float *room, int32_t *chosen,
            float *weights) {
    const i64 E = net.experts, K = net.chosen, in_group = E / net.expert_groups;
    float top = -INFINITY, all = 0.0f;
    for (i64 e = 0; e < E; ++e) top = std::max(top, scores[e]);
    for (i64 e = 0; e < E; ++e) {
        scores[e] = net.softmax ? exponential(scores[e] - top) : 1.0f / (1.0f + exponential(-scores[e]));
        all += scores[e];
    }
    for (i64 e = 0; e < E; ++e) {
        if (net.softmax) scores[e] /= all;
        room[e] = net.biased ? scores[e] + correction[e] : scores[e];
    }
    if (net.within_groups) {  // leave only the best groups, by their two best experts or by their best
        for (i64 left = net.groups_kept; left < net.expert_groups; ++left) {
            i64 worst = -1;
            float least = INFINITY;
            for (i64 g = 0; g < net.expert_groups; ++g) {
                float best = -INFINITY, second = -INFINITY;
                for (i64 e = g * in_group; e < (g + 1) * in_group; ++e) {
                    if (room[e] > best) {
                        second = best;
                        best = room[e];
                    } else {
                        second = std::max(second, room[e]);
                    }
                }
                const float worth = net.biased && in_group > 1 ? best + second : best;
                if (best > -INFINITY && worth < least) {
                    least = worth;
                    worst = g;
                }
            }
            if (worst < 0) break;
            for (i64 e = worst * in_group; e < (worst + 1) * in_group; ++e) room[e] = -INFINITY;
        }
    }
    float sum = 0.0f;
    for (i64 k = 0; k < K; ++k) {
        i64 best = 0;
        for (i64 e = 1; e < E; ++e)
            if (room[e] > room[best]) best = e;
        chosen[k] = int32_t(best);
        weights[k] = scores[best];
        sum += scores[best];
        room[best] = -INFINITY;
    }
    for (i64 k = 0; k < K; ++k) weights[k] *= factor / (net.normalise ? sum + 1e-20f : 1.0f);
}

}  // namespace
