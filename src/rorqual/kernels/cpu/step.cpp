// A whole step of a network with packed weights: some new tokens of a few sequences, from tokens to logits, in one call.
// A step of PyTorch's operators spends as long between them as in them.
//
// All threads stay in it from beginning to end (team.h). What is to be done between two barriers is taken in small pieces
// by whoever comes; of one or two rows, every thread makes the small functions for itself, which is quicker than waiting.

#include <cstdlib>
#include <memory>
#include <omp.h>
#include <vector>

#include "attend.h"
#include "cache8.h"
#include "network.h"
#include "team.h"

namespace {

// The rows' places in the cache.
struct Pasts {
    const int32_t *tables;
    i64 table_row, block;
    const int32_t *lengths;  // with the new token

    const int32_t *table(i64 r) const { return tables + r * table_row; }
    i64 shift() const { return std::countr_zero(uint64_t(block)); }
    i64 last(i64 r) const {  // where the new token lies
        const i64 place = lengths[r] - 1;
        return i64(table(r)[place >> shift()]) * block + (place & (block - 1));
    }
    i64 longest(i64 rows) const { return *std::max_element(lengths, lengths + rows); }
    // Whether row r is the next token of the sequence of row r - 1. Sequences never share the block they write to.
    bool goes_on(i64 r) const {
        const i64 blocks = (lengths[r - 1] + block - 1) / block;
        return lengths[r] == lengths[r - 1] + 1 && std::equal(table(r), table(r) + blocks, table(r - 1));
    }
};

// Floats, and bytes for quantised rows, that are handed out once.
class Room {
  public:
    explicit Room(i64 size) : owner(static_cast<float *>(std::aligned_alloc(64, (size + 63) / 64 * 64)), std::free) {}
    float *take(i64 count) { return owner.get() + std::exchange(taken, taken + count); }
    uint8_t *take_quantised(i64 rows, i64 width, i64 format) {
        return reinterpret_cast<uint8_t *>(take(Quantised::bytes(rows, width, format) / 4));
    }

  private:
    std::unique_ptr<float, decltype(&std::free)> owner;
    i64 taken = 0;
};

template <class T>
class Decoding {
  public:
    Decoding(const Network<T> &net, const Numbers &numbers, const Pasts &pasts, i64 rows)
        : net(net), numbers(numbers), pasts(pasts), rows(rows), format(net.head.format), alone(rows <= 2) {
        // The rows of a sequence read the same keys, which some of them can share once they are turned on their side.
        const i64 share = net.latent ? net.heads : net.heads / net.groups, most = std::max(i64(1), std::min(i64(8), 24 / share));
        for (i64 r = 0; r < rows; ++r) {
            const bool same = r > 0 && pasts.goes_on(r);
            apart = apart && !same;
            if (!same || r - runs.back() == most) runs.push_back(r);
        }
        longest_run = 1;
        runs.push_back(rows);
        for (size_t i = 1; i < runs.size(); ++i) longest_run = std::max(longest_run, runs[i] - runs[i - 1]);
    }

