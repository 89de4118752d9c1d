// AdamW on one tensor whose moments are stored in BF16 or in 8 bits, in one pass over memory. The numbers of a step and
// the codes are those of kernels/adamw.py, which has the references. Every element depends on its block alone, so any
// number of threads gives the same bits.

#include <algorithm>
#include <cmath>

#include "dtypes.h"

namespace {

constexpr i64 BLOCK = 256;  // elements that share a scale
constexpr int FIRST_BITS = 7, SECOND_BITS = 8;

struct Coefficients {
    float new_first, new_second, keep, rate, root, eps;
};

// Updates a weight and its moments.
inline void update(float &weight, float grad, float &m, float &v, const Coefficients &c) {
    m += (grad - m) * c.new_first;
    v += (grad * grad - v) * c.new_second;
    weight = weight * c.keep - c.rate * m / (std::sqrt(v) * c.root + c.eps);
}

inline uint32_t random_bits(uint32_t x) {  // MurmurHash3's last step
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

inline bf16 round_by_chance(float x, uint32_t random) {  // of 16 bits
    return {uint16_t((std::bit_cast<uint32_t>(x) + random) >> 16)};
}

void adamw(float *weight, const float *grad, bf16 *first, bf16 *second, i64 size, i64 key, const Coefficients c) {
    if (key < 0) {
#pragma omp parallel for simd schedule(static)
        for (i64 i = 0; i < size; ++i) {
            float m = load(first[i]), v = load(second[i]);
            update(weight[i], grad[i], m, v, c);
            store(first[i], m);
            store(second[i], v);
        }
    } else {
#pragma omp parallel for simd schedule(static)
        for (i64 i = 0; i < size; ++i) {
            float m = load(first[i]), v = load(second[i]);
            update(weight[i], grad[i], m, v, c);
            const uint32_t random = random_bits(uint32_t(i) * 0x9e3779b9u ^ uint32_t(key));
            first[i] = round_by_chance(m, random & 0xffff);
            second[i] = round_by_chance(v, random >> 16);
        }
    }
}

// The cell of x in [0, 1]: `bits` decades below 1, the k-th from below cut into 2^k equal cells; 1 is a cell of its own.
template <int bits>
inline int32_t cell(float x) {
    int32_t cells = 1 << (bits - 1);
#pragma GCC unroll 8  // or GCC does not vectorise the loops around it at -O2
    for (int k = 1; k < bits; ++k) {
        const bool below = x < 0.1f;
        x = below ? x * 10.0f : x;
        cells = below ? cells >> 1 : cells;
    }
    // 1.1111112 is above 1/0.9 by less than rounding, so that x = 1 arrives at `cells`, which begins the next decade.
    return cells - 1 + int32_t((x - 0.1f) * (float(cells) * 1.1111112f));
}

inline int32_t first_code(float x) {
    const int32_t magnitude = cell<FIRST_BITS>(std::fabs(x));
    const int32_t code = x < 0 ? 126 - (magnitude > 126 ? 126 : magnitude) : 128 + magnitude;
    return std::fabs(x) < 2.75e-7f ? 127 : code;  // half of the smallest magnitude
}

void adamw_8bit(float *weight, const float *grad, uint8_t *first, uint8_t *second, float *first_scale,
                float *second_scale, const float *first_table, const float *second_table, i64 size,
                const Coefficients c) {
#pragma omp parallel for schedule(static)
    for (i64 start = 0; start < size; start += BLOCK) {
        const i64 block = start / BLOCK, count = std::min(BLOCK, size - start);
        float *w = weight + start;
        const float *g = grad + start;
        uint8_t *m_codes = first + start, *v_codes = second + start;
        const float m_scale = first_scale[block], v_scale = second_scale[block];
        float m[BLOCK], v[BLOCK], m_top = 0, v_top = 0;
#pragma omp simd reduction(max : m_top, v_top)
        for (i64 i = 0; i < count; ++i) {
            m[i] = first_table[m_codes[i]] * m_scale;
            v[i] = second_table[v_codes[i]] * v_scale;
            update(w[i], g[i], m[i], v[i], c);
            const float magnitude = std::fabs(m[i]);
            m_top = magnitude > m_top ? magnitude : m_top;
            v_top = v[i] > v_top ? v[i] : v_top;
        }
        first_scale[block] = m_top;
        second_scale[block] = v_top;
        const float m_one = m_top > 0 ? m_top : 1, v_one = v_top > 0 ? v_top : 1;
#pragma omp simd
        for (i64 i = 0; i < count; ++i) m_codes[i] = uint8_t(first_code(m[i] / m_one));
#pragma omp simd
        for (i64 i = 0; i < count; ++i) v_codes[i] = uint8_t(cell<SECOND_BITS>(v[i] / v_one));
    }
}

}  // namespace

extern "C" {
void adamw_bf16(float *weight, const float *grad, bf16 *first, bf16 *second, i64 size, i64 key, float new_first,
                float new_second, float keep, float rate, float root, float eps) {
    adamw(weight, grad, first, second, size, key, {new_first, new_second, keep, rate, root, eps});
}

void adamw_8bit_f32(float *weight, const float *grad, uint8_t *first, uint8_t *second, float *first_scale,
                    float *second_scale, const float *first_table, const float *second_table, i64 size, float new_first,
                    float new_second, float keep, float rate, float root, float eps) {
    adamw_8bit(weight, grad, first, second, first_scale, second_scale, first_table, second_table, size,
               {new_first, new_second, keep, rate, root, eps});
}
}
