// Weights of 4 or 8 bits as they lie in memory, and rows of activations as bytes.
//
// Weights lie in panels of 16 outputs, a panel in records of 32 inputs: for every four inputs 16 outputs' weights side by
// side (at 4 bits inputs 4j… in the lower and 4j+16… in the upper halves of bytes), then 16 FP16 scales and, where there
// are minima, 16 of those. Activations become bytes with a scale for every 32, or for 96 beside weights with a scale an
// output, where nothing else interrupts the sums. Where one channel is a hundred times the rest, a scale for a whole token
// costs 5 % of accuracy, one for 96 costs 2 %, one for 32 costs 1 % (of a whole network: docs/design-notes.md).
#pragma once

#include <algorithm>

#include "lanes.h"

constexpr i64 GROUP = 32;     // inputs that share a scale
constexpr i64 COMMON = 3;     // groups of activations that share theirs, beside weights with a scale an output
constexpr i64 TOGETHER = 24;  // of many rows those that meet panels together
constexpr i64 PANELS = 6;     // that a thread takes at a time, most
constexpr i64 BESIDE = 2;     // panels that rows meet side by side
enum Format { INT4, INT4_MINS, INT8, INT8_GROUPS };
constexpr i64 RECORD[] = {288, 320, 512, 544};  // bytes

typedef uint8_t bytes __attribute__((vector_size(64)));

// 32 activations: bytes, their scale, their sum times -8 and -128 (by how much weights lie too high), and times the scale;
// where groups share a scale, the first has all that for all of them. One lies beside the other, and so does one group
// beside the next, so that a product reads a row from one address.
struct Group {
    int8_t numbers[GROUP];
    float scale;
    int32_t less_by_8, less_by_128;
    float scaled_sum;
};

extern "C" const i64 matrix_unit;  // whether there is one (matrix.h)
extern "C" void begin_products(), end_products();

// Every thread has one while it multiplies.
struct Multiplying {
    Multiplying() { begin_products(); }
    ~Multiplying() { end_products(); }
};

// What follows the digits of a row's first line: the row's scale, and the sums of both lines times -128 (by how much weights
// lie too high).
struct LineEnd {
    float scale;
    int32_t less[2];
};

// Rows of activations [rows, groups]. For the matrix unit and weights of 8 bits with a scale an output they lie as digits:
// numbers of 16 bits with one scale a row, as a line of their high bytes and one of their low ones, signed both, zeros up
// to a multiple of 64, and 64 bytes more, at whose beginning a LineEnd lies. That is more exact than groups of bytes.
struct Quantised {
    Group *data;
    i64 groups, line;  // bytes of a line of digits, or 0
    i64 common;        // groups that share a scale, which the first of them has, and their sums

    Quantised(uint8_t *room, i64 width, i64 format)
        : data(reinterpret_cast<Group *>(room)), groups(groups_of(width)), line(line_of(width, format)),
          common(common_of(format)) {}
    int8_t *lines(i64 row) const { return reinterpret_cast<int8_t *>(data) + 2 * row * line; }
    LineEnd &end_of(int8_t *of) const { return *reinterpret_cast<LineEnd *>(of + line - 64); }
    const LineEnd &end_of(const int8_t *of) const { return *reinterpret_cast<const LineEnd *>(of + line - 64); }
    static i64 common_of(i64 format) { return format == INT8 ? COMMON : 1; }
    static i64 groups_of(i64 width) { return (width + GROUP - 1) / GROUP; }
    static i64 line_of(i64 width, i64 format) { return matrix_unit && format == INT8 ? (width + 63) / 64 * 64 + 64 : 0; }
    // A multiple of 64; the unit reads eight rows of digits at a time, of which the last may be no rows.
    static i64 bytes(i64 rows, i64 width, i64 format) {
        const i64 line = line_of(width, format);
        return line ? (rows + 7) * 2 * line : (rows * groups_of(width) * i64(sizeof(Group)) + 63) / 64 * 64;
    }
};

// Numbers of rows: those from `first` on or, where there is a list, those it holds.
struct Which {
    i64 first;
    const int32_t *list;

    i64 operator[](i64 i) const { return list ? list[i] : first + i; }
    Which operator+(i64 i) const { return {first + i, list ? list + i : nullptr}; }
};

// What a thread reads next, in lines of the cache. Memory delivers it while rows meet the panels before it.
struct Ahead {
    const uint8_t *from;
    i64 lines;

    Ahead part(i64 i, i64 of) const { return {from + i * lines / of * 64, (i + 1) * lines / of - i * lines / of}; }
    void ask(i64 some) {
        some = std::min(some, lines);
        for (i64 i = 0; i < some; ++i, from += 64) __builtin_prefetch(from, 0, 2);
        lines -= some;
    }
};

