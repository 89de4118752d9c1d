// Row-wise functions of training, each one pass over memory where PyTorch's operators make several.
//
// Plain C ABI and mostly no intrinsics: the loops are written so that GCC and Clang vectorise them, once per
// instruction set (build.py). Each function is documented where it is called, beside its PyTorch reference. Tensors are
// rows of contiguous elements; `_stride` is the distance between rows. Sums are FP32 whatever the storage. Rows are
// scheduled statically, so that the same number of threads gives the same bits.

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <omp.h>

#include "simd.h"

namespace {

template <class T>
void softmax_grad(T *logits, i64 rows, i64 vocab, const i64 *targets, const float *weight, float temperature,
                  float *logprob, float *entropy) {
    const float inv_temperature = 1.0f / temperature;
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < rows; ++i) {
        T *row = logits + i * vocab;
        float top = -INFINITY, sum = 0, moment = 0;
#pragma omp simd reduction(max : top)
        for (i64 j = 0; j < vocab; ++j) {
            const float x = load(row[j]);
            top = x > top ? x : top;
        }
#pragma omp simd reduction(+ : sum, moment)
        for (i64 j = 0; j < vocab; ++j) {
            const float x = (load(row[j]) - top) * inv_temperature, e = fast_exp(x);
            sum += e;
            moment += e * x;
        }
        const float log_sum = std::log(sum);
        logprob[i] = (load(row[targets[i]]) - top) * inv_temperature - log_sum;
        entropy[i] = log_sum - moment / sum;
        if (!weight) continue;
        const float scale = weight[i] / sum;
#pragma omp simd
        for (i64 j = 0; j < vocab; ++j) store(row[j], fast_exp((load(row[j]) - top) * inv_temperature) * scale);
        store(row[targets[i]], weight[i] * std::expm1(logprob[i]));  // p − 1 without cancellation
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

// partial [threads, width] receives each thread's part of the weight's gradient; the caller adds them up.
template <class T>
void rms_norm_backward(const T *grad, i64 grad_stride, const T *x, i64 x_stride, const float *weight, const float *rstd,
                       i64 rows, i64 width, T *grad_x, float *partial, i64 threads) {
#pragma omp parallel num_threads(threads)
    {
        float *thread_partial = partial + omp_get_thread_num() * width;
#pragma omp for schedule(static)
        for (i64 i = 0; i < rows; ++i) {
            const T *g = grad + i * grad_stride, *in = x + i * x_stride;
            T *to = grad_x + i * width;
            float dot = 0;
            const float scale = rstd[i];
#pragma omp simd reduction(+ : dot)
            for (i64 j = 0; j < width; ++j) {
                const float grad_value = load(g[j]), value = load(in[j]);
                dot += grad_value * weight[j] * value;
                thread_partial[j] += grad_value * value * scale;
            }
            const float correction = dot * scale * scale * scale / float(width);
#pragma omp simd
            for (i64 j = 0; j < width; ++j) store(to[j], load(g[j]) * weight[j] * scale - load(in[j]) * correction);
        }
    }
}

// Each row times its weight; weights null: each counts 1.
template <class T>
void swiglu(const T *gate, i64 gate_stride, const T *up, i64 up_stride, const float *weights, i64 rows, i64 width,
            T *out) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < rows; ++i) {
        const T *a = gate + i * gate_stride, *b = up + i * up_stride;
        T *to = out + i * width;
        const float weight = weights ? weights[i] : 1.0f;
#pragma omp simd
        for (i64 j = 0; j < width; ++j) {
            const float x = load(a[j]);
            store(to[j], x / (1.0f + fast_exp(-x)) * load(b[j]) * weight);
        }
    }
}

template <class T>
void swiglu_backward(const T *grad, i64 grad_stride, const T *gate, i64 gate_stride, const T *up, i64 up_stride,
                     const float *weights, i64 rows, i64 width, T *grad_gate, i64 grad_gate_stride, T *grad_up,
                     i64 grad_up_stride, float *grad_weights) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < rows; ++i) {
        const T *g = grad + i * grad_stride, *a = gate + i * gate_stride, *b = up + i * up_stride;
        T *to_gate = grad_gate + i * grad_gate_stride, *to_up = grad_up + i * grad_up_stride;
        const float weight = weights ? weights[i] : 1.0f;
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (i64 j = 0; j < width; ++j) {
            const float x = load(a[j]), s = 1.0f / (1.0f + fast_exp(-x)), y = load(b[j]);
            const float unweighted = load(g[j]), grad_value = unweighted * weight;
            dot += unweighted * x * s * y;
            store(to_up[j], grad_value * x * s);
            store(to_gate[j], grad_value * y * s * (1.0f + x * (1.0f - s)));
        }
        if (weights) grad_weights[i] = dot;
    }
}