    void run(const i64 *tokens, const float *states, float *hidden, const int32_t *wanted, i64 count, float *logits) {
        const i64 R = rows, K = net.chosen;
        i64 wide = net.hidden * (net.join ? 2 : 1), inner = 0, low = 0, out = 0;  // of all layers the widest
        for (i64 l = 0; l < net.depth; ++l) {
            const Layer<T> &layer = net.layers[l];
            inner = std::max({inner, layer.gate.outputs, layer.experts_out.width});
            low = std::max(low, layer.q_a.outputs);
            out = std::max(out, layer.o.width);
        }
        const i64 queries = net.layers[0].q.outputs, keys = net.layers[0].k.outputs, latents = net.latent + net.width;
        wide = std::max({wide, inner, low, out});
        const i64 each = net.hidden + low + queries + 2 * keys + latents + out + net.width + 2 * net.experts +
                         2 * K + 2 * K * inner + inner + L;
        Room room(4 * R * each + 2 * Quantised::bytes(R, wide, format) + Quantised::bytes(R * K, inner, format));
        shared = room.take_quantised(R, wide, format);
        shared_inner = room.take_quantised(R, inner, format);
        mixed_inner = room.take_quantised(R * K, inner, format);
        x = room.take(R * net.hidden);
        qa = room.take(R * low);
        q = room.take(R * queries);
        k = room.take(R * keys);
        v = room.take(R * keys);
        kv = room.take(R * latents);
        o = room.take(R * out);
        cos = room.take(R * net.width / 2);
        sin = room.take(R * net.width / 2);
        scores = room.take(R * net.experts);
        spare = room.take(R * net.experts);
        chosen = reinterpret_cast<int32_t *>(room.take(R * K));
        shares = room.take(R * K);
        mixed = room.take(2 * R * K * inner);
        gates = room.take(R * (inner + L));
#pragma omp parallel
        {
            Thread me(*this, wide);
            me.team.share(R, [&](i64 r) {
                if (!net.join) unpack_row(net.embedding, tokens[r], x + r * net.hidden);
                for (i64 j = 0; j < net.width / 2; ++j) {
                    const float angle = float(pasts.lengths[r] - 1) * net.frequencies[j];
                    cos[r * (net.width / 2) + j] = std::cos(angle) * numbers.rope_factor;
                    sin[r * (net.width / 2) + j] = std::sin(angle) * numbers.rope_factor;
                }
            });
            me.meet();
            if (net.join) me.join(tokens, states);
            for (i64 l = 0; l < net.depth; ++l) {
                const Layer<T> &layer = net.layers[l];
                if (layer.kv_a)
                    me.latent_attention(layer);
                else
                    me.grouped_attention(layer);
                if (layer.router)
                    me.mixture(layer);
                else
                    me.feed_forward(layer);
            }
            const Quantised last = me.normed_rows(x, net.norm, net.hidden, numbers.eps, hidden);
            const i64 panels = net.head.panels();
            me.team.share_some(panels, panels_at_once(panels, me.size, count), [&](i64 start, i64 end, i64 next) {
                net.head.times(start, end, next, last, {0, wanted}, count,
                               [&](i64 p, i64 i, lanes y, i64 some) {
                                   store_some(logits + i * net.head.outputs + p * L, y, some);
                               });
            });
        }
    }

  private:
    struct Part {
        const Weights<T> *weights;
        float *to;  // [rows, outputs]
    };

    // What one thread does, and its own room.
    struct Thread {
        const Multiplying now;
        Decoding &all;
        const Network<T> &net;
        const i64 rows;
        const int size = omp_get_num_threads();
        Member team;
        const i64 stride, heads_at_once;
        Room room;
        uint8_t *const own;
        lanes *const keys;
        float *const one;  // a row of numbers
        const Quantised few;  // queries, for a cache of 8 bits
        float *const queries, *const weights, *const outputs;
        std::vector<int32_t> sorted, ends, active;

        Thread(Decoding &all, i64 wide)
            : all(all), net(all.net), rows(all.rows), team(all.team, omp_get_thread_num(), size),
              stride((all.pasts.longest(all.rows) + L - 1) / L * L),
              heads_at_once(net.latent ? (rows >= size ? net.heads : (net.heads + size - 1) / size) : net.heads / net.groups),
              room(Quantised::bytes(all.alone ? rows : 0, wide, all.format) +
                   Quantised::bytes(queries_at_once(), net.width, INT8_GROUPS) +
                   4 * (wide + L * key_width() +
                        all.longest_run * heads_at_once * (2 * key_width() + stride))),
              own(room.take_quantised(all.alone ? rows : 0, wide, all.format)),
              keys(reinterpret_cast<lanes *>(room.take(L * key_width()))), one(room.take(wide)),
              few(room.take_quantised(queries_at_once(), net.width, INT8_GROUPS), net.width, INT8_GROUPS),
              queries(room.take(all.longest_run * heads_at_once * key_width())),
              weights(room.take(all.longest_run * heads_at_once * stride)),
              outputs(room.take(all.longest_run * heads_at_once * key_width())) {}

