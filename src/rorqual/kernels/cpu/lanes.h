// Sixteen numbers in a register or several; lowered to whatever the instruction set has.
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "numbers.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

typedef float lanes __attribute__((vector_size(64)));
typedef int32_t integers __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
constexpr i64 L = 16;

inline lanes load_lanes(const float *from) {
    lanes x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline lanes load_lanes(const bf16 *from) {
    halves x;
    std::memcpy(&x, from, sizeof x);
    return std::bit_cast<lanes>(__builtin_convertvector(x, words) << 16);
}

// GCC 12 widens bytes one by one.
inline integers load_integers(const int8_t *from) {
#if defined(__AVX512F__)
    return (integers)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
#elif defined(__AVX2__)
    struct { __m256i low, high; } x;
    x.low = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from)));
    x.high = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from + 8)));
    return std::bit_cast<integers>(x);
#else
    typedef int8_t small __attribute__((vector_size(16)));
    small x;
    std::memcpy(&x, from, sizeof x);
    return __builtin_convertvector(x, integers);
#endif
}

inline integers load_mask(const bool *from) {  // -1 where true, 0 elsewhere
    return -load_integers(reinterpret_cast<const int8_t *>(from));
}

inline void store_lanes(float *to, lanes x) { std::memcpy(to, &x, sizeof x); }

inline words rounded(lanes x) {  // as store does, the BF16 number in the upper half
    const words u = std::bit_cast<words>(x);
    return x != x ? words{} + 0x7fc00000u : u + 0x7fffu + ((u >> 16) & 1);
}

inline void store_lanes(bf16 *to, lanes x) {
    const halves y = __builtin_convertvector(rounded(x) >> 16, halves);
    std::memcpy(to, &y, sizeof y);
}

// 2L numbers in two registers, BF16 ones even and odd, which costs less than in order.
inline void load_two(const float *from, lanes &a, lanes &b) {
    a = load_lanes(from);
    b = load_lanes(from + L);
}

inline void load_two(const bf16 *from, lanes &a, lanes &b) {
    words u;
    std::memcpy(&u, from, sizeof u);
    a = std::bit_cast<lanes>(u << 16);
    b = std::bit_cast<lanes>(u & 0xffff0000u);
}

inline void store_two(float *to, lanes a, lanes b) {
    store_lanes(to, a);
    store_lanes(to + L, b);
}

inline void store_two(bf16 *to, lanes a, lanes b) {
    const words u = rounded(a) >> 16 | (rounded(b) & 0xffff0000u);
    std::memcpy(to, &u, sizeof u);
}

inline lanes exponential(lanes x) {  // see numbers.h
    x = x < -87.0f ? lanes{} - 87.0f : x;
    x = x > 88.0f ? lanes{} + 88.0f : x;
    const lanes n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    const lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    lanes p = lanes{} + 1.98412698e-4f;
    for (float c : {1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f}) p = p * r + c;
    return p * std::bit_cast<lanes>((__builtin_convertvector(n, integers) + 127) << 23);
}

// All lanes by f, which is commutative, half with half and so on.
template <class V, class F>
inline auto fold(V x, F f) {
#if __has_builtin(__builtin_shufflevector)  // else GCC takes halves through memory: twice the time
    const auto eight = f(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7),
                         __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
    const auto four = f(__builtin_shufflevector(eight, eight, 0, 1, 2, 3), __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
    const auto two = f(four, __builtin_shufflevector(four, four, 2, 3, 0, 1));
    return f(two, __builtin_shufflevector(two, two, 1, 0, 3, 2))[0];
#else  // GCC 11
    typedef std::remove_reference_t<decltype(x[0])> one;
    typedef one eight __attribute__((vector_size(32)));
    typedef one four __attribute__((vector_size(16)));
    struct Eights { eight a, b; } e = std::bit_cast<Eights>(x);
    struct Fours { four a, b; } o = std::bit_cast<Fours>(f(e.a, e.b));
    const four y = f(o.a, o.b);
    return f(f(y[0], y[2]), f(y[1], y[3]));
#endif
}

// Swaps bit D of the row's number and of the column's: done for every bit, it turns L rows on their side.
template <int D, size_t... C>
inline void swap_bit(lanes *rows, std::index_sequence<C...>) {
    for (i64 i = 0; i < L; ++i) {
        if (i & D) continue;
        const lanes a = rows[i], b = rows[i + D];
#if __has_builtin(__builtin_shufflevector)
        rows[i] = __builtin_shufflevector(a, b, (C & D ? L + C - D : C)...);
        rows[i + D] = __builtin_shufflevector(a, b, (C & D ? L + C : C + D)...);
#else  // GCC 11
        rows[i] = __builtin_shuffle(a, b, integers{(C & D ? int32_t(L + C - D) : int32_t(C))...});
        rows[i + D] = __builtin_shuffle(a, b, integers{(C & D ? int32_t(L + C) : int32_t(C + D))...});
#endif
    }
}

// What load_two took apart, in order again.
template <size_t... C>
inline void store_in_turn(float *to, lanes even, lanes odd, std::index_sequence<C...>) {
#if __has_builtin(__builtin_shufflevector)
    store_lanes(to, __builtin_shufflevector(even, odd, (C % 2 ? L + C / 2 : C / 2)...));
    store_lanes(to + L, __builtin_shufflevector(even, odd, (C % 2 ? L + L / 2 + C / 2 : L / 2 + C / 2)...));
#else  // GCC 11
    store_lanes(to, __builtin_shuffle(even, odd, integers{int32_t(C % 2 ? L + C / 2 : C / 2)...}));
    store_lanes(to + L, __builtin_shuffle(even, odd, integers{int32_t(C % 2 ? L + L / 2 + C / 2 : L / 2 + C / 2)...}));
#endif
}

inline void turn(lanes *rows) {
    constexpr std::make_index_sequence<L> columns;
    swap_bit<1>(rows, columns);
    swap_bit<2>(rows, columns);
    swap_bit<4>(rows, columns);
    swap_bit<8>(rows, columns);
}

}  // namespace
