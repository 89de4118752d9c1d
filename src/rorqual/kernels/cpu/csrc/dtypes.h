// FP32 and BF16 values in memory, FP32 in registers; and the macro that exports a template for both dtypes.
#pragma once

#include <bit>
#include <cstdint>

#if defined(RORQUAL_CHECK)  // CXX="g++ -DRORQUAL_CHECK" python build.py
#undef NDEBUG
#include <cassert>
#define RORQUAL_ASSERT(condition) assert(condition)
#else
#define RORQUAL_ASSERT(condition) ((void)0)
#endif

using i64 = int64_t;

// Pairs of BF16 values and quads of int8 are read as 32-bit words.
static_assert(std::endian::native == std::endian::little);

constexpr i64 INTERFACE = 30;  // as in bindings.py

namespace {

struct bf16 {
    uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline void store(float &to, float x) { to = x; }
inline void store(bf16 &to, float x) {  // round to nearest, ties to even; NaN stays NaN
    const uint32_t u = std::bit_cast<uint32_t>(x);
    to.bits = uint16_t(x != x ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

// eˣ within 2 ulp for x in [-87, 88], clamped outside; branch-free, so that it vectorises.
inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // round to nearest integer
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

// Exports a function template as name_f32 and name_bf16, with the C ABI.
#define EXPORT_F32_BF16(result, name, parameters, arguments)           \
    extern "C" result name##_f32 parameters(float) { name arguments; } \
    extern "C" result name##_bf16 parameters(bf16) { name arguments; }
