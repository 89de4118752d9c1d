// The functions of a decode step that PyTorch's operators make in several passes; built and called as rows.cpp is.

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <omp.h>
#include <vector>

#include "attend.h"

namespace {

// One new token a sequence over its past, the first lengths[i] places of the blocks in row i of `tables`. Scores are
// q·k + q2·k2, the second part being latent attention's rotated key, which all heads share; distances are between
// blocks, between places in one, and between key/value heads (`group`).
template <class T>
void past_attention(const T *q, const T *q2, const T *k, i64 k_block, i64 k_place, i64 k_group, const T *k2,
                    i64 k2_block, i64 k2_place, const T *v, i64 v_block, i64 v_place, i64 v_group,
                    const int32_t *tables, i64 table_row, i64 block, const int32_t *lengths, i64 rows, i64 heads,
                    i64 groups, i64 width, i64 width2, i64 value_width, float scale, T *out) {
    const i64 share = heads / groups, both = width + width2, shift = std::countr_zero(uint64_t(block));
    i64 longest = 0;
    for (i64 i = 0; i < rows; ++i) longest = std::max(longest, i64(lengths[i]));
    const i64 stride = (longest + L - 1) / L * L;
#pragma omp parallel
    {
        lanes *keys = static_cast<lanes *>(std::aligned_alloc(64, sizeof(lanes) * both));
        float *queries = static_cast<float *>(std::malloc(sizeof(float) * share * (both + stride)));
        float *weights = queries + share * both;
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < rows * groups; ++task) {
            const i64 i = task / groups, g = task % groups, first = i * heads + g * share, end = lengths[i];
            const int32_t *table = tables + i * table_row;
            const Places<T> here{k + g * k_group, k_block, k_place, table, end, shift};
            const Places<T> here2{k2, k2_block, k2_place, table, end, shift};
            for (i64 h = 0; h < share; ++h) {
                for (i64 j = 0; j < width; ++j) queries[h * both + j] = load(q[(first + h) * width + j]);
                for (i64 j = 0; j < width2; ++j) queries[h * both + width + j] = load(q2[(first + h) * width2 + j]);
            }
            attend(queries, here, here2, Places<T>{v + g * v_group, v_block, v_place, table, end, shift}, 1, share, width,
                   width2, value_width, scale, keys, weights, stride, out + first * value_width);
        }
        std::free(queries);
        std::free(keys);
    }
}

// A word and its logit; less is what stands further ahead.
struct Word {
    float logit;
    i64 number;

    bool operator<(const Word &o) const { return logit > o.logit || (logit == o.logit && number < o.number); }
};

// What of a vocabulary may be drawn, see kernels/sample.py.
struct Cut {
    float top_p;
    i64 top_k;
    float min_p;
};

constexpr i64 SOME = 256;  // words of a row whose largest logit is known

// The last word that a cut leaves: it and all that stand ahead of it may be drawn. `weight` gives a logit's share of
// `sum`. Those whose shares add up are looked for among the words above a bound that sinks until there are enough.
template <class T, class F>
Word last_left(const T *row, i64 words, const std::vector<float> &largest, float top, float temperature, Cut cut, double sum,
               F weight) {
    const float lowest = std::numeric_limits<float>::lowest();  // what is forbidden lies below
    const float least = cut.min_p > 0 ? top + std::log(cut.min_p) * temperature : lowest;
    if (cut.top_p >= 1 && !cut.top_k) return {least, words};
    const double wanted = cut.top_p < 1 ? cut.top_p * sum : INFINITY;
    std::vector<Word> found;
    for (float below = 4;; below *= 1.25f) {
        const float bound = below < 88 ? std::max(least, top - below * temperature) : least;
        double mass = 0;
        found.clear();
        for (i64 start = 0; start < words; start += SOME) {
            if (!(largest[start / SOME] >= bound)) continue;
            for (i64 j = start; j < std::min(words, start + SOME); ++j) {
                const float x = load(row[j]);
                if (!(x >= bound)) continue;
                found.push_back({x, j});
                mass += weight(x);
            }
        }
        if (bound == least || mass >= wanted || (cut.top_k && i64(found.size()) >= cut.top_k)) break;
    }
    if (found.empty()) return {-INFINITY, words};  // no numbers at all
    if (cut.top_k && i64(found.size()) > cut.top_k) {
        std::nth_element(found.begin(), found.begin() + cut.top_k, found.end());
        found.resize(cut.top_k);
    }
    // Half of what is left at a time, without sorting it: the first whose share makes the sum large enough.
    auto first = found.begin(), last = found.end();
    for (double passed = 0; last - first > 1;) {
        const auto middle = first + (last - first) / 2;
        std::nth_element(first, middle, last);
        double part = 0;
        for (auto w = first; w != middle; ++w) part += weight(w->logit);
        if (passed + part >= wanted) {
            last = middle;
        } else {
            passed += part;
            first = middle;
        }
    }
    return *first;
}

