// BF16 products of the shapes that oneDNN is slow at: the few rows of a decode step against large weights that are used
// once, and those of each expert with its own rows, whose number changes every time.
//
// oneDNN packs all weights first and compiles a kernel for every new shape. Here 32 columns of the second factor are
// paired in cache, as they lie, multiplied with all the rows there are, and forgotten. Needs the processor's BF16 dot
// products (AVX-512 BF16), which take subnormal numbers for zero; without them the caller's reference runs.

#include <algorithm>
#include <cstdlib>
#include <omp.h>

#include "classes.h"
#include "lanes.h"

extern "C" {
extern const i64 dot_products;
}

#if defined(__AVX512F__) && defined(__x86_64__)

#include <immintrin.h>

#define WITH_DOT_PRODUCTS __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace {

constexpr i64 ROWS = 12, COLUMNS = 2 * L;  // 24 sums and two weights fill the registers

// Weights [COLUMNS, width] from `from` on → panel [width/2][COLUMNS] of pairs; outputs past `some` get what the first has.
void turn_panel(const bf16 *from, i64 some, i64 width, float *panel) {
    for (i64 half = 0; half < 2; ++half) {
        const bf16 *row[L];
        for (i64 t = 0; t < L; ++t) row[t] = from + (half * L + t < some ? half * L + t : 0) * width;
        const i64 pairs = width / 2;
        float *to = panel + half * L;
        i64 p = 0;
        for (; p + L <= pairs; p += L) {
            lanes block[L];
            for (i64 t = 0; t < L; ++t) std::memcpy(&block[t], row[t] + 2 * p, sizeof(lanes));
            turn(block);
            for (i64 t = 0; t < L; ++t) std::memcpy(to + (p + t) * COLUMNS, &block[t], sizeof(lanes));
        }
        for (; p < pairs; ++p)
            for (i64 t = 0; t < L; ++t) std::memcpy(to + p * COLUMNS + t, row[t] + 2 * p, sizeof(float));
    }
}

// Rows of `some` numbers each, at a distance → panel [(rows + 1)/2][apart] of pairs of two rows' numbers; an odd last row
// is paired with zeros, and zeros follow `some` up to a multiple of L. What of a panel is beyond stays as it was: no
// result of it is kept.
WITH_DOT_PRODUCTS void pair_panel(const bf16 *from, i64 distance, i64 rows, i64 some, float *panel, i64 apart) {
    for (i64 p = 0; 2 * p < rows; ++p) {
        const bf16 *row = from + 2 * p * distance;
        for (i64 j = 0; j < some; j += L) {
            const __mmask16 here = some - j >= L ? 0xffff : __mmask16((1u << (some - j)) - 1);
            const __mmask16 other = 2 * p + 1 < rows ? here : 0;
            const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, row + j));
            const __m512i b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(other, row + distance + j));
            const __mmask16 room = apart - j >= L ? 0xffff : __mmask16((1u << (apart - j)) - 1);
            _mm512_mask_storeu_epi32(panel + p * apart + j, room, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
        }
    }
}

