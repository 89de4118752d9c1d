// Linear layers with 4- or 8-bit weights that stay packed: a decode step is bound by reading the weights.
//
// Weights are unsigned and activations signed, as vpdpbusd takes them; the weights' zero point, 8 or 128, is corrected
// by the sum of the activations.

#include <cmath>
#include <omp.h>

#include "cpu_class.h"
#include "kv_int8.h"
#include "quantized_weight.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if !defined(__AVX2__)
#define UNROLL  // unrolling is not worth ten times the compile time at this level
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#if defined(__AVX512F__)
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
namespace vnni {
constexpr bool SIGNED_WEIGHTS = false;
template <int BITS>
constexpr int MAX_ROWS = BITS == 4 ? 12 : 8;
template <int BITS>
constexpr int MAX_PANELS = BITS == 4 ? 1 : PANEL_BLOCK;
TARGET inline f32x16 load_f16x16(const uint8_t *from) {
    return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}
template <int>
using Sums = i32x16;
template <int>
TARGET inline i32x16 begin_sums(int32_t correction) {
    return i32x16{} + correction;
}
template <int>
TARGET inline i32x16 end_sums(i32x16 sums, int32_t) {
    return sums;
}
template <int>
TARGET inline i32x16 dot4(i32x16 sum, u8x64 weights, int32_t four) {
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(four));
}
constexpr int MAX_QUANTIZED_WEIGHT = 255;
TARGET inline i32x16 dot4_values(i32x16 sum, int32_t four, u8x64 values) {
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(four), (__m512i)values);
}
#include "microkernel.h"
#include "kv_int8_attention.h"
}  // namespace vnni
#undef TARGET
#endif

// Without VNNI: AVX2's vpmaddubsw, or 32-bit arithmetic in vectors.
#define TARGET
namespace base {
template <int>
constexpr int MAX_ROWS = 4;
template <int>
constexpr int MAX_PANELS = 1;
#if defined(__AVX2__)
constexpr bool SIGNED_WEIGHTS = true;  // unsigned 8-bit weights would overflow the 16-bit sum of a pair (vpmaddubsw)
inline f32x16 load_f16x16(const uint8_t *from) {
    const __m128i *const halves = reinterpret_cast<const __m128i *>(from);
    typedef Halves<float>::half half;
    return std::bit_cast<f32x16>(Halves<float>{(half)_mm256_cvtph_ps(_mm_loadu_si128(halves)),
                                               (half)_mm256_cvtph_ps(_mm_loadu_si128(halves + 1))});
}
// Sums of 4-bit weights stay in 16 bits for a record: each adds eight pairs, of at most 2 · 15 · 127.
template <int BITS>
using Sums = std::conditional_t<BITS == 4, i16x32, i32x16>;
template <int BITS>
inline Sums<BITS> begin_sums(int32_t correction) {
    if constexpr (BITS == 4)
        return Sums<BITS>{};
    else
        return Sums<BITS>{} + correction;
}
template <int BITS>
inline i32x16 end_sums(Sums<BITS> sums, int32_t correction) {
    if constexpr (BITS == 4)
        return add_pairs(sums) + correction;
    else
        return sums;
}
template <int BITS>
inline Sums<BITS> dot4(Sums<BITS> sums, u8x64 weights, int32_t four) {
    if constexpr (BITS == 4)
        return add_in_order(sums, multiply_pairs(weights, repeat_four(four)));
    else
        return sums + add_pairs(multiply_signed_pairs(weights ^ uint8_t(128), repeat_four(four)));
}
constexpr int MAX_QUANTIZED_WEIGHT = 127;  // so that the sum of a pair fits 16 bits
inline i32x16 dot4_values(i32x16 sum, int32_t four, u8x64 values) {
    return sum + add_pairs(multiply_pairs(repeat_four(four), values));
}
#else
constexpr bool SIGNED_WEIGHTS = false;
inline f32x16 load_f16x16(const uint8_t *from) { return f16_to_f32(from); }
// One byte of each 32-bit element at a time: the same on vectors of bytes took GCC minutes and gigabytes to compile.
static_assert(std::endian::native == std::endian::little);
template <int>
using Sums = i32x16;
template <int>
inline i32x16 begin_sums(int32_t correction) {
    return i32x16{} + correction;
}
template <int>
inline i32x16 end_sums(i32x16 sums, int32_t) {
    return sums;
}
template <int>
inline i32x16 dot4(i32x16 sum, u8x64 weights, int32_t four) {
    const u32x16 w = std::bit_cast<u32x16>(weights);
    int8_t x[4];
    std::memcpy(x, &four, sizeof x);
    sum += std::bit_cast<i32x16>(w & 255u) * int32_t(x[0]);
    sum += std::bit_cast<i32x16>(w >> 8 & 255u) * int32_t(x[1]);
    sum += std::bit_cast<i32x16>(w >> 16 & 255u) * int32_t(x[2]);
    sum += std::bit_cast<i32x16>(w >> 24) * int32_t(x[3]);
    return sum;
}
constexpr int MAX_QUANTIZED_WEIGHT = 255;
inline i32x16 dot4_values(i32x16 sum, int32_t four, u8x64 values) {
    const u32x16 v = std::bit_cast<u32x16>(values);
    uint8_t x[4];
    std::memcpy(x, &four, sizeof x);
    sum += (std::bit_cast<i32x16>(v << 24) >> 24) * int32_t(x[0]);
    sum += (std::bit_cast<i32x16>(v << 16) >> 24) * int32_t(x[1]);
    sum += (std::bit_cast<i32x16>(v << 8) >> 24) * int32_t(x[2]);
    sum += (std::bit_cast<i32x16>(v) >> 24) * int32_t(x[3]);
    return sum;
}
#endif
#include "microkernel.h"
#include "kv_int8_attention.h"
}  // namespace base
#undef TARGET

