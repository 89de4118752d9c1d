// The row-wise functions of training, each in one pass over memory where PyTorch's operators make several.
//
// Plain C ABI, no intrinsics: the loops are written so that GCC and Clang vectorise them, and setup.py builds this file
// once for every instruction set. Each function is described where it is called, beside its PyTorch reference.
// Tensors are rows of contiguous numbers; `_stride` is the distance between rows. Sums are FP32 whatever the storage.
// Rows are dealt out statically, so that the same threads give the same bits.

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <omp.h>

#include "lanes.h"

namespace {

template <class T>
void softmax_slope(T *logits, i64 rows, i64 words, const i64 *targets, const float *share, float temperature,
                   float *logprob, float *entropy) {
    const float sharpness = 1.0f / temperature;
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < rows; ++i) {
        T *row = logits + i * words;
        float top = -INFINITY, sum = 0, moment = 0;
#pragma omp simd reduction(max : top)
        for (i64 j = 0; j < words; ++j) {
            const float x = load(row[j]);
            top = x > top ? x : top;
        }
#pragma omp simd reduction(+ : sum, moment)
        for (i64 j = 0; j < words; ++j) {
            const float x = (load(row[j]) - top) * sharpness, e = exponential(x);
            sum += e;
            moment += e * x;
        }
        const float log_sum = std::log(sum);
        logprob[i] = (load(row[targets[i]]) - top) * sharpness - log_sum;
        entropy[i] = log_sum - moment / sum;
        if (!share) continue;
        const float scale = share[i] / sum;
#pragma omp simd
        for (i64 j = 0; j < words; ++j) store(row[j], exponential((load(row[j]) - top) * sharpness) * scale);
        store(row[targets[i]], share[i] * std::expm1(logprob[i]));  // p − 1 without cancellation
    }
}

template <class T>
void rms_norm(const T *x, i64 x_stride, const float *weight, i64 rows, i64 width, float eps, T *out, float *rstd) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < rows; ++i) {
        const T *in = x + i * x_stride;
        T *to = out + i * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (i64 j = 0; j < width; ++j) sum += load(in[j]) * load(in[j]);
        const float scale = 1.0f / std::sqrt(sum / float(width) + eps);
        rstd[i] = scale;
#pragma omp simd
        for (i64 j = 0; j < width; ++j) store(to[j], load(in[j]) * scale * weight[j]);
    }
}

// partial [threads, width] holds each thread's part of the weight's gradient; the caller adds them up.
template <class T>
void rms_norm_backward(const T *grad, i64 grad_stride, const T *x, i64 x_stride, const float *weight, const float *rstd,
                       i64 rows, i64 width, T *grad_x, float *partial, i64 threads) {
#pragma omp parallel num_threads(threads)
    {
        float *mine = partial + omp_get_thread_num() * width;
#pragma omp for schedule(static)
        for (i64 i = 0; i < rows; ++i) {
            const T *g = grad + i * grad_stride, *in = x + i * x_stride;
            T *to = grad_x + i * width;
            float dot = 0;
            const float scale = rstd[i];
#pragma omp simd reduction(+ : dot)
            for (i64 j = 0; j < width; ++j) {
                const float slope = load(g[j]), value = load(in[j]);
                dot += slope * weight[j] * value;
                mine[j] += slope * value * scale;
            }
            const float pull = dot * scale * scale * scale / float(width);
#pragma omp simd
            for (i64 j = 0; j < width; ++j) store(to[j], load(g[j]) * weight[j] * scale - load(in[j]) * pull);
        }
    }
}

template <class T>
void swiglu(const T *gate, i64 gate_stride, const T *up, i64 up_stride, i64 rows, i64 width, T *out) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < rows; ++i) {
        const T *a = gate + i * gate_stride, *b = up + i * up_stride;
        T *to = out + i * width;
#pragma omp simd
        for (i64 j = 0; j < width; ++j) {
            const float x = load(a[j]);
            store(to[j], x / (1.0f + exponential(-x)) * load(b[j]));
        }
    }
}

template <class T>
void swiglu_backward(const T *grad, i64 grad_stride, const T *gate, i64 gate_stride, const T *up, i64 up_stride, i64 rows,
                     i64 width, T *grad_gate, i64 grad_gate_stride, T *grad_up, i64 grad_up_stride) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < rows; ++i) {
        const T *g = grad + i * grad_stride, *a = gate + i * gate_stride, *b = up + i * up_stride;
        T *to_gate = grad_gate + i * grad_gate_stride, *to_up = grad_up + i * grad_up_stride;
#pragma omp simd
        for (i64 j = 0; j < width; ++j) {
            const float x = load(a[j]), slope = load(g[j]), s = 1.0f / (1.0f + exponential(-x));
            store(to_up[j], slope * x * s);
            store(to_gate[j], slope * load(b[j]) * s * (1.0f + x * (1.0f - s)));
        }
    }
}

