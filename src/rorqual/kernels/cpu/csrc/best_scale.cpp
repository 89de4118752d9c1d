// Which of some scales rounds a group of 32 weights to 4 bits with the least squared error (precision/quantize.py).

#include <limits>

#include "simd.h"

namespace {

// Σ(scale · q − x)² of one vector, q the nearest to x / scale of −8 … 7.
inline f32x16 squared_errors(f32x16 x, float scale) {
    const f32x16 lowest = f32x16{} - 8.0f, highest = f32x16{} + 7.0f;
    f32x16 q = (x / scale + 12582912.0f) - 12582912.0f;  // round to nearest
    q = blend(less(q, lowest), lowest, q);
    q = blend(less(highest, q), highest, q);
    const f32x16 error = q * scale - x;
    return error * error;
}

}  // namespace

// groups [count, 32]; scales [count, candidates], 0 where all weights become 0; best [count].
extern "C" void best_scale_f32(const float *groups, const float *scales, i64 count, i64 candidates, float *best) {
#pragma omp parallel for if (count * candidates > 1 << 10)
    for (i64 i = 0; i < count; ++i) {
        const f32x16 low = load_f32x16(groups + 32 * i), high = load_f32x16(groups + 32 * i + VLEN);
        float least = std::numeric_limits<float>::infinity();
        best[i] = 0.0f;
        for (i64 c = 0; c < candidates; ++c) {
            const float scale = scales[i * candidates + c];
            if (scale == 0.0f) continue;
            const float error =
                reduce(squared_errors(low, scale) + squared_errors(high, scale), [](auto a, auto b) { return a + b; });
            if (error < least) least = error, best[i] = scale;
        }
    }
}
