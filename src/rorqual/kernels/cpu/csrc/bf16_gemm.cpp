// Grouped BF16 GEMM for the shapes oneDNN is slow at: the few rows of a decode step against large weights that are used
// once, and the rows of each expert, whose number changes every time.
//
// oneDNN repacks all weights first and compiles a kernel for every new shape. Here 32 columns of the second factor are
// packed into cache as pairs, multiplied with all rows, and dropped. Needs AVX-512 BF16 (vdpbf16ps, which flushes
// subnormals to zero); without it the caller's reference runs.

#include <algorithm>
#include <cstdlib>
#include <omp.h>

#include "cpu_class.h"
#include "simd.h"

extern "C" {
extern const i64 has_bf16_dot;
}

#if defined(__AVX512F__) && defined(__x86_64__)

#include <immintrin.h>

#define BF16_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace {

constexpr i64 MAX_ROWS = 12, PANEL_COLUMNS = 2 * VLEN;  // 24 sums and two weights fill the registers

// Weights [columns, width] → panel [width/2][PANEL_COLUMNS] of BF16 pairs; the panel's columns past `columns` repeat
// the first.
void transpose_panel(const bf16 *from, i64 columns, i64 width, float *panel) {
    for (i64 half = 0; half < 2; ++half) {
        const bf16 *row[VLEN];
        for (i64 t = 0; t < VLEN; ++t) row[t] = from + (half * VLEN + t < columns ? half * VLEN + t : 0) * width;
        const i64 pairs = width / 2;
        float *to = panel + half * VLEN;
        i64 p = 0;
        for (; p + VLEN <= pairs; p += VLEN) {
            f32x16 block[VLEN];
            for (i64 t = 0; t < VLEN; ++t) block[t] = load_as<f32x16>(row[t] + 2 * p);
            transpose16(block);
            for (i64 t = 0; t < VLEN; ++t) store_as(to + (p + t) * PANEL_COLUMNS, block[t]);
        }
        for (; p < pairs; ++p)
            for (i64 t = 0; t < VLEN; ++t) std::memcpy(to + p * PANEL_COLUMNS + t, row[t] + 2 * p, sizeof(float));
    }
}

// Rows of `columns` values at a distance → panel [(rows + 1)/2][panel_stride] of pairs of two rows' values. An odd last
// row is paired with zeros; zeros follow `columns` up to a multiple of VLEN. The rest of the panel is left as it was:
// no result of it is kept.
BF16_TARGET void interleave_row_pairs(const bf16 *from, i64 distance, i64 rows, i64 columns, float *panel,
                                      i64 panel_stride) {
    for (i64 p = 0; 2 * p < rows; ++p) {
        const bf16 *row = from + 2 * p * distance;
        for (i64 j = 0; j < columns; j += VLEN) {
            const __mmask16 here = columns - j >= VLEN ? 0xffff : __mmask16((1u << (columns - j)) - 1);
            const __mmask16 other = 2 * p + 1 < rows ? here : 0;
            const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, row + j));
            const __m512i b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(other, row + distance + j));
            const __mmask16 inside = panel_stride - j >= VLEN ? 0xffff : __mmask16((1u << (panel_stride - j)) - 1);
            _mm512_mask_storeu_epi32(panel + p * panel_stride + j, inside,
                                     _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
        }
    }
}

