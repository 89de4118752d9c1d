// Grouped FP32 GEMM for the few rows of a decode step against large weights that are used once: out = x·wᵀ + bias.
//
// BLAS libraries copy all weights into panels first, which takes longer than the product itself. Here a tile of
// TILE_COLUMNS weight rows is read from memory once, along k, and multiplied with all rows of x from the caches, while
// the next tile is fetched. Sums are as wide as a register; their elements are added at the end, in an order that does
// not depend on the other rows.

#include <algorithm>
#include <omp.h>

#include "simd.h"

namespace {

#if defined(__AVX512F__)
constexpr i64 WIDTH = 16, TILE_ROWS = 6;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr i64 WIDTH = 8, TILE_ROWS = 3;
#elif defined(__aarch64__)
constexpr i64 WIDTH = 4, TILE_ROWS = 6;
#else
constexpr i64 WIDTH = 4, TILE_ROWS = 2;
#endif
constexpr i64 TILE_COLUMNS = 4;  // with TILE_ROWS, the sums that the registers hold beside the factors
constexpr i64 MAX_COLUMNS = 64;  // of a task: a thread reads weights in long runs
typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef float vec4 __attribute__((vector_size(16)));

inline vec load_vec(const float *from) {
    vec x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

// The sums of each of four vectors' elements.
inline vec4 sums_of(vec a, vec b, vec c, vec d) {
#if defined(__AVX2__)
    __m256 e[4];
#if defined(__AVX512F__)
    const vec all[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i)
        e[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)all[i]), _mm512_extractf32x8_ps((__m512)all[i], 1));
#else
    e[0] = (__m256)a, e[1] = (__m256)b, e[2] = (__m256)c, e[3] = (__m256)d;
#endif
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(e[0], e[1]), _mm256_hadd_ps(e[2], e[3]));
    return (vec4)_mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
#else
    const auto add = [](vec x) { return (x[0] + x[2]) + (x[1] + x[3]); };
    return vec4{add(a), add(b), add(c), add(d)};
#endif
}

// R rows of x by TILE_COLUMNS rows of w, all of K numbers; `columns` of the results are stored.
template <int R>
void tile(const float *x, i64 x_row, const float *w, i64 K, const float *bias, i64 columns, float *out, i64 out_row) {
    vec sum[R][TILE_COLUMNS] = {};
    const float *weights[TILE_COLUMNS];  // those beyond the last column are read again and not stored
    for (i64 c = 0; c < TILE_COLUMNS; ++c) weights[c] = w + std::min(c, columns - 1) * K;
    i64 k = 0;
    for (; k + WIDTH <= K; k += WIDTH) {
        vec value[R];
        for (int r = 0; r < R; ++r) value[r] = load_vec(x + r * x_row + k);
        for (int c = 0; c < TILE_COLUMNS; ++c) {
            const vec weight = load_vec(weights[c] + k);
            for (int r = 0; r < R; ++r) sum[r][c] += value[r] * weight;
        }
    }
    vec4 start = {};
    if (bias)
        for (i64 c = 0; c < columns; ++c) start[c] = bias[c];
    for (int r = 0; r < R; ++r) {
        vec4 total = start + sums_of(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
        for (i64 rest = k; rest < K; ++rest)
            for (int c = 0; c < TILE_COLUMNS; ++c) total[c] += x[r * x_row + rest] * weights[c][rest];
        if (columns == TILE_COLUMNS)
            std::memcpy(out + r * out_row, &total, sizeof total);
        else
            for (i64 c = 0; c < columns; ++c) out[r * out_row + c] = total[c];
    }
}

template <int R>
void tile_of(i64 rows, const float *x, i64 x_row, const float *w, i64 K, const float *bias, i64 columns, float *out,
             i64 out_row) {
    if (rows == R) return tile<R>(x, x_row, w, K, bias, columns, out, out_row);
    if constexpr (R > 1) tile_of<R - 1>(rows, x, x_row, w, K, bias, columns, out, out_row);
}

}  // namespace

// x [rows, K] with x_row between rows, sorted by group: those of group g end at ends[g]. w [groups, N, K]; bias
// [groups, N] or null; out [rows, N].
extern "C" void grouped_gemm_f32(const float *x, i64 x_row, const float *w, const float *bias, const int32_t *ends,
                                 i64 groups, i64 N, i64 K, float *out) {
    // Several tasks for each thread, since one may be late.
    const i64 share = N / (4 * omp_get_max_threads()) / TILE_COLUMNS * TILE_COLUMNS;
    const i64 size = std::clamp(share, 4 * TILE_COLUMNS, MAX_COLUMNS), tasks = (N + size - 1) / size;
#pragma omp parallel for schedule(dynamic)
    for (i64 task = 0; task < groups * tasks; ++task) {
        const i64 g = task / tasks, begin = g ? ends[g - 1] : 0, rows = ends[g] - begin;
        if (rows <= 0) continue;
        const i64 first = task % tasks * size, last = std::min(N, first + size);
        const i64 blocks = (rows + TILE_ROWS - 1) / TILE_ROWS;  // as even as possible
        for (i64 column = first; column < last; column += TILE_COLUMNS) {
            const i64 columns = std::min(TILE_COLUMNS, last - column);
            const float *const here = w + (g * N + column) * K;
            const char *const next = reinterpret_cast<const char *>(here + TILE_COLUMNS * K);
            const i64 lines = column + TILE_COLUMNS < N ? TILE_COLUMNS * K * i64(sizeof(float)) / 64 : 0;
            for (i64 b = 0; b < blocks; ++b) {
                const i64 row = b * rows / blocks, end = (b + 1) * rows / blocks;
                for (i64 line = b * lines / blocks; line < (b + 1) * lines / blocks; ++line)
                    __builtin_prefetch(next + 64 * line);
                tile_of<TILE_ROWS>(end - row, x + (begin + row) * x_row, x_row, here, K,
                                   bias ? bias + g * N + column : nullptr, columns, out + (begin + row) * N + column,
                                   N);
            }
        }
    }
}