namespace {

#if defined(__AVX512F__)
bool vnni_usable() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512vnni") && allows(AVX512_VNNI);
}
#endif

}  // namespace

extern "C" {
extern const QgemmPanels qgemm_panels;
extern const QkScoresInt8 kv_int8_qk_scores;
extern const WeightedSumInt8 kv_int8_weighted_sum;
extern const i64 has_vnni;  // AVX-512 VNNI is in use
extern const i64 has_amx;
#if defined(__AVX512F__)
const i64 has_vnni = vnni_usable();
const QgemmPanels qgemm_panels = vnni_usable() ? vnni::qgemm_panels : base::qgemm_panels;
const QkScoresInt8 kv_int8_qk_scores = vnni_usable() ? vnni::kv_int8_qk_scores : base::kv_int8_qk_scores;
const WeightedSumInt8 kv_int8_weighted_sum = vnni_usable() ? vnni::kv_int8_weighted_sum : base::kv_int8_weighted_sum;
#else
const i64 has_vnni = 0;
const QgemmPanels qgemm_panels = base::qgemm_panels;
const QkScoresInt8 kv_int8_qk_scores = base::kv_int8_qk_scores;
const WeightedSumInt8 kv_int8_weighted_sum = base::kv_int8_weighted_sum;
#endif
#if defined(__AVX512F__)
const i64 has_amx = amx::available();
void begin_gemm() {
    if (has_amx) amx::begin();
}
void end_gemm() {
    if (has_amx) amx::end();
}
#else
const i64 has_amx = 0;
void begin_gemm() {}
void end_gemm() {}
#endif
}

namespace {

template <class T>
void quantized_linear(const T *x, i64 x_row, const uint8_t *data, i64 format, const float *channels, const T *bias,
                      const int32_t *ends, i64 experts, i64 outputs, i64 width, uint8_t *scratch, T *out) {
    const QuantizedLinear<T> weights{data, channels, bias, format, outputs, width};
    const i64 rows = ends[experts - 1], panels = weights.panels();
    const QuantizedRows q(scratch, width, format);
    const i64 work = rows * outputs * width, task_panels = panels_per_task(panels, omp_get_max_threads(), rows);
    const i64 tasks = (panels + task_panels - 1) / task_panels;
#pragma omp parallel if (work > 1 << 15)
    {
        const GemmScope scope;
#pragma omp for schedule(static)
        for (i64 r = 0; r < rows; ++r) quantize_row(x + r * x_row, width, q, r);
        // Dynamic: where another program uses a core, the other threads take more.
#pragma omp for schedule(dynamic, 1)
        for (i64 task = 0; task < experts * tasks; ++task) {
            const i64 e = task / tasks, start = e ? ends[e - 1] : 0, p = task % tasks * task_panels;
            T *to = out + start * outputs;
            weights.gemm(e * panels + p, e * panels + std::min(panels, p + task_panels), -1, q, {start, nullptr},
                         ends[e] - start, [&](i64 p, i64 r, f32x16 y, i64 valid) {
                             store_partial(to + r * outputs + p % panels * VLEN, y, valid);
                         });
        }
    }
}

}  // namespace

#define PARAMETERS(T)                                                                              \
    (const T *x, i64 x_row, const uint8_t *data, i64 format, const float *channels, const T *bias, \
     const int32_t *ends, i64 experts, i64 outputs, i64 width, uint8_t *scratch, T *out)
EXPORT_F32_BF16(void, quantized_linear, PARAMETERS,
                (x, x_row, data, format, channels, bias, ends, experts, outputs, width, scratch, out))
#undef PARAMETERS