// A row of -1 counts as zeros.
template <class T>
void unpermute(const T *y, const i64 *row, i64 tokens, i64 k, i64 width, T *out) {
#pragma omp parallel for schedule(static)
    for (i64 n = 0; n < tokens; ++n) {
        T *to = out + n * width;
        for (i64 start = 0; start < width; start += 256) {
            float sum[256] = {};
            const i64 columns = width - start < 256 ? width - start : 256;
            for (i64 c = 0; c < k; ++c) {
                if (row[n * k + c] < 0) continue;
                const T *from = y + row[n * k + c] * width + start;
#pragma omp simd
                for (i64 j = 0; j < columns; ++j) sum[j] += load(from[j]);
            }
#pragma omp simd
            for (i64 j = 0; j < columns; ++j) store(to[start + j], sum[j]);
        }
    }
}

// Row i belongs to group i / group_rows (the heads and tokens of a sequence) and is token i % tokens; its mask is at
// token·mask_token + group·mask_group. Keys outside the first and last visible one are skipped; a row without visible
// keys becomes zeros. `scale` is positive.
template <class T>
void masked_softmax(T *scores, i64 rows, i64 keys, const bool *mask, i64 mask_group, i64 mask_token, i64 group_rows,
                    i64 tokens, float scale) {
    const i64 padded = (keys + VLEN - 1) / VLEN * VLEN;
#pragma omp parallel
    {
        float *x = static_cast<float *>(std::aligned_alloc(64, sizeof(float) * padded));
        bool *seen = static_cast<bool *>(std::calloc(padded, 1));
#pragma omp for schedule(static)
        for (i64 i = 0; i < rows; ++i) {
            T *row = scores + i * keys;
            std::memcpy(seen, mask + i / group_rows * mask_group + i % tokens * mask_token, keys);
            i64 first = 0, end = keys;
            while (end > 0 && !seen[end - 1]) --end;
            while (first < end && !seen[first]) ++first;
            first = first / VLEN * VLEN;
            f32x16 top = f32x16{} - INFINITY, sum = {};
            for (i64 s = first; s < end; s += VLEN) {
                if (s + VLEN <= keys)
                    store_f32x16(x + s, load_f32x16(row + s));
                else
                    for (i64 t = 0; t < VLEN; ++t) x[s + t] = s + t < keys ? load(row[s + t]) : 0.0f;
                top = greater(blend(load_mask(seen + s), load_f32x16(x + s), f32x16{} - INFINITY), top);
            }
            const float highest = reduce(top, greater);
            for (i64 s = first; s < end; s += VLEN) {
                const f32x16 e = fast_exp((load_f32x16(x + s) - highest) * scale);
                const f32x16 here = blend(load_mask(seen + s), e, f32x16{});
                store_f32x16(x + s, here);
                sum += here;
            }
            const float all = reduce(sum, [](auto a, auto b) { return a + b; });
            const float inv_sum = all == 0.0f ? 0.0f : 1.0f / all;
            if (first) std::memset(static_cast<void *>(row), 0, sizeof(T) * first);
            for (i64 s = first; s < end; s += VLEN) {
                if (s + VLEN <= keys)
                    store_f32x16(row + s, load_f32x16(x + s) * inv_sum);
                else
                    for (i64 t = s; t < keys; ++t) store(row[t], x[t] * inv_sum);
            }
            const i64 done = (end + VLEN - 1) / VLEN * VLEN;
            if (done < keys) std::memset(static_cast<void *>(row + done), 0, sizeof(T) * (keys - done));
        }
        std::free(seen);
        std::free(x);
    }
}

template <class T>
void masked_softmax_backward(T *grad, const T *weights, i64 rows, i64 keys, float scale) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < rows; ++i) {
        T *g = grad + i * keys;
        const T *w = weights + i * keys;
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (i64 s = 0; s < keys; ++s) dot += load(g[s]) * load(w[s]);
#pragma omp simd
        for (i64 s = 0; s < keys; ++s) store(g[s], load(w[s]) * (load(g[s]) - dot) * scale);
    }
}