// R rows of pairs of x, which are `row` apart and each `pair` (in numbers), against a panel → `some` columns of out, with
// `bias` added; on the way `ahead`, what the next panel is made of, is asked for from memory.
template <int R>
WITH_DOT_PRODUCTS void strip(const bf16 *x, i64 row, i64 pair, const float *panel, i64 pairs, const float *bias, i64 some,
                             bf16 *out, i64 out_row, const char *ahead, i64 lines) {
    __m512 sum[R][2];
    for (int r = 0; r < R; ++r) {
        sum[r][0] = bias ? _mm512_loadu_ps(bias) : _mm512_setzero_ps();
        sum[r][1] = bias ? _mm512_loadu_ps(bias + L) : _mm512_setzero_ps();
    }
    const i64 every = lines ? std::max(pairs / lines, i64(1)) : pairs + 1, each = lines ? (lines + pairs - 1) / pairs : 0;
    const char *const last = ahead + lines * 64;
    i64 next = 0;
    for (i64 p = 0; p < pairs; ++p) {
        const __m512bh a = (__m512bh)_mm512_load_ps(panel + p * COLUMNS);
        const __m512bh b = (__m512bh)_mm512_load_ps(panel + p * COLUMNS + L);
        for (int r = 0; r < R; ++r) {
            int32_t two;
            std::memcpy(&two, x + r * row + p * pair, sizeof two);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], a, both);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], b, both);
        }
        if (p == next && lines) {
            for (i64 i = 0; i < each && ahead < last; ++i, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
            next += every;
        }
    }
    const __mmask16 low = some >= L ? 0xffff : __mmask16((1u << some) - 1);
    const __mmask16 high = some >= COLUMNS ? 0xffff : some > L ? __mmask16((1u << (some - L)) - 1) : 0;
    for (int r = 0; r < R; ++r) {
        _mm256_mask_storeu_epi16(out + r * out_row, low, (__m256i)_mm512_cvtneps_pbh(sum[r][0]));
        _mm256_mask_storeu_epi16(out + r * out_row + L, high, (__m256i)_mm512_cvtneps_pbh(sum[r][1]));
    }
}

using Strip = decltype(&strip<1>);
constexpr Strip STRIPS[ROWS] = {strip<1>, strip<2>, strip<3>, strip<4>,  strip<5>,  strip<6>,
                                strip<7>, strip<8>, strip<9>, strip<10>, strip<11>, strip<12>};

// All `rows` rows against a panel, some at a time, as evenly as can be.
void strips(const bf16 *x, i64 row, i64 pair, i64 rows, const float *panel, i64 pairs, const float *bias, i64 some,
            bf16 *out, i64 out_row, const char *ahead = nullptr, i64 lines = 0) {
    const i64 count = (rows + ROWS - 1) / ROWS;
    for (i64 s = 0; s < count; ++s) {
        const i64 at = s * rows / count, line = s * lines / count;
        STRIPS[(s + 1) * rows / count - at - 1](x + at * row, row, pair, panel, pairs, bias, some, out + at * out_row,
                                                out_row, ahead + line * 64, (s + 1) * lines / count - line);
    }
}

float *room(i64 pairs) { return static_cast<float *>(std::aligned_alloc(64, sizeof(float) * COLUMNS * pairs)); }

i64 start_of(const int32_t *ends, i64 g) { return g ? ends[g - 1] : 0; }

}  // namespace

extern "C" {
const i64 dot_products = [] {
    __builtin_cpu_init();
    return i64(__builtin_cpu_supports("avx512bf16") && allows(AVX512_BF16));
}();

// x [rows, width] in groups that end at ends[g], weights [groups, outputs, width], bias [groups, outputs] or none →
// out [rows, outputs], x·Wᵀ + b; width is even. A group without rows costs nothing.
void product_bf16(const bf16 *x, i64 x_row, const bf16 *weights, const bf16 *bias, const int32_t *ends, i64 groups,
                  i64 outputs, i64 width, bf16 *out) {
    const i64 panels = (outputs + COLUMNS - 1) / COLUMNS, lines = COLUMNS * width / 32;
#pragma omp parallel
    {
        float *panel = room(width / 2);
#pragma omp for schedule(static)
        for (i64 task = 0; task < groups * panels; ++task) {
            const i64 g = task / panels, first = task % panels * COLUMNS;
            const i64 start = start_of(ends, g), rows = ends[g] - start;
            if (rows <= 0) continue;
            const i64 some = std::min(COLUMNS, outputs - first);
            float biases[COLUMNS] = {};
            if (bias)
                for (i64 j = 0; j < some; ++j) biases[j] = load(bias[g * outputs + first + j]);
            const bf16 *here = weights + (g * outputs + first) * width;
            turn_panel(here, some, width, panel);
            strips(x + start * x_row, x_row, 2, rows, panel, width / 2, biases, some, out + start * outputs + first,
                   outputs, reinterpret_cast<const char *>(here + COLUMNS * width),
                   task + 1 < groups * panels ? lines : 0);
        }
        std::free(panel);
    }
}

// The derivative by x: grad [rows, outputs] → grad_x [rows, width] = grad·W; outputs is even.
void product_backward_bf16(const bf16 *grad, i64 grad_row, const bf16 *weights, const int32_t *ends, i64 groups,
                           i64 outputs, i64 width, bf16 *grad_x) {
    const i64 panels = (width + COLUMNS - 1) / COLUMNS;
#pragma omp parallel
    {
        float *panel = room(outputs / 2);
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < groups * panels; ++task) {
            const i64 g = task / panels, first = task % panels * COLUMNS;
            const i64 start = start_of(ends, g), rows = ends[g] - start;
            if (rows <= 0) continue;
            const i64 some = std::min(COLUMNS, width - first);
            pair_panel(weights + g * outputs * width + first, width, outputs, some, panel, COLUMNS);
            strips(grad + start * grad_row, grad_row, 2, rows, panel, outputs / 2, nullptr, some,
                   grad_x + start * width + first, width);
        }
        std::free(panel);
    }
}

