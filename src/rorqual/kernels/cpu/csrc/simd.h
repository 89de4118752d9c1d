// Vectors of 16 elements. They are GCC's own where a register holds one, and where it holds a quarter (the compiler
// splits them). AVX2 has halves: GCC 12 would pass whole ones through memory and compare them one element at a time.
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "dtypes.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX2__)
template <class T>
struct Halves {
    typedef T half __attribute__((vector_size(32)));
    half low, high;

    T &operator[](i64 t) { return reinterpret_cast<T *>(this)[t]; }
    const T &operator[](i64 t) const { return reinterpret_cast<const T *>(this)[t]; }
    Halves operator-() const { return {-low, -high}; }
    Halves operator~() const { return {~low, ~high}; }
};

namespace {

// A scalar is of T, as GCC's own vectors take it.
#define OPERATOR(op)                                                       \
    template <class T>                                                     \
    inline Halves<T> operator op(Halves<T> a, Halves<T> b) {               \
        return {a.low op b.low, a.high op b.high};                         \
    }                                                                      \
    template <class T>                                                     \
    inline Halves<T> operator op(Halves<T> a, std::type_identity_t<T> b) { \
        return {a.low op b, a.high op b};                                  \
    }                                                                      \
    template <class T>                                                     \
    inline Halves<T> operator op(std::type_identity_t<T> a, Halves<T> b) { \
        return {a op b.low, a op b.high};                                  \
    }                                                                      \
    template <class T, class U>                                            \
    inline Halves<T> &operator op## = (Halves<T> & a, const U &b) {        \
        return a = a op b;                                                 \
    }
OPERATOR(+)
OPERATOR(-)
OPERATOR(*)
OPERATOR(/)
OPERATOR(&)
OPERATOR(|)
OPERATOR(^)
#undef OPERATOR
template <class T>
inline Halves<T> operator<<(Halves<T> a, int count) {
    return {a.low << count, a.high << count};
}
template <class T>
inline Halves<T> operator>>(Halves<T> a, int count) {
    return {a.low >> count, a.high >> count};
}

}  // namespace
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
#define RORQUAL_HALVES
typedef Halves<float> f32x16;
typedef Halves<int32_t> i32x16;
typedef Halves<uint32_t> u32x16;
typedef Halves<uint8_t> u8x64;
typedef Halves<int16_t> i16x32;
#else
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));
typedef int16_t i16x32 __attribute__((vector_size(64)));
#endif
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

