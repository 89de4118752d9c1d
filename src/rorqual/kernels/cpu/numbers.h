// FP32 and BF16 numbers in memory, FP32 in registers; and how a function of either becomes two of the C ABI.
#pragma once

#include <bit>
#include <cstdint>

using i64 = int64_t;

static_assert(std::endian::native == std::endian::little);  // pairs of BF16 numbers and fours of bytes are read as words

constexpr i64 INTERFACE = 19;

namespace {

struct bf16 {
    uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline void store(float &to, float x) { to = x; }
inline void store(bf16 &to, float x) {  // to nearest, ties to even; NaN stays NaN
    const uint32_t u = std::bit_cast<uint32_t>(x);
    to.bits = uint16_t(x != x ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

// eˣ within 2 units in the last place for x in [-87, 88], clamped there; branch-free, so that it vectorises.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest integer
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.98412698e-4f;  // 1/7!
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * std::bit_cast<float>((int32_t(n) + 127) << 23);
}

}  // namespace

#define BOTH(result, name, parameters, arguments)                                                                      \
    extern "C" result name##_f32 parameters(float) { name arguments; }                                                 \
    extern "C" result name##_bf16 parameters(bf16) { name arguments; }

