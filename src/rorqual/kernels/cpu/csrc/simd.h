// Vectors of 16 elements in GCC's vector extension; the compiler lowers them to what the instruction set has.
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "dtypes.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));
constexpr i64 VLEN = 16;

inline f32x16 load_f32x16(const float *from) {
    f32x16 x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline f32x16 load_f32x16(const bf16 *from) {
    u16x16 x;
    std::memcpy(&x, from, sizeof x);
    return std::bit_cast<f32x16>(__builtin_convertvector(x, u32x16) << 16);
}

// Intrinsics, because GCC 12 widens int8 vectors one element at a time.
inline i32x16 load_i32x16(const int8_t *from) {
#if defined(__AVX512F__)
    return (i32x16)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
#elif defined(__AVX2__)
    struct {
        __m256i low, high;
    } x;
    x.low = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from)));
    x.high = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from + 8)));
    return std::bit_cast<i32x16>(x);
#else
    i8x16 x;
    std::memcpy(&x, from, sizeof x);
    return __builtin_convertvector(x, i32x16);
#endif
}

inline i32x16 load_mask(const bool *from) {  // -1 where true, else 0
    return -load_i32x16(reinterpret_cast<const int8_t *>(from));
}

inline void store_f32x16(float *to, f32x16 x) { std::memcpy(to, &x, sizeof x); }

inline u32x16 round_to_bf16(f32x16 x) {  // as `store` of dtypes.h; the BF16 value is in the upper 16 bits
    const u32x16 u = std::bit_cast<u32x16>(x);
    return x != x ? u32x16{} + 0x7fc00000u : u + 0x7fffu + ((u >> 16) & 1);
}

inline void store_f32x16(bf16 *to, f32x16 x) {
    const u16x16 y = __builtin_convertvector(round_to_bf16(x) >> 16, u16x16);
    std::memcpy(to, &y, sizeof y);
}

// 2·VLEN values into two registers: float in order, BF16 as even and odd elements, which is cheaper than in order.
inline void load_pair(const float *from, f32x16 &a, f32x16 &b) {
    a = load_f32x16(from);
    b = load_f32x16(from + VLEN);
}

inline void load_pair(const bf16 *from, f32x16 &a, f32x16 &b) {
    u32x16 u;
    std::memcpy(&u, from, sizeof u);
    a = std::bit_cast<f32x16>(u << 16);
    b = std::bit_cast<f32x16>(u & 0xffff0000u);
}

// As load_pair gives BF16.
inline void store_pair(bf16 *to, f32x16 a, f32x16 b) {
    const u32x16 u = round_to_bf16(a) >> 16 | (round_to_bf16(b) & 0xffff0000u);
    std::memcpy(to, &u, sizeof u);
}

inline f32x16 fast_exp(f32x16 x) {  // see dtypes.h
    x = x < -87.0f ? f32x16{} - 87.0f : x;
    x = x > 88.0f ? f32x16{} + 88.0f : x;
    const f32x16 n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    const f32x16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    f32x16 p = f32x16{} + 1.98412698e-4f;
    for (float c : {1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f}) p = p * r + c;
    return p * std::bit_cast<f32x16>((__builtin_convertvector(n, i32x16) + 127) << 23);
}

// Reduces all elements with f, which must be commutative, by halving.
template <class V, class F>
inline auto reduce(V x, F f) {
#if __has_builtin(__builtin_shufflevector)  // without it GCC moves halves through memory: twice the time
    const auto eight = f(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7),
                         __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
    const auto four =
        f(__builtin_shufflevector(eight, eight, 0, 1, 2, 3), __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
    const auto two = f(four, __builtin_shufflevector(four, four, 2, 3, 0, 1));
    return f(two, __builtin_shufflevector(two, two, 1, 0, 3, 2))[0];
#else  // GCC 11
    typedef std::remove_reference_t<decltype(x[0])> element;
    typedef element eight __attribute__((vector_size(32)));
    typedef element four __attribute__((vector_size(16)));
    struct Eights {
        eight a, b;
    } e = std::bit_cast<Eights>(x);
    struct Fours {
        four a, b;
    } o = std::bit_cast<Fours>(f(e.a, e.b));
    const four y = f(o.a, o.b);
    return f(f(y[0], y[2]), f(y[1], y[3]));
#endif
}

// One butterfly stage: swaps bit D of the row index and of the column index. All four stages transpose the block.
template <int D, size_t... C>
inline void transpose_stage(f32x16 *rows, std::index_sequence<C...>) {
    for (i64 i = 0; i < VLEN; ++i) {
        if (i & D) continue;
        const f32x16 a = rows[i], b = rows[i + D];
#if __has_builtin(__builtin_shufflevector)
        rows[i] = __builtin_shufflevector(a, b, (C & D ? VLEN + C - D : C)...);
        rows[i + D] = __builtin_shufflevector(a, b, (C & D ? VLEN + C : C + D)...);
#else  // GCC 11
        rows[i] = __builtin_shuffle(a, b, i32x16{(C & D ? int32_t(VLEN + C - D) : int32_t(C))...});
        rows[i + D] = __builtin_shuffle(a, b, i32x16{(C & D ? int32_t(VLEN + C) : int32_t(C + D))...});
#endif
    }
}

// Stores even and odd elements, as load_pair gives them for BF16, in their order.
template <size_t... C>
inline void store_interleaved(float *to, f32x16 even, f32x16 odd, std::index_sequence<C...>) {
#if __has_builtin(__builtin_shufflevector)
    store_f32x16(to, __builtin_shufflevector(even, odd, (C % 2 ? VLEN + C / 2 : C / 2)...));
    store_f32x16(to + VLEN,
                 __builtin_shufflevector(even, odd, (C % 2 ? VLEN + VLEN / 2 + C / 2 : VLEN / 2 + C / 2)...));
#else  // GCC 11
    store_f32x16(to, __builtin_shuffle(even, odd, i32x16{int32_t(C % 2 ? VLEN + C / 2 : C / 2)...}));
    store_f32x16(to + VLEN,
                 __builtin_shuffle(even, odd, i32x16{int32_t(C % 2 ? VLEN + VLEN / 2 + C / 2 : VLEN / 2 + C / 2)...}));
#endif
}

// Transposes a 16 × 16 block of 32-bit elements in registers.
inline void transpose16(f32x16 *rows) {
    constexpr std::make_index_sequence<VLEN> columns;
    transpose_stage<1>(rows, columns);
    transpose_stage<2>(rows, columns);
    transpose_stage<4>(rows, columns);
    transpose_stage<8>(rows, columns);
}

// Stores the first `count` elements.
template <class T>
inline void store_partial(T *to, f32x16 x, i64 count) {
    if (count == VLEN) return store_f32x16(to, x);
    for (i64 t = 0; t < count; ++t) store(to[t], x[t]);
}

// 16 finite FP16 values to FP32.
inline f32x16 f16_to_f32(const uint8_t *from) {
    u16x16 h;
    std::memcpy(&h, from, sizeof h);
    const u32x16 u = __builtin_convertvector(h, u32x16);
    const f32x16 magnitude = std::bit_cast<f32x16>((u & 0x7fff) << 13) * std::bit_cast<float>(uint32_t(239) << 23);
    return std::bit_cast<f32x16>(std::bit_cast<u32x16>(magnitude) | (u & 0x8000) << 16);
}

}  // namespace