namespace {

constexpr i64 VLEN = 16;

// 64 bytes of any place. By halves: GCC 12 copies them 16 bytes at a time, and a load of 32 that follows has to wait.
template <class V>
inline V load_as(const void *from) {
#if defined(RORQUAL_HALVES)
    const __m256i *const halves = static_cast<const __m256i *>(from);
    return {(typename V::half)_mm256_loadu_si256(halves), (typename V::half)_mm256_loadu_si256(halves + 1)};
#else
    V x;
    std::memcpy(&x, from, sizeof x);
    return x;
#endif
}
template <class V>
inline void store_as(void *to, V x) {
#if defined(RORQUAL_HALVES)
    __m256i *const halves = static_cast<__m256i *>(to);
    _mm256_storeu_si256(halves, (__m256i)x.low);
    _mm256_storeu_si256(halves + 1, (__m256i)x.high);
#else
    std::memcpy(to, &x, sizeof x);
#endif
}

inline f32x16 load_f32x16(const float *from) { return load_as<f32x16>(from); }

// Elements of another type; integers that do not fit lose their upper bits.
#if defined(RORQUAL_HALVES)
inline i32x16 to_i32(f32x16 x) {
    return {(i32x16::half)_mm256_cvttps_epi32((__m256)x.low), (i32x16::half)_mm256_cvttps_epi32((__m256)x.high)};
}
inline f32x16 to_f32(i32x16 x) {
    return {(f32x16::half)_mm256_cvtepi32_ps((__m256i)x.low), (f32x16::half)_mm256_cvtepi32_ps((__m256i)x.high)};
}
inline u32x16 to_u32(u16x16 x) {
    const __m256i all = (__m256i)x;
    return {(u32x16::half)_mm256_cvtepu16_epi32(_mm256_castsi256_si128(all)),
            (u32x16::half)_mm256_cvtepu16_epi32(_mm256_extracti128_si256(all, 1))};
}
inline u32x16 to_u32(u8x16 x) {
    return {(u32x16::half)_mm256_cvtepu8_epi32((__m128i)x),
            (u32x16::half)_mm256_cvtepu8_epi32(_mm_srli_si128((__m128i)x, 8))};
}
inline u16x16 to_u16(u32x16 x) {
    const __m256i low = (__m256i)(x.low & 0xffffu), high = (__m256i)(x.high & 0xffffu);
    return (u16x16)_mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
}
inline u8x16 to_u8(u32x16 x) {
    const __m256i words = (__m256i)to_u16(x & 0xffu);
    return (u8x16)_mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
#else
inline i32x16 to_i32(f32x16 x) { return __builtin_convertvector(x, i32x16); }
inline f32x16 to_f32(i32x16 x) { return __builtin_convertvector(x, f32x16); }
inline u32x16 to_u32(u16x16 x) { return __builtin_convertvector(x, u32x16); }
inline u32x16 to_u32(u8x16 x) { return __builtin_convertvector(x, u32x16); }
inline u16x16 to_u16(u32x16 x) { return __builtin_convertvector(x, u16x16); }
inline u8x16 to_u8(u32x16 x) { return __builtin_convertvector(x, u8x16); }
#endif
inline i8x16 to_i8(i32x16 x) { return (i8x16)to_u8(std::bit_cast<u32x16>(x)); }

inline f32x16 load_f32x16(const bf16 *from) {
    u16x16 x;
    std::memcpy(&x, from, sizeof x);
    return std::bit_cast<f32x16>(to_u32(x) << 16);
}

// Intrinsics, because GCC 12 widens int8 vectors one element at a time.
inline i32x16 load_i32x16(const int8_t *from) {
#if defined(__AVX512F__)
    return (i32x16)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
#elif defined(RORQUAL_HALVES)
    return {(i32x16::half)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from))),
            (i32x16::half)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from + 8)))};
#else
    i8x16 x;
    std::memcpy(&x, from, sizeof x);
    return __builtin_convertvector(x, i32x16);
#endif
}

inline i32x16 load_mask(const bool *from) {  // -1 where true, else 0
    return -load_i32x16(reinterpret_cast<const int8_t *>(from));
}

// blend: yes where the mask is -1, no where it is 0; less, equal: -1 where the relation holds.
#if defined(RORQUAL_HALVES)
inline f32x16 blend(i32x16 mask, f32x16 yes, f32x16 no) {
    return {(f32x16::half)_mm256_blendv_ps((__m256)no.low, (__m256)yes.low, (__m256)mask.low),
            (f32x16::half)_mm256_blendv_ps((__m256)no.high, (__m256)yes.high, (__m256)mask.high)};
}
template <int RELATION>
inline i32x16 compare(f32x16 a, f32x16 b) {
    return {(i32x16::half)_mm256_cmp_ps((__m256)a.low, (__m256)b.low, RELATION),
            (i32x16::half)_mm256_cmp_ps((__m256)a.high, (__m256)b.high, RELATION)};
}
inline i32x16 less(f32x16 a, f32x16 b) { return compare<_CMP_LT_OQ>(a, b); }
inline i32x16 equal(f32x16 a, f32x16 b) { return compare<_CMP_EQ_OQ>(a, b); }
#else
inline f32x16 blend(i32x16 mask, f32x16 yes, f32x16 no) { return mask ? yes : no; }
inline i32x16 less(f32x16 a, f32x16 b) { return a < b; }
inline i32x16 equal(f32x16 a, f32x16 b) { return a == b; }
#endif

inline void store_f32x16(float *to, f32x16 x) { store_as(to, x); }

inline u32x16 round_to_bf16(f32x16 x) {  // as `store` of dtypes.h; the BF16 value is in the upper 16 bits
    const u32x16 u = std::bit_cast<u32x16>(x);
    return std::bit_cast<u32x16>(blend(equal(x, x), std::bit_cast<f32x16>(u + 0x7fffu + ((u >> 16) & 1)),
                                       std::bit_cast<f32x16>(u32x16{} + 0x7fc00000u)));
}

