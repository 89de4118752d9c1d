// x·wᵀ + bias in FP32, where every element is one chain of fused multiply-adds over k in ascending order that begins
// with the bias: its bits do not depend on the other rows, on tiles, threads or the class of processor (exact_math.h).
//
// Columns are packed a few panels and KEPT k at a time, so partial sums are stored and loaded again, which changes no
// bit. Groups: experts with rows of their own (`ends`), or heads, which all rows pass through.

#include <algorithm>

#include "exact_math.h"

namespace {

#if defined(__AVX512F__)
constexpr i64 TILE_ROWS = 12, TILE_VECS = 2;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr i64 TILE_ROWS = 6, TILE_VECS = 2;
#else
constexpr i64 TILE_ROWS = 3, TILE_VECS = 4;
#endif
constexpr i64 PANEL = TILE_VECS * WIDTH;  // columns of a tile
static_assert(PANEL % 8 == 0);
constexpr i64 PANELS = 2, COLUMNS = PANELS * PANEL;  // packed together
constexpr i64 KEPT = 256;                            // k packed together
constexpr i64 ROWS = 480;                            // of a task: enough to pay for packing

// weight(n, k) is at base[n·by_n + k·by_k]; one of the distances is 1.
struct Matrix {
    const float *base;
    i64 by_n, by_k;
};

#if defined(__AVX2__)
// to(k, n) = from(n, k), 8 by 8; `to` has PANEL columns.
inline void pack8(const float *from, i64 by_n, float *to) {
    __m256 block[8];
    for (int n = 0; n < 8; ++n) block[n] = _mm256_loadu_ps(from + n * by_n);
    transpose8(block);
    for (int k = 0; k < 8; ++k) _mm256_storeu_ps(to + k * PANEL, block[k]);
}
#endif

// Columns [0, columns) and k in [0, count) into panels [KEPT, PANEL], columns beyond being 0.
void pack(Matrix w, i64 columns, i64 count, float *to) {
    for (i64 first = 0; first < columns; first += 8) {
        float *const panel = to + first / PANEL * KEPT * PANEL + first % PANEL;
        const i64 here = std::min<i64>(8, columns - first);
        const float *const from = w.base + first * w.by_n;
        i64 k = 0;
#if defined(__AVX2__)
        if (here == 8 && w.by_k == 1)
            for (; k + 8 <= count; k += 8) pack8(from + k, w.by_n, panel + k * PANEL);
#endif
        if (here == 8)
            for (; k < count; ++k)
                for (i64 n = 0; n < 8; ++n) panel[k * PANEL + n] = from[n * w.by_n + k * w.by_k];
        else
            for (; k < count; ++k)
                for (i64 n = 0; n < 8; ++n) panel[k * PANEL + n] = n < here ? from[n * w.by_n + k * w.by_k] : 0.0f;
    }
    for (i64 n = (columns + 7) / 8 * 8; n % PANEL; ++n)
        for (i64 k = 0; k < count; ++k) to[n / PANEL * KEPT * PANEL + k * PANEL + n % PANEL] = 0.0f;
}

// R rows of x by a panel: out continues from `from` [R, PANEL].
template <int R>
void tile(const float *x, i64 x_stride, const float *panel, i64 count, const float *from, i64 from_stride, float *out,
          i64 out_stride) {
    vec sum[R][TILE_VECS];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < TILE_VECS; ++v) sum[r][v] = load_vec(from + r * from_stride + v * WIDTH);
    for (i64 k = 0; k < count; ++k) {
        vec w[TILE_VECS];
        for (int v = 0; v < TILE_VECS; ++v) w[v] = load_vec(panel + k * PANEL + v * WIDTH);
        for (int r = 0; r < R; ++r) {
            const vec value = broadcast(x[r * x_stride + k]);
            for (int v = 0; v < TILE_VECS; ++v) sum[r][v] = fma(value, w[v], sum[r][v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < TILE_VECS; ++v) store_vec(out + r * out_stride + v * WIDTH, sum[r][v]);
}

template <int R>
void tile_of(i64 rows, const float *x, i64 xs, const float *panel, i64 count, const float *from, i64 fs, float *out,
             i64 os) {
    if (rows == R) return tile<R>(x, xs, panel, count, from, fs, out, os);
    if constexpr (R > 1) tile_of<R - 1>(rows, x, xs, panel, count, from, fs, out, os);
}

// `rows` rows by up to COLUMNS columns.
void multiply(const float *x, i64 x_stride, i64 rows, Matrix w, i64 columns, i64 K, const float *bias, float *out,
              i64 out_stride) {
    alignas(64) static thread_local float packed[PANELS * KEPT * PANEL];
    alignas(64) float start[COLUMNS] = {}, edge[TILE_ROWS * PANEL];
    if (bias) std::copy(bias, bias + columns, start);
    for (i64 k = 0; k == 0 || k < K; k += KEPT) {
        const i64 count = std::min(KEPT, K - k);
        pack({w.base + k * w.by_k, w.by_n, w.by_k}, columns, count, packed);
        for (i64 row = 0; row < rows; row += TILE_ROWS) {
            const i64 here = std::min(TILE_ROWS, rows - row);
            for (i64 first = 0; first < columns; first += PANEL) {
                const i64 width = std::min(PANEL, columns - first);
                const bool whole = width == PANEL;
                float *const to = out + row * out_stride + first;
                if (!whole && k)
                    for (i64 r = 0; r < here; ++r)
                        std::copy(to + r * out_stride, to + r * out_stride + width, edge + r * PANEL);
                const float *const from = k == 0 ? start + first : whole ? to : edge;
                const i64 from_stride = k == 0 ? 0 : whole ? out_stride : PANEL;
                tile_of<TILE_ROWS>(here, x + row * x_stride + k, x_stride, packed + first / PANEL * KEPT * PANEL, count,
                                   from, from_stride, whole ? to : edge, whole ? out_stride : PANEL);
                if (!whole)
                    for (i64 r = 0; r < here; ++r)
                        std::copy(edge + r * PANEL, edge + r * PANEL + width, to + r * out_stride);
            }
        }
    }
}

}  // namespace

// x and out: row and group strides; w [groups, N, K]: strides of groups, n and k. ends [groups]: group g has the rows
// from ends[g - 1] to ends[g]; null: all groups have all rows, at their own x and out.
extern "C" void exact_gemm_f32(const float *x, i64 x_stride, i64 x_group, const float *w, i64 w_group, i64 by_n,
                               i64 by_k, const float *bias, const int32_t *ends, i64 rows, i64 groups, i64 N, i64 K,
                               float *out, i64 out_stride, i64 out_group) {
    const i64 across = (N + COLUMNS - 1) / COLUMNS, down = (rows + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(dynamic)
    for (i64 task = 0; task < groups * across * down; ++task) {
        const i64 g = task / (across * down), column = task / down % across * COLUMNS;
        const i64 begin = ends && g ? ends[g - 1] : 0, end = ends ? ends[g] : rows;
        const i64 first = begin + task % down * ROWS, last = std::min(end, first + ROWS);
        if (first >= last) continue;
        multiply(x + g * x_group + first * x_stride, x_stride, last - first,
                 {w + g * w_group + column * by_n, by_n, by_k}, std::min(COLUMNS, N - column), K,
                 bias ? bias + column : nullptr, out + g * out_group + first * out_stride + column, out_stride);
    }
}