        i64 key_width() const { return net.latent + net.width; }
        i64 queries_at_once() const { return net.eight ? all.longest_run * heads_at_once : 0; }
        // Then weights are read, of which those that this thread probably begins with are asked for while it waits.
        void meet(const Weights<T> *then = nullptr) {
            if (!then || !*then) return team.meet([] {});
            const i64 panels = then->panels(), some = panels_at_once(panels, size, rows);
            const i64 first = team.begin((panels + some - 1) / some) * some;
            Ahead ahead{then->panel(first), std::min(some, panels - first) * then->groups() * RECORD[then->format] / 64};
            team.meet([&] { ahead.ask(4); });
        }

        // Rows made ready by f(row's numbers, where to, row): `shared` by all, or by each thread for itself.
        template <class F>
        Quantised ready(i64 width, F f) {
            const Quantised to(all.alone ? own : all.shared, width, all.format);
            if (all.alone) {
                for (i64 r = 0; r < rows; ++r) f(to, r);
            } else {
                team.share(rows, [&](i64 r) { f(to, r); });
                meet();
            }
            return to;
        }

        // kept: where the normed numbers go too [rows, width], if anywhere.
        Quantised normed_rows(const float *from, const T *weight, i64 width, float eps, float *kept = nullptr) {
            return ready(width, [&](const Quantised &to, i64 r) {
                float *y = kept ? kept + r * width : one;
                normed(from + r * width, weight, width, eps, y);
                quantise_row(y, width, to, r);
            });
        }

        // Rows times several weights, each product written or added to its place.
        void multiply(const Quantised &from, std::initializer_list<Part> parts, bool add, const Weights<T> *then = nullptr) {
            i64 panels = 0;
            for (const Part &part : parts) panels += part.weights->panels();
            team.share_some(panels, panels_at_once(panels, size, rows), [&](i64 start, i64 end, i64 next) {
                products(from, parts, start, end, next, add);
            });
            meet(then);
        }

        // Panels start to end of all the parts' one after the other; the thread will probably go on from `next`.
        void products(const Quantised &from, std::initializer_list<Part> parts, i64 start, i64 end, i64 next, bool add) {
            for (const Part &part : parts) {
                const i64 panels = part.weights->panels(), row = part.weights->outputs;
                if (start < panels && end > 0)
                    part.weights->times(std::max(i64(0), start), std::min(end, panels), next < panels ? next : -1, from,
                                        {0, nullptr}, rows,
                                        [&](i64 p, i64 r, lanes y, i64 some) {
                                            float *to = part.to + r * row + p * L;
                                            if (add)
                                                add_some(to, y, some);
                                            else
                                                store_some(to, y, some);
                                        });
                start -= panels;
                end -= panels;
                next -= panels;
            }
        }

        // What a multi-token module begins with (V3 eq. 21).
        void join(const i64 *tokens, const float *states) {
            const i64 D = net.hidden;
            const auto both = [&](const Quantised &to, i64 r) {
                unpack_row(net.embedding, tokens[r], one);
                normed(one, net.embedding_norm, D, all.numbers.eps, one);
                normed(states + r * D, net.state_norm, D, all.numbers.eps, one + D);
                quantise_row(one, 2 * D, to, r);
            };
            multiply(ready(2 * D, both), {{&net.join, all.x}}, false);
        }

