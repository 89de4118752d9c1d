// A whole decode step of a dense network with packed weights: one new token for each of a few sequences, from their
// tokens to logits, in one call. A step of PyTorch's operators spends as long between them as in them.
//
// All threads stay in it from beginning to end and meet at barriers of their own, five a layer: they wait in a loop, and
// give the processor up after a while, so that another program on one of the cores costs no more than its share. What is
// to be done between two barriers is taken in small pieces by whoever comes.

#include <atomic>
#include <cstdlib>
#include <omp.h>
#include <sched.h>

#include "attend.h"
#include "lowbit.h"

namespace {

// Five numbers and three addresses are 8 bytes each: Python writes these as rows of int64 (kernels/step.py).
template <class T>
struct Weights {
    const uint8_t *data;
    const float *channels;
    const T *bias;
    i64 format, outputs, width;

    i64 panels() const { return (outputs + L - 1) / L; }
    i64 groups() const { return (width + GROUP - 1) / GROUP; }
    const uint8_t *panel(i64 p) const { return data + p * groups() * RECORD[format]; }
};

template <class T>
struct Layer {
    const T *norm;
    Weights<T> q, k, v, o;
    const T *norm2;
    Weights<T> gate, up, down;
    T *keys, *values;  // of the cache: [blocks, block, groups, width]
};

template <class T>
struct Network {
    const Layer<T> *layers;
    i64 depth, hidden, heads, groups, width, interleave;
    const T *norm;
    Weights<T> embedding, head;
    const float *frequencies;  // [width / 2]
};

class Team {
  public:
    // Whoever arrives last lets all go on, with the pieces to be handed out anew.
    void meet(int size) {
        const int before = round.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            arrived.store(0, std::memory_order_relaxed);
            next.store(0, std::memory_order_relaxed);
            round.store(before + 1, std::memory_order_release);
            return;
        }
        for (int turn = 0; round.load(std::memory_order_acquire) == before; ++turn) {
            if (turn < 4000) {  // some ten microseconds, longer than the pieces differ
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
            } else {
                sched_yield();
            }
        }
    }

    // Calls f with every number below `count` that nobody else has taken, `some` at a time.
    template <class F>
    void share(i64 count, i64 some, F f) {
        for (i64 start; (start = next.fetch_add(some, std::memory_order_relaxed)) < count;)
            for (i64 i = start; i < std::min(count, start + some); ++i) f(i);
    }

  private:
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> round{0};
    alignas(64) std::atomic<i64> next{0};
};

inline float inverse_root_mean_square(const float *x, i64 width, float eps) {
    lanes sum = {};
    i64 j = 0;
    for (; j + L <= width; j += L) {
        const lanes a = load_lanes(x + j);
        sum += a * a;
    }
    float all = fold(sum, [](float a, float b) { return a + b; });
    for (; j < width; ++j) all += x[j] * x[j];
    return 1.0f / std::sqrt(all / float(width) + eps);
}

// x / rms(x) · weight → group by group.
template <class T>
void quantise_normed(const float *x, const T *weight, i64 width, float eps, const Quantised &to, i64 row) {
    const float scale = inverse_root_mean_square(x, width, eps);
    for (i64 g = 0; g < to.groups; ++g) {
        float y[GROUP] = {};
        for (i64 j = 0; j < std::min(GROUP, width - g * GROUP); ++j)
            y[j] = x[g * GROUP + j] * scale * load(weight[g * GROUP + j]);
        quantise(load_lanes(y), load_lanes(y + L), to, row * to.groups + g);
    }
}

// silu(gate) · up → group by group.
void quantise_gated(const float *gate, const float *up, i64 width, const Quantised &to, i64 row) {
    for (i64 g = 0; g < to.groups; ++g) {
        float y[GROUP] = {};
        for (i64 j = 0; j < std::min(GROUP, width - g * GROUP); ++j) {
            const float a = gate[g * GROUP + j];
            y[j] = a / (1.0f + exponential(-a)) * up[g * GROUP + j];
        }
        quantise(load_lanes(y), load_lanes(y + L), to, row * to.groups + g);
    }
}