// R rows of pairs of x (`row` and `pair`: distances in elements) × a panel → `columns` columns of out, plus `bias`.
// Prefetches `lines` cache lines from `prefetch`, the next panel's weights, on the way.
template <int R>
BF16_TARGET void microkernel(const bf16 *x, i64 row, i64 pair, const float *panel, i64 pairs, const float *bias,
                             i64 columns, bf16 *out, i64 out_row, const char *prefetch, i64 lines) {
    __m512 sum[R][2];
    for (int r = 0; r < R; ++r) {
        sum[r][0] = bias ? _mm512_loadu_ps(bias) : _mm512_setzero_ps();
        sum[r][1] = bias ? _mm512_loadu_ps(bias + VLEN) : _mm512_setzero_ps();
    }
    const i64 every = lines ? std::max(pairs / lines, i64(1)) : pairs + 1,
              each = lines ? (lines + pairs - 1) / pairs : 0;
    const char *const last = prefetch + lines * 64;
    i64 next = 0;
    for (i64 p = 0; p < pairs; ++p) {
        const __m512bh a = (__m512bh)_mm512_load_ps(panel + p * PANEL_COLUMNS);
        const __m512bh b = (__m512bh)_mm512_load_ps(panel + p * PANEL_COLUMNS + VLEN);
        for (int r = 0; r < R; ++r) {
            int32_t pair_bits;
            std::memcpy(&pair_bits, x + r * row + p * pair, sizeof pair_bits);
            const __m512bh broadcast = (__m512bh)_mm512_set1_epi32(pair_bits);
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], a, broadcast);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], b, broadcast);
        }
        if (p == next && lines) {
            for (i64 i = 0; i < each && prefetch < last; ++i, prefetch += 64) _mm_prefetch(prefetch, _MM_HINT_T1);
            next += every;
        }
    }
    const __mmask16 low = columns >= VLEN ? 0xffff : __mmask16((1u << columns) - 1);
    const __mmask16 high = columns >= PANEL_COLUMNS ? 0xffff
                           : columns > VLEN         ? __mmask16((1u << (columns - VLEN)) - 1)
                                                    : 0;
    for (int r = 0; r < R; ++r) {
        _mm256_mask_storeu_epi16(out + r * out_row, low, (__m256i)_mm512_cvtneps_pbh(sum[r][0]));
        _mm256_mask_storeu_epi16(out + r * out_row + VLEN, high, (__m256i)_mm512_cvtneps_pbh(sum[r][1]));
    }
}

using Microkernel = decltype(&microkernel<1>);
constexpr Microkernel MICROKERNELS[MAX_ROWS] = {microkernel<1>, microkernel<2>,  microkernel<3>,  microkernel<4>,
                                                microkernel<5>, microkernel<6>,  microkernel<7>,  microkernel<8>,
                                                microkernel<9>, microkernel<10>, microkernel<11>, microkernel<12>};

// All rows × a panel, in blocks of at most MAX_ROWS rows, as even as possible.
void gemm_rows(const bf16 *x, i64 row, i64 pair, i64 rows, const float *panel, i64 pairs, const float *bias,
               i64 columns, bf16 *out, i64 out_row, const char *prefetch = nullptr, i64 lines = 0) {
    const i64 count = (rows + MAX_ROWS - 1) / MAX_ROWS;
    for (i64 s = 0; s < count; ++s) {
        const i64 at = s * rows / count, line = s * lines / count;
        MICROKERNELS[(s + 1) * rows / count - at - 1](x + at * row, row, pair, panel, pairs, bias, columns,
                                                      out + at * out_row, out_row, prefetch + line * 64,
                                                      (s + 1) * lines / count - line);
    }
}

float *allocate_panel(i64 pairs) {
    return static_cast<float *>(std::aligned_alloc(64, sizeof(float) * PANEL_COLUMNS * pairs));
}

i64 start_of(const int32_t *ends, i64 g) { return g ? ends[g - 1] : 0; }

}  // namespace

extern "C" {
const i64 has_bf16_dot = [] {
    __builtin_cpu_init();
    return i64(__builtin_cpu_supports("avx512bf16") && allows(AVX512_BF16));
}();

// x [rows, width] in groups that end at ends[g], weights [groups, outputs, width], bias [groups, outputs] or null → out
// [rows, outputs] = x·Wᵀ + b; width is even. A group without rows costs nothing.
void grouped_gemm_bf16(const bf16 *x, i64 x_row, const bf16 *weights, const bf16 *bias, const int32_t *ends, i64 groups,
                       i64 outputs, i64 width, bf16 *out) {
    const i64 panels = (outputs + PANEL_COLUMNS - 1) / PANEL_COLUMNS, lines = PANEL_COLUMNS * width / 32;
#pragma omp parallel
    {
        float *panel = allocate_panel(width / 2);
#pragma omp for schedule(static)
        for (i64 task = 0; task < groups * panels; ++task) {
            const i64 g = task / panels, first = task % panels * PANEL_COLUMNS;
            const i64 start = start_of(ends, g), rows = ends[g] - start;
            if (rows <= 0) continue;
            const i64 columns = std::min(PANEL_COLUMNS, outputs - first);
            float biases[PANEL_COLUMNS] = {};
            if (bias)
                for (i64 j = 0; j < columns; ++j) biases[j] = load(bias[g * outputs + first + j]);
            const bf16 *here = weights + (g * outputs + first) * width;
            transpose_panel(here, columns, width, panel);
            gemm_rows(x + start * x_row, x_row, 2, rows, panel, width / 2, biases, columns,
                      out + start * outputs + first, outputs,
                      reinterpret_cast<const char *>(here + PANEL_COLUMNS * width),
                      task + 1 < groups * panels ? lines : 0);
        }
        std::free(panel);
    }
}

// Gradient of x: grad [rows, outputs] → grad_x [rows, width] = grad·W; outputs is even.
void grouped_gemm_backward_input_bf16(const bf16 *grad, i64 grad_row, const bf16 *weights, const int32_t *ends,
                                      i64 groups, i64 outputs, i64 width, bf16 *grad_x) {
    const i64 panels = (width + PANEL_COLUMNS - 1) / PANEL_COLUMNS;
#pragma omp parallel
    {
        float *panel = allocate_panel(outputs / 2);
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < groups * panels; ++task) {
            const i64 g = task / panels, first = task % panels * PANEL_COLUMNS;
            const i64 start = start_of(ends, g), rows = ends[g] - start;
            if (rows <= 0) continue;
            const i64 columns = std::min(PANEL_COLUMNS, width - first);
            interleave_row_pairs(weights + g * outputs * width + first, width, outputs, columns, panel, PANEL_COLUMNS);
            gemm_rows(grad + start * grad_row, grad_row, 2, rows, panel, outputs / 2, nullptr, columns,
                      grad_x + start * width + first, width);
        }
        std::free(panel);
    }
}