        void grouped_attention(const Layer<T> &layer) {
            const i64 G = net.groups, W = net.width, share = net.heads / G, half = W / 2;
            multiply(normed_rows(all.x, layer.norm, net.hidden, all.numbers.eps),
                     {{&layer.q, all.q}, {&layer.k, all.k}, {&layer.v, all.v}}, false);
            const i64 head8 = Quantised::groups_of(W) * RECORD8;  // bytes of a head in a block of 8 bits
            const auto write = [&](i64 task) {
                const i64 r = task / G, g = task % G, at = all.pasts.last(r);
                turn_pairs(all.k + task * W, all.cos + r * half, all.sin + r * half, W, net.interleave, one);
                if (net.eight) {
                    const i64 to = (at / L * G + g) * head8;
                    quantise_row(one, W, few, 0);
                    keep_key(few, at % L, reinterpret_cast<uint8_t *>(layer.a) + to);
                    quantise_row(all.v + task * W, W, few, 0);
                    keep_value(few, at % L, reinterpret_cast<uint8_t *>(layer.b) + to);
                } else {
                    keep_row(one, W, layer.a + (at * G + g) * W);
                    keep_row(all.v + task * W, W, layer.b + (at * G + g) * W);
                }
            };
            if (!all.apart) {  // a row reads what another writes
                team.share(rows * G, write);
                meet();
            }
            const auto blocks = [&](const T *store, i64 task) {
                const i64 last = all.runs[task / G + 1] - 1;
                return Blocks8{reinterpret_cast<const uint8_t *>(store) + task % G * head8, G * head8, all.pasts.table(last),
                               (all.pasts.lengths[last] + L - 1) / L};
            };
            const auto one_group = [&](i64 task, i64 next) {
                const i64 g = task % G, first = all.runs[task / G], end = all.runs[task / G + 1], count = end - first;
                const i64 place = G * W, block = all.pasts.block * place, places = all.pasts.lengths[end - 1];
                const int32_t *table = all.pasts.table(end - 1);
                if (all.apart) write(first * G + g);
                for (i64 i = 0; i < count * share; ++i) {
                    const i64 r = first + i / share, h = g * share + i % share;
                    float *query = net.eight ? one : queries + i * W;
                    turn_pairs(all.q + (r * net.heads + h) * W, all.cos + r * half, all.sin + r * half, W, net.interleave,
                               query);
                    if (net.eight) quantise_row(query, W, few, i);
                }
                float *out = count == 1 ? all.o + (first * net.heads + g * share) * W : outputs;
                if (net.eight) {
                    attend8(few, blocks(layer.a, task), blocks(layer.b, task), next < 0 ? Blocks8{} : blocks(layer.a, next), places,
                            count, share, W, all.numbers.scale, weights, stride, out);
                } else {
                    const Places<T> k{layer.a + g * W, block, place, table, places, all.pasts.shift()};
                    const Places<T> v{layer.b + g * W, block, place, table, places, k.shift};
                    attend(queries, k, k, v, count, share, W, 0, W, all.numbers.scale, keys, weights, stride, out);
                }
                for (i64 i = 0; out == outputs && i < count; ++i)
                    std::copy_n(outputs + i * share * W, share * W, all.o + ((first + i) * net.heads + g * share) * W);
            };
            // A sequence's groups lie side by side in memory: the thread that reads one has half of the next.
            const i64 tasks = (i64(all.runs.size()) - 1) * G;
            team.share_some(tasks, tasks >= 8 * G ? G : 1, [&](i64 start, i64 end, i64 next) {
                for (i64 task = start; task < end; ++task) one_group(task, task + 1 < end ? task + 1 : next);
            });
            meet(&layer.o);
            add_heads(layer);
        }