// Some rows against one or BESIDE panels → the sums [rows, BESIDE] of their 16 outputs each, without channels' scales.
using Against = void (*)(i64 format, const uint8_t *panel, i64 panels, const Quantised &x, Which which, i64 rows,
                         lanes *sums, Ahead ahead);
extern "C" const Against against;

// What is done to a panel's outputs, `some` of which there are.
struct Outputs {
    lanes scale, more;
    i64 some;
};

#if defined(__AVX512F__)
#include "matrix.h"
#endif

namespace {

// Weights of one linear or of several experts, with a scale an output (`channels`) and a bias where there are some.
// Python writes these as six int64 (kernels/fused_decode.py).
template <class T>
struct Weights {
    const uint8_t *data;
    const float *channels;
    const T *bias;
    i64 format, outputs, width;

    explicit operator bool() const { return data != nullptr; }
    i64 panels() const { return (outputs + L - 1) / L; }
    i64 groups() const { return Quantised::groups_of(width); }
    const uint8_t *panel(i64 p) const { return data + p * groups() * RECORD[format]; }

    // Rows against panels of one expert: f(p, i, y, some) gets the outputs y of panel p, `some` of which there are, for
    // the i-th row. As many rows as the nearest cache holds meet all the panels before others come. While the first do,
    // the panels after them are asked for from memory, which bought 10 % with 32 rows and 8 bits; then those from `next`
    // on (if it is not negative), where the thread will probably go on.
    template <class F>
    void times(i64 start, i64 end, i64 next, const Quantised &x, Which which, i64 rows, F f) const {
        const i64 own = start / panels() * panels();  // the first of this expert's
        const auto outputs_of = [&](i64 p) {
            const i64 within = (p - own) * L;
            Outputs y{lanes{} + 1.0f, lanes{}, std::min(L, outputs - within)};
            if (channels) y.scale = load_lanes(channels + p * L);
            for (i64 t = 0; bias && t < y.some; ++t) y.more[t] = load(bias[within + t]);
            return y;
        };
#if defined(__AVX512F__)
        if (x.line)
            return matrix::product(data, start, end, next < 0 ? nullptr : panel(next), x, which, rows, outputs_of, f);
#endif
        const i64 lines = groups() * RECORD[format] / 64, size = rows <= 2 * TOGETHER ? rows : TOGETHER;
        for (i64 first = 0; first < rows; first += size) {
            const i64 count = std::min(size, rows - first);
            for (i64 p = start; p < end; p += BESIDE) {
                const i64 beside = std::min(BESIDE, end - p);
                lanes sums[2 * TOGETHER * BESIDE];
                Ahead ahead{panel(p + BESIDE), first == 0 ? lines * std::min(BESIDE, end - p - BESIDE) : 0};
                if (p + BESIDE >= end) ahead = {panel(next), first + size >= rows && next >= 0 ? lines * beside : 0};
                against(format, panel(p), beside, x, which + first, count, sums, ahead);
                for (i64 c = 0; c < beside; ++c) {
                    const Outputs to = outputs_of(p + c);
                    for (i64 r = 0; r < count; ++r)
                        f(p + c, first + r, sums[r * BESIDE + c] * to.scale + to.more, to.some);
                }
            }
        }
    }
};

// Panels that a thread takes at a time: as many as leave every thread three times some, an even number; where each of
// them takes a while (many rows, no matrix unit) the fewest, so that no thread waits long for another (3 to 5 % with 31
// rows).
inline i64 panels_at_once(i64 panels, i64 threads, i64 rows) {
    return rows > 8 && !matrix_unit ? BESIDE : std::clamp(panels / (3 * threads) / BESIDE * BESIDE, BESIDE, PANELS);
}

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

// `some` groups of 32 numbers, COMMON at most, of which lanes_of(i) are the i-th lanes → groups from `at` on, with one
// scale. With a NaN or an infinity among them they become zeros with a scale that is none; with nothing as large as 2^-121
// zeros too, since 127/most would be infinite, and processors differ in what integer they make of that.
template <class F>
inline void quantise(i64 some, F lanes_of, const Quantised &to, i64 at) {
    typedef int8_t small __attribute__((vector_size(16)));
    const auto many = [&](auto count) {  // a constant, so that the numbers stay in registers
        constexpr int lots = 2 * count;
        const auto greater = [](auto a, auto b) { return a > b ? a : b; };
        lanes x[lots];
        words sizes = {};
        for (int i = 0; i < lots; ++i) {
            x[i] = lanes_of(i);
            sizes = greater(sizes, std::bit_cast<words>(x[i]) & 0x7fffffffu);
        }
        const uint32_t bits = fold(sizes, greater);  // sizes order as their bits do; above are infinity and NaN
        const float most = std::bit_cast<float>(bits);
        const bool none = bits < 0x03000000u || bits >= 0x7f800000u;
        const float up = none ? 0.0f : 127.0f / most;
        integers sums = {};
        Group *const groups = to.data + at;
        for (int i = 0; i < lots; ++i) {
            const lanes number = ((none ? lanes{} : x[i]) * up + 12582912.0f) - 12582912.0f;  // to the nearest
            const integers n = __builtin_convertvector(number, integers);
            const small s = __builtin_convertvector(n, small);
            std::memcpy(groups[i / 2].numbers + i % 2 * L, &s, sizeof s);
            sums += n;
        }
        const int32_t sum = fold(sums, [](auto a, auto b) { return a + b; });
        groups->scale = bits >= 0x7f800000u ? std::bit_cast<float>(0x7fc00000u) : most / 127.0f;
        groups->less_by_8 = -8 * sum;
        groups->less_by_128 = -128 * sum;
        groups->scaled_sum = groups->scale * float(sum);
    };
    static_assert(COMMON == 3);
    if (some == 3) return many(std::integral_constant<int, 3>());
    if (some == 2) return many(std::integral_constant<int, 2>());
    many(std::integral_constant<int, 1>());
}

// One row as digits: x ≈ scale · (256 · high + low). A row with a NaN or an infinity becomes zeros with a scale that is none.
template <class T>
inline void quantise_digits(const T *from, i64 width, const Quantised &to, i64 row) {
    typedef int8_t small __attribute__((vector_size(16)));
    int8_t *const high = to.lines(row), *const low = high + to.line;
    const auto greater = [](auto a, auto b) { return a > b ? a : b; };
    const i64 whole = width / L * L;
    float left[L] = {};
    for (i64 j = whole; j < width; ++j) left[j - whole] = load(from[j]);
    const lanes rest = load_lanes(left);
    words most = std::bit_cast<words>(rest) & 0x7fffffffu;
    for (i64 j = 0; j < whole; j += L) most = greater(most, std::bit_cast<words>(load_lanes(from + j)) & 0x7fffffffu);
    const uint32_t bits = fold(most, greater);
    const bool none = bits < 0x07000000u || bits >= 0x7f800000u;  // 2^-113
    const float largest = std::bit_cast<float>(bits), up = none ? 0.0f : 32512.0f / largest;
    integers high_sum = {}, low_sum = {};
    const auto put = [&](i64 j, lanes x) {
        const integers n = __builtin_convertvector(((none ? lanes{} : x) * up + 12582912.0f) - 12582912.0f, integers);
        const integers h = (n + 128) >> 8, l = n - h * 256;
        const small sh = __builtin_convertvector(h, small), sl = __builtin_convertvector(l, small);
        std::memcpy(high + j, &sh, sizeof sh);
        std::memcpy(low + j, &sl, sizeof sl);
        high_sum += h;
        low_sum += l;
    };
    for (i64 j = 0; j < whole; j += L) put(j, load_lanes(from + j));
    for (i64 j = whole; j < to.line - 64; j += L) put(j, j < width ? rest : lanes{});
    const auto add = [](auto a, auto b) { return a + b; };
    const float scale = bits >= 0x7f800000u ? std::bit_cast<float>(0x7fc00000u) : largest / 32512.0f;
    to.end_of(high) = {scale, {-128 * fold(high_sum, add), -128 * fold(low_sum, add)}};
}

// One row of `width` numbers, with zeros up to a multiple of 32 or 64.
template <class T>
inline void quantise_row(const T *from, i64 width, const Quantised &to, i64 row) {
    if (to.line) return quantise_digits(from, width, to, row);
    for (i64 g = 0; g < to.groups; g += to.common) {
        const i64 some = std::min(to.common, to.groups - g), left = width - g * GROUP;
        const T *x = from + g * GROUP;
        const auto lanes_of = [&](i64 i) { return load_lanes(x + i * L); };
        if (left >= some * GROUP) {
            quantise(some, lanes_of, to, row * to.groups + g);
            continue;
        }
        float padded[COMMON * GROUP] = {};
        for (i64 j = 0; j < left; ++j) padded[j] = load(x[j]);
        quantise(some, [&](i64 i) { return load_lanes(padded + i * L); }, to, row * to.groups + g);
    }
}

}  // namespace
