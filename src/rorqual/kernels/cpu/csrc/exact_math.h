// Arithmetic whose bits depend on the numbers alone: not on how many rows there are, on the width of vectors or on the
// class of processor. A sum is a chain of fused multiply-adds in one order, or 16 of them (element i belongs to chain
// i % 16) that are added by halving. Fusing is always explicit: build.py compiles these sources with -ffp-contract=off.
// kernels/exact/arithmetic.py has the same in PyTorch.
#pragma once

#include <cmath>

#include "simd.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// A vector register of the instruction set.
#if defined(__AVX512F__)
constexpr i64 WIDTH = 16;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr i64 WIDTH = 8;
#else
constexpr i64 WIDTH = 4;
#endif
typedef float vec __attribute__((vector_size(4 * WIDTH)));

inline vec load_vec(const float *from) {
    vec x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline void store_vec(float *to, vec x) { std::memcpy(to, &x, sizeof x); }

inline vec broadcast(float x) { return x - vec{}; }  // x + 0 would turn -0 into 0

inline vec fma(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    for (i64 t = 0; t < WIDTH; ++t) c[t] = fma(a[t], b[t], c[t]);
    return c;
#endif
}

// 16 chains.
constexpr i64 CHAINS = 16, PARTS = CHAINS / WIDTH;

struct Chains {
    vec part[PARTS] = {};

    void add(i64 chain, float x) { part[chain / WIDTH][chain % WIDTH] += x; }
    void add_product(i64 chain, float a, float b) {
        part[chain / WIDTH][chain % WIDTH] = fma(a, b, part[chain / WIDTH][chain % WIDTH]);
    }
    void add_products(const float *a, const float *b) {
        for (i64 p = 0; p < PARTS; ++p) part[p] = fma(load_vec(a + p * WIDTH), load_vec(b + p * WIDTH), part[p]);
    }
    float sum() const {
#if defined(__AVX2__) && defined(__FMA__)
        struct {
            __m256 low, high;
        } half;
        std::memcpy(&half, part, sizeof half);
        const __m256 eight = _mm256_add_ps(half.low, half.high);
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
        const vec four = (part[0] + part[2]) + (part[1] + part[3]);
        return (four[0] + four[2]) + (four[1] + four[3]);
#endif
    }
};

// The sum of x [count].
inline float sum_of(const float *x, i64 count) {
    Chains chains;
    i64 i = 0;
    for (; i + CHAINS <= count; i += CHAINS)
        for (i64 p = 0; p < PARTS; ++p) chains.part[p] += load_vec(x + i + p * WIDTH);
    for (; i < count; ++i) chains.add(i % CHAINS, x[i]);
    return chains.sum();
}

// Adds a · b, of `count` elements.
inline void add_dot(Chains &chains, const float *a, const float *b, i64 count) {
    i64 i = 0;
    for (; i + CHAINS <= count; i += CHAINS) chains.add_products(a + i, b + i);
    for (; i < count; ++i) chains.add_product(i % CHAINS, a[i], b[i]);
}

// eˣ within 2 ulp, 0 below -87, e⁸⁸ above 88; branch-free, so that it vectorises.
inline float exact_exp(float x) {
    const float y = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = fma(y, 1.44269504f, 12582912.0f) - 12582912.0f;  // rounds to the nearest integer
    const float r = fma(n, 2.12194440e-4f, fma(n, -0.693359375f, y));
    float p = 1.98412698e-4f;  // 1/7!
    p = fma(p, r, 1.38888889e-3f);
    p = fma(p, r, 8.33333333e-3f);
    p = fma(p, r, 4.16666667e-2f);
    p = fma(p, r, 1.66666667e-1f);
    p = fma(p, r, 0.5f);
    p = fma(p, r, 1.0f);
    p = fma(p, r, 1.0f);
    const float found = p * std::bit_cast<float>((int32_t(n) + 127) << 23);
    return x < -87.0f ? 0.0f : found;
}

// ln x of a normal number, by the series of artanh; its error is far below a float's.
inline double exact_log(double x) {
    const uint64_t bits = std::bit_cast<uint64_t>(x);
    double exponent = double(int64_t(bits >> 52) - 1023);
    double m = std::bit_cast<double>((bits & 0xfffffffffffffu) | (uint64_t(1023) << 52));
    if (m > 1.4142135623730951) {
        m *= 0.5;
        exponent += 1.0;
    }
    const double s = (m - 1.0) / (m + 1.0), z = s * s;
    double series = 0.0;
    for (int k = 21; k > 0; k -= 2) series = series * z + 1.0 / k;
    return exponent * 0.6931471805599453 + 2.0 * s * series;
}

}  // namespace