        // The absorbed form of model/attention.py.
        void latent_attention(const Layer<T> &layer) {
            const i64 H = net.heads, C = net.latent, N = net.nope, R = net.width, V = net.value, half = R / 2;
            const Quantised from = normed_rows(all.x, layer.norm, net.hidden, all.numbers.eps);
            multiply(from, {{layer.q_a ? &layer.q_a : &layer.q, layer.q_a ? all.qa : all.q}, {&layer.kv_a, all.kv}}, false);
            team.share(rows, [&](i64 r) {
                const float *kv = all.kv + r * (C + R);
                const i64 at = all.pasts.last(r);
                normed(kv, layer.kv_a_norm, C, all.numbers.latent_eps, queries);
                keep_row(queries, C, layer.a + at * C);
                turn_pairs(kv + C, all.cos + r * half, all.sin + r * half, R, net.interleave, queries);
                keep_row(queries, R, layer.b + at * R);
            });
            meet();
            if (layer.q_a)
                multiply(normed_rows(all.qa, layer.q_a_norm, layer.q_a.outputs, all.numbers.latent_eps), {{&layer.q, all.q}},
                         false);
            const i64 pieces = (H + heads_at_once - 1) / heads_at_once;
            team.share(rows * pieces, [&](i64 task) {
                const i64 r = task / pieces, first = task % pieces * heads_at_once, count = std::min(heads_at_once, H - first);
                for (i64 h = 0; h < count; ++h) {
                    const float *query = all.q + (r * H + first + h) * (N + R);
                    times_rows(query, layer.up + (first + h) * (N + V) * C, N, C, queries + h * (C + R));
                    turn_pairs(query + N, all.cos + r * half, all.sin + r * half, R, net.interleave,
                               queries + h * (C + R) + C);
                }
                const Places<T> a{layer.a, all.pasts.block * C, C, all.pasts.table(r), all.pasts.lengths[r], all.pasts.shift()};
                const Places<T> b{layer.b, all.pasts.block * R, R, a.table, a.count, a.shift};
                attend(queries, a, b, a, 1, count, C, R, C, all.numbers.scale, keys, weights, stride, outputs);
                for (i64 h = 0; h < count; ++h) {
                    const T *w = layer.up + ((first + h) * (N + V) + N) * C;
                    float *to = all.o + (r * H + first + h) * V;
                    for (i64 n = 0; n < V; n += L)
                        store_some(to + n, rows_times(w + n * C, std::min(L, V - n), C, outputs + h * C), std::min(L, V - n));
                }
            });
            meet();
            add_heads(layer);
        }

        void add_heads(const Layer<T> &layer) {
            const i64 width = layer.o.width;
            const auto quantised = [&](const Quantised &to, i64 r) { quantise_row(all.o + r * width, width, to, r); };
            multiply(ready(width, quantised), {{&layer.o, all.x}}, true, &layer.gate);
        }

        void feed_forward(const Layer<T> &layer) {
            const Quantised from = normed_rows(all.x, layer.norm2, net.hidden, all.numbers.eps);
            const Quantised inner(all.shared_inner, layer.gate.outputs, all.format);
            const i64 panels = layer.gate.panels(), some = std::max(panels_at_once(panels, size, rows), gates(inner));
            team.share_some(panels, some, [&](i64 start, i64 end, i64 next) {
                gated(layer, from, start, end, next, inner);
            });
            meet(&layer.down);
            if (inner.line) {
                team.share(rows, [&](i64 r) { quantise_row(all.gates + r * panels * L, layer.gate.outputs, inner, r); });
                meet();
            }
            multiply(inner, {{&layer.down, all.x}}, true);
        }

        // Panels of gates that become bytes with one scale, and so are made by one thread.
        static i64 gates(const Quantised &to) { return to.line ? BESIDE : to.common * GROUP / L; }

