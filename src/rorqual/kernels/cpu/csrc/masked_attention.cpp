// softmax(q·kᵀ·scale)·v in FP32 under a mask, and its gradients, without the attention weights in memory
// (FlashAttention: Dao et al. 2022, Algorithms 1 and 4).
//
// The mask is cut into tiles of TILE × TILE; those that hide every key from every query are not computed. A prompt with
// several completions in one block, or documents in one row, leave most tiles so.
//
// Heads of a sequence are tasks; a backward task has gradients of keys and values of its own, which are the same bits
// with any number of threads. Layout: B sequences; q, out and their gradients [B, T, H, ·], k and v [B, S, G, ·],
// gradients of k and v [B, S, H, ·]. Widths are multiples of 16.

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace {

constexpr i64 TILE = 64;  // queries, and keys
#if defined(__AVX512F__)
constexpr int ROWS = 12, VECS = 2;  // of a product, in registers: rows, and VLEN columns each
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int ROWS = 6, VECS = 1;
#else
constexpr int ROWS = 3, VECS = 1;
#endif

// A matrix: element (i, j) is at base[i·by_row + j·by_column].
struct Factor {
    const float *base;
    i64 by_row, by_column;
};

template <int R, int V>
inline void tile(Factor a, const float *b, i64 b_row, i64 depth, bool add, float *out, i64 out_row) {
    f32x16 sum[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sum[r][v] = add ? load_f32x16(out + r * out_row + v * VLEN) : f32x16{};
    for (i64 k = 0; k < depth; ++k) {
        f32x16 w[V];
        for (int v = 0; v < V; ++v) w[v] = load_f32x16(b + k * b_row + v * VLEN);
        for (int r = 0; r < R; ++r) {
            const float x = a.base[r * a.by_row + k * a.by_column];
            for (int v = 0; v < V; ++v) sum[r][v] += w[v] * x;
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store_f32x16(out + r * out_row + v * VLEN, sum[r][v]);
}

template <int R, int V>
inline void tile_of(i64 rows, Factor a, const float *b, i64 b_row, i64 depth, bool add, float *out, i64 out_row) {
    if (rows == R) return tile<R, V>(a, b, b_row, depth, add, out, out_row);
    if constexpr (R > 1) tile_of<R - 1, V>(rows, a, b, b_row, depth, add, out, out_row);
}

// out [rows, columns] = or += a [rows, depth] · b [depth, columns]; columns: a multiple of VLEN.
void multiply(Factor a, const float *b, i64 b_row, i64 rows, i64 columns, i64 depth, bool add, float *out,
              i64 out_row) {
    const i64 blocks = (rows + ROWS - 1) / ROWS;  // as even as possible
    for (i64 column = 0; column < columns;) {
        const bool wide = VECS > 1 && columns - column >= VECS * VLEN;
        for (i64 t = 0; t < blocks; ++t) {
            const i64 row = t * rows / blocks, here = (t + 1) * rows / blocks - row;
            const Factor from{a.base + row * a.by_row, a.by_row, a.by_column};
            float *const to = out + row * out_row + column;
            if (wide)
                tile_of<ROWS, VECS>(here, from, b + column, b_row, depth, add, to, out_row);
            else
                tile_of<ROWS, 1>(here, from, b + column, b_row, depth, add, to, out_row);
        }
        column += wide ? VECS * VLEN : VLEN;
    }
}

enum Seen : uint8_t { NONE, SOME, ALL };

// The mask [B or 1, T, S], and what each of its tiles shows.
struct Mask {
    const bool *base;
    i64 by_sequence, by_query, queries, keys, query_tiles, key_tiles;
    std::vector<Seen> tiles;

    Mask(const bool *base, i64 by_sequence, i64 by_query, i64 sequences, i64 queries, i64 keys)
        : base(base),
          by_sequence(by_sequence),
          by_query(by_query),
          queries(queries),
          keys(keys),
          query_tiles((queries + TILE - 1) / TILE),
          key_tiles((keys + TILE - 1) / TILE),
          tiles((by_sequence ? sequences : 1) * query_tiles * key_tiles) {
#pragma omp parallel for schedule(static)
        for (i64 t = 0; t < i64(tiles.size()); ++t) {
            const i64 n = t / (query_tiles * key_tiles), i = t / key_tiles % query_tiles, j = t % key_tiles;
            bool any = false, all = keys_of(j) == TILE;
            for (i64 q = 0; q < queries_of(i); ++q) {
                const bool *const seen = row(n, i * TILE + q) + j * TILE, *const end = seen + keys_of(j);
                any = any || std::memchr(seen, true, end - seen);
                all = all && !std::memchr(seen, false, end - seen);
            }
            tiles[t] = !any ? NONE : all ? ALL : SOME;
        }
    }

    const bool *row(i64 sequence, i64 query) const { return base + sequence * by_sequence + query * by_query; }
    i64 queries_of(i64 tile) const { return std::min(TILE, queries - tile * TILE); }
    i64 keys_of(i64 tile) const { return std::min(TILE, keys - tile * TILE); }
    Seen seen(i64 sequence, i64 query_tile, i64 key_tile) const {
        return tiles[((by_sequence ? sequence : 0) * query_tiles + query_tile) * key_tiles + key_tile];
    }
};

// x [B, S, G, W] · factor → [B, G, key tiles, W, TILE], keys beyond S being 0.
std::vector<float> transposed(const float *x, i64 sequences, i64 keys, i64 groups, i64 width, float factor) {
    const i64 tiles = (keys + TILE - 1) / TILE;
    std::vector<float> out(sequences * groups * tiles * width * TILE);
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < sequences * groups * tiles; ++t) {
        const i64 n = t / (groups * tiles), g = t / tiles % groups, first = t % tiles * TILE;
        for (i64 k = 0; k < std::min(TILE, keys - first); ++k) {
            const float *const row = x + ((n * keys + first + k) * groups + g) * width;
            for (i64 w = 0; w < width; ++w) out[(t * width + w) * TILE + k] = row[w] * factor;
        }
    }
    return out;
}

struct Sizes {
    i64 sequences, queries, keys, heads, groups, width, value_width;
};

// Which keys of a tile a query sees, for whole vectors; keys beyond the last are hidden.
struct Row {
    const bool *seen;  // null: all
    alignas(64) bool padded[TILE];

    Row(const Mask &mask, Seen state, i64 sequence, i64 query, i64 key_tile) {
        seen = state == ALL ? nullptr : mask.row(sequence, query) + key_tile * TILE;
        const i64 keys = mask.keys_of(key_tile);
        if (!seen || keys == TILE) return;
        std::fill(std::copy(seen, seen + keys, padded), padded + TILE, false);
        seen = padded;
    }
    f32x16 shown(f32x16 x, i64 k, float hidden) const {
        return seen ? blend(load_mask(seen + k), x, f32x16{} + hidden) : x;
    }
};

inline float greatest(const float *scores, const Row &row) {
    f32x16 top = f32x16{} - INFINITY;
    for (i64 k = 0; k < TILE; k += VLEN) top = greater(top, row.shown(load_f32x16(scores + k), k, -INFINITY));
    return reduce(top, greater);
}

// Scores → their exponentials less `top`, 0 where hidden; returns the sum.
inline float exponentials(float *scores, const Row &row, float top) {
    f32x16 sum{};
    for (i64 k = 0; k < TILE; k += VLEN) {
        const f32x16 x = row.shown(fast_exp(load_f32x16(scores + k) - top), k, 0.0f);
        store_f32x16(scores + k, x);
        sum += x;
    }
    return reduce(sum, [](auto a, auto b) { return a + b; });
}

inline void multiply_row(float *x, i64 count, float factor) {
    for (i64 k = 0; k < count; k += VLEN) store_f32x16(x + k, load_f32x16(x + k) * factor);
}

// One tile of queries of one head: writes `out` and the logarithm of the sum of its exponentials.
void forward_tile(const float *q, const float *k_transposed, const float *v, const Mask &mask, const Sizes &s, i64 n,
                  i64 i, float *out, float *log_sums) {
    alignas(64) float scores[TILE * TILE], top[TILE], sum[TILE] = {};
    const i64 rows = mask.queries_of(i), out_row = s.heads * s.value_width;
    std::fill_n(top, TILE, -INFINITY);
    for (i64 r = 0; r < rows; ++r) std::fill_n(out + r * out_row, s.value_width, 0.0f);
    for (i64 j = 0; j < mask.key_tiles; ++j) {
        const Seen state = mask.seen(n, i, j);
        if (state == NONE) continue;
        const i64 keys = mask.keys_of(j);
        multiply({q, s.heads * s.width, 1}, k_transposed + j * s.width * TILE, TILE, rows, TILE, s.width, false, scores,
                 TILE);
        for (i64 r = 0; r < rows; ++r) {
            float *const row = scores + r * TILE;
            const Row shown(mask, state, n, i * TILE + r, j);
            // Compared so that NaN stays one.
            const float here = greatest(row, shown), highest = here <= top[r] ? top[r] : here;
            if (highest == -INFINITY) {  // no key so far
                std::fill_n(row, TILE, 0.0f);
                continue;
            }
            if (!(highest <= top[r])) {
                const float less = std::exp(top[r] - highest);
                sum[r] *= less;
                if (less != 0) multiply_row(out + r * out_row, s.value_width, less);
                top[r] = highest;
            }
            sum[r] += exponentials(row, shown, highest);
        }
        multiply({scores, TILE, 1}, v + j * TILE * s.groups * s.value_width, s.groups * s.value_width, rows,
                 s.value_width, keys, true, out, out_row);
    }
    for (i64 r = 0; r < rows; ++r) {
        if (sum[r] != 0) multiply_row(out + r * out_row, s.value_width, 1 / sum[r]);
        log_sums[r] = sum[r] != 0 ? top[r] + std::log(sum[r]) : 0.0f;
    }
}

// Gradients of one head of one sequence.
void backward_head(const float *q, const float *k, const float *k_transposed, const float *v_transposed,
                   const float *out, const float *grad, const float *log_sums, const Mask &mask, const Sizes &s, i64 n,
                   float scale, float *grad_q, float *grad_k, float *grad_v) {
    alignas(64) float weights[TILE * TILE], grad_weights[TILE * TILE];
    const i64 q_row = s.heads * s.width, k_row = s.groups * s.width, v_row = s.heads * s.value_width;
    std::vector<float> dots(s.queries);  // of each query's output with its gradient
    for (i64 t = 0; t < s.queries; ++t) {
        f32x16 sum{};
        for (i64 w = 0; w < s.value_width; w += VLEN)
            sum += load_f32x16(out + t * v_row + w) * load_f32x16(grad + t * v_row + w);
        dots[t] = reduce(sum, [](auto a, auto b) { return a + b; });
        std::fill_n(grad_q + t * q_row, s.width, 0.0f);
    }
    for (i64 j = 0; j < mask.key_tiles; ++j) {
        const i64 keys = mask.keys_of(j), first_key = j * TILE;
        for (i64 t = first_key; t < first_key + keys; ++t) {
            std::fill_n(grad_k + t * q_row, s.width, 0.0f);
            std::fill_n(grad_v + t * v_row, s.value_width, 0.0f);
        }
        for (i64 i = 0; i < mask.query_tiles; ++i) {
            const Seen state = mask.seen(n, i, j);
            if (state == NONE) continue;
            const i64 rows = mask.queries_of(i), first = i * TILE;
            multiply({q + first * q_row, q_row, 1}, k_transposed + j * s.width * TILE, TILE, rows, TILE, s.width, false,
                     weights, TILE);
            multiply({grad + first * v_row, v_row, 1}, v_transposed + j * s.value_width * TILE, TILE, rows, TILE,
                     s.value_width, false, grad_weights, TILE);
            for (i64 r = 0; r < rows; ++r)
                exponentials(weights + r * TILE, Row(mask, state, n, first + r, j), log_sums[first + r]);
            multiply({weights, 1, TILE}, grad + first * v_row, v_row, keys, s.value_width, rows, true,
                     grad_v + first_key * v_row, v_row);
            for (i64 r = 0; r < rows; ++r)
                for (i64 c = r * TILE; c < (r + 1) * TILE; c += VLEN)
                    store_f32x16(weights + c, load_f32x16(weights + c) *
                                                  ((load_f32x16(grad_weights + c) - dots[first + r]) * scale));
            multiply({weights, 1, TILE}, q + first * q_row, q_row, keys, s.width, rows, true,
                     grad_k + first_key * q_row, q_row);
            multiply({weights, TILE, 1}, k + first_key * k_row, k_row, rows, s.width, keys, true,
                     grad_q + first * q_row, q_row);
        }
    }
}

}  // namespace

extern "C" {
// mask: its distances between sequences (0: one for all) and queries. → out, log_sums [B, H, T]
void masked_attention_f32(const float *q, const float *k, const float *v, const bool *mask, i64 by_sequence,
                          i64 by_query, i64 sequences, i64 queries, i64 keys, i64 heads, i64 groups, i64 width,
                          i64 value_width, float scale, float *out, float *log_sums) {
    const Sizes s{sequences, queries, keys, heads, groups, width, value_width};
    const Mask seen(mask, by_sequence, by_query, sequences, queries, keys);
    const std::vector<float> k_transposed = transposed(k, sequences, keys, groups, width, scale);
#pragma omp parallel for schedule(dynamic)
    for (i64 t = 0; t < sequences * heads * seen.query_tiles; ++t) {
        const i64 i = t % seen.query_tiles, n = t / seen.query_tiles / heads, h = t / seen.query_tiles % heads;
        const i64 g = h / (heads / groups), row = n * queries + i * TILE;
        forward_tile(q + (row * heads + h) * width,
                     k_transposed.data() + (n * groups + g) * seen.key_tiles * width * TILE,
                     v + (n * keys * groups + g) * value_width, seen, s, n, i, out + (row * heads + h) * value_width,
                     log_sums + (n * heads + h) * queries + i * TILE);
    }
}

void masked_attention_backward_f32(const float *q, const float *k, const float *v, const bool *mask, i64 by_sequence,
                                   i64 by_query, i64 sequences, i64 queries, i64 keys, i64 heads, i64 groups, i64 width,
                                   i64 value_width, float scale, const float *out, const float *log_sums,
                                   const float *grad, float *grad_q, float *grad_k, float *grad_v) {
    const Sizes s{sequences, queries, keys, heads, groups, width, value_width};
    const Mask seen(mask, by_sequence, by_query, sequences, queries, keys);
    const std::vector<float> k_transposed = transposed(k, sequences, keys, groups, width, scale);
    const std::vector<float> v_transposed = transposed(v, sequences, keys, groups, value_width, 1.0f);
#pragma omp parallel for schedule(dynamic)
    for (i64 t = 0; t < sequences * heads; ++t) {
        const i64 n = t / heads, h = t % heads, g = h / (heads / groups),
                  panel = (n * groups + g) * seen.key_tiles * TILE;
        const i64 own = n * queries * heads + h, key = n * keys * heads + h;
        backward_head(q + own * width, k + (n * keys * groups + g) * width, k_transposed.data() + panel * width,
                      v_transposed.data() + panel * value_width, out + own * value_width, grad + own * value_width,
                      log_sums + t * queries, seen, s, n, scale, grad_q + own * width, grad_k + key * width,
                      grad_v + key * value_width);
    }
}
}
