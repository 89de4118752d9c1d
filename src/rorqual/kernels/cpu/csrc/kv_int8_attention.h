// Attention over the int8 KV cache (kv_int8.h), included by qgemm.cpp once per int8 dot instruction, after
// microkernel.h, with the same definitions. `dot4_values` multiplies four unsigned weights, at most
// MAX_QUANTIZED_WEIGHT, by 4·VLEN signed values.

// Scores of N queries for all keys. Prefetches PREFETCH_BLOCKS blocks ahead, past the last key the values.
template <int N>
TARGET void qk_scores_int8(const ActivationGroup *queries, i64 groups, const Int8Blocks &keys, const Int8Blocks &values,
                           float scale, float *scores, i64 stride) {
    for (i64 b = 0; b < keys.count; ++b) {
        const uint8_t *record = keys[b];
        const i64 later = b + PREFETCH_BLOCKS - keys.count;
        if (later < values.count)
            prefetch(later < 0 ? keys[b + PREFETCH_BLOCKS] : values[later], groups * KV_RECORD_BYTES);
        f32x16 sum[N] = {};
        for (i64 g = 0; g < groups; ++g, record += KV_RECORD_BYTES) {
            const ActivationGroup *query = queries + g;
            i32x16 acc[N] = {};
            // Subtract the keys' zero point, 128.
            if constexpr (!SIGNED_WEIGHTS) UNROLL for (int n = 0; n < N; ++n) acc[n] += query[n * groups].minus_128_sum;
            UNROLL for (int j = 0; j < GROUP_SIZE / 4; ++j) {
                const u8x64 key = load_as<u8x64>(record + 64 * j);
                UNROLL for (int n = 0; n < N; ++n) {
                    int32_t four;
                    std::memcpy(&four, query[n * groups].q + 4 * j, sizeof four);
                    acc[n] = dot4<8>(acc[n], key, four);
                }
            }
            const f32x16 scales = load_f16x16(record + KV_SCALES_OFFSET) * scale;
            UNROLL for (int n = 0; n < N; ++n)
                sum[n] += to_f32(acc[n]) * (scales * query[n * groups].scale);
        }
        UNROLL for (int n = 0; n < N; ++n) store_f32x16(scores + n * stride + b * VLEN, sum[n]);
    }
}

