// A cache of 8 bits: what it keeps of keys and values, and attention over it.
//
// A block has 16 places. Of each of its heads it keeps records of 32 numbers at 16 places with a scale a place: keys as
// weights lie (lowbit.h, INT8_GROUPS: a place is an output), so that the product with packed weights scores a block at
// once; values place by place. A record is 17 bytes a place where BF16 has 64, and attention of short rows is as fast as
// it comes from memory.
#pragma once

#include "attend.h"
#include "lowbit.h"

namespace {

constexpr i64 RECORD8 = RECORD[INT8_GROUPS], SCALES8 = GROUP * L;  // bytes of a record, and before its scales

// A number ≥ 0, or none, in FP16.
inline uint16_t half_of(float x) {
    if (!(x < 65520.0f)) return x != x ? 0x7e00 : 0x7c00;
    const uint32_t u = std::bit_cast<uint32_t>(x * std::bit_cast<float>(uint32_t(15) << 23));  // 2^-112
    return uint16_t((u + 0xfff + ((u >> 13) & 1)) >> 13);
}

// What a place keeps of a head's quantised key and value.
inline void keep_key(const Quantised &key, i64 place, uint8_t *records) {
    for (i64 g = 0; g < key.groups; ++g, records += RECORD8) {
        for (i64 j = 0; j < GROUP / 4; ++j) {
            uint32_t four;
            std::memcpy(&four, key.data[g].numbers + 4 * j, sizeof four);
            four ^= 0x80808080u;  // 128 more
            std::memcpy(records + 64 * j + 4 * place, &four, sizeof four);
        }
        const uint16_t scale = half_of(key.data[g].scale);
        std::memcpy(records + SCALES8 + 2 * place, &scale, sizeof scale);
    }
}

inline void keep_value(const Quantised &value, i64 place, uint8_t *records) {
    for (i64 g = 0; g < value.groups; ++g, records += RECORD8) {
        std::memcpy(records + GROUP * place, value.data[g].numbers, GROUP);
        const uint16_t scale = half_of(value.data[g].scale);
        std::memcpy(records + SCALES8 + 2 * place, &scale, sizeof scale);
    }
}

// One head's records in the blocks of a sequence.
struct Blocks8 {
    const uint8_t *store;
    i64 block;  // bytes
    const int32_t *table;
    i64 count;  // of blocks

    const uint8_t *operator[](i64 b) const { return store + table[b] * block; }
};

// N heads' weighted sums of 32·C numbers of the values of `places` places.
template <int N, int C>
void mix8(const float *weights, i64 stride, const Blocks8 &values, i64 places, i64 width, float *out) {
    lanes sum[C][2][N] = {};
    for (i64 b = 0; b < values.count; ++b) {
        const uint8_t *records = values[b];
        if (b + 1 < values.count) ask(values[b + 1], C * RECORD8);
        for (int c = 0; c < C; ++c, records += RECORD8) {
            const lanes scales = halves_plain(records + SCALES8);
            lanes scaled[N];
            for (int n = 0; n < N; ++n) scaled[n] = load_lanes(weights + n * stride + b * L) * scales;
            for (i64 t = 0; t < std::min(L, places - b * L); ++t) {
                for (int half = 0; half < 2; ++half) {
                    const auto numbers = reinterpret_cast<const int8_t *>(records + GROUP * t + L * half);
                    const lanes value = __builtin_convertvector(load_integers(numbers), lanes);
                    for (int n = 0; n < N; ++n) sum[c][half][n] += scaled[n][t] * value;
                }
            }
        }
    }
    for (int c = 0; c < C; ++c)
        for (int half = 0; half < 2; ++half)
            for (int n = 0; n < N; ++n) {
                const i64 at = c * GROUP + half * L;
                if (at < width) store_some(out + n * width + at, sum[c][half][n], std::min(L, width - at));
            }
}

// As `attend` of attend.h, with quantised queries [rows · share].
inline void attend8(const Quantised &queries, const Blocks8 &k, const Blocks8 &v, i64 places, i64 rows, i64 share, i64 width,
                    float scale, float *weights, i64 stride, float *out) {
    const i64 all = rows * share, lines = queries.groups * RECORD8 / 64 + 1;
    lanes sums[TOGETHER * BESIDE];
    for (i64 b = 0; b < k.count; ++b) {
        Ahead ahead{b + 1 < k.count ? k[b + 1] : v[0], lines};
        for (i64 first = 0; first < all; first += TOGETHER) {
            const i64 some = std::min(TOGETHER, all - first);
            against(INT8_GROUPS, k[b], 1, queries, {first, nullptr}, some, sums, ahead);
            ahead.lines = 0;
            for (i64 h = 0; h < some; ++h)
                store_lanes(weights + (first + h) * stride + b * L, sums[h * BESIDE] * scale);
        }
    }
    softmax(weights, stride, places, rows, share);
    by_heads(all, [&](i64 h, auto n) {
        i64 g = 0;
        const auto some = [&](auto c) {
            const Blocks8 values{v.store + g * RECORD8, v.block, v.table, v.count};
            mix8<n, c>(weights + h * stride, stride, values, places, width - g * GROUP, out + h * width + g * GROUP);
            g += c;
        };
        while (g + 2 <= queries.groups) some(std::integral_constant<int, 2>());
        if (g < queries.groups) some(std::integral_constant<int, 1>());
    });
}

}  // namespace
