// The products of a decode step: few rows against large BF16 weights that are used once and lie as the model has them.
//
// A library packs its weights first, or not at all: for 64 rows oneDNN reaches half the speed of its large products.
// Here 32 outputs' weights are turned on their side in the first cache, multiplied with all the rows there are, and
// forgotten. Needs the processor's BF16 dot products (AVX-512 BF16); without them the caller's reference runs.

#include <cmath>
#include <cstdlib>
#include <omp.h>

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

// R rows of x against a panel; on the way `ahead`, the weights of the next one, are asked for from memory.
template <int R>
WITH_DOT_PRODUCTS void strip(const bf16 *x, i64 stride, const float *panel, i64 pairs, const float *bias, i64 some,
                             bf16 *out, i64 out_stride, const char *ahead, i64 lines) {
    __m512 sum[R][2];
    for (int r = 0; r < R; ++r) {
        sum[r][0] = _mm512_loadu_ps(bias);
        sum[r][1] = _mm512_loadu_ps(bias + L);
    }
    const i64 every = lines ? (pairs / lines > 1 ? pairs / lines : 1) : pairs + 1;
    i64 next = every;
    for (i64 p = 0; p < pairs; ++p) {
        const __m512bh a = (__m512bh)_mm512_load_ps(panel + p * COLUMNS);
        const __m512bh b = (__m512bh)_mm512_load_ps(panel + p * COLUMNS + L);
        for (int r = 0; r < R; ++r) {
            int32_t two;
            std::memcpy(&two, x + r * stride + 2 * p, sizeof two);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], a, both);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], b, both);
        }
        if (p == next) {
            _mm_prefetch(ahead, _MM_HINT_T1);
            ahead += 64;
            next += every;
        }
    }
    const __mmask16 low = some >= L ? 0xffff : __mmask16((1u << some) - 1);
    const __mmask16 high = some >= COLUMNS ? 0xffff : some > L ? __mmask16((1u << (some - L)) - 1) : 0;
    for (int r = 0; r < R; ++r) {
        _mm256_mask_storeu_epi16(out + r * out_stride, low, (__m256i)_mm512_cvtneps_pbh(sum[r][0]));
        _mm256_mask_storeu_epi16(out + r * out_stride + L, high, (__m256i)_mm512_cvtneps_pbh(sum[r][1]));
    }
}

using Strip = decltype(&strip<1>);
constexpr Strip STRIPS[ROWS] = {strip<1>, strip<2>, strip<3>, strip<4>,  strip<5>,  strip<6>,
                                strip<7>, strip<8>, strip<9>, strip<10>, strip<11>, strip<12>};

}  // namespace

extern "C" {
const i64 dot_products = [] {
    __builtin_cpu_init();
    return i64(__builtin_cpu_supports("avx512bf16") != 0);
}();

// x [rows, width] in groups that end at ends[g], weights [groups, outputs, width], bias [groups, outputs] or none →
// out [rows, outputs]; width is even. A group without rows costs nothing.
void few_rows_bf16(const bf16 *x, i64 stride, const bf16 *weights, const bf16 *bias, const int32_t *ends, i64 groups,
                   i64 outputs, i64 width, bf16 *out) {
    const i64 panels = (outputs + COLUMNS - 1) / COLUMNS, lines = COLUMNS * width / 32;
#pragma omp parallel
    {
        float *panel = static_cast<float *>(std::aligned_alloc(64, sizeof(float) * COLUMNS * (width / 2)));
#pragma omp for schedule(static)
        for (i64 task = 0; task < groups * panels; ++task) {
            const i64 g = task / panels, first = task % panels * COLUMNS;
            const i64 start = g ? ends[g - 1] : 0, rows = ends[g] - start;
            if (rows <= 0) continue;
            const i64 some = outputs - first < COLUMNS ? outputs - first : COLUMNS;
            float biases[COLUMNS] = {};
            if (bias)
                for (i64 j = 0; j < some; ++j) biases[j] = load(bias[g * outputs + first + j]);
            const bf16 *here = weights + (g * outputs + first) * width;
            turn_panel(here, some, width, panel);
            const i64 strips = (rows + ROWS - 1) / ROWS;
            const char *ahead = reinterpret_cast<const char *>(here + COLUMNS * width);
            for (i64 s = 0; s < strips; ++s) {
                const i64 at = start + s * rows / strips, some_rows = start + (s + 1) * rows / strips - at;
                const i64 from = s * lines / strips, to = task + 1 < groups * panels ? (s + 1) * lines / strips : from;
                STRIPS[some_rows - 1](x + at * stride, stride, panel, width / 2, biases, some,
                                      out + at * outputs + first, outputs, ahead + from * 64, to - from);
            }
        }
        std::free(panel);
    }
}
}

#else

extern "C" {
const i64 dot_products = 0;
void few_rows_bf16(const bf16 *, i64, const bf16 *, const bf16 *, const int32_t *, i64, i64, i64, bf16 *) {}
}

#endif