// Row r of packed weights, as numbers.
template <class T>
void unpack_row(const Weights<T> &w, i64 r, float *out) {
    const i64 p = r / L, t = r % L;
    const bool four = w.format == INT4 || w.format == INT4_MINS;
    for (i64 g = 0; g < w.groups(); ++g) {
        const uint8_t *record = w.panel(p) + g * RECORD[w.format], *after = record + (four ? 256 : 512);
        const float scale = w.format == INT8 ? w.channels[r] : halves_plain(after)[t];
        const float least = w.format == INT4_MINS ? halves_plain(after + 32)[t] : scale * (four ? -8.0f : -128.0f);
        for (i64 j = 0; j < std::min(GROUP, w.width - g * GROUP); ++j) {
            const i64 four_of = j / 4, at = (four ? four_of % 4 : four_of) * 64 + t * 4 + j % 4;
            const int q = !four ? record[at] : four_of < 4 ? record[at] & 15 : record[at] >> 4;
            out[g * GROUP + j] = scale * float(q) + least;
        }
    }
}

// Turns the pairs of a head, side by side or in two halves, by their angles (RoFormer); the result is in two halves, as
// kernels/rotate.py leaves it.
void turn_pairs(const float *x, const float *cos, const float *sin, i64 width, bool interleave, float *out) {
    const i64 half = width / 2;
    for (i64 j = 0; j < half; ++j) {
        const i64 first = interleave ? 2 * j : j, second = interleave ? 2 * j + 1 : half + j;
        const float a = x[first], b = x[second];
        out[j] = a * cos[j] - b * sin[j];
        out[half + j] = b * cos[j] + a * sin[j];
    }
}