// A word from what a cut leaves of softmax(row/temperature), by a uniform number: the first whose probability, added to
// those of the words before it, exceeds it. Sums of blocks first and then within one of them, so that the improbable words
// of a large vocabulary are not lost beside the sum of all. At temperature 0 the first of the most probable. Its
// log-probability is that before the cut.
template <class T>
i64 draw_one(const T *row, i64 words, float temperature, Cut cut, float uniform, float *logprob) {
    const bool greedy = temperature == 0.0f;
    const float sharpness = greedy ? 1.0f : std::min(1.0f / temperature, std::numeric_limits<float>::max());
    const i64 blocks = (words + SOME - 1) / SOME;
    std::vector<float> largest(blocks);
    std::vector<double> sums(blocks);
    float top = -INFINITY;
    for (i64 b = 0; b < blocks; ++b) {
        const i64 end = std::min(words, (b + 1) * SOME);
        float most = -INFINITY;
#pragma omp simd reduction(max : most)
        for (i64 j = b * SOME; j < end; ++j) {
            const float x = load(row[j]);
            most = x > most ? x : most;
        }
        largest[b] = most;
        top = std::max(top, most);
    }
    const auto weight = [&](float x) {  // `exponential` is never nothing, which what is forbidden must be
        const float d = (x - top) * sharpness;
        return d < -87.0f ? 0.0f : exponential(d);
    };
    double sum = 0;
    for (i64 b = 0; b < blocks; ++b) {
        const i64 end = std::min(words, (b + 1) * SOME);
        float part = 0;
#pragma omp simd reduction(+ : part)
        for (i64 j = b * SOME; j < end; ++j) part += weight(load(row[j]));
        sums[b] = part;
        sum += part;
    }
    const bool whole = greedy || (cut.top_p >= 1 && !cut.top_k && !(cut.min_p > 0));
    Word end_of{-INFINITY, words};
    double left = sum;
    if (!whole) {
        end_of = last_left(row, words, largest, top, temperature, cut, sum, weight);
        left = 0;
        for (i64 b = 0; b < blocks; ++b) {
            sums[b] = 0;
            if (largest[b] >= end_of.logit)
                for (i64 j = b * SOME; j < std::min(words, (b + 1) * SOME); ++j)
                    if (const float x = load(row[j]); !(end_of < Word{x, j})) sums[b] += weight(x);
            left += sums[b];
        }
    }
    double wanted = uniform * left, passed = 0;
    i64 b = 0, final = blocks - 1, chosen;  // by rounding the numbers may lead past the end
    while (!whole && final > 0 && sums[final] == 0) --final;
    for (; b < final && (greedy ? largest[b] != top : sums[b] <= wanted); ++b) wanted -= sums[b];
    for (i64 j = chosen = b * SOME; j < std::min(words, (b + 1) * SOME); ++j) {
        const float x = load(row[j]);
        if (end_of < Word{x, j}) continue;
        chosen = j;
        passed += weight(x);
        if (greedy ? x == top : passed > wanted) break;
    }
    *logprob = (load(row[chosen]) - top) * sharpness - float(std::log(sum));
    return chosen;
}

template <class T>
void draw(const T *logits, i64 rows, i64 words, float temperature, Cut cut, const float *uniform, i64 *token, float *logprob) {
#pragma omp parallel for schedule(dynamic) if (rows > 1)
    for (i64 i = 0; i < rows; ++i)
        token[i] = draw_one(logits + i * words, words, temperature, cut, uniform[i], logprob + i);
}