// Gradient of the weights: gradᵀ·x of each group → grad_weights [groups, outputs, width]; zero for a group without
// rows. `pairs` is scratch for [rows/2 + groups + 1, outputs rounded up to MAX_ROWS] floats: grad with its rows paired,
// in column blocks of MAX_ROWS.
void grouped_gemm_backward_weight_bf16(const bf16 *grad, i64 grad_row, const bf16 *x, i64 x_row, const int32_t *ends,
                                       i64 groups, i64 outputs, i64 width, float *pairs, bf16 *grad_weights) {
    const i64 panels = (width + PANEL_COLUMNS - 1) / PANEL_COLUMNS, parts = (outputs + MAX_ROWS - 1) / MAX_ROWS;
    i64 max_rows = 0;
    for (i64 g = 0; g < groups; ++g) max_rows = std::max(max_rows, i64(ends[g]) - start_of(ends, g));
    const auto part = [&](i64 g, i64 s) {
        const i64 start = start_of(ends, g);
        return pairs + ((start / 2 + g) * parts + (ends[g] - start + 1) / 2 * s) * MAX_ROWS;
    };
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
        for (i64 g = 0; g < groups; ++g) {
            const i64 start = start_of(ends, g);
            for (i64 s = 0; s < parts; ++s)
                interleave_row_pairs(grad + start * grad_row + s * MAX_ROWS, grad_row, ends[g] - start,
                                     std::min(MAX_ROWS, outputs - s * MAX_ROWS), part(g, s), MAX_ROWS);
        }
        float *panel = allocate_panel((max_rows + 1) / 2 + 1);
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < groups * panels; ++task) {
            const i64 g = task / panels, first = task % panels * PANEL_COLUMNS;
            const i64 start = start_of(ends, g), rows = ends[g] - start;
            const i64 columns = std::min(PANEL_COLUMNS, width - first);
            interleave_row_pairs(x + start * x_row + first, x_row, rows, columns, panel, PANEL_COLUMNS);
            for (i64 s = 0; s < parts; ++s)
                gemm_rows(reinterpret_cast<const bf16 *>(part(g, s)), 2, 2 * MAX_ROWS,
                          std::min(MAX_ROWS, outputs - s * MAX_ROWS), panel, (rows + 1) / 2, nullptr, columns,
                          grad_weights + (g * outputs + s * MAX_ROWS) * width + first, width);
        }
        std::free(panel);
    }
}
}

#else

extern "C" {
const i64 has_bf16_dot = 0;
void grouped_gemm_bf16(const bf16 *, i64, const bf16 *, const bf16 *, const int32_t *, i64, i64, i64, bf16 *) {}
void grouped_gemm_backward_input_bf16(const bf16 *, i64, const bf16 *, const int32_t *, i64, i64, i64, bf16 *) {}
void grouped_gemm_backward_weight_bf16(const bf16 *, i64, const bf16 *, i64, const int32_t *, i64, i64, i64, float *,
                                       bf16 *) {}
}

#endif
