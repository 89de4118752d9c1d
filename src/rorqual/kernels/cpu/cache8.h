// A cache of 8 bits: what it keeps of keys and values, and attention over it.
//
// A block has 16 places. Of each of its heads it keeps records of 32 numbers at 16 places with a scale a place: keys as
// weights lie (lowbit.h, INT8_GROUPS: a place is an output), values with four places side by side, for every four places
// 32 numbers. So both products of attention are ones of bytes. A record is 17 bytes a place where BF16 has 64, and
// attention of short rows is as fast as it comes from memory.
#pragma once

#include "attend.h"
#include "lowbit.h"

namespace {

constexpr i64 AHEAD8 = 6;  // blocks after which what is asked for now has come from memory
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
        uint8_t *to = records + place / 4 * (4 * GROUP) + place % 4;  // other threads may write the places beside
        for (i64 j = 0; j < GROUP; ++j) to[4 * j] = uint8_t(value.data[g].numbers[j]);
        const uint16_t scale = half_of(value.data[g].scale);
        std::memcpy(records + SCALES8 + 2 * place, &scale, sizeof scale);
    }
}

}  // namespace

// One head's records in the blocks of a sequence.
struct Blocks8 {
    const uint8_t *store;
    i64 block;  // bytes
    const int32_t *table;
    i64 count;  // of blocks

    const uint8_t *operator[](i64 b) const { return store + table[b] * block; }
};

// Quantised queries → scores [count, stride] of all places, and weights → sums of values [count, width] (past8.h).
using Score8 = void (*)(const Quantised &queries, i64 count, const Blocks8 &keys, const Blocks8 &values, float scale,
                        float *scores, i64 stride);
using Mix8 = void (*)(const float *weights, i64 stride, i64 count, const Blocks8 &values, const Blocks8 &then, i64 width,
                      float *out);
extern "C" const Score8 score8;
extern "C" const Mix8 mix8;

namespace {

// As `attend` of attend.h, with quantised queries [rows · share]. `then`: keys that are read next, asked for in time.
inline void attend8(const Quantised &queries, const Blocks8 &k, const Blocks8 &v, const Blocks8 &then, i64 places, i64 rows,
                    i64 share, i64 width, float scale, float *weights, i64 stride, float *out) {
    score8(queries, rows * share, k, v, scale, weights, stride);
    softmax(weights, stride, places, rows, share);
    mix8(weights, stride, rows * share, v, then, width, out);
}

}  // namespace
