// The int8 KV cache: how keys and values are stored, and attention over it.
//
// A block has 16 slots. For each head it holds records of 32 values at 16 slots, with an FP16 scale per slot. Keys are
// laid out as weights are (quantized_weight.h, INT8_GROUPS: a slot is an output); values are signed, four slots
// interleaved for each of 32 columns. Both products of attention are thus int8. A record has 34 bytes a slot where BF16
// takes 64, and attention with few queries is bound by memory.
#pragma once

#include "attention.h"
#include "quantized_weight.h"

namespace {

constexpr i64 PREFETCH_BLOCKS = 6;  // prefetch distance in blocks, about the latency of memory
constexpr i64 KV_RECORD_BYTES = RECORD_BYTES[INT8_GROUPS],
              KV_SCALES_OFFSET = GROUP_SIZE * VLEN;  // bytes of a record, and the offset of its scales

// FP16 of a number ≥ 0 or a NaN.
inline uint16_t to_f16(float x) {
    if (!(x < 65520.0f)) return x != x ? 0x7e00 : 0x7c00;
    const uint32_t u = std::bit_cast<uint32_t>(x * std::bit_cast<float>(uint32_t(15) << 23));  // 2^-112
    return uint16_t((u + 0xfff + ((u >> 13) & 1)) >> 13);
}

// Writes a head's quantised key into a slot.
inline void store_key(const QuantizedRows &key, i64 slot, uint8_t *records) {
    for (i64 g = 0; g < key.groups; ++g, records += KV_RECORD_BYTES) {
        for (i64 j = 0; j < GROUP_SIZE / 4; ++j) {
            uint32_t four;
            std::memcpy(&four, key.data[g].q + 4 * j, sizeof four);
            four ^= 0x80808080u;  // zero point 128
            std::memcpy(records + 64 * j + 4 * slot, &four, sizeof four);
        }
        const uint16_t scale = to_f16(key.data[g].scale);
        std::memcpy(records + KV_SCALES_OFFSET + 2 * slot, &scale, sizeof scale);
    }
}

// Writes a head's quantised value into a slot.
inline void store_value(const QuantizedRows &value, i64 slot, uint8_t *records) {
    for (i64 g = 0; g < value.groups; ++g, records += KV_RECORD_BYTES) {
        uint8_t *to = records + slot / 4 * (4 * GROUP_SIZE) +
                      slot % 4;  // byte stores: other threads may write the neighbouring slots
        for (i64 j = 0; j < GROUP_SIZE; ++j) to[4 * j] = uint8_t(value.data[g].q[j]);
        const uint16_t scale = to_f16(value.data[g].scale);
        std::memcpy(records + KV_SCALES_OFFSET + 2 * slot, &scale, sizeof scale);
    }
}

}  // namespace

// One head's records in the blocks of a sequence.
struct Int8Blocks {
    const uint8_t *store;
    i64 block_bytes;  // distance between blocks
    const int32_t *table;
    i64 count;  // number of blocks

    const uint8_t *operator[](i64 b) const { return store + table[b] * block_bytes; }
};

// Quantised queries → scores [count, stride] of all keys; weights → sums of values [count, width]
// (kv_int8_attention.h).
using QkScoresInt8 = void (*)(const QuantizedRows &queries, i64 count, const Int8Blocks &keys, const Int8Blocks &values,
                              float scale, float *scores, i64 stride);
using WeightedSumInt8 = void (*)(const float *weights, i64 stride, i64 count, const Int8Blocks &values,
                                 const Int8Blocks &next_keys, i64 width, float *out);
extern "C" const QkScoresInt8 kv_int8_qk_scores;
extern "C" const WeightedSumInt8 kv_int8_weighted_sum;

namespace {

// `attend_group` of attention.h over the int8 cache, with quantised queries [rows · q_per_kv]. next_keys: the keys the
// thread reads next, prefetched.
inline void attend_group_int8(const QuantizedRows &queries, const Int8Blocks &k, const Int8Blocks &v,
                              const Int8Blocks &next_keys, i64 length, i64 rows, i64 q_per_kv, i64 width, float scale,
                              float *weights, i64 stride, float *out) {
    kv_int8_qk_scores(queries, rows * q_per_kv, k, v, scale, weights, stride);
    softmax(weights, stride, length, rows, q_per_kv);
    kv_int8_weighted_sum(weights, stride, rows * q_per_kv, v, next_keys, width, out);
}

}  // namespace
