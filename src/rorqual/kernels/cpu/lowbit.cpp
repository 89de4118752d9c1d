// Products with weights of 4 or 8 bits, which stay packed: a decode step is as fast as its weights come from memory.
//
// Numbers are multiplied as unsigned weights and signed activations, the processor's own form (vpdpbusd); that weights
// lie 8 or 128 too high is taken off by the sum of the activations.

#include <cmath>
#include <omp.h>

#include "cache8.h"
#include "classes.h"
#include "lowbit.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if !defined(__AVX2__)
#define UNROLL  // at this level not worth ten times the time to compile
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#if defined(__AVX512F__)
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
namespace vnni {
constexpr bool SIGNED = false;
template <int BITS>
constexpr int MOST = BITS == 4 ? 12 : 8;
template <int BITS>
constexpr int WIDE = BITS == 4 ? 1 : BESIDE;
TARGET inline lanes halves_at(const uint8_t *from) {
    return (lanes)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}
template <int>
TARGET inline integers dot(integers sum, bytes weights, int32_t four) {
    return (integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(four));
}
constexpr int HIGHEST = 255;
TARGET inline integers dot_values(integers sum, int32_t four, bytes values) {
    return (integers)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(four), (__m512i)values);
}
#include "tile.h"
#include "past8.h"
}  // namespace vnni
#undef TARGET
#endif

#define TARGET
namespace plain {
template <int>
constexpr int MOST = 4;
template <int>
constexpr int WIDE = 1;
#if defined(__AVX2__)
constexpr bool SIGNED = true;  // 8-bit weights moved up would not fit the 16 bits of a pair's sum
inline lanes halves_at(const uint8_t *from) {
    struct { __m256 low, high; } x;
    x.low = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
    x.high = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from) + 1));
    return std::bit_cast<lanes>(x);
}
template <int BITS>
inline integers dot(integers sum, bytes weights, int32_t four) {
    struct Two { __m256i part[2]; };
    Two w = std::bit_cast<Two>(weights), s = std::bit_cast<Two>(sum);
    const __m256i x = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1);
    for (int i = 0; i < 2; ++i) {
        __m256i pairs;
        if constexpr (BITS == 4) {
            pairs = _mm256_maddubs_epi16(w.part[i], x);
        } else {
            const __m256i real = _mm256_xor_si256(w.part[i], _mm256_set1_epi8(-128));
            pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(real), _mm256_sign_epi8(x, real));
        }
        s.part[i] = _mm256_add_epi32(s.part[i], _mm256_madd_epi16(pairs, ones));
    }
    return std::bit_cast<integers>(s);
}
constexpr int HIGHEST = 127;  // so that a pair's sum fits 16 bits
inline integers dot_values(integers sum, int32_t four, bytes values) {
    struct Two { __m256i part[2]; };
    Two v = std::bit_cast<Two>(values), s = std::bit_cast<Two>(sum);
    for (int i = 0; i < 2; ++i) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(four), v.part[i]);
        s.part[i] = _mm256_add_epi32(s.part[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    return std::bit_cast<integers>(s);
}
#else
constexpr bool SIGNED = false;
inline lanes halves_at(const uint8_t *from) { return halves_plain(from); }
// On lanes of 32 bits, a byte of each at a time: written on bytes it took GCC minutes and gigabytes.
static_assert(std::endian::native == std::endian::little);
template <int>
inline integers dot(integers sum, bytes weights, int32_t four) {
    const words w = std::bit_cast<words>(weights);
    int8_t x[4];
    std::memcpy(x, &four, sizeof x);
    sum += std::bit_cast<integers>(w & 255u) * int32_t(x[0]);
    sum += std::bit_cast<integers>(w >> 8 & 255u) * int32_t(x[1]);
    sum += std::bit_cast<integers>(w >> 16 & 255u) * int32_t(x[2]);
    sum += std::bit_cast<integers>(w >> 24) * int32_t(x[3]);
    return sum;
}
constexpr int HIGHEST = 255;
inline integers dot_values(integers sum, int32_t four, bytes values) {
    const words v = std::bit_cast<words>(values);
    uint8_t x[4];
    std::memcpy(x, &four, sizeof x);
    sum += (std::bit_cast<integers>(v << 24) >> 24) * int32_t(x[0]);
    sum += (std::bit_cast<integers>(v << 16) >> 24) * int32_t(x[1]);
    sum += (std::bit_cast<integers>(v << 8) >> 24) * int32_t(x[2]);
    sum += (std::bit_cast<integers>(v) >> 24) * int32_t(x[3]);
    return sum;
}
#endif
#include "tile.h"
#include "past8.h"
}  // namespace plain
#undef TARGET

namespace {

#if defined(__AVX512F__)
bool has_vnni() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512vnni") && allows(AVX512_VNNI);
}
#endif

}  // namespace

extern "C" {
extern const Against against;
extern const Score8 score8;
extern const Mix8 mix8;
extern const i64 byte_products;  // whether the processor's own (VNNI) are used
extern const i64 matrix_unit;
#if defined(__AVX512F__)
const i64 byte_products = has_vnni();
const Against against = has_vnni() ? vnni::against : plain::against;
const Score8 score8 = has_vnni() ? vnni::score_queries : plain::score_queries;
const Mix8 mix8 = has_vnni() ? vnni::mix_queries : plain::mix_queries;
#else
const i64 byte_products = 0;
const Against against = plain::against;
const Score8 score8 = plain::score_queries;
const Mix8 mix8 = plain::mix_queries;
#endif
#if defined(__AVX512F__)
const i64 matrix_unit = matrix::usable();
void begin_products() {
    if (matrix_unit) matrix::begin();
}
void end_products() {
    if (matrix_unit) matrix::end();
}
#else
const i64 matrix_unit = 0;
void begin_products() {}
void end_products() {}
#endif
}

namespace {

template <class T>
void lowbit_product(const T *x, i64 x_row, const uint8_t *data, i64 format, const float *channels, const T *bias,
                    const int32_t *ends, i64 experts, i64 outputs, i64 width, uint8_t *room, T *out) {
    const Weights<T> weights{data, channels, bias, format, outputs, width};
    const i64 rows = ends[experts - 1], panels = weights.panels();
    const Quantised q(room, width, format);
    const i64 work = rows * outputs * width, some = panels_at_once(panels, omp_get_max_threads(), rows);
    const i64 pieces = (panels + some - 1) / some;
#pragma omp parallel if (work > 1 << 15)
    {
        const Multiplying now;
#pragma omp for schedule(static)
        for (i64 r = 0; r < rows; ++r) quantise_row(x + r * x_row, width, q, r);
        // In pieces handed out as threads come: where another program takes a core, the other does more.
#pragma omp for schedule(dynamic, 1)
        for (i64 piece = 0; piece < experts * pieces; ++piece) {
            const i64 e = piece / pieces, start = e ? ends[e - 1] : 0, p = piece % pieces * some;
            T *to = out + start * outputs;
            weights.times(e * panels + p, e * panels + std::min(panels, p + some), -1, q, {start, nullptr}, ends[e] - start,
                          [&](i64 p, i64 r, lanes y, i64 some) { store_some(to + r * outputs + p % panels * L, y, some); });
        }
    }
}

}  // namespace

#define P(T) (const T *x, i64 x_row, const uint8_t *data, i64 format, const float *channels, const T *bias,           \
              const int32_t *ends, i64 experts, i64 outputs, i64 width, uint8_t *room, T *out)
BOTH(void, lowbit_product, P, (x, x_row, data, format, channels, bias, ends, experts, outputs, width, room, out))
#undef P