// Without weights, each counts 1.
template <class T>
void combine(const T *y, const float *weights, const i64 *row, i64 tokens, i64 k, i64 width, T *out) {
#pragma omp parallel for schedule(static)
    for (i64 n = 0; n < tokens; ++n) {
        T *to = out + n * width;
        for (i64 start = 0; start < width; start += 256) {
            float sum[256] = {};
            const i64 some = width - start < 256 ? width - start : 256;
            for (i64 c = 0; c < k; ++c) {
                const T *from = y + row[n * k + c] * width + start;
                const float weight = weights ? weights[n * k + c] : 1.0f;
#pragma omp simd
                for (i64 j = 0; j < some; ++j) sum[j] += weight * load(from[j]);
            }
#pragma omp simd
            for (i64 j = 0; j < some; ++j) store(to[start + j], sum[j]);
        }
    }
}

template <class T>
void combine_backward(const T *grad, const T *y, const float *weights, const i64 *place, i64 rows, i64 tokens, i64 k,
                      i64 width, T *grad_y, float *grad_weights) {
#pragma omp parallel for schedule(static)
    for (i64 m = 0; m < rows; ++m) {
        T *to = grad_y + m * width;
        const i64 p = place[m];
        if (p == tokens * k) {  // a row that only fills up
            std::memset(static_cast<void *>(to), 0, sizeof(T) * width);
            continue;
        }
        const T *g = grad + p / k * width, *value = y + m * width;
        const float weight = weights[p];
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (i64 j = 0; j < width; ++j) {
            const float slope = load(g[j]);
            dot += slope * load(value[j]);
            store(to[j], slope * weight);
        }
        grad_weights[p] = dot;
    }
}

// Rows in groups of `of` (the heads and tokens of a sequence), in each of which row i is token i % tokens; their mask is
// at i·mask_token + group·mask_group. What lies outside the first and last place seen is not computed; a row that sees
// nothing becomes zeros. `scale` is positive.
template <class T>
void masked_softmax(T *scores, i64 rows, i64 places, const bool *mask, i64 mask_group, i64 mask_token, i64 of, i64 tokens,
                    float scale) {
    const i64 whole = (places + L - 1) / L * L;
#pragma omp parallel
    {
        float *x = static_cast<float *>(std::aligned_alloc(64, sizeof(float) * whole));
        bool *seen = static_cast<bool *>(std::calloc(whole, 1));
#pragma omp for schedule(static)
        for (i64 i = 0; i < rows; ++i) {
            T *row = scores + i * places;
            std::memcpy(seen, mask + i / of * mask_group + i % tokens * mask_token, places);
            i64 first = 0, end = places;
            while (end > 0 && !seen[end - 1]) --end;
            while (first < end && !seen[first]) ++first;
            first = first / L * L;
            lanes top = lanes{} - INFINITY, sum = {};
            for (i64 s = first; s < end; s += L) {
                if (s + L <= places)
                    store_lanes(x + s, load_lanes(row + s));
                else
                    for (i64 t = 0; t < L; ++t) x[s + t] = s + t < places ? load(row[s + t]) : 0.0f;
                const lanes here = load_mask(seen + s) ? load_lanes(x + s) : lanes{} - INFINITY;
                top = here > top ? here : top;
            }
            const float highest = fold(top, [](auto a, auto b) { return b > a ? b : a; });
            for (i64 s = first; s < end; s += L) {
                const lanes e = exponential((load_lanes(x + s) - highest) * scale);
                const lanes here = load_mask(seen + s) ? e : lanes{};
                store_lanes(x + s, here);
                sum += here;
            }
            const float all = fold(sum, [](auto a, auto b) { return a + b; });
            const float share = all == 0.0f ? 0.0f : 1.0f / all;
            if (first) std::memset(static_cast<void *>(row), 0, sizeof(T) * first);
            for (i64 s = first; s < end; s += L) {
                if (s + L <= places)
                    store_lanes(row + s, load_lanes(x + s) * share);
                else
                    for (i64 t = s; t < places; ++t) store(row[t], x[t] * share);
            }
            const i64 done = (end + L - 1) / L * L;
            if (done < places) std::memset(static_cast<void *>(row + done), 0, sizeof(T) * (places - done));
        }
        std::free(seen);
        std::free(x);
    }
}

template <class T>
void masked_softmax_backward(T *slope, const T *weights, i64 rows, i64 places, float scale) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < rows; ++i) {
        T *g = slope + i * places;
        const T *w = weights + i * places;
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (i64 s = 0; s < places; ++s) dot += load(g[s]) * load(w[s]);
#pragma omp simd
        for (i64 s = 0; s < places; ++s) store(g[s], load(w[s]) * (load(g[s]) - dot) * scale);
    }
}

