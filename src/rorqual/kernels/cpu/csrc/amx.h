// INT8 weights on AMX (Intel since 2023); included by quantized_weight.h.
//
// A tile is 16 rows of 64 bytes. Two INT8 records in a row form one weight tile as they are stored, and AMX multiplies
// 16 rows of activations with it in 16 cycles, eight times the rate of vector instructions. Its int32 sums over all
// inputs are exact, so activations can be INT16 in two int8 planes (quantized_rows.h), at half that rate.
#pragma once

#include "cpu_class.h"

#if defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define INLINE __attribute__((always_inline))
#define AMX_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,amx-tile,amx-int8")))

namespace amx {

constexpr i64 TILE_ROWS = 16, TILE_COLS = 64, TILE_BYTES = TILE_ROWS * TILE_COLS, BLOCK_ROWS = TILE_ROWS / 2;

// Tile configuration, per thread: all tiles are full-sized; 0 to 3 hold sums, 4 and 5 activations, 6 and 7 weights.
// Configuring takes as long as multiplying 8 rows with a panel.
AMX_TARGET inline void begin() {
    struct {
        uint8_t palette = 1, start = 0, none[14] = {};
        uint16_t bytes[16] = {TILE_COLS, TILE_COLS, TILE_COLS, TILE_COLS, TILE_COLS, TILE_COLS, TILE_COLS, TILE_COLS};
        uint8_t lines[16] = {TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS};
    } config;
    asm volatile("" ::"r"(&config) : "memory");  // GCC's header declares a read of 8 bytes only
    _tile_loadconfig(&config);
}
AMX_TARGET inline void end() { _tile_release(); }

// Rows × panels, block by block. The epilogue of one block runs while AMX multiplies the next: a third faster than
// storing all sums first.
template <class F>
class TileGemm {
  public:
    TileGemm(const QuantizedRows &x, F &f) : x(x), f(f) {}

    // Up to 2·BLOCK_ROWS rows from index `row`, planes at `from`, × P panels from index `panel`. With at most
    // BLOCK_ROWS rows two sums alternate, because consecutive products into one tile wait for each other.
    template <int P, bool TWO_BLOCKS>
    AMX_TARGET void block(const uint8_t *weights, i64 panel, const Epilogue *epilogues, const int8_t *from, i64 row,
                          i64 rows, Prefetch prefetch) {
        const i64 whole = x.groups / 2, steps = (x.groups + 1) / 2, size = x.groups * RECORD_BYTES[INT8];
        const i64 lines_per_step = (prefetch.lines + steps - 1) / steps;
        const auto step = [&](i64 s, const uint8_t *here, i64 panel_stride, bool odd) AMX_TARGET INLINE {
            prefetch.issue(lines_per_step);
            const int8_t *first = from + s * TILE_COLS;
            _tile_loadd(4, first, x.plane_bytes);
            _tile_loadd(6, here, TILE_COLS);
            if constexpr (P == 2) _tile_loadd(7, here + panel_stride, TILE_COLS);
            if (TWO_BLOCKS || !odd) {
                _tile_dpbsud(0, 4, 6);
                if constexpr (P == 2) _tile_dpbsud(1, 4, 7);
            } else {
                _tile_dpbsud(2, 4, 6);
                if constexpr (P == 2) _tile_dpbsud(3, 4, 7);
            }
            if constexpr (TWO_BLOCKS) {
                _tile_loadd(5, first + TILE_ROWS * x.plane_bytes, x.plane_bytes);
                _tile_dpbsud(2, 5, 6);
                if constexpr (P == 2) _tile_dpbsud(3, 5, 7);
            }
            finish(s + 1 < steps ? (s + 1) * pending.rows / steps / 4 * 4
                                 : pending.rows);  // in fours, since each call has a cost
        };
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        i64 s = 0;
        for (; s + 2 <= whole; s += 2) {
            step(s, weights + s * TILE_BYTES, size, false);
            step(s + 1, weights + (s + 1) * TILE_BYTES, size, true);
        }
        if (s < whole) step(s, weights + s * TILE_BYTES, size, false);
        if (whole < steps) {  // the second half of this tile belongs to the next panel
            alignas(64) uint8_t last[P * TILE_BYTES] = {};
            for (i64 p = 0; p < P; ++p)
                std::memcpy(last + p * TILE_BYTES, weights + p * size + whole * TILE_BYTES, TILE_BYTES / 2);
            asm volatile("" ::"r"(last) : "memory");
            step(whole, last, TILE_BYTES, true);
        }
        pending = {from, row, rows, 0, panel, P, !TWO_BLOCKS, epilogues};
        _tile_stored(0, sums[0][0], TILE_COLS);
        _tile_stored(2, sums[1][0], TILE_COLS);
        if constexpr (P == 2) {
            _tile_stored(1, sums[0][1], TILE_COLS);
            _tile_stored(3, sums[1][1], TILE_COLS);
        }
    }

