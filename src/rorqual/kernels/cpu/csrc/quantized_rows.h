// Rows of activations quantised for products with packed weights (quantized_weight.h).
//
// A row becomes int8 with a scale for every 32 values, or for 96 with INT8 weights, which have no scales of their own
// along the inputs. With an outlier channel a hundred times the rest, one scale per token costs 5 % of accuracy, one
// per 96 values 2 %, one per 32 values 1 % (a whole network: docs/design-notes.md).
#pragma once

#include <algorithm>

#include "simd.h"

constexpr i64 GROUP_SIZE = 32;        // inputs that share a scale
constexpr i64 INT8_SCALE_GROUPS = 3;  // activation groups that share a scale, with INT8 weights

enum Format { INT4, INT4_MINS, INT8, INT8_GROUPS };
constexpr i64 RECORD_BYTES[] = {288, 320, 512, 544};  // bytes of a record, by Format

extern "C" const i64 has_amx;  // AMX is usable (amx.h)

// 32 int8 activations with their scale, and the sums that correct for the weights' zero point: Σq·(-8), Σq·(-128), and
// scale·Σq. Where groups share a scale, the first group holds these for all. The groups of a row are contiguous, so a
// kernel reads a row from one address.
struct ActivationGroup {
    int8_t q[GROUP_SIZE];
    float scale;
    int32_t minus_8_sum, minus_128_sum;
    float scaled_sum;
};

// After the first plane of an INT16 row: its scale, and the sum of each plane times -128 (the weights' zero point).
struct PlaneTrailer {
    float scale;
    int32_t correction[2];
};

// Quantised activations [rows, groups]. For AMX with INT8 weights a row is INT16 with one scale, stored as two int8
// planes (high and low bytes, both signed), each padded with zeros to a multiple of 64, plus 64 bytes that hold a
// PlaneTrailer. This is more exact than int8 groups.
struct QuantizedRows {
    ActivationGroup *data;
    i64 groups, plane_bytes;  // plane_bytes: of one plane with its trailer; 0: int8 groups
    i64 scale_groups;         // groups that share a scale, stored in the first

    QuantizedRows(uint8_t *memory, i64 width, i64 format)
        : data(reinterpret_cast<ActivationGroup *>(memory)),
          groups(groups_of(width)),
          plane_bytes(plane_bytes_of(width, format)),
          scale_groups(scale_groups_of(format)) {}
    int8_t *planes(i64 row) const { return reinterpret_cast<int8_t *>(data) + 2 * row * plane_bytes; }
    PlaneTrailer &trailer(int8_t *of) const { return *reinterpret_cast<PlaneTrailer *>(of + plane_bytes - 64); }
    const PlaneTrailer &trailer(const int8_t *of) const {
        return *reinterpret_cast<const PlaneTrailer *>(of + plane_bytes - 64);
    }
    static i64 scale_groups_of(i64 format) { return format == INT8 ? INT8_SCALE_GROUPS : 1; }
    static i64 groups_of(i64 width) { return (width + GROUP_SIZE - 1) / GROUP_SIZE; }
    static i64 plane_bytes_of(i64 width, i64 format) {
        return has_amx && format == INT8 ? (width + 63) / 64 * 64 + 64 : 0;
    }
    // Bytes to allocate, a multiple of 64. AMX reads eight rows at a time, so it may read past the last one.
    static i64 bytes(i64 rows, i64 width, i64 format) {
        const i64 plane = plane_bytes_of(width, format);
        return plane ? (rows + 7) * 2 * plane : (rows * groups_of(width) * i64(sizeof(ActivationGroup)) + 63) / 64 * 64;
    }
};