// N heads' weighted sums of 32 columns of the values. Each weight times its value's scale is quantised to uint8, with
// one scale per CHUNK_BLOCKS blocks, so that small weights far from the largest keep their precision.
template <int N>
TARGET void weighted_sum_int8(const float *weights, i64 stride, const Int8Blocks &values, const Int8Blocks &next_keys,
                              i64 prefetch_bytes, i64 width, i64 columns, float *out) {
    constexpr i64 CHUNK_BLOCKS = 4;
    f32x16 sum[N][2] = {};
    for (i64 first = 0; first < values.count; first += CHUNK_BLOCKS) {
        const i64 blocks = std::min(CHUNK_BLOCKS, values.count - first);
        alignas(16) uint8_t quantized[N][CHUNK_BLOCKS][VLEN];
        float scale[N];
        f32x16 scales[CHUNK_BLOCKS];
        for (i64 b = 0; b < blocks; ++b) {
            scales[b] = load_f16x16(values[first + b] + KV_SCALES_OFFSET);
            const i64 later = first + b + PREFETCH_BLOCKS, after = later - values.count;
            if (after < 0)
                prefetch(values[later], prefetch_bytes);
            else if (after < next_keys.count)
                prefetch(next_keys[after], prefetch_bytes);
        }
        UNROLL for (int n = 0; n < N; ++n) {
            f32x16 x[CHUNK_BLOCKS];
            u32x16 magnitudes = {};
            for (i64 b = 0; b < blocks; ++b) {  // the scale of a masked slot is arbitrary
                const f32x16 weight = load_f32x16(weights + n * stride + (first + b) * VLEN);
                x[b] = blend(equal(weight, f32x16{}), weight, weight * scales[b]);
                magnitudes = greater(magnitudes, std::bit_cast<u32x16>(x[b]));
            }
            const uint32_t bits = reduce(magnitudes, greater);
            const float maximum = std::bit_cast<float>(bits);
            // Below 2^-120 the quotient would be infinite, which processors convert to different integers.
            const float inverse =
                bits < 0x03800000u || bits >= 0x7f800000u ? 0.0f : float(MAX_QUANTIZED_WEIGHT) / maximum;
            for (i64 b = 0; b < blocks; ++b) {
                const f32x16 number = x[b] * inverse + 12582912.0f;  // round to nearest
                const u8x16 s = to_u8(std::bit_cast<u32x16>(to_i32(number - 12582912.0f)));
                std::memcpy(quantized[n][b], &s, sizeof s);
            }
            scale[n] = bits >= 0x7f800000u ? std::bit_cast<float>(0x7fc00000u) : maximum / float(MAX_QUANTIZED_WEIGHT);
        }
        i32x16 acc[N][2] = {};
        for (i64 b = 0; b < blocks; ++b) {
            const uint8_t *record = values[first + b];
            UNROLL for (int j = 0; j < VLEN / 4; ++j) {
                const u8x64 value[] = {load_as<u8x64>(record + 128 * j), load_as<u8x64>(record + 128 * j + 64)};
                UNROLL for (int n = 0; n < N; ++n) {
                    int32_t four;
                    std::memcpy(&four, quantized[n][b] + 4 * j, sizeof four);
                    acc[n][0] = dot4_values(acc[n][0], four, value[0]);
                    acc[n][1] = dot4_values(acc[n][1], four, value[1]);
                }
            }
        }
        UNROLL for (int n = 0; n < N; ++n) UNROLL
            for (int half = 0; half < 2; ++half)
                sum[n][half] += to_f32(acc[n][half]) * scale[n];
    }
    UNROLL for (int n = 0; n < N; ++n)
        for (i64 half = 0; half * VLEN < columns; ++half)
            store_partial(out + n * width + half * VLEN, sum[n][half], std::min(VLEN, columns - half * VLEN));
}

// Splits `count` queries into blocks of at most sizeof...(N), as evenly as possible; f gets the size as a constant.
template <class F, size_t... N>
inline void for_query_blocks(i64 count, std::index_sequence<N...>, F f) {
    constexpr i64 MAX_QUERIES = sizeof...(N);
    const i64 blocks = (count + MAX_QUERIES - 1) / MAX_QUERIES;
    for (i64 t = 0; t < blocks; ++t) {
        const i64 first = t * count / blocks, n = (t + 1) * count / blocks - first;
        ((n == N + 1 ? f(first, std::integral_constant<int, N + 1>()) : void()), ...);
    }
}

TARGET void kv_int8_qk_scores(const QuantizedRows &queries, i64 count, const Int8Blocks &keys, const Int8Blocks &values,
                              float scale, float *scores, i64 stride) {
    for_query_blocks(count, std::make_index_sequence<8>(), [&](i64 first, auto n) {
        qk_scores_int8<n>(queries.data + first * queries.groups, queries.groups, keys, values, scale,
                          scores + first * stride, stride);
    });
}

TARGET void kv_int8_weighted_sum(const float *weights, i64 stride, i64 count, const Int8Blocks &values,
                                 const Int8Blocks &next_keys, i64 width, float *out) {
    for (i64 g = 0; g * GROUP_SIZE < width; ++g) {
        const Int8Blocks here{values.store + g * KV_RECORD_BYTES, values.block_bytes, values.table, values.count};
        const i64 columns = std::min(GROUP_SIZE, width - g * GROUP_SIZE),
                  prefetch_bytes = g == 0 ? QuantizedRows::groups_of(width) * KV_RECORD_BYTES : 0;
        for_query_blocks(count, std::make_index_sequence<6>(), [&](i64 first, auto n) {
            weighted_sum_int8<n>(weights + first * stride, stride, here, next_keys, prefetch_bytes, width, columns,
                                 out + first * width + g * GROUP_SIZE);
        });
    }
}
