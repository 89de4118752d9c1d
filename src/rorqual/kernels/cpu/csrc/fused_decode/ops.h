// The functions between the matrix products of a decode step.
#pragma once

#include <algorithm>
#include <cmath>

#include "model.h"

namespace {

// RMSNorm: x / rms(x) · weight.
template <class T>
void rms_norm(const float *x, const T *weight, i64 width, float eps, float *out) {
    f32x16 sum = {};
    i64 j = 0;
    for (; j + VLEN <= width; j += VLEN) {
        const f32x16 a = load_f32x16(x + j);
        sum += a * a;
    }
    float all = reduce(sum, [](auto a, auto b) { return a + b; });
    for (; j < width; ++j) all += x[j] * x[j];
    const float scale = 1.0f / std::sqrt(all / float(width) + eps);
    for (j = 0; j + VLEN <= width; j += VLEN)
        store_f32x16(out + j, load_f32x16(x + j) * scale * load_f32x16(weight + j));
    for (; j < width; ++j) out[j] = x[j] * scale * load(weight[j]);
}

template <class V>
inline V silu(V x) {
    return x / (1.0f + fast_exp(-x));
}

// Quantises silu(gate) · up; for INT16 rows `gate` is overwritten.
inline void quantize_swiglu(float *gate, const float *up, i64 width, const QuantizedRows &to, i64 row) {
    const auto gated = [](auto a, auto b) { return silu(a) * b; };
    if (to.plane_bytes) {
        i64 j = 0;
        for (; j + VLEN <= width; j += VLEN) store_f32x16(gate + j, gated(load_f32x16(gate + j), load_f32x16(up + j)));
        for (; j < width; ++j) gate[j] = gated(gate[j], up[j]);
        return quantize_row(gate, width, to, row);
    }
    for (i64 g = 0; g < to.groups; g += to.scale_groups) {
        const i64 count = std::min(to.scale_groups, to.groups - g), remaining = width - g * GROUP_SIZE;
        const float *a = gate + g * GROUP_SIZE, *b = up + g * GROUP_SIZE;
        f32x16 y[2 * INT8_SCALE_GROUPS];
        for (i64 i = 0; i < 2 * count; ++i) {
            if (remaining >= (i + 1) * VLEN) {
                y[i] = gated(load_f32x16(a + i * VLEN), load_f32x16(b + i * VLEN));
            } else {
                y[i] = f32x16{};
                for (i64 j = i * VLEN; j < remaining; ++j) y[i][j - i * VLEN] = gated(a[j], b[j]);
            }
        }
        quantize_groups(count, [&](i64 i) { return y[i]; }, to, row * to.groups + g);
    }
}

// Row r of packed weights in FP32: an embedding.
template <class T>
void dequantize_row(const QuantizedLinear<T> &w, i64 r, float *out) {
    const i64 p = r / VLEN, t = r % VLEN;
    const bool is_int4 = w.format == INT4 || w.format == INT4_MINS;
    for (i64 g = 0; g < w.groups(); ++g) {
        const uint8_t *record = w.panel(p) + g * RECORD_BYTES[w.format], *scales = record + (is_int4 ? 256 : 512);
        const float scale = w.format == INT8 ? w.channels[r] : f16_to_f32(scales)[t];
        const float minimum = w.format == INT4_MINS ? f16_to_f32(scales + 32)[t] : scale * (is_int4 ? -8.0f : -128.0f);
        for (i64 j = 0; j < std::min(GROUP_SIZE, w.width - g * GROUP_SIZE); ++j) {
            const i64 quad = j / 4, at = (is_int4 ? quad % 4 : quad) * 64 + t * 4 + j % 4;
            const int q = !is_int4 ? record[at] : quad < 4 ? record[at] & 15 : record[at] >> 4;
            out[g * GROUP_SIZE + j] = scale * float(q) + minimum;
        }
    }
}

// Rotary embedding of one head (RoFormer), pairs interleaved or in two halves; the result is in two halves either way,
// as in kernels/rotary.py.
inline void apply_rope(const float *x, const float *cos, const float *sin, i64 width, bool interleave, float *out) {
    const i64 half = width / 2;
    const auto rotate = [&](i64 j, auto a, auto b, auto c, auto s, auto store) {
        store(out + j, a * c - b * s);
        store(out + half + j, b * c + a * s);
    };
    i64 j = 0;
    for (; !interleave && j + VLEN <= half; j += VLEN)
        rotate(j, load_f32x16(x + j), load_f32x16(x + half + j), load_f32x16(cos + j), load_f32x16(sin + j),
               [](float *to, f32x16 y) { store_f32x16(to, y); });
    for (; j < half; ++j) {
        const i64 first = interleave ? 2 * j : j, second = interleave ? 2 * j + 1 : half + j;
        rotate(j, x[first], x[second], cos[j], sin[j], [](float *to, float y) { *to = y; });
    }
}

// Writes a row of the KV cache.
template <class T>
void store_row(const float *x, i64 width, T *to) {
    i64 j = 0;
    for (; j + VLEN <= width; j += VLEN) store_f32x16(to + j, load_f32x16(x + j));
    for (; j < width; ++j) store(to[j], x[j]);
}

// Up to VLEN rows [count, width] · x.
template <class T>
f32x16 gemv16(const T *rows, i64 count, i64 width, const float *x) {
    const T *row[VLEN];
    for (i64 t = 0; t < VLEN; ++t) row[t] = rows + std::min(t, count - 1) * width;
    f32x16 sums[VLEN] = {}, all = {};
    i64 j = 0;
    for (; j + VLEN <= width; j += VLEN) {
        const f32x16 y = load_f32x16(x + j);
        for (i64 t = 0; t < VLEN; ++t) sums[t] += y * load_f32x16(row[t] + j);
    }
    transpose16(sums);
    for (i64 t = 0; t < VLEN; ++t) all += sums[t];
    for (; j < width; ++j)
        for (i64 t = 0; t < VLEN; ++t) all[t] += x[j] * load(row[t][j]);
    return all;
}

// xᵀ · rows [count, width] → [width].
template <class T>
void gemv_transposed(const float *x, const T *rows, i64 count, i64 width, float *out) {
    i64 j = 0;
    const auto columns = [&](auto n) {
        f32x16 sums[n] = {};
        for (i64 i = 0; i < count; ++i)
            for (int t = 0; t < n; ++t) sums[t] += x[i] * load_f32x16(rows + i * width + j + t * VLEN);
        for (int t = 0; t < n; ++t) store_f32x16(out + j + t * VLEN, sums[t]);
        j += n * VLEN;
    };
    while (j + 8 * VLEN <= width) columns(std::integral_constant<int, 8>());
    while (j + VLEN <= width) columns(std::integral_constant<int, 1>());
    for (; j < width; ++j) {
        out[j] = 0.0f;
        for (i64 i = 0; i < count; ++i) out[j] += x[i] * load(rows[i * width + j]);
    }
}

// Top-k routing of one token from the router's logits [experts], as model/moe.py: expert indices and weights [chosen].
// `scores` holds the logits and becomes scores; `biased_scores` is scratch [experts].
template <class T>
void route_topk(const Network<T> &net, const float *correction, float factor, float *scores, float *biased_scores,
                int32_t *chosen, float *weights) {
    const i64 E = net.experts, K = net.top_k, in_group = E / net.expert_groups;
    float top = -INFINITY, all = 0.0f;
    for (i64 e = 0; e < E; ++e) top = std::max(top, scores[e]);
    for (i64 e = 0; e < E; ++e) {
        scores[e] = net.softmax ? fast_exp(scores[e] - top) : 1.0f / (1.0f + fast_exp(-scores[e]));
        all += scores[e];
    }
    for (i64 e = 0; e < E; ++e) {
        if (net.softmax) scores[e] /= all;
        biased_scores[e] = net.correction_bias ? scores[e] + correction[e] : scores[e];
    }
    if (net.group_limited) {  // group-limited: keep the best groups, by their two best experts or their best
        for (i64 remaining = net.groups_kept; remaining < net.expert_groups; ++remaining) {
            i64 worst = -1;
            float lowest = INFINITY;
            for (i64 g = 0; g < net.expert_groups; ++g) {
                float best = -INFINITY, second = -INFINITY;
                for (i64 e = g * in_group; e < (g + 1) * in_group; ++e) {
                    if (biased_scores[e] > best) {
                        second = best;
                        best = biased_scores[e];
                    } else {
                        second = std::max(second, biased_scores[e]);
                    }
                }
                const float group_score = net.correction_bias && in_group > 1 ? best + second : best;
                if (best > -INFINITY && group_score < lowest) {
                    lowest = group_score;
                    worst = g;
                }
            }
            if (worst < 0) break;
            for (i64 e = worst * in_group; e < (worst + 1) * in_group; ++e) biased_scores[e] = -INFINITY;
        }
    }
    float sum = 0.0f;
    for (i64 k = 0; k < K; ++k) {
        i64 best = 0;
        for (i64 e = 1; e < E; ++e)
            if (biased_scores[e] > biased_scores[best]) best = e;
        chosen[k] = int32_t(best);
        weights[k] = scores[best];
        sum += scores[best];
        biased_scores[best] = -INFINITY;
    }
    for (i64 k = 0; k < K; ++k) weights[k] *= factor / (net.normalise ? sum + 1e-20f : 1.0f);
}

}  // namespace