namespace {

// Quantises `count` groups (at most INT8_SCALE_GROUPS) with one scale into group `at` and following; load_vector(i)
// gives their i-th 16 values. NaN or infinity: zeros with scale NaN. All below 2^-121: zeros, since 127/max would be
// infinite, which processors convert to different integers.
template <class F>
inline void quantize_groups(i64 count, F load_vector, const QuantizedRows &to, i64 at) {
    const auto quantize_n = [&](auto n_groups) {  // constant, so that the values stay in registers
        constexpr int vectors = 2 * n_groups;
        f32x16 x[vectors];
        u32x16 magnitudes = {};
        for (int i = 0; i < vectors; ++i) {
            x[i] = load_vector(i);
            magnitudes = greater(magnitudes, std::bit_cast<u32x16>(x[i]) & 0x7fffffffu);
        }
        const uint32_t bits =
            reduce(magnitudes, greater);  // as integers, floats ≥ 0 order by magnitude, infinity and NaN above all
        const float largest = std::bit_cast<float>(bits);
        const bool flush = bits < 0x03000000u || bits >= 0x7f800000u;
        const float inverse = flush ? 0.0f : 127.0f / largest;
        i32x16 sums = {};
        ActivationGroup *const groups = to.data + at;
        for (int i = 0; i < vectors; ++i) {
            const f32x16 number =
                ((flush ? f32x16{} : x[i]) * inverse + 12582912.0f) - 12582912.0f;  // round to nearest
            const i32x16 n = to_i32(number);
            const i8x16 s = to_i8(n);
            std::memcpy(groups[i / 2].q + i % 2 * VLEN, &s, sizeof s);
            sums += n;
        }
        const int32_t sum = reduce(sums, [](auto a, auto b) { return a + b; });
        groups->scale = bits >= 0x7f800000u ? std::bit_cast<float>(0x7fc00000u) : largest / 127.0f;
        groups->minus_8_sum = -8 * sum;
        groups->minus_128_sum = -128 * sum;
        groups->scaled_sum = groups->scale * float(sum);
    };
    static_assert(INT8_SCALE_GROUPS == 3);
    if (count == 3) return quantize_n(std::integral_constant<int, 3>());
    if (count == 2) return quantize_n(std::integral_constant<int, 2>());
    quantize_n(std::integral_constant<int, 1>());
}

// A row as INT16 in two int8 planes: x ≈ scale · (256 · high + low). NaN or infinity: zeros with scale NaN.
template <class T>
inline void quantize_int16(const T *from, i64 width, const QuantizedRows &to, i64 row) {
    int8_t *const high = to.planes(row), *const low = high + to.plane_bytes;
    const i64 full = width / VLEN * VLEN;
    float padded[VLEN] = {};
    for (i64 j = full; j < width; ++j) padded[j - full] = load(from[j]);
    const f32x16 tail = load_f32x16(padded);
    u32x16 largest = std::bit_cast<u32x16>(tail) & 0x7fffffffu;
    for (i64 j = 0; j < full; j += VLEN)
        largest = greater(largest, std::bit_cast<u32x16>(load_f32x16(from + j)) & 0x7fffffffu);
    const uint32_t bits = reduce(largest, greater);
    const bool flush = bits < 0x07000000u || bits >= 0x7f800000u;  // 2^-113
    const float maximum = std::bit_cast<float>(bits), inverse = flush ? 0.0f : 32512.0f / maximum;
    i32x16 high_sum = {}, low_sum = {};
    const auto store_planes = [&](i64 j, f32x16 x) {
        const i32x16 n = to_i32(((flush ? f32x16{} : x) * inverse + 12582912.0f) - 12582912.0f);
        const i32x16 h = (n + 128) >> 8, l = n - h * 256;
        const i8x16 sh = to_i8(h), sl = to_i8(l);
        std::memcpy(high + j, &sh, sizeof sh);
        std::memcpy(low + j, &sl, sizeof sl);
        high_sum += h;
        low_sum += l;
    };
    for (i64 j = 0; j < full; j += VLEN) store_planes(j, load_f32x16(from + j));
    for (i64 j = full; j < to.plane_bytes - 64; j += VLEN) store_planes(j, j < width ? tail : f32x16{});
    const auto add = [](auto a, auto b) { return a + b; };
    const float scale = bits >= 0x7f800000u ? std::bit_cast<float>(0x7fc00000u) : maximum / 32512.0f;
    to.trailer(high) = {scale, {-128 * reduce(high_sum, add), -128 * reduce(low_sum, add)}};
}

// Quantises one row of `width` values, padded with zeros to a multiple of 32 (int8 groups) or 64 (INT16).
template <class T>
inline void quantize_row(const T *from, i64 width, const QuantizedRows &to, i64 row) {
    if (to.plane_bytes) return quantize_int16(from, width, to, row);
    for (i64 g = 0; g < to.groups; g += to.scale_groups) {
        const i64 count = std::min(to.scale_groups, to.groups - g), remaining = width - g * GROUP_SIZE;
        const T *x = from + g * GROUP_SIZE;
        const auto load_vector = [&](i64 i) { return load_f32x16(x + i * VLEN); };
        if (remaining >= count * GROUP_SIZE) {
            quantize_groups(count, load_vector, to, row * to.groups + g);
            continue;
        }
        float padded[INT8_SCALE_GROUPS * GROUP_SIZE] = {};
        for (i64 j = 0; j < remaining; ++j) padded[j] = load(x[j]);
        quantize_groups(count, [&](i64 i) { return load_f32x16(padded + i * VLEN); }, to, row * to.groups + g);
    }
}

}  // namespace
