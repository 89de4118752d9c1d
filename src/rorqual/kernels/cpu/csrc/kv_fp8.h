// The FP8 KV cache: how rows are stored, and attention over them.
//
// A row holds its values in E4M3, padded with zeros to a multiple of 4 bytes, then an FP32 scale for every 128 values,
// the last ones fewer. A row is a head's key or value of one token, or an MLA latent, whose rotated key stays BF16
// (FlashMLA's FP8 cache of DeepSeek-V3.2-Exp).
#pragma once

#include "attention.h"

namespace {

constexpr i64 FP8_TILE = 128;  // values that share a scale
constexpr i64 fp8_scales_offset(i64 width) { return (width + 3) / 4 * 4; }
constexpr i64 fp8_tiles(i64 width) { return (width + FP8_TILE - 1) / FP8_TILE; }
constexpr i64 fp8_row_bytes(i64 width) { return fp8_scales_offset(width) + 4 * fp8_tiles(width); }

struct e4m3 {
    uint8_t bits;
};

// Loads give 2^-8 of the value, and load_fp8_scale 2^8 of the scale: shifted by 7, the bits of an E4M3 number are those
// of the FP16 number 2^-8 times as large, which x86 converts in one instruction. NaN becomes a number; its scale is NaN.
inline float load(e4m3 x) {
    const uint32_t m = x.bits & 0x7fu;
    const float magnitude = m < 8 ? float(m) * 0x1p-17f : std::bit_cast<float>((m << 20) + (112u << 23));
    return x.bits & 0x80 ? -magnitude : magnitude;
}

inline f32x16 load_f32x16(const e4m3 *from) {
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(int16_t(0xbfff)));
#if defined(__AVX512F__)
    return (f32x16)_mm512_cvtph_ps(half);
#else
    struct {
        __m256 low, high;
    } x;
    x.low = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
    x.high = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
    return std::bit_cast<f32x16>(x);
#endif
#else
    u8x16 bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    const u32x16 u = to_u32(bytes), m = u & 0x7fu;
    // Numbers below 2^-6 have no leading 1: it is added with the exponent, and subtracted again.
    const f32x16 small = std::bit_cast<f32x16>((m << 20) + (113u << 23)) - 0x1p-14f;
    const f32x16 magnitude =
        blend((std::bit_cast<i32x16>(m) - 8) >> 31, small, std::bit_cast<f32x16>((m << 20) + (112u << 23)));
    return std::bit_cast<f32x16>(std::bit_cast<u32x16>(magnitude) | (u & 0x80u) << 24);
#endif
}

inline void load_pair(const e4m3 *from, f32x16 &a, f32x16 &b) {
    a = load_f32x16(from);
    b = load_f32x16(from + VLEN);
}

inline float load_fp8_scale(const e4m3 *row, i64 width, i64 tile) {
    float scale;
    std::memcpy(&scale, row + fp8_scales_offset(width) + 4 * tile, sizeof scale);
    return scale * 256.0f;
}

// FP32 to E4M3, to nearest, ties to even; what is beyond ±448 becomes ±448. No NaN.
inline u32x16 to_e4m3(f32x16 x) {
    const u32x16 bits = std::bit_cast<u32x16>(x), magnitude = bits & 0x7fffffffu, most = u32x16{} + 0x43e00000u;
    const u32x16 u = most - greater(most, magnitude) + magnitude;  // the smaller one
    const u32x16 normal = ((u + 0x7ffffu + ((u >> 20) & 1)) >> 20) - (120u << 3);
    // Below 2^-6 steps are of 2^-9, as those of FP32 numbers from 2^14 on.
    const u32x16 small = std::bit_cast<u32x16>(std::bit_cast<f32x16>(u) + 16384.0f) - 0x46800000u;
    const i32x16 is_small = (std::bit_cast<i32x16>(u) - 0x3c800000) >> 31;
    const f32x16 code = blend(is_small, std::bit_cast<f32x16>(small), std::bit_cast<f32x16>(normal));
    return std::bit_cast<u32x16>(code) | ((bits >> 24) & 0x80u);
}