// Number i of a pair's first half is at x[first·i], of its second at x[first·i + second]; out likewise. `turn` is 1, or
// -1 to rotate back. `angles` rows of cos and sin serve the tokens by turns.
template <class T>
void rotate(const T *x, i64 x_token, i64 x_head, i64 first, i64 second, const T *cos, const T *sin, i64 angles,
            i64 tokens, i64 heads, i64 pairs, float turn, T *out, i64 out_first, i64 out_second) {
#pragma omp parallel for schedule(static)
    for (i64 n = 0; n < tokens; ++n) {
        const T *c = cos + n % angles * pairs, *s = sin + n % angles * pairs;
        for (i64 h = 0; h < heads; ++h) {
            const T *from = x + n * x_token + h * x_head;
            T *to = out + (n * heads + h) * 2 * pairs;
            if (first == 1 && out_first == 1) {
#pragma omp simd
                for (i64 i = 0; i < pairs; ++i) {
                    const float a = load(from[i]), b = load(from[i + second]), sine = turn * load(s[i]);
                    store(to[i], a * load(c[i]) - b * sine);
                    store(to[i + out_second], b * load(c[i]) + a * sine);
                }
            } else {
                for (i64 i = 0; i < pairs; ++i) {
                    const float a = load(from[first * i]), b = load(from[first * i + second]), sine = turn * load(s[i]);
                    store(to[out_first * i], a * load(c[i]) - b * sine);
                    store(to[out_first * i + out_second], b * load(c[i]) + a * sine);
                }
            }
        }
    }
}

template <class T>
void add_into(float *sum, const T *x, i64 size) {
#pragma omp parallel for simd schedule(static)
    for (i64 i = 0; i < size; ++i) sum[i] += load(x[i]);
}

}  // namespace

extern "C" {
extern const i64 interface;
const i64 interface = INTERFACE;
}

#define P(T) (T *logits, i64 rows, i64 words, const i64 *targets, const float *share, float temperature,               \
              float *logprob, float *entropy)
BOTH(void, softmax_slope, P, (logits, rows, words, targets, share, temperature, logprob, entropy))
#undef P
#define P(T) (const T *x, i64 xs, const float *weight, i64 rows, i64 width, float eps, T *out, float *rstd)
BOTH(void, rms_norm, P, (x, xs, weight, rows, width, eps, out, rstd))
#undef P
#define P(T) (const T *grad, i64 gs, const T *x, i64 xs, const float *weight, const float *rstd, i64 rows, i64 width,  \
              T *grad_x, float *partial, i64 threads)
BOTH(void, rms_norm_backward, P, (grad, gs, x, xs, weight, rstd, rows, width, grad_x, partial, threads))
#undef P
#define P(T) (const T *gate, i64 as, const T *up, i64 bs, i64 rows, i64 width, T *out)
BOTH(void, swiglu, P, (gate, as, up, bs, rows, width, out))
#undef P
#define P(T) (const T *grad, i64 gs, const T *gate, i64 as, const T *up, i64 bs, i64 rows, i64 width, T *grad_gate,    \
              i64 gas, T *grad_up, i64 gbs)
BOTH(void, swiglu_backward, P, (grad, gs, gate, as, up, bs, rows, width, grad_gate, gas, grad_up, gbs))
#undef P
#define P(T) (const T *y, const float *weights, const i64 *row, i64 tokens, i64 k, i64 width, T *out)
BOTH(void, combine, P, (y, weights, row, tokens, k, width, out))
#undef P
#define P(T) (const T *grad, const T *y, const float *weights, const i64 *place, i64 rows, i64 tokens, i64 k,          \
              i64 width, T *grad_y, float *grad_weights)
BOTH(void, combine_backward, P, (grad, y, weights, place, rows, tokens, k, width, grad_y, grad_weights))
#undef P
#define P(T) (float *sum, const T *x, i64 size)
BOTH(void, add_into, P, (sum, x, size))
#undef P
#define P(T) (T *scores, i64 rows, i64 places, const bool *mask, i64 mg, i64 mt, i64 of, i64 tokens, float scale)
BOTH(void, masked_softmax, P, (scores, rows, places, mask, mg, mt, of, tokens, scale))
#undef P
#define P(T) (T *slope, const T *weights, i64 rows, i64 places, float scale)
BOTH(void, masked_softmax_backward, P, (slope, weights, rows, places, scale))
#undef P
#define P(T) (const T *x, i64 xt, i64 xh, i64 first, i64 second, const T *cos, const T *sin, i64 angles, i64 tokens,   \
              i64 heads, i64 pairs, float turn, T *out, i64 out_first, i64 out_second)
BOTH(void, rotate, P, (x, xt, xh, first, second, cos, sin, angles, tokens, heads, pairs, turn, out, out_first,         \
                       out_second))
#undef P