// Element i of a head's first half is at x[first·i], of its second half at x[first·i + second]; out likewise.
// `direction`: 1, or -1 to rotate back. Token n uses row n % angles of cos and sin.
template <class T>
void apply_rotary(const T *x, i64 x_token, i64 x_head, i64 first, i64 second, const T *cos, const T *sin, i64 angles,
                  i64 tokens, i64 heads, i64 pairs, float direction, T *out, i64 out_first, i64 out_second) {
#pragma omp parallel for schedule(static)
    for (i64 n = 0; n < tokens; ++n) {
        const T *c = cos + n % angles * pairs, *s = sin + n % angles * pairs;
        for (i64 h = 0; h < heads; ++h) {
            const T *from = x + n * x_token + h * x_head;
            T *to = out + (n * heads + h) * 2 * pairs;
            if (first == 1 && out_first == 1) {
#pragma omp simd
                for (i64 i = 0; i < pairs; ++i) {
                    const float a = load(from[i]), b = load(from[i + second]), sine = direction * load(s[i]);
                    store(to[i], a * load(c[i]) - b * sine);
                    store(to[i + out_second], b * load(c[i]) + a * sine);
                }
            } else {
                for (i64 i = 0; i < pairs; ++i) {
                    const float a = load(from[first * i]), b = load(from[first * i + second]),
                                sine = direction * load(s[i]);
                    store(to[out_first * i], a * load(c[i]) - b * sine);
                    store(to[out_first * i + out_second], b * load(c[i]) + a * sine);
                }
            }
        }
    }
}

template <class T>
void accumulate(float *sum, const T *x, i64 size) {
#pragma omp parallel for simd schedule(static)
    for (i64 i = 0; i < size; ++i) sum[i] += load(x[i]);
}

}  // namespace

extern "C" {
extern const i64 interface;  // bindings.py refuses a build with another number
const i64 interface = INTERFACE;
}

#define PARAMETERS(T)                                                                                            \
    (T *logits, i64 rows, i64 vocab, const i64 *targets, const float *weight, float temperature, float *logprob, \
     float *entropy)
EXPORT_F32_BF16(void, softmax_grad, PARAMETERS, (logits, rows, vocab, targets, weight, temperature, logprob, entropy))
#undef PARAMETERS
#define PARAMETERS(T) (const T *x, i64 xs, const float *weight, i64 rows, i64 width, float eps, T *out, float *rstd)
EXPORT_F32_BF16(void, rms_norm, PARAMETERS, (x, xs, weight, rows, width, eps, out, rstd))
#undef PARAMETERS
#define PARAMETERS(T)                                                                                        \
    (const T *grad, i64 gs, const T *x, i64 xs, const float *weight, const float *rstd, i64 rows, i64 width, \
     T *grad_x, float *partial, i64 threads)
EXPORT_F32_BF16(void, rms_norm_backward, PARAMETERS,
                (grad, gs, x, xs, weight, rstd, rows, width, grad_x, partial, threads))
#undef PARAMETERS
#define PARAMETERS(T) (const T *gate, i64 as, const T *up, i64 bs, const float *weights, i64 rows, i64 width, T *out)
EXPORT_F32_BF16(void, swiglu, PARAMETERS, (gate, as, up, bs, weights, rows, width, out))
#undef PARAMETERS
#define PARAMETERS(T)                                                                                              \
    (const T *grad, i64 gs, const T *gate, i64 as, const T *up, i64 bs, const float *weights, i64 rows, i64 width, \
     T *grad_gate, i64 gas, T *grad_up, i64 gbs, float *grad_weights)
EXPORT_F32_BF16(void, swiglu_backward, PARAMETERS,
                (grad, gs, gate, as, up, bs, weights, rows, width, grad_gate, gas, grad_up, gbs, grad_weights))
#undef PARAMETERS
#define PARAMETERS(T) (const T *y, const i64 *row, i64 tokens, i64 k, i64 width, T *out)
EXPORT_F32_BF16(void, unpermute, PARAMETERS, (y, row, tokens, k, width, out))
#undef PARAMETERS
#define PARAMETERS(T) (float *sum, const T *x, i64 size)
EXPORT_F32_BF16(void, accumulate, PARAMETERS, (sum, x, size))
#undef PARAMETERS
#define PARAMETERS(T) \
    (T *scores, i64 rows, i64 keys, const bool *mask, i64 mg, i64 mt, i64 group_rows, i64 tokens, float scale)
EXPORT_F32_BF16(void, masked_softmax, PARAMETERS, (scores, rows, keys, mask, mg, mt, group_rows, tokens, scale))
#undef PARAMETERS
#define PARAMETERS(T) (T *grad, const T *weights, i64 rows, i64 keys, float scale)
EXPORT_F32_BF16(void, masked_softmax_backward, PARAMETERS, (grad, weights, rows, keys, scale))
#undef PARAMETERS
#define PARAMETERS(T)                                                                                                  \
    (const T *x, i64 xt, i64 xh, i64 first, i64 second, const T *cos, const T *sin, i64 angles, i64 tokens, i64 heads, \
     i64 pairs, float direction, T *out, i64 out_first, i64 out_second)
EXPORT_F32_BF16(void, apply_rotary, PARAMETERS,
                (x, xt, xh, first, second, cos, sin, angles, tokens, heads, pairs, direction, out, out_first,
                 out_second))
#undef PARAMETERS