inline void store_f32x16(bf16 *to, f32x16 x) {
    const u16x16 y = to_u16(round_to_bf16(x) >> 16);
    std::memcpy(to, &y, sizeof y);
}

// 2·VLEN values into two registers: float in order, BF16 as even and odd elements, which is cheaper than in order.
inline void load_pair(const float *from, f32x16 &a, f32x16 &b) {
    a = load_f32x16(from);
    b = load_f32x16(from + VLEN);
}

inline void load_pair(const bf16 *from, f32x16 &a, f32x16 &b) {
    const u32x16 u = load_as<u32x16>(from);
    a = std::bit_cast<f32x16>(u << 16);
    b = std::bit_cast<f32x16>(u & 0xffff0000u);
}

// As load_pair gives BF16.
inline void store_pair(bf16 *to, f32x16 a, f32x16 b) {
    store_as(to, round_to_bf16(a) >> 16 | (round_to_bf16(b) & 0xffff0000u));
}

inline f32x16 fast_exp(f32x16 x) {  // see dtypes.h
    x = blend(less(x, f32x16{} - 87.0f), f32x16{} - 87.0f, x);
    x = blend(less(f32x16{} + 88.0f, x), f32x16{} + 88.0f, x);
    const f32x16 n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    const f32x16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    f32x16 p = f32x16{} + 1.98412698e-4f;
    for (float c : {1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f}) p = p * r + c;
    return p * std::bit_cast<f32x16>((to_i32(n) + 127) << 23);
}

// The greater of two numbers or of two vectors' elements; of floats the second where one is NaN.
struct Greater {
    template <class V>
    V operator()(V a, V b) const {
        return a > b ? a : b;
    }
#if defined(RORQUAL_HALVES)
    template <class T>
    Halves<T> operator()(Halves<T> a, Halves<T> b) const {
        return {(*this)(a.low, b.low), (*this)(a.high, b.high)};
    }
#endif
};
constexpr Greater greater;

// Reduces all elements with f, which must be commutative, by halving.
#if defined(RORQUAL_HALVES)
template <class T, class F>
inline T reduce(Halves<T> x, F f) {
    typedef typename Halves<T>::half half;
    const half eight = f(x.low, x.high);
    const half four = f(eight, (half)_mm256_permute2f128_ps((__m256)eight, (__m256)eight, 1));
    const half two = f(four, (half)_mm256_permute_ps((__m256)four, 0x4e));
    return f(two, (half)_mm256_permute_ps((__m256)two, 0xb1))[0];
}
#else
template <class V, class F>
inline auto reduce(V x, F f) {
#if __has_builtin(__builtin_shufflevector)  // without it GCC moves halves through memory: twice the time
    const auto eight = f(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7),
                         __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
    const auto four =
        f(__builtin_shufflevector(eight, eight, 0, 1, 2, 3), __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
    const auto two = f(four, __builtin_shufflevector(four, four, 2, 3, 0, 1));
    return f(two, __builtin_shufflevector(two, two, 1, 0, 3, 2))[0];
#else                                       // GCC 11
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
#endif

// Stores even and odd elements, as load_pair gives them for BF16, in their order.
#if defined(RORQUAL_HALVES)
template <size_t... C>
inline void store_interleaved(float *to, f32x16 even, f32x16 odd, std::index_sequence<C...>) {
    for (const auto &[a, b] : {std::pair(even.low, odd.low), std::pair(even.high, odd.high)}) {
        const __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b), high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
        _mm256_storeu_ps(to, _mm256_permute2f128_ps(low, high, 0x20));
        _mm256_storeu_ps(to + 8, _mm256_permute2f128_ps(low, high, 0x31));
        to += VLEN;
    }
}
#else
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
#endif

#if defined(__AVX2__)
inline void transpose8(__m256 *rows) {
    __m256 pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int half = 0; half < 2; ++half) {
            fours[i + 2 * half] = _mm256_shuffle_ps(pairs[i + half], pairs[i + half + 2], 0x44);
            fours[i + 2 * half + 1] = _mm256_shuffle_ps(pairs[i + half], pairs[i + half + 2], 0xee);
        }
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
}

#endif

