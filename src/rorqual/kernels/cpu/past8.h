// Attention over a cache of 8 bits (cache8.h), included once for every way to multiply bytes after tile.h, whose TARGET,
// SIGNED, `dot` and `halves_at` it uses; `dot_values` multiplies four weights, 0 to HIGHEST, by L·4 signed values.

// N queries' scores of all places. What comes AHEAD8 blocks later, at last the values, is asked for from memory.
template <int N>
TARGET void score_some(const Group *queries, i64 groups, const Blocks8 &keys, const Blocks8 &values, float scale,
                       float *scores, i64 stride) {
    for (i64 b = 0; b < keys.count; ++b) {
        const uint8_t *record = keys[b];
        const i64 later = b + AHEAD8 - keys.count;
        if (later < values.count) ask(later < 0 ? keys[b + AHEAD8] : values[later], groups * RECORD8);
        lanes sum[N] = {};
        for (i64 g = 0; g < groups; ++g, record += RECORD8) {
            const Group *query = queries + g;
            integers part[N] = {};
            if constexpr (!SIGNED)  // keys lie 128 too high
                UNROLL for (int n = 0; n < N; ++n) part[n] += query[n * groups].less_by_128;
            UNROLL for (int j = 0; j < GROUP / 4; ++j) {
                bytes key;
                std::memcpy(&key, record + 64 * j, sizeof key);
                UNROLL for (int n = 0; n < N; ++n) {
                    int32_t four;
                    std::memcpy(&four, query[n * groups].numbers + 4 * j, sizeof four);
                    part[n] = dot<8>(part[n], key, four);
                }
            }
            const lanes scales = halves_at(record + SCALES8) * scale;
            UNROLL for (int n = 0; n < N; ++n)
                sum[n] += __builtin_convertvector(part[n], lanes) * (scales * query[n * groups].scale);
        }
        UNROLL for (int n = 0; n < N; ++n) store_lanes(scores + n * stride + b * L, sum[n]);
    }
}

// N heads' weighted sums of 32 numbers of the values, which are at `values`. A weight times its value's scale becomes a
// byte, with a scale for the places of CHUNK blocks: places far from the heaviest keep their share of the bits.
template <int N>
TARGET void mix_some(const float *weights, i64 stride, const Blocks8 &values, const Blocks8 &then, i64 ahead, i64 width,
                     i64 some, float *out) {
    constexpr i64 CHUNK = 4;
    typedef uint8_t small __attribute__((vector_size(16)));
    const auto greater = [](auto a, auto b) { return a > b ? a : b; };
    lanes sum[N][2] = {};
    for (i64 first = 0; first < values.count; first += CHUNK) {
        const i64 blocks = std::min(CHUNK, values.count - first);
        alignas(16) uint8_t numbers[N][CHUNK][L];
        float scale[N];
        lanes scales[CHUNK];
        for (i64 b = 0; b < blocks; ++b) {
            scales[b] = halves_at(values[first + b] + SCALES8);
            const i64 later = first + b + AHEAD8, after = later - values.count;
            if (after < 0)
                ask(values[later], ahead);
            else if (after < then.count)
                ask(then[after], ahead);
        }
        UNROLL for (int n = 0; n < N; ++n) {
            lanes x[CHUNK];
            words sizes = {};
            for (i64 b = 0; b < blocks; ++b) {  // places that are not seen have any scale
                const lanes weight = load_lanes(weights + n * stride + (first + b) * L);
                x[b] = weight == 0.0f ? lanes{} : weight * scales[b];
                sizes = greater(sizes, std::bit_cast<words>(x[b]));
            }
            const uint32_t bits = fold(sizes, greater);
            const float most = std::bit_cast<float>(bits);
            // Below 2^-120 it would be infinite, of which processors make different integers.
            const float up = bits < 0x03800000u || bits >= 0x7f800000u ? 0.0f : float(HIGHEST) / most;
            for (i64 b = 0; b < blocks; ++b) {
                const lanes number = x[b] * up + 12582912.0f;  // to the nearest
                const small s = __builtin_convertvector(__builtin_convertvector(number - 12582912.0f, integers), small);
                std::memcpy(numbers[n][b], &s, sizeof s);
            }
            scale[n] = bits >= 0x7f800000u ? std::bit_cast<float>(0x7fc00000u) : most / float(HIGHEST);
        }
        integers part[N][2] = {};
        for (i64 b = 0; b < blocks; ++b) {
            const uint8_t *record = values[first + b];
            UNROLL for (int j = 0; j < L / 4; ++j) {
                bytes value[2];
                std::memcpy(value, record + 128 * j, sizeof value);
                UNROLL for (int n = 0; n < N; ++n) {
                    int32_t four;
                    std::memcpy(&four, numbers[n][b] + 4 * j, sizeof four);
                    part[n][0] = dot_values(part[n][0], four, value[0]);
                    part[n][1] = dot_values(part[n][1], four, value[1]);
                }
            }
        }
        UNROLL for (int n = 0; n < N; ++n)
            UNROLL for (int half = 0; half < 2; ++half)
                sum[n][half] += __builtin_convertvector(part[n][half], lanes) * scale[n];
    }
    UNROLL for (int n = 0; n < N; ++n)
        for (i64 half = 0; half * L < some; ++half)
            store_some(out + n * width + half * L, sum[n][half], std::min(L, some - half * L));
}

// All queries, some at a time, as evenly as can be.
template <class F, size_t... N>
inline void by_queries(i64 count, std::index_sequence<N...>, F some) {
    constexpr i64 MOST = sizeof...(N);
    const i64 times = (count + MOST - 1) / MOST;
    for (i64 t = 0; t < times; ++t) {
        const i64 first = t * count / times, n = (t + 1) * count / times - first;
        ((n == N + 1 ? some(first, std::integral_constant<int, N + 1>()) : void()), ...);
    }
}

TARGET void score_queries(const Quantised &queries, i64 count, const Blocks8 &keys, const Blocks8 &values, float scale,
                          float *scores, i64 stride) {
    by_queries(count, std::make_index_sequence<8>(), [&](i64 first, auto n) {
        score_some<n>(queries.data + first * queries.groups, queries.groups, keys, values, scale, scores + first * stride, stride);
    });
}

TARGET void mix_queries(const float *weights, i64 stride, i64 count, const Blocks8 &values, const Blocks8 &then, i64 width,
                        float *out) {
    for (i64 g = 0; g * GROUP < width; ++g) {
        const Blocks8 here{values.store + g * RECORD8, values.block, values.table, values.count};
        const i64 some = std::min(GROUP, width - g * GROUP), ahead = g == 0 ? Quantised::groups_of(width) * RECORD8 : 0;
        by_queries(count, std::make_index_sequence<6>(), [&](i64 first, auto n) {
            mix_some<n>(weights + first * stride, stride, here, then, ahead, width, some, out + first * width + g * GROUP);
        });
    }
}