// tokens [rows] at places lengths - 1 of their sequences → logits [rows, outputs of the head].
template <class T>
void decode_step(const Network<T> *network, const i64 *tokens, i64 rows, const int32_t *tables, i64 table_row, i64 block,
                 const int32_t *lengths, float factor, float scale, float eps, float *logits) {
    const Network<T> &net = *network;
    const i64 H = net.heads, G = net.groups, W = net.width, D = net.hidden, share = H / G, half = W / 2;
    const i64 shift = std::countr_zero(uint64_t(block)), inner = net.layers[0].gate.outputs;
    i64 longest = 0;
    for (i64 i = 0; i < rows; ++i) longest = std::max(longest, i64(lengths[i]));
    const i64 stride = (longest + L - 1) / L * L, widest = std::max({D, H * W, inner}), most = (widest + GROUP - 1) / GROUP;
    float *const x = static_cast<float *>(std::malloc(sizeof(float) * rows * (D + 2 * H * W + 2 * G * W + 2 * inner + W)));
    float *const q = x + rows * D, *const k = q + rows * H * W, *const v = k + rows * G * W, *const o = v + rows * G * W;
    float *const gate = o + rows * H * W, *const up = gate + rows * inner, *const cos = up + rows * inner;
    float *const sin = cos + rows * half;
    uint8_t *const shared = static_cast<uint8_t *>(std::malloc(40 * rows * most));
    const bool alone = rows <= 2;  // then every thread quantises for itself, which is quicker than waiting
    Team team;
#pragma omp parallel
    {
        const int size = omp_get_num_threads();
        uint8_t *const own = alone ? static_cast<uint8_t *>(std::malloc(40 * rows * most)) : shared;
        lanes *keys = static_cast<lanes *>(std::aligned_alloc(64, sizeof(lanes) * W));
        float *queries = static_cast<float *>(std::malloc(sizeof(float) * share * (W + stride) + sizeof(float) * W));
        float *weights = queries + share * W, *turned = weights + share * stride;

        // Rows made ready by f, then their products with several weights; each either written or added.
        const auto products = [&](i64 width, auto f, std::initializer_list<std::pair<const Weights<T> *, float *>> parts,
                                  bool add) {
            const Quantised ready(own, rows, (width + GROUP - 1) / GROUP);
            if (alone) {
                for (i64 r = 0; r < rows; ++r) f(ready, r);
            } else {
                team.share(rows, 1, [&](i64 r) { f(ready, r); });
                team.meet(size);
            }
            i64 panels = 0;
            for (const auto &part : parts) panels += part.first->panels();
            team.share(panels, 2, [&](i64 task) {
                auto part = parts.begin();
                for (; task >= part->first->panels(); ++part) task -= part->first->panels();
                const Weights<T> &w = *part->first;
                const i64 some = std::min(L, w.outputs - task * L);
                for (i64 first = 0; first < rows; first += 64) {
                    lanes sums[64];
                    const i64 count = std::min(i64(64), rows - first);
                    against(int(w.format), w.panel(task), ready, first, count, sums);
                    for (i64 r = 0; r < count; ++r) {
                        float *to = part->second + (first + r) * w.outputs + task * L;
                        for (i64 t = 0; t < some; ++t) {
                            float y = sums[r][t];
                            if (w.channels) y *= w.channels[task * L + t];
                            if (w.bias) y += load(w.bias[task * L + t]);
                            to[t] = add ? to[t] + y : y;
                        }
                    }
                }
            });
            team.meet(size);
        };

        team.share(rows, 1, [&](i64 r) {
            unpack_row(net.embedding, tokens[r], x + r * D);
            for (i64 j = 0; j < half; ++j) {
                const float angle = float(lengths[r] - 1) * net.frequencies[j];
                cos[r * half + j] = std::cos(angle) * factor;
                sin[r * half + j] = std::sin(angle) * factor;
            }
        });
        team.meet(size);
        for (i64 l = 0; l < net.depth; ++l) {
            const Layer<T> &layer = net.layers[l];
            products(
                D, [&](const Quantised &to, i64 r) { quantise_normed(x + r * D, layer.norm, D, eps, to, r); },
                {{&layer.q, q}, {&layer.k, k}, {&layer.v, v}}, false);
            team.share(rows * G, 1, [&](i64 task) {
                const i64 r = task / G, g = task % G, place = lengths[r] - 1;
                const int32_t *table = tables + r * table_row;
                const i64 at = ((table[place >> shift] << shift) + (place & (block - 1))) * G * W + g * W;
                turn_pairs(k + task * W, cos + r * half, sin + r * half, W, net.interleave, turned);
                for (i64 j = 0; j < W; ++j) {
                    store(layer.keys[at + j], turned[j]);
                    store(layer.values[at + j], v[task * W + j]);
                }
                for (i64 h = 0; h < share; ++h)
                    turn_pairs(q + (task * share + h) * W, cos + r * half, sin + r * half, W, net.interleave, queries + h * W);
                const Places<T> here{layer.keys + g * W, block * G * W, G * W, table, lengths[r], shift};
                const Places<T> value{layer.values + g * W, block * G * W, G * W, table, lengths[r], shift};
                attend(queries, here, here, value, share, W, 0, W, scale, keys, weights, stride, o + task * share * W);
            });
            team.meet(size);
            products(
                H * W, [&](const Quantised &to, i64 r) { quantise_row(o + r * H * W, H * W, to, r); }, {{&layer.o, x}}, true);
            products(
                D, [&](const Quantised &to, i64 r) { quantise_normed(x + r * D, layer.norm2, D, eps, to, r); },
                {{&layer.gate, gate}, {&layer.up, up}}, false);
            products(
                inner, [&](const Quantised &to, i64 r) { quantise_gated(gate + r * inner, up + r * inner, inner, to, r); },
                {{&layer.down, x}}, true);
        }
        products(
            D, [&](const Quantised &to, i64 r) { quantise_normed(x + r * D, net.norm, D, eps, to, r); },
            {{&net.head, logits}}, false);
        if (alone) std::free(own);
        std::free(keys);
        std::free(queries);
    }
    std::free(shared);
    std::free(x);
}

}  // namespace

#define P(T) (const Network<T> *network, const i64 *tokens, i64 rows, const int32_t *tables, i64 table_row, i64 block,        \
              const int32_t *lengths, float factor, float scale, float eps, float *logits)
BOTH(void, decode_step, P, (network, tokens, rows, tables, table_row, block, lengths, factor, scale, eps, logits))
#undef P