#if defined(RORQUAL_HALVES)
// Transposes a 16 × 16 block of 32-bit elements, by quarters.
inline void transpose16(f32x16 *rows) {
    float *const block = reinterpret_cast<float *>(rows);
    const auto load_quarter = [&](i64 row, i64 column, __m256 *to) {
        for (i64 i = 0; i < 8; ++i) to[i] = _mm256_loadu_ps(block + (row + i) * VLEN + column);
        transpose8(to);
    };
    const auto store_quarter = [&](i64 row, i64 column, const __m256 *from) {
        for (i64 i = 0; i < 8; ++i) _mm256_storeu_ps(block + (row + i) * VLEN + column, from[i]);
    };
    __m256 one[8], other[8];
    for (i64 i = 0; i < VLEN; i += 8) {
        load_quarter(i, i, one);
        store_quarter(i, i, one);
    }
    load_quarter(0, 8, one);
    load_quarter(8, 0, other);
    store_quarter(8, 0, one);
    store_quarter(0, 8, other);
}
#else
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

// Transposes a 16 × 16 block of 32-bit elements in registers.
inline void transpose16(f32x16 *rows) {
    constexpr std::make_index_sequence<VLEN> columns;
    transpose_stage<1>(rows, columns);
    transpose_stage<2>(rows, columns);
    transpose_stage<4>(rows, columns);
    transpose_stage<8>(rows, columns);
}
#endif

#if defined(__AVX2__)
// Products of unsigned and signed bytes, pairs of them added; the sum of a pair must fit 16 bits.
inline i16x32 multiply_pairs(u8x64 a, u8x64 b) {
#if defined(RORQUAL_HALVES)
    return {(i16x32::half)_mm256_maddubs_epi16((__m256i)a.low, (__m256i)b.low),
            (i16x32::half)_mm256_maddubs_epi16((__m256i)a.high, (__m256i)b.high)};
#else
    return (i16x32)_mm512_maddubs_epi16((__m512i)a, (__m512i)b);
#endif
}

inline i32x16 add_pairs(i16x32 x) {
#if defined(RORQUAL_HALVES)
    const __m256i ones = _mm256_set1_epi16(1);
    return {(i32x16::half)_mm256_madd_epi16((__m256i)x.low, ones),
            (i32x16::half)_mm256_madd_epi16((__m256i)x.high, ones)};
#else
    return (i32x16)_mm512_madd_epi16((__m512i)x, _mm512_set1_epi16(1));
#endif
}

// a + b, of sums that stay in their registers: GCC would add integers as a tree, whose leaves it spills.
inline i16x32 add_in_order(i16x32 a, i16x32 b) {
    a += b;
#if defined(RORQUAL_HALVES)
    asm("" : "+x"(a.low), "+x"(a.high));
#else
    asm("" : "+v"(a));
#endif
    return a;
}

inline u8x64 repeat_four(int32_t four) {
#if defined(RORQUAL_HALVES)
    const u8x64::half x = (u8x64::half)_mm256_set1_epi32(four);
    return {x, x};
#else
    return (u8x64)_mm512_set1_epi32(four);
#endif
}

// Products of signed bytes, pairs of them added: |a| · (b with a's sign).
inline i16x32 multiply_signed_pairs(u8x64 a, u8x64 b) {
#if defined(RORQUAL_HALVES)
    const auto multiply = [](u8x64::half a, u8x64::half b) {
        return (i16x32::half)_mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)a),
                                                  _mm256_sign_epi8((__m256i)b, (__m256i)a));
    };
    return {multiply(a.low, b.low), multiply(a.high, b.high)};
#else
    const __m512i x = (__m512i)a, y = (__m512i)b;
    const __m512i negated = _mm512_mask_sub_epi8(y, _mm512_movepi8_mask(x), _mm512_setzero_si512(), y);
    return (i16x32)_mm512_maddubs_epi16(_mm512_abs_epi8(x), negated);
#endif
}
#endif

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
    const u32x16 u = to_u32(h);
    const f32x16 magnitude = std::bit_cast<f32x16>((u & 0x7fff) << 13) * std::bit_cast<float>(uint32_t(239) << 23);
    return std::bit_cast<f32x16>(std::bit_cast<u32x16>(magnitude) | (u & 0x8000) << 16);
}

}  // namespace