// Arrays of running sequences, a row for each (engine/batch.py), with the numbers of their columns.
struct Sequences {
    i64 *numbers, count;
    const float *cuts;
    i64 cut_width;
    const float *uniform;
    i64 window;
    const i64 *stops, stop_count;
    i64 *tokens, token_width;
    float *logprobs;
    i64 logprob_width;
    const i64 *drafts, draft_count, block;
};

// The next tokens of the sequences `at`, from their logits: drawn by the next of a row's random numbers, noted; and why a
// sequence ends by them. lanes: of each sequence the first row of logits, and how many there are, which are for the tokens
// after its drafts: a token that is not the draft is its last. Null: one each. At the end of `found` what has to be seen to
// (kernels/append_tokens.py).
template <class T>
void extend(const T *logits, i64 rows, i64 words, const i64 *at, const i64 *lanes, const i64 *where, i64 *found) {
    const Sequences &s = *reinterpret_cast<const Sequences *>(where);
    const auto number = [&](i64 which) { return s.numbers + which * s.count; };
    i64 *const place = number(0), *const count = number(1), *const limit = number(2), *const last = number(3);
    i64 *const held = number(4), *const budget = number(5), *const think_end = number(6), *const cut = number(7);
    i64 *const closed = number(8), *const tokens = found, *const ended = found + rows + 1;
#pragma omp parallel for schedule(dynamic) if (rows > 1)
    for (i64 i = 0; i < rows; ++i) {
        const i64 r = at[i], first = lanes ? lanes[i] : i, some = lanes ? lanes[rows + i] : 1;
        const float *c = s.cuts + cut[r] * s.cut_width;
        const Cut own{c[1], i64(c[2]), c[3]};
        const i64 *const stops = s.stops + r * s.stop_count, *const draft = s.drafts + r * s.draft_count;
        for (i64 j = 0; j < some; ++j) {
            const i64 made = count[r];
            const float uniform = s.uniform[r * s.window + made % s.window];
            i64 token = draw_one(logits + (first + j) * words, words, c[0], own, uniform,
                                 s.logprobs + r * s.logprob_width + made);
            if (!closed[r] && made >= budget[r]) token = think_end[r];
            closed[r] |= token == think_end[r];
            tokens[i] = last[r] = s.tokens[r * s.token_width + made] = token;
            const bool stopped = std::find(stops, stops + s.stop_count, token) != stops + s.stop_count;
            ++place[r];
            ++count[r];
            ended[i] = stopped ? 2 : count[r] >= limit[r] ? 1 : 0;
            if (ended[i] || j + 1 == some || token != draft[j]) break;
        }
    }
    i64 &see_to = ended[rows] = 0;
    for (i64 i = 0; i < rows; ++i) {
        const i64 r = at[i];
        const bool narrow = count[r] + s.draft_count >= std::min(s.token_width, s.logprob_width);
        see_to |= (ended[i] != 0) | (count[r] % s.window == 0 || narrow) << 1 | (place[r] >= held[r] * s.block) << 2;
    }
}

}  // namespace

#define P(T) (const T *q, const T *q2, const T *k, i64 kb, i64 kp, i64 kg, const T *k2, i64 k2b, i64 k2p, const T *v,  \
              i64 vb, i64 vp, i64 vg, const int32_t *tables, i64 tr, i64 block, const int32_t *lengths, i64 rows,      \
              i64 heads, i64 groups, i64 width, i64 width2, i64 value_width, float scale, T *out)
BOTH(void, past_attention, P, (q, q2, k, kb, kp, kg, k2, k2b, k2p, v, vb, vp, vg, tables, tr, block, lengths, rows,     \
                               heads, groups, width, width2, value_width, scale, out))
#undef P
#define P(T) (const T *logits, i64 rows, i64 words, float temperature, float top_p, i64 top_k, float min_p,              \
              const float *uniform, i64 *token, float *logprob)
BOTH(void, draw, P, (logits, rows, words, temperature, {top_p, top_k, min_p}, uniform, token, logprob))
#undef P
#define P(T) (const T *logits, i64 rows, i64 words, const i64 *at, const i64 *lanes, const i64 *where, i64 *found)
BOTH(void, extend, P, (logits, rows, words, at, lanes, where, found))
#undef P