    // One or two rows with vector instructions, which stream weights from memory sooner than tile loads: 20 % faster.
    template <int R>
    AMX_TARGET void gemv(const uint8_t *weights, i64 panel, i64 panels, const Epilogue *epilogues, const int8_t *from,
                         Prefetch prefetch) {
        const i64 size = x.groups * RECORD_BYTES[INT8], lines_per_step = (prefetch.lines + x.groups - 1) / x.groups;
        const i64 panel_stride = panels == 1 ? 0 : size;
        __m512i acc[2 * R][PANEL_BLOCK] = {};
        for (i64 g = 0; g < x.groups; ++g, weights += RECORD_BYTES[INT8]) {
            prefetch.issue(lines_per_step);
            for (i64 j = 0; j < GROUP_SIZE / 4; ++j) {
                const __m512i a = _mm512_loadu_si512(weights + 64 * j),
                              b = _mm512_loadu_si512(weights + panel_stride + 64 * j);
                for (int i = 0; i < 2 * R; ++i) {
                    int32_t four;
                    std::memcpy(&four, from + i * x.plane_bytes + g * GROUP_SIZE + 4 * j, sizeof four);
                    acc[i][0] = _mm512_dpbusd_epi32(acc[i][0], a, _mm512_set1_epi32(four));
                    acc[i][1] = _mm512_dpbusd_epi32(acc[i][1], b, _mm512_set1_epi32(four));
                }
            }
        }
        pending = {from, 0, R, 0, panel, panels, false, epilogues};
        for (int i = 0; i < 2 * R; ++i)
            for (int p = 0; p < PANEL_BLOCK; ++p) std::memcpy(sums[0][p][i], &acc[i][p], sizeof(__m512i));
        finish();
    }

    AMX_TARGET void finish() { finish(pending.rows); }

  private:
    // Finishes the first `end` rows of the pending block.
    AMX_TARGET void finish(i64 end) {
        if (end <= pending.done) return;
        if (pending.two_sums || pending.panels == 1) {
            for (i64 p = 0; p < pending.panels; ++p)
                for (i64 r = pending.done; r < end; ++r) finish_row<true>(r, p);
        } else {
            for (i64 r = pending.done; r < end; ++r) {
                finish_row<false>(r, 0);
                finish_row<false>(r, 1);
            }
        }
        pending.done = end;
    }

    template <bool MAY_HAVE_TWO_SUMS>
    AMX_TARGET INLINE void finish_row(uint64_t r, i64 p) {
        const PlaneTrailer &end = x.trailer(pending.planes + 2 * r * x.plane_bytes);
        const auto plane_sum = [&](int plane) AMX_TARGET INLINE {
            i32x16 acc;
            std::memcpy(&acc, sums[r / BLOCK_ROWS][p][r % BLOCK_ROWS * 2 + plane], sizeof acc);
            if (MAY_HAVE_TWO_SUMS && pending.two_sums) {
                i32x16 other;
                std::memcpy(&other, sums[1][p][r * 2 + plane], sizeof other);
                acc += other;
            }
            return to_f32(acc + end.correction[plane]);
        };
        const Epilogue &to = pending.epilogues[p];
        const f32x16 y = (plane_sum(0) * 256.0f + plane_sum(1)) * end.scale;
        f(pending.panel + p, pending.row + i64(r), y * to.scale + to.bias, to.valid);
    }