        // silu(gate) · up of panels start to end, `start` a multiple of `gates`, made bytes at once: as floats they would
        // outgrow the near caches.
        void gated(const Layer<T> &layer, const Quantised &from, i64 start, i64 end, i64 next, const Quantised &to) {
            const i64 panels = layer.gate.panels(), at_once = rows <= 2 * TOGETHER ? rows : TOGETHER, size = gates(to);
            lanes all_gates[2 * TOGETHER * COMMON * GROUP / L];
            if (next >= panels) next = -1;
            if (to.line) {  // a row's digits have one scale, so that they are made of all its gates
                const auto gate = [&](i64 p, i64 r) { return all.gates + (r * panels + p) * L; };
                layer.gate.times(start, end, next, from, {0, nullptr}, rows,
                                 [&](i64 p, i64 r, lanes y, i64) { store_lanes(gate(p, r), silu(y)); });
                layer.up_proj.times(start, end, next, from, {0, nullptr}, rows, [&](i64 p, i64 r, lanes y, i64) {
                    store_lanes(gate(p, r), load_lanes(gate(p, r)) * y);
                });
                return;
            }
            for (i64 first = 0; first < rows; first += at_once) {
                const i64 count = std::min(at_once, rows - first);
                for (i64 p = start; p < end; p += BESIDE) {
                    const i64 last = std::min(end, p + BESIDE), begin = p / size * size;
                    const bool asks = last < end ? first == 0 : first + at_once >= rows;
                    const i64 after = !asks ? -1 : last < end ? last : next;
                    const Which which{first, nullptr};
                    const auto gate = [&](i64 q, i64 r) -> lanes & { return all_gates[r * size + q - begin]; };
                    layer.gate.times(p, last, after, from, which, count, [&](i64 q, i64 r, lanes y, i64) { gate(q, r) = y; });
                    layer.up_proj.times(p, last, after, from, which, count, [&](i64 q, i64 r, lanes y, i64 some) {
                        lanes &x = gate(q, r);
                        x = silu(x) * y;
                        for (i64 t = some; t < L; ++t) x[t] = 0;
                    });
                    if (last < end && last - begin < size) continue;
                    const i64 groups = (last - begin + 1) * L / GROUP;
                    for (i64 r = 0; r < count; ++r) {
                        if (last - begin < groups * GROUP / L) gate(last, r) = lanes{};
                        quantise(groups, [&](i64 i) { return gate(begin + i, r); }, to,
                                 (first + r) * to.groups + begin * L / GROUP);
                    }
                }
            }
        }

        // Experts read their own rows only, so a step costs the weights of those that were chosen.
        void mixture(const Layer<T> &layer) {
            const i64 E = net.experts, K = net.chosen, D = net.hidden, F = layer.experts_out.width;
            const i64 shared_width = layer.gate ? layer.gate.outputs : 0;
            const Quantised from = ready(D, [&](const Quantised &to, i64 r) {
                normed(all.x + r * D, layer.norm2, D, all.numbers.eps, one);
                quantise_row(one, D, to, r);
            });
            // The router, in 16 experts at a time, and what does not wait for it.
            const Quantised shared(all.shared_inner, shared_width, all.format);
            const i64 lots = (E + L - 1) / L, some = gates(shared), pieces = layer.gate ? (layer.gate.panels() + some - 1) / some : 0;
            team.share(rows * lots + pieces, [&](i64 task) {
                if (const i64 p = some * (task - rows * lots); p >= 0)
                    return gated(layer, from, p, std::min(p + some, layer.gate.panels()), p + some, shared);
                const i64 r = task / lots, e = task % lots * L, some = std::min(L, E - e);
                normed(all.x + r * D, layer.norm2, D, all.numbers.eps, one);
                store_some(all.scores + r * E + e, rows_times(layer.router + e * D, some, D, one), some);
            });
            meet();
            team.share(rows, [&](i64 r) {
                if (layer.gate && shared.line)
                    quantise_row(all.gates + r * layer.gate.panels() * L, shared_width, shared, r);
                choose(net, layer.correction, all.numbers.routed_factor, all.scores + r * E, all.spare + r * E,
                       all.chosen + r * K, all.shares + r * K);
            });
            meet();
            sort();
            const i64 busy = i64(active.size()), in_panels = layer.experts_in.panels(), out_panels = layer.experts_out.panels();
            const auto begin = [&](i64 e) { return e ? ends[e - 1] : 0; };
            const int32_t *row_of = sorted.data() + rows * K;
            team.share(busy * in_panels, [&](i64 task) {
                const i64 e = active[task / in_panels], p = task % in_panels, at = e * in_panels + p, first = begin(e);
                layer.experts_in.times(at, at + 1, p + 1 < in_panels ? at + 1 : -1, from, {0, row_of + first},
                                       ends[e] - first, [&](i64, i64 i, lanes y, i64 some) {
                                           store_some(all.mixed + (first + i) * 2 * F + p * L, y, some);
                                       });
            });
            meet();
            const Quantised inner(all.mixed_inner, F, all.format);
            team.share(rows * K, [&](i64 i) {
                float *two = all.mixed + i * 2 * F;
                quantise_gated(two, two + F, F, inner, i);
            });
            meet();
            team.share(out_panels, [&](i64 p) {  // all that is added to a place, one after the other
                for (i64 e : active) {
                    const i64 first = begin(e), at = e * out_panels + p;
                    layer.experts_out.times(at, at + 1, -1, inner, {first, nullptr}, ends[e] - first,
                                            [&](i64, i64 i, lanes y, i64 some) {
                                                const i64 entry = sorted[first + i];
                                                add_some(all.x + entry / K * D + p * L, y * all.shares[entry], some);
                                            });
                }
                if (layer.gate)
                    layer.down.times(p, p + 1, -1, shared, {0, nullptr}, rows,
                                     [&](i64, i64 r, lanes y, i64 some) { add_some(all.x + r * D + p * L, y, some); });
            });
            meet();
        }

