// Weights of 4 or 8 bits as they lie in memory, and rows of activations as bytes.
//
// Weights lie in panels of 16 outputs, a panel in records of 32 inputs: for every four inputs 16 outputs' weights side by
// side (at 4 bits inputs 4j… in the lower and 4j+16… in the upper halves of bytes), then 16 FP16 scales and, where there
// are minima, 16 of those. Activations become bytes with a scale for every 32: one for a whole token costs 5 % of
// accuracy where one channel is a hundred times the rest, one for 32 costs 1 % (of a whole network: docs/measured.md).
#pragma once

#include <algorithm>

#include "lanes.h"

constexpr i64 GROUP = 32;     // columns that share a scale
constexpr i64 TOGETHER = 24;  // rows that meet panels together
constexpr i64 PANELS = 3;     // that a thread takes at a time
enum Format { INT4, INT4_MINS, INT8, INT8_GROUPS };
constexpr i64 RECORD[] = {288, 320, 512, 544};  // bytes

typedef uint8_t bytes __attribute__((vector_size(64)));

// 32 activations: bytes, their scale, minus eight times their sum, and their sum times the scale. One lies beside the
// other, and so does one group beside the next, so that a product reads a row from one address.
struct Group {
    int8_t numbers[GROUP];
    float scale;
    int32_t less;
    float scaled_sum;
    int32_t unused;  // up to a multiple of 16 bytes
};

// Rows of activations [rows, groups].
struct Quantised {
    Group *data;
    i64 groups;

    Quantised(uint8_t *room, i64 groups) : data(reinterpret_cast<Group *>(room)), groups(groups) {}
};

// Numbers of rows: those from `first` on or, where there is a list, those it holds.
struct Which {
    i64 first;
    const int32_t *list;

    i64 operator[](i64 i) const { return list ? list[i] : first + i; }
    Which operator+(i64 i) const { return {first + i, list ? list + i : nullptr}; }
};

// Some rows against a panel → the sums [rows] of its 16 outputs, without channels' scales.
using Against = void (*)(i64 format, const uint8_t *panel, const Quantised &x, Which which, i64 rows, lanes *sums);
extern "C" const Against against;

namespace {

// Weights of one linear or of several experts, with a scale an output (`channels`) and a bias where there are some.
// Python writes these as six int64 (kernels/step.py).
template <class T>
struct Weights {
    const uint8_t *data;
    const float *channels;
    const T *bias;
    i64 format, outputs, width;

    explicit operator bool() const { return data != nullptr; }
    i64 panels() const { return (outputs + L - 1) / L; }
    i64 groups() const { return (width + GROUP - 1) / GROUP; }
    const uint8_t *panel(i64 p) const { return data + p * groups() * RECORD[format]; }

    // Rows against panels: f(p, i, y, some) gets the outputs y of panel p, `some` of which there are, for the i-th row. As
    // many rows as the nearest cache holds meet all the panels before others come.
    template <class F>
    void times(i64 start, i64 end, const Quantised &x, Which which, i64 rows, F f) const {
        for (i64 first = 0; first < rows; first += TOGETHER) {
            for (i64 p = start; p < end; ++p) {
                const i64 within = p % panels() * L, some = std::min(L, outputs - within);
                const i64 count = std::min(TOGETHER, rows - first);
                lanes sums[TOGETHER], more = {};
                for (i64 t = 0; bias && t < some; ++t) more[t] = load(bias[within + t]);
                against(format, panel(p), x, which + first, count, sums);
                for (i64 r = 0; r < count; ++r)
                    f(p, first + r, (channels ? sums[r] * load_lanes(channels + p * L) : sums[r]) + more, some);
            }
        }
    }
};

// The first `some` of the lanes.
template <class T>
inline void store_some(T *to, lanes x, i64 some) {
    if (some == L) return store_lanes(to, x);
    for (i64 t = 0; t < some; ++t) store(to[t], x[t]);
}

// 16 FP16 numbers, finite ones.
inline lanes halves_plain(const uint8_t *from) {
    halves h;
    std::memcpy(&h, from, sizeof h);
    const words u = __builtin_convertvector(h, words);
    const lanes size = std::bit_cast<lanes>((u & 0x7fff) << 13) * std::bit_cast<float>(uint32_t(239) << 23);
    return std::bit_cast<lanes>(std::bit_cast<words>(size) | (u & 0x8000) << 16);
}

// 32 numbers → group `at`. A group with a NaN or an infinity becomes zeros with a scale that is none.
inline void quantise(lanes a, lanes b, const Quantised &to, i64 at) {
    typedef int8_t small __attribute__((vector_size(16)));
    const words ua = std::bit_cast<words>(a) & 0x7fffffffu, ub = std::bit_cast<words>(b) & 0x7fffffffu;
    const auto greater = [](auto a, auto b) { return a > b ? a : b; };
    const uint32_t bits = fold(greater(ua, ub), greater);  // sizes order as their bits do; above are infinity and NaN
    const float most = std::bit_cast<float>(bits);
    if (bits == 0 || bits >= 0x7f800000u) a = b = lanes{};
    const float up = bits == 0 || bits >= 0x7f800000u ? 0.0f : 127.0f / most;
    const integers na = __builtin_convertvector((a * up + 12582912.0f) - 12582912.0f, integers);  // to the nearest
    const integers nb = __builtin_convertvector((b * up + 12582912.0f) - 12582912.0f, integers);
    const small sa = __builtin_convertvector(na, small), sb = __builtin_convertvector(nb, small);
    Group &group = to.data[at];
    std::memcpy(group.numbers, &sa, sizeof sa);
    std::memcpy(group.numbers + L, &sb, sizeof sb);
    const int32_t sum = fold(na + nb, [](auto a, auto b) { return a + b; });
    group.scale = bits >= 0x7f800000u ? std::bit_cast<float>(0x7fc00000u) : most / 127.0f;
    group.less = -8 * sum;
    group.scaled_sum = group.scale * float(sum);
}

// One row of `width` numbers, with zeros up to a multiple of 32.
template <class T>
inline void quantise_row(const T *from, i64 width, const Quantised &to, i64 row) {
    for (i64 g = 0; g < to.groups; ++g) {
        const i64 some = std::min(GROUP, width - g * GROUP);
        if (some == GROUP) {
            quantise(load_lanes(from + g * GROUP), load_lanes(from + g * GROUP + L), to, row * to.groups + g);
        } else {
            float x[GROUP] = {};
            for (i64 j = 0; j < some; ++j) x[j] = load(from[g * GROUP + j]);
            quantise(load_lanes(x), load_lanes(x + L), to, row * to.groups + g);
        }
    }
}

}  // namespace