    const QuantizedRows &x;
    F &f;
    struct {
        const int8_t *planes;
        i64 row, rows, done, panel, panels;
        bool two_sums;  // even and odd steps have sums of their own
        const Epilogue *epilogues;
    } pending{};
    alignas(64) int32_t sums[2][PANEL_BLOCK][TILE_ROWS][VLEN];
};

// Per-thread copy of the rows that an index list selects, contiguous for tile loads.
struct GatheredRows {
    i64 size = 0;
    int8_t *data = nullptr;

    ~GatheredRows() { std::free(data); }
    const int8_t *gather(const QuantizedRows &x, RowIndex index, i64 rows) {
        const i64 row = 2 * x.plane_bytes, needed = (rows + BLOCK_ROWS - 1) * row;
        if (needed > size) {
            std::free(data);
            data = static_cast<int8_t *>(std::aligned_alloc(TILE_COLS, size = needed));
        }
        for (i64 r = 0; r < rows; ++r) std::memcpy(data + r * row, x.planes(index[r]), row);
        asm volatile("" ::"r"(data) : "memory");
        return data;
    }
};

// Rows × panels [start, end) of `weights`, f as in QuantizedLinear::gemm; prefetches from `next` at the end, if not
// null.
template <class F, class G>
AMX_TARGET void gemm(const uint8_t *weights, i64 start, i64 end, const uint8_t *next, const QuantizedRows &x,
                     RowIndex index, i64 rows, G epilogue_of, F &f) {
    thread_local GatheredRows gathered;
    const int8_t *planes = index.list ? gathered.gather(x, index, rows) : x.planes(index.first);
    const i64 blocks = (rows + 2 * BLOCK_ROWS - 1) / (2 * BLOCK_ROWS), panel = x.groups * RECORD_BYTES[INT8];
    Epilogue epilogues[2][PANEL_BLOCK];  // of these panels, and of the panels before, whose last block is still pending
    TileGemm<F> tiles(x, f);
    for (i64 p = start; p < end; p += PANEL_BLOCK) {
        const uint8_t *here = weights + p * panel,
                      *following = p + PANEL_BLOCK < end ? here + PANEL_BLOCK * panel : next;
        const Prefetch prefetch{following, following ? PANEL_BLOCK * panel / 64 : 0};
        const bool pair = p + 1 < end;
        Epilogue *current = epilogues[(p - start) / PANEL_BLOCK % 2];
        for (i64 c = 0; c <= pair; ++c) current[c] = epilogue_of(p + c);
        if (rows == 1) tiles.template gemv<1>(here, p, 1 + pair, current, planes, prefetch);
        if (rows == 2) tiles.template gemv<2>(here, p, 1 + pair, current, planes, prefetch);
        for (i64 b = 0; rows > 2 && b < blocks; ++b) {
            const i64 row = b * rows / blocks, count = (b + 1) * rows / blocks - row;
            const int8_t *from = planes + 2 * row * x.plane_bytes;
            if (pair && count > BLOCK_ROWS)
                tiles.template block<2, true>(here, p, current, from, row, count, prefetch.slice(b, blocks));
            else if (pair)
                tiles.template block<2, false>(here, p, current, from, row, count, prefetch.slice(b, blocks));
            else if (count > BLOCK_ROWS)
                tiles.template block<1, true>(here, p, current, from, row, count, prefetch.slice(b, blocks));
            else
                tiles.template block<1, false>(here, p, current, from, row, count, prefetch.slice(b, blocks));
        }
    }
    tiles.finish();
}

// Whether the processor has AMX and Linux grants it: the first use has to be requested, since a context grows by 8 KB.
inline bool available() {
#if defined(__linux__)
    constexpr long REQUEST = 0x1023, TILES = 18;
    constexpr unsigned needed = 1u << 24 | 1u << 25;  // AMX-TILE, AMX-INT8
    unsigned a, b, c, d = 0;
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    return allows(AMX) && (d & needed) == needed && syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
#else
    return false;
#endif
}

}  // namespace amx