// The derivative by the weights: gradᵀ·x of each group → grad_weights [groups, outputs, width], zero without rows.
// `pairs` has room for [rows/2 + groups + 1, outputs filled up to ROWS] floats: grad, its rows paired, ROWS columns at
// a time.
void product_backward_weights_bf16(const bf16 *grad, i64 grad_row, const bf16 *x, i64 x_row, const int32_t *ends,
                                   i64 groups, i64 outputs, i64 width, float *pairs, bf16 *grad_weights) {
    const i64 panels = (width + COLUMNS - 1) / COLUMNS, parts = (outputs + ROWS - 1) / ROWS;
    i64 most = 0;
    for (i64 g = 0; g < groups; ++g) most = std::max(most, i64(ends[g]) - start_of(ends, g));
    const auto part = [&](i64 g, i64 s) {
        const i64 start = start_of(ends, g);
        return pairs + ((start / 2 + g) * parts + (ends[g] - start + 1) / 2 * s) * ROWS;
    };
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
        for (i64 g = 0; g < groups; ++g) {
            const i64 start = start_of(ends, g);
            for (i64 s = 0; s < parts; ++s)
                pair_panel(grad + start * grad_row + s * ROWS, grad_row, ends[g] - start,
                           std::min(ROWS, outputs - s * ROWS), part(g, s), ROWS);
        }
        float *panel = room((most + 1) / 2 + 1);
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < groups * panels; ++task) {
            const i64 g = task / panels, first = task % panels * COLUMNS;
            const i64 start = start_of(ends, g), rows = ends[g] - start;
            const i64 some = std::min(COLUMNS, width - first);
            pair_panel(x + start * x_row + first, x_row, rows, some, panel, COLUMNS);
            for (i64 s = 0; s < parts; ++s)
                strips(reinterpret_cast<const bf16 *>(part(g, s)), 2, 2 * ROWS, std::min(ROWS, outputs - s * ROWS), panel,
                       (rows + 1) / 2, nullptr, some, grad_weights + (g * outputs + s * ROWS) * width + first, width);
        }
        std::free(panel);
    }
}
}

#else

extern "C" {
const i64 dot_products = 0;
void product_bf16(const bf16 *, i64, const bf16 *, const bf16 *, const int32_t *, i64, i64, i64, bf16 *) {}
void product_backward_bf16(const bf16 *, i64, const bf16 *, const int32_t *, i64, i64, i64, bf16 *) {}
void product_backward_weights_bf16(const bf16 *, i64, const bf16 *, i64, const int32_t *, i64, i64, i64, float *,
                                   bf16 *) {}
}

#endif
