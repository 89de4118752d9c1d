// Row-wise functions of the exact mode in FP32: a row's bits depend on that row alone (exact_math.h). Each function is
// documented where it is called, in kernels/exact/.

#include <algorithm>
#include <limits>

#include "exact_math.h"

namespace {

constexpr i64 BLOCK = 256;  // tokens of a vocabulary whose sum is a float

// log softmax(row / temperature)[target]; at temperature 0 as at 1
float logprob(const float *row, i64 vocab, i64 target, float temperature) {
    const float inv_temperature = temperature == 0 ? 1 : std::min(1 / temperature, std::numeric_limits<float>::max());
    float top = row[0];
#pragma omp simd reduction(max : top)  // the largest, in whatever order
    for (i64 j = 0; j < vocab; ++j) top = row[j] > top ? row[j] : top;
    double sum = 0;
    for (i64 start = 0; start < vocab; start += BLOCK) {
        const i64 count = std::min(BLOCK, vocab - start);
        alignas(64) float weight[BLOCK];
#pragma omp simd
        for (i64 j = 0; j < count; ++j) weight[j] = exact_exp((row[start + j] - top) * inv_temperature);
        sum += double(sum_of(weight, count));
    }
    return (row[target] - top) * inv_temperature - float(exact_log(sum));
}

}  // namespace

extern "C" {
void exact_rms_norm_f32(const float *x, i64 x_stride, const float *weight, i64 rows, i64 width, float eps, float *out,
                        float *rstd) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < rows; ++i) {
        const float *const in = x + i * x_stride;
        Chains squares;
        add_dot(squares, in, in, width);
        const float scale = 1.0f / std::sqrt(squares.sum() / float(width) + eps);
        rstd[i] = scale;
#pragma omp simd
        for (i64 j = 0; j < width; ++j) out[i * width + j] = in[j] * scale * weight[j];
    }
}

void exact_swiglu_f32(const float *gate, i64 gate_stride, const float *up, i64 up_stride, const float *weights,
                      i64 rows, i64 width, float *out) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < rows; ++i) {
        const float *const a = gate + i * gate_stride, *const b = up + i * up_stride;
        const float weight = weights ? weights[i] : 1.0f;
#pragma omp simd
        for (i64 j = 0; j < width; ++j) out[i * width + j] = a[j] / (1.0f + exact_exp(-a[j])) * b[j] * weight;
    }
}

void exact_sigmoid_f32(const float *x, i64 size, float *out) {
#pragma omp simd
    for (i64 i = 0; i < size; ++i) out[i] = 1.0f / (1.0f + exact_exp(-x[i]));
}

void exact_softmax_f32(const float *x, i64 rows, i64 width, float *out) {
    for (i64 i = 0; i < rows; ++i) {
        const float *const in = x + i * width;
        float *const to = out + i * width;
        const float top = *std::max_element(in, in + width);
#pragma omp simd
        for (i64 j = 0; j < width; ++j) to[j] = exact_exp(in[j] - top);
        const float sum = sum_of(to, width);
#pragma omp simd
        for (i64 j = 0; j < width; ++j) to[j] /= sum;
    }
}

// As apply_rotary of elementwise.cpp, forwards only.
void exact_rotary_f32(const float *x, i64 x_token, i64 x_head, i64 first, i64 second, const float *cos,
                      const float *sin, i64 angles, i64 tokens, i64 heads, i64 pairs, float *out) {
#pragma omp parallel for schedule(static)
    for (i64 n = 0; n < tokens; ++n) {
        const float *const c = cos + n % angles * pairs, *const s = sin + n % angles * pairs;
        for (i64 h = 0; h < heads; ++h) {
            const float *const from = x + n * x_token + h * x_head;
            float *const to = out + (n * heads + h) * 2 * pairs;
            for (i64 i = 0; i < pairs; ++i) {
                const float a = from[first * i], b = from[first * i + second];
                to[i] = a * c[i] - b * s[i];
                to[i + pairs] = b * c[i] + a * s[i];
            }
        }
    }
}

void exact_logprobs_f32(const float *logits, i64 rows, i64 vocab, const i64 *targets, const float *temperatures,
                        float *out) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < rows; ++i) out[i] = logprob(logits + i * vocab, vocab, targets[i], temperatures[i]);
}
}
