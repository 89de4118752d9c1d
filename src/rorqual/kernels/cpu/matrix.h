// The processor's matrix unit (AMX, Intel since 2023) for weights of 8 bits with a scale an output; included in lowbit.h.
//
// A tile is 16 lines of 64 bytes. Two records of such weights are one as they lie, and the unit multiplies 16 lines of
// activations with it in 16 cycles, eight times what vector instructions do. Its sums are exact, over all inputs, so it
// can take activations finer than bytes: a row is two lines of digits (lowbit.h), at half that speed.
#pragma once

#include "classes.h"

#if defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define INLINE __attribute__((always_inline))
#define MATRIX __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,amx-tile,amx-int8")))

namespace matrix {

constexpr i64 LINES = 16, BYTES = 64, TILE = LINES * BYTES, ROWS = LINES / 2;

// What a thread does before and after it multiplies: all tiles are whole, 0 to 3 for sums, 4 and 5 for activations, 6 and
// 7 for weights. That takes as long as multiplying 8 rows with a panel.
MATRIX inline void begin() {
    struct {
        uint8_t palette = 1, start = 0, none[14] = {};
        uint16_t bytes[16] = {BYTES, BYTES, BYTES, BYTES, BYTES, BYTES, BYTES, BYTES};
        uint8_t lines[16] = {LINES, LINES, LINES, LINES, LINES, LINES, LINES, LINES};
    } tiles;
    asm volatile("" ::"r"(&tiles) : "memory");  // GCC's header says that 8 bytes of it are read
    _tile_loadconfig(&tiles);
}
MATRIX inline void end() { _tile_release(); }

// Rows, block by block, against panels. A block's sums become numbers while the unit multiplies the next block: a third
// faster than when all were stored first.
template <class F>
class Unit {
  public:
    Unit(const Quantised &x, F &f) : x(x), f(f) {}

    // Up to 2·ROWS rows, the first `row`, whose lines lie from `from` on, against P panels, the first `panel`. Of up to
    // ROWS the sums are taken in turns, since one waits for itself.
    template <int P, bool BOTH>
    MATRIX void block(const uint8_t *weights, i64 panel, const Outputs *outputs, const int8_t *from, i64 row, i64 rows,
                      Ahead ahead) {
        const i64 whole = x.groups / 2, steps = (x.groups + 1) / 2, size = x.groups * RECORD[INT8];
        const i64 each = (ahead.lines + steps - 1) / steps;
        const auto step = [&](i64 s, const uint8_t *here, i64 apart, bool odd) MATRIX INLINE {
            ahead.ask(each);
            const int8_t *first = from + s * BYTES;
            _tile_loadd(4, first, x.line);
            _tile_loadd(6, here, BYTES);
            if constexpr (P == 2) _tile_loadd(7, here + apart, BYTES);
            if (BOTH || !odd) {
                _tile_dpbsud(0, 4, 6);
                if constexpr (P == 2) _tile_dpbsud(1, 4, 7);
            } else {
                _tile_dpbsud(2, 4, 6);
                if constexpr (P == 2) _tile_dpbsud(3, 4, 7);
            }
            if constexpr (BOTH) {
                _tile_loadd(5, first + LINES * x.line, x.line);
                _tile_dpbsud(2, 5, 6);
                if constexpr (P == 2) _tile_dpbsud(3, 5, 7);
            }
            finish(s + 1 < steps ? (s + 1) * before.rows / steps / 4 * 4 : before.rows);  // a few: each time costs something
        };
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        i64 s = 0;
        for (; s + 2 <= whole; s += 2) {
            step(s, weights + s * TILE, size, false);
            step(s + 1, weights + (s + 1) * TILE, size, true);
        }
        if (s < whole) step(s, weights + s * TILE, size, false);
        if (whole < steps) {  // the second half of this tile is another panel's
            alignas(64) uint8_t last[P * TILE] = {};
            for (i64 p = 0; p < P; ++p) std::memcpy(last + p * TILE, weights + p * size + whole * TILE, TILE / 2);
            asm volatile("" ::"r"(last) : "memory");
            step(whole, last, TILE, true);
        }
        before = {from, row, rows, 0, panel, P, !BOTH, outputs};
        _tile_stored(0, exact[0][0], BYTES);
        _tile_stored(2, exact[1][0], BYTES);
        if constexpr (P == 2) {
            _tile_stored(1, exact[0][1], BYTES);
            _tile_stored(3, exact[1][1], BYTES);
        }
    }

    // One or two rows by vector instructions, which read weights from memory sooner than tiles do: 20 % faster.
    template <int R>
    MATRIX void few(const uint8_t *weights, i64 panel, i64 panels, const Outputs *outputs, const int8_t *from, Ahead ahead) {
        const i64 size = x.groups * RECORD[INT8], each = (ahead.lines + x.groups - 1) / x.groups;
        const i64 apart = panels == 1 ? 0 : size;
        __m512i sum[2 * R][BESIDE] = {};
        for (i64 g = 0; g < x.groups; ++g, weights += RECORD[INT8]) {
            ahead.ask(each);
            for (i64 j = 0; j < GROUP / 4; ++j) {
                const __m512i a = _mm512_loadu_si512(weights + 64 * j), b = _mm512_loadu_si512(weights + apart + 64 * j);
                for (int i = 0; i < 2 * R; ++i) {
                    int32_t four;
                    std::memcpy(&four, from + i * x.line + g * GROUP + 4 * j, sizeof four);
                    sum[i][0] = _mm512_dpbusd_epi32(sum[i][0], a, _mm512_set1_epi32(four));
                    sum[i][1] = _mm512_dpbusd_epi32(sum[i][1], b, _mm512_set1_epi32(four));
                }
            }
        }
        before = {from, 0, R, 0, panel, panels, false, outputs};
        for (int i = 0; i < 2 * R; ++i)
            for (int p = 0; p < BESIDE; ++p) std::memcpy(exact[0][p][i], &sum[i][p], sizeof(__m512i));
        finish();
    }