        static void add_some(float *to, lanes y, i64 some) {
            if (some == L) return store_lanes(to, load_lanes(to) + y);
            for (i64 t = 0; t < some; ++t) to[t] += y[t];
        }

        // The choices in order of their experts, each followed by its row; where each expert's end; who has any.
        void sort() {
            const i64 K = net.chosen, count = rows * K;
            ends.assign(net.experts, 0);
            active.clear();
            sorted.resize(2 * count);
            for (i64 i = 0; i < count; ++i) ++ends[all.chosen[i]];
            int32_t sum = 0;
            for (i64 e = 0; e < net.experts; ++e) {
                if (ends[e]) active.push_back(int32_t(e));
                sum += std::exchange(ends[e], sum);
            }
            for (i64 i = 0; i < count; ++i) {
                const int32_t at = ends[all.chosen[i]]++;
                sorted[at] = int32_t(i);
                sorted[count + at] = int32_t(i / K);
            }
        }
    };

    const Network<T> &net;
    const Numbers &numbers;
    const Pasts &pasts;
    const i64 rows, format;  // of all weights or, where they differ, none of them is INT8
    const bool alone;
    bool apart = true;      // no two rows belong to one sequence
    std::vector<i64> runs;  // first rows of stretches of one sequence, and the end
    i64 longest_run;
    Team team{omp_get_max_threads()};
    float *x, *qa, *q, *k, *v, *kv, *o, *cos, *sin, *scores, *spare, *shares, *mixed, *gates;
    int32_t *chosen;
    uint8_t *shared, *shared_inner, *mixed_inner;
};

// tokens [rows], each the last of the lengths[i] places of its past (a multi-token module reads them with the `states`
// [rows, hidden] before them) → hidden [rows, hidden] after the last norm and, of the `count` rows in `wanted` (or, where
// it is null, of the first), logits [count, outputs of the head]. Tokens of one sequence lie side by side, in order.
template <class T>
void decode_step(const Network<T> *network, const i64 *tokens, const float *states, i64 rows, const int32_t *tables,
                 i64 table_row, i64 block, const int32_t *lengths, const Numbers *numbers, float *hidden,
                 const int32_t *wanted, i64 count, float *logits) {
    const Pasts pasts{tables, table_row, block, lengths};
    Decoding<T>(*network, *numbers, pasts, rows).run(tokens, states, hidden, wanted, count, logits);
}

}  // namespace

#define P(T) (const Network<T> *network, const i64 *tokens, const float *states, i64 rows, const int32_t *tables,             \
              i64 table_row, i64 block, const int32_t *lengths, const Numbers *numbers, float *hidden,                        \
              const int32_t *wanted, i64 count, float *logits)
BOTH(void, decode_step, P,
     (network, tokens, states, rows, tables, table_row, block, lengths, numbers, hidden, wanted, count, logits))
#undef P
