// Small number formats whose elements share a scale by tile (kernels/block_scaled.py). An element has `mantissa` bits,
// normal numbers from 2^least_exponent on, subnormals below and a largest number at which it saturates.
//
// A matrix [rows, columns] is cut into blocks of rows (`starts` [blocks + 1], or `height` rows each where it is null)
// and tiles of `width` columns. scales [blocks, tiles]; scale_stride is the distance between its rows, 0 where all rows
// share one.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "dtypes.h"

namespace {

struct Blocks {
    const int32_t *starts;
    i64 height, rows;

    i64 begin(i64 block) const { return starts ? starts[block] : block * height; }
    i64 end(i64 block) const { return starts ? starts[block + 1] : std::min(rows, (block + 1) * height); }
};

struct Element {
    int mantissa, least_exponent;
    float largest;

    // x to the nearest number of the format, ties to even; beyond the largest to that; NaN stays NaN. Adding and
    // subtracting 1.5 · 2^(e + 23 − mantissa) rounds a number of exponent e to `mantissa` bits.
    float round(float x) const {
        const uint32_t u = std::bit_cast<uint32_t>(x), least = uint32_t(127 + least_exponent) << 23;
        const float magnitude = std::bit_cast<float>(u & 0x7fffffffu);
        const float size = magnitude > largest ? largest : magnitude;
        const uint32_t exponent = std::max(std::bit_cast<uint32_t>(size) & 0x7f800000u, least);
        const float magic = std::bit_cast<float>((exponent + (uint32_t(23 - mantissa) << 23)) | 0x400000u);
        return std::bit_cast<float>(std::bit_cast<uint32_t>((size + magic) - magic) | (u & 0x80000000u));
    }

    // The code of a number of the format: sign, exponent, mantissa.
    uint32_t encode(float y, int bits) const {
        const uint32_t u = std::bit_cast<uint32_t>(y), magnitude = u & 0x7fffffffu;
        const uint32_t least = uint32_t(127 + least_exponent) << 23;
        const float size = std::bit_cast<float>(magnitude);
        // A subnormal number plus the least normal one has its code, and an exponent that is one too high.
        const uint32_t shifted = std::bit_cast<uint32_t>(size + std::bit_cast<float>(least)) - least;
        const uint32_t normal = magnitude - least + 0x800000u;
        const uint32_t code = (magnitude < least ? shifted : normal) >> (23 - mantissa);
        const uint32_t sign = (u >> 31) << (bits - 1), most = (1u << (bits - 1)) - 1;
        return sign | (y != y ? most : code);
    }