    MATRIX void finish() { finish(before.rows); }

  private:
    // The first `end` rows of the block before.
    MATRIX void finish(i64 end) {
        if (end <= before.done) return;
        if (before.twice || before.panels == 1) {
            for (i64 p = 0; p < before.panels; ++p)
                for (i64 r = before.done; r < end; ++r) number<true>(r, p);
        } else {
            for (i64 r = before.done; r < end; ++r) {
                number<false>(r, 0);
                number<false>(r, 1);
            }
        }
        before.done = end;
    }

    template <bool ANY>
    MATRIX INLINE void number(uint64_t r, i64 p) {
        const LineEnd &end = x.end_of(before.lines + 2 * r * x.line);
        const auto digit = [&](int which) MATRIX INLINE {
            integers sum;
            std::memcpy(&sum, exact[r / ROWS][p][r % ROWS * 2 + which], sizeof sum);
            if (ANY && before.twice) {
                integers other;
                std::memcpy(&other, exact[1][p][r * 2 + which], sizeof other);
                sum += other;
            }
            return __builtin_convertvector(sum + end.less[which], lanes);
        };
        const Outputs &to = before.outputs[p];
        const lanes y = (digit(0) * 256.0f + digit(1)) * end.scale;
        f(before.panel + p, before.row + i64(r), y * to.scale + to.more, to.some);
    }

    const Quantised &x;
    F &f;
    struct {
        const int8_t *lines;
        i64 row, rows, done, panel, panels;
        bool twice;  // two sums each
        const Outputs *outputs;
    } before{};
    alignas(64) int32_t exact[2][BESIDE][LINES][L];
};

// Rows that a list names, side by side, for one thread.
struct Gathered {
    i64 size = 0;
    int8_t *data = nullptr;

    ~Gathered() { std::free(data); }
    const int8_t *of(const Quantised &x, Which which, i64 rows) {
        const i64 row = 2 * x.line, wanted = (rows + ROWS - 1) * row;
        if (wanted > size) {
            std::free(data);
            data = static_cast<int8_t *>(std::aligned_alloc(BYTES, size = wanted));
        }
        for (i64 r = 0; r < rows; ++r) std::memcpy(data + r * row, x.lines(which[r]), row);
        asm volatile("" ::"r"(data) : "memory");
        return data;
    }
};

// Rows against the panels start to end of `weights`: f as in Weights::times; `next` is asked for from memory at the end, if
// it is not null.
template <class F, class G>
MATRIX void product(const uint8_t *weights, i64 start, i64 end, const uint8_t *next, const Quantised &x, Which which,
                    i64 rows, G outputs_of, F &f) {
    thread_local Gathered gathered;
    const int8_t *lines = which.list ? gathered.of(x, which, rows) : x.lines(which.first);
    const i64 blocks = (rows + 2 * ROWS - 1) / (2 * ROWS), panel = x.groups * RECORD[INT8];
    Outputs outputs[2][BESIDE];  // of these panels, and of those before, whose last block is not finished
    Unit<F> unit(x, f);
    for (i64 p = start; p < end; p += BESIDE) {
        const uint8_t *here = weights + p * panel, *after = p + BESIDE < end ? here + BESIDE * panel : next;
        const Ahead ahead{after, after ? BESIDE * panel / 64 : 0};
        const bool two = p + 1 < end;
        Outputs *own = outputs[(p - start) / BESIDE % 2];
        for (i64 c = 0; c <= two; ++c) own[c] = outputs_of(p + c);
        if (rows == 1) unit.template few<1>(here, p, 1 + two, own, lines, ahead);
        if (rows == 2) unit.template few<2>(here, p, 1 + two, own, lines, ahead);
        for (i64 b = 0; rows > 2 && b < blocks; ++b) {
            const i64 row = b * rows / blocks, some = (b + 1) * rows / blocks - row;
            const int8_t *from = lines + 2 * row * x.line;
            if (two && some > ROWS)
                unit.template block<2, true>(here, p, own, from, row, some, ahead.part(b, blocks));
            else if (two)
                unit.template block<2, false>(here, p, own, from, row, some, ahead.part(b, blocks));
            else if (some > ROWS)
                unit.template block<1, true>(here, p, own, from, row, some, ahead.part(b, blocks));
            else
                unit.template block<1, false>(here, p, own, from, row, some, ahead.part(b, blocks));
        }
    }
    unit.finish();
}

// Whether there is such a unit and Linux lends it, since a thread that uses it has 8 KB more to be kept.
inline bool usable() {
#if defined(__linux__)
    constexpr long REQUEST = 0x1023, TILES = 18;
    constexpr unsigned wanted = 1u << 24 | 1u << 25;  // AMX-TILE, AMX-INT8
    unsigned a, b, c, d = 0;
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    return allows(AMX) && (d & wanted) == wanted && syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
#else
    return false;
#endif
}

}  // namespace matrix