// Quantises a row. A tile's scale is its largest magnitude / 448, but no smaller than 2^-100 / 448, so that it has all
// its bits. A tile with a NaN or an infinity becomes NaN.
template <class T>
inline void store_fp8_row(const T *from, i64 width, uint8_t *row) {
    for (i64 tile = 0; tile < fp8_tiles(width); ++tile) {
        const i64 start = tile * FP8_TILE, count = std::min(FP8_TILE, width - start),
                  vectors = (count + VLEN - 1) / VLEN;
        f32x16 x[FP8_TILE / VLEN] = {};
        u32x16 magnitudes = u32x16{} + 0x0d800000u;  // 2^-100
        for (i64 i = 0; i < vectors; ++i) {
            const i64 valid = std::min(VLEN, count - i * VLEN);
            if (valid == VLEN)
                x[i] = load_f32x16(from + start + i * VLEN);
            else
                for (i64 t = 0; t < valid; ++t) x[i][t] = load(from[start + i * VLEN + t]);
            magnitudes = greater(magnitudes, std::bit_cast<u32x16>(x[i]) & 0x7fffffffu);
        }
        const uint32_t largest = reduce(magnitudes, greater);
        const bool finite = largest < 0x7f800000u;
        const float scale =
            finite ? std::bit_cast<float>(largest) * (1.0f / 448.0f) : std::bit_cast<float>(0x7fc00000u);
        for (i64 i = 0; i < vectors; ++i) {
            const u8x16 codes = to_u8(finite ? to_e4m3(x[i] / scale) : u32x16{} + 0x7fu);
            std::memcpy(row + start + i * VLEN, &codes, size_t(std::min(VLEN, count - i * VLEN)));
        }
        std::memcpy(row + fp8_scales_offset(width) + 4 * tile, &scale, sizeof scale);
    }
}

// The rows of a sequence's tokens in an FP8 store, `width` values each.
struct Fp8Rows {
    PagedRows<e4m3> bytes;
    i64 width;

    Fp8Rows(const uint8_t *store, i64 block, i64 groups, i64 g, i64 width, const int32_t *table, i64 length)
        : bytes{reinterpret_cast<const e4m3 *>(store) + g * fp8_row_bytes(width),
                block * groups * fp8_row_bytes(width),
                groups * fp8_row_bytes(width),
                table,
                length,
                std::countr_zero(uint64_t(block))},
          width(width) {}
};

// Calls f(tile, its first value, its number of values).
template <class F>
void for_each_tile(i64 width, F f) {
    for (i64 tile = 0; tile < fp8_tiles(width); ++tile)
        f(tile, tile * FP8_TILE, std::min(FP8_TILE, width - tile * FP8_TILE));
}

inline f32x16 load_fp8_scales(const e4m3 *const *rows, i64 width, i64 tile) {
    f32x16 scales;
    for (i64 t = 0; t < VLEN; ++t) scales[t] = load_fp8_scale(rows[t], width, tile);
    return scales;
}

// `attend_group` of attention.h over the FP8 cache; values are as wide as keys without their second part. weights: room
// for twice `stride` floats a query.
template <class O>
void attend_group_fp8(const float *queries, const Fp8Rows &k, const PagedRows<bf16> &k2, const Fp8Rows &v, i64 rows,
                      i64 q_per_kv, i64 width2, float scale, f32x16 *keys, float *weights, i64 stride, O *out) {
    const i64 width = k.width, full_width = width + width2, num_queries = rows * q_per_kv, length = k.bytes.length;
    const e4m3 *rows_of[VLEN];
    for (i64 s = 0; s < length; s += VLEN) {
        k.bytes.gather16(s, fp8_row_bytes(width), rows_of);
        for_each_tile(width, [&](i64 tile, i64 start, i64 count) {
            const e4m3 *tiles[VLEN];
            for (i64 t = 0; t < VLEN; ++t) tiles[t] = rows_of[t] + start;
            transpose_rows(tiles, count, keys + start);
            const f32x16 scales = load_fp8_scales(rows_of, width, tile);
            for (i64 j = start; j < start + count; ++j) keys[j] *= scales;
        });
        if (width2) {
            const bf16 *second[VLEN];
            k2.gather16(s, width2, second);
            transpose_rows(second, width2, keys + width);
        }
        for_head_blocks(num_queries, [&](i64 h, auto n) {
            qk_scores<n>(queries + h * full_width, keys, full_width, scale, weights + h * stride + s, stride);
        });
    }
    softmax(weights, stride, length, rows, q_per_kv);
    float *scaled = weights + num_queries * stride;  // weights times the values' scales
    for_each_tile(width, [&](i64 tile, i64 start, i64 count) {
        for (i64 s = 0; s < length; s += VLEN) {
            v.bytes.gather16(s, 0, rows_of);
            const f32x16 scales = load_fp8_scales(rows_of, width, tile);
            for (i64 i = s; i < num_queries * stride; i += stride) {
                const f32x16 weight = load_f32x16(weights + i);  // the scale of a masked slot is arbitrary
                store_f32x16(scaled + i, blend(equal(weight, f32x16{}), weight, weight * scales));
            }
        }
        PagedRows<e4m3> values = v.bytes;
        values.store += start;
        for_head_blocks(num_queries, [&](i64 h, auto n) {
            weighted_sum<n>(scaled + h * stride, stride, values, count, width, out + h * width + start);
        });
    });
}

}  // namespace