    float decode(uint32_t code, int bits) const {
        const uint32_t magnitude = code & ((1u << (bits - 1)) - 1), sign = (code >> (bits - 1)) << 31;
        const float step = std::bit_cast<float>(uint32_t(127 + least_exponent - mantissa) << 23);
        const float subnormal = float(int32_t(magnitude)) * step;
        const uint32_t bits_of = (magnitude << (23 - mantissa)) + (uint32_t(126 + least_exponent) << 23);
        const uint32_t small = std::bit_cast<uint32_t>(subnormal);
        const uint32_t found = magnitude >> mantissa ? bits_of : small;
        return std::bit_cast<float>((bits == 8 && magnitude == 0x7f ? 0x7fc00000u : found) | sign);
    }
};

inline i64 row_bytes(i64 columns, int bits) { return (columns * bits + 7) / 8; }

// The largest magnitude of every tile; NaN where there is one, since its bits exceed infinity's.
template <class T>
void tile_amax(const T *x, i64 stride, i64 rows, i64 columns, const int32_t *starts, i64 blocks, i64 height, i64 width,
               float *amax) {
    const Blocks of{starts, height, rows};
    const i64 tiles = (columns + width - 1) / width;
    uint32_t *out = reinterpret_cast<uint32_t *>(amax);
#pragma omp parallel for schedule(static)
    for (i64 b = 0; b < blocks; ++b) {
        uint32_t *top = out + b * tiles;
        std::fill_n(top, tiles, 0u);
        for (i64 i = of.begin(b); i < of.end(b); ++i) {
            const T *row = x + i * stride;
            if (width == 1) {
#pragma omp simd
                for (i64 j = 0; j < columns; ++j)
                    top[j] = std::max(top[j], std::bit_cast<uint32_t>(load(row[j])) & 0x7fffffffu);
                continue;
            }
            for (i64 t = 0; t < tiles; ++t) {
                const i64 last = std::min(columns, (t + 1) * width);
                uint32_t most = 0;
#pragma omp simd reduction(max : most)
                for (i64 j = t * width; j < last; ++j)
                    most = std::max(most, std::bit_cast<uint32_t>(load(row[j])) & 0x7fffffffu);
                top[t] = std::max(top[t], most);
            }
        }
    }
}

template <bool ONE_BY_ONE, class T>
inline void round_run(const T *x, const float *scale, i64 count, const Element &element, float *values,
                      uint8_t *codes) {
    const float s = *scale;
    if (values && codes) {
#pragma omp simd
        for (i64 j = 0; j < count; ++j) {
            const float own = ONE_BY_ONE ? scale[j] : s, y = element.round(load(x[j]) / own);
            values[j] = y * own;
            codes[j] = uint8_t(element.encode(y, 8));
        }
    } else if (values) {
#pragma omp simd
        for (i64 j = 0; j < count; ++j) {
            const float own = ONE_BY_ONE ? scale[j] : s;
            values[j] = element.round(load(x[j]) / own) * own;
        }
    } else {
#pragma omp simd
        for (i64 j = 0; j < count; ++j)
            codes[j] = uint8_t(element.encode(element.round(load(x[j]) / (ONE_BY_ONE ? scale[j] : s)), 8));
    }
}

// Codes of 4 and 12 bits: two share a byte, or three bytes, the first in the lower bits.
template <class T>
inline void pack_row(const T *row, const float *scales, i64 columns, i64 width, const Element &element, int bits,
                     uint8_t *to) {
    std::fill_n(to, row_bytes(columns, bits), uint8_t(0));
    for (i64 j = 0; j < columns; ++j) {
        const uint32_t code = element.encode(element.round(load(row[j]) / scales[j / width]), bits);
        const i64 bit = j * bits;
        to[bit / 8] |= uint8_t(code << bit % 8);
        if (bit % 8 + bits > 8) to[bit / 8 + 1] |= uint8_t(code >> (8 - bit % 8));
    }
}

// values and codes may each be null.
template <class T>
void round_tiles(const T *x, i64 stride, i64 rows, i64 columns, const int32_t *starts, i64 blocks, i64 height,
                 i64 width, const float *scales, i64 scale_stride, i64 mantissa, i64 least_exponent, float largest,
                 i64 bits, float *values, uint8_t *codes) {
    const Blocks of{starts, height, rows};
    const Element element{int(mantissa), int(least_exponent), largest};
    const i64 bytes = row_bytes(columns, int(bits));
#pragma omp parallel for schedule(static)
    for (i64 b = 0; b < blocks; ++b) {
        const float *scale = scales + b * scale_stride;
        for (i64 i = of.begin(b); i < of.end(b); ++i) {
            const T *row = x + i * stride;
            float *to = values ? values + i * columns : nullptr;
            uint8_t *code = codes && bits == 8 ? codes + i * bytes : nullptr;
            if (codes && !code) pack_row(row, scale, columns, width, element, int(bits), codes + i * bytes);
            if (!to && !code) continue;
            if (width == 1) {
                round_run<true>(row, scale, columns, element, to, code);
                continue;
            }
            for (i64 j = 0; j < columns; j += width)
                round_run<false>(row + j, scale + j / width, std::min(width, columns - j), element,
                                 to ? to + j : nullptr, code ? code + j : nullptr);
        }
    }
}

template <class T>
void decode_tiles(const uint8_t *codes, i64 rows, i64 columns, const int32_t *starts, i64 blocks, i64 height, i64 width,
                  const float *scales, i64 scale_stride, i64 mantissa, i64 least_exponent, i64 bits, T *values) {
    const Blocks of{starts, height, rows};
    const Element element{int(mantissa), int(least_exponent), 0};
    const i64 bytes = row_bytes(columns, int(bits));
#pragma omp parallel for schedule(static)
    for (i64 b = 0; b < blocks; ++b) {
        const float *scale = scales + b * scale_stride;
        for (i64 i = of.begin(b); i < of.end(b); ++i) {
            const uint8_t *row = codes + i * bytes;
            T *to = values + i * columns;
            if (bits != 8) {
                for (i64 j = 0; j < columns; ++j) {
                    const i64 bit = j * bits;
                    uint32_t code = row[bit / 8] >> bit % 8;
                    if (bit % 8 + bits > 8) code |= uint32_t(row[bit / 8 + 1]) << (8 - bit % 8);
                    store(to[j], element.decode(code & ((1u << bits) - 1), int(bits)) * scale[j / width]);
                }
            } else if (width == 1) {
#pragma omp simd
                for (i64 j = 0; j < columns; ++j) store(to[j], element.decode(row[j], 8) * scale[j]);
            } else {
                for (i64 t = 0; t * width < columns; ++t) {
                    const float s = scale[t];
                    const i64 last = std::min(columns, (t + 1) * width);
#pragma omp simd
                    for (i64 j = t * width; j < last; ++j) store(to[j], element.decode(row[j], 8) * s);
                }
            }
        }
    }
}

}  // namespace

#define PARAMETERS(T)                                                                                         \
    (const T *x, i64 stride, i64 rows, i64 columns, const int32_t *starts, i64 blocks, i64 height, i64 width, \
     float *amax)
EXPORT_F32_BF16(void, tile_amax, PARAMETERS, (x, stride, rows, columns, starts, blocks, height, width, amax))
#undef PARAMETERS
#define PARAMETERS(T)                                                                                         \
    (const T *x, i64 stride, i64 rows, i64 columns, const int32_t *starts, i64 blocks, i64 height, i64 width, \
     const float *scales, i64 scale_stride, i64 mantissa, i64 least, float largest, i64 bits, float *values,  \
     uint8_t *codes)
EXPORT_F32_BF16(void, round_tiles, PARAMETERS,
                (x, stride, rows, columns, starts, blocks, height, width, scales, scale_stride, mantissa, least,
                 largest, bits, values, codes))
#undef PARAMETERS
#define PARAMETERS(T)                                                                                       \
    (const uint8_t *codes, i64 rows, i64 columns, const int32_t *starts, i64 blocks, i64 height, i64 width, \
     const float *scales, i64 scale_stride, i64 mantissa, i64 least, i64 bits, T *values)
EXPORT_F32_BF16(void, decode_tiles, PARAMETERS,
                (codes, rows, columns, starts, blocks, height, width, scales, scale_stride, mantissa, least, bits,
                 values))
#undef PARAMETERS
