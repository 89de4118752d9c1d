// Sampling from logits, and appending the sampled tokens to the sequences of a decode batch, each in one pass where
// PyTorch's operators make several.

#include <algorithm>
#include <cmath>
#include <limits>
#include <omp.h>
#include <vector>

#include "dtypes.h"

namespace {

// A token and its logit, ordered by probability: `a < b` if a is the more probable, or equally so with the lower id.
struct TokenLogit {
    float logit;
    i64 number;

    bool operator<(const TokenLogit &o) const { return logit > o.logit || (logit == o.logit && number < o.number); }
};

// Which tokens may be sampled, as in kernels/sample.py.
struct SamplingFilter {
    float top_p;
    i64 top_k;
    float min_p;
};

constexpr i64 BLOCK = 256;  // tokens of a row for which the largest logit is kept

// Top-k, top-p and min-p: the last token the filter keeps; it and all tokens before it in order may be sampled.
// `weight` gives a logit's share of `sum`. Searches only the tokens above a bound, which is lowered until they suffice.
template <class T, class F>
TokenLogit find_cutoff(const T *row, i64 vocab, const std::vector<float> &block_max_logits, float top,
                       float temperature, SamplingFilter filter, double sum, F weight) {
    const float lowest = std::numeric_limits<float>::lowest();  // masked tokens are below
    const float min_logit = filter.min_p > 0 ? top + std::log(filter.min_p) * temperature : lowest;
    if (filter.top_p >= 1 && !filter.top_k) return {min_logit, vocab};
    const double target = filter.top_p < 1 ? filter.top_p * sum : INFINITY;
    std::vector<TokenLogit> found;
    for (float below = 4;; below *= 1.25f) {
        const float bound = below < 88 ? std::max(min_logit, top - below * temperature) : min_logit;
        double mass = 0;
        found.clear();
        for (i64 start = 0; start < vocab; start += BLOCK) {
            if (!(block_max_logits[start / BLOCK] >= bound)) continue;
            for (i64 j = start; j < std::min(vocab, start + BLOCK); ++j) {
                const float x = load(row[j]);
                if (!(x >= bound)) continue;
                found.push_back({x, j});
                mass += weight(x);
            }
        }
        if (bound == min_logit || mass >= target || (filter.top_k && i64(found.size()) >= filter.top_k)) break;
    }
    if (found.empty()) return {-INFINITY, vocab};  // all are NaN
    if (filter.top_k && i64(found.size()) > filter.top_k) {
        std::nth_element(found.begin(), found.begin() + filter.top_k, found.end());
        found.resize(filter.top_k);
    }
    // A partial sort that halves the range each time finds the first token at which the sum is large enough.
    auto first = found.begin(), last = found.end();
    for (double cumulative = 0; last - first > 1;) {
        const auto middle = first + (last - first) / 2;
        std::nth_element(first, middle, last);
        double part = 0;
        for (auto w = first; w != middle; ++w) part += weight(w->logit);
        if (cumulative + part >= target) {
            last = middle;
        } else {
            cumulative += part;
            first = middle;
        }
    }
    return *first;
}

// Samples a token from the filtered softmax(row/temperature) with a uniform number: the first whose probability, added
// to those of the tokens before it, exceeds the number. Block sums come first, then the tokens of one block, so that
// improbable tokens of a large vocabulary are not lost to rounding. At temperature 0: the first of the most probable.
// Its log-probability is that before the filter.
template <class T>
i64 sample_row(const T *row, i64 vocab, float temperature, SamplingFilter filter, float uniform, float *logprob) {
    const bool greedy = temperature == 0.0f;
    const float inv_temperature = greedy ? 1.0f : std::min(1.0f / temperature, std::numeric_limits<float>::max());
    const i64 blocks = (vocab + BLOCK - 1) / BLOCK;
    std::vector<float> block_max_logits(blocks);
    std::vector<double> sums(blocks);
    float top = -INFINITY;
    for (i64 b = 0; b < blocks; ++b) {
        const i64 end = std::min(vocab, (b + 1) * BLOCK);
        float block_max = -INFINITY;
#pragma omp simd reduction(max : block_max)
        for (i64 j = b * BLOCK; j < end; ++j) {
            const float x = load(row[j]);
            block_max = x > block_max ? x : block_max;
        }
        block_max_logits[b] = block_max;
        top = std::max(top, block_max);
    }
    const auto weight = [&](float x) {  // fast_exp is never 0, which masked tokens need
        const float d = (x - top) * inv_temperature;
        return d < -87.0f ? 0.0f : fast_exp(d);
    };
    double sum = 0;
    for (i64 b = 0; b < blocks; ++b) {
        const i64 end = std::min(vocab, (b + 1) * BLOCK);
        float part = 0;
#pragma omp simd reduction(+ : part)
        for (i64 j = b * BLOCK; j < end; ++j) part += weight(load(row[j]));
        sums[b] = part;
        sum += part;
    }
    const bool unfiltered = greedy || (filter.top_p >= 1 && !filter.top_k && !(filter.min_p > 0));
    TokenLogit cutoff{-INFINITY, vocab};
    double kept = sum;
    if (!unfiltered) {
        cutoff = find_cutoff(row, vocab, block_max_logits, top, temperature, filter, sum, weight);
        kept = 0;
        for (i64 b = 0; b < blocks; ++b) {
            sums[b] = 0;
            if (block_max_logits[b] >= cutoff.logit)
                for (i64 j = b * BLOCK; j < std::min(vocab, (b + 1) * BLOCK); ++j)
                    if (const float x = load(row[j]); !(cutoff < TokenLogit{x, j})) sums[b] += weight(x);
            kept += sums[b];
        }
    }
    double target = uniform * kept, cumulative = 0;
    i64 b = 0, final = blocks - 1, chosen;  // rounding could lead past the end
    while (!unfiltered && final > 0 && sums[final] == 0) --final;
    for (; b < final && (greedy ? block_max_logits[b] != top : sums[b] <= target); ++b) target -= sums[b];
    for (i64 j = chosen = b * BLOCK; j < std::min(vocab, (b + 1) * BLOCK); ++j) {
        const float x = load(row[j]);
        if (cutoff < TokenLogit{x, j}) continue;
        chosen = j;
        cumulative += weight(x);
        if (greedy ? x == top : cumulative > target) break;
    }
    *logprob = (load(row[chosen]) - top) * inv_temperature - float(std::log(sum));
    return chosen;
}

template <class T>
void sample(const T *logits, i64 rows, i64 vocab, float temperature, SamplingFilter filter, const float *uniform,
            i64 *token, float *logprob) {
#pragma omp parallel for schedule(dynamic) if (rows > 1)
    for (i64 i = 0; i < rows; ++i)
        token[i] = sample_row(logits + i * vocab, vocab, temperature, filter, uniform[i], logprob + i);
}

// Rows of BatchState::numbers, in the order of NUMBERS in kernels/append_tokens.py.
// clang-format off
enum BatchNumber {
    POSITION, NUM_TOKENS, MAX_NEW_TOKENS, LAST_TOKEN, NUM_BLOCKS, BUDGET, THINK_END_TOKEN, FILTER_INDEX, THINKING_ENDED,
    NEEDS_ADJUSTING, STREAMING
};
// clang-format on
enum FilterColumn { TEMPERATURE, TOP_P, TOP_K, MIN_P };

// As in kernels/append_tokens.py.
enum FinishReason { RUNNING, LENGTH_REACHED, STOP_TOKEN };
enum Flags { FINISHED = 1, NEEDS_PREPARE = 2, NEEDS_BLOCKS = 4 };

// The arrays of the decode batch (engine/batch.py), with their row widths; kernels/append_tokens.py writes it as int64.
struct BatchState {
    i64 *numbers, count;
    const float *filters;
    i64 filter_width;
    const float *uniform;
    i64 window;
    const i64 *stop_tokens, stop_count;
    i64 *tokens, token_width;
    float *logprobs;
    i64 logprob_width;
    const i64 *drafts, draft_count, block;
};

// Appends the next tokens of the sequences rows_at [rows], sampled from their logits with the next of each sequence's
// random numbers, and says why a sequence finished. draft_rows [2, rows]: each sequence's first row of logits and their
// number, one more than its drafts; it stops at the first token that is not the draft. Null: one row each. found [2,
// rows + 1]: newest tokens; finish reasons, and at the end the Flags of the batch.
template <class T>
void append_tokens(const T *logits, i64 rows, i64 vocab, const i64 *rows_at, const i64 *draft_rows, const i64 *batch,
                   i64 *found) {
    const BatchState &s = *reinterpret_cast<const BatchState *>(batch);
    const auto number = [&](BatchNumber row) { return s.numbers + row * s.count; };
    i64 *const position = number(POSITION), *const num_tokens = number(NUM_TOKENS), *const last = number(LAST_TOKEN);
    i64 *const thinking_ended = number(THINKING_ENDED);
    const i64 *const max_new_tokens = number(MAX_NEW_TOKENS), *const num_blocks = number(NUM_BLOCKS);
    const i64 *const budget = number(BUDGET), *const think_end = number(THINK_END_TOKEN),
                     *const filter = number(FILTER_INDEX);
    i64 *const tokens = found, *const finished = found + rows + 1;
#pragma omp parallel for schedule(dynamic) if (rows > 1)
    for (i64 i = 0; i < rows; ++i) {
        const i64 r = rows_at[i], first = draft_rows ? draft_rows[i] : i,
                  num_logits = draft_rows ? draft_rows[rows + i] : 1;
        const float *c = s.filters + filter[r] * s.filter_width;
        const SamplingFilter own{c[TOP_P], i64(c[TOP_K]), c[MIN_P]};
        const i64 *const stop_tokens = s.stop_tokens + r * s.stop_count, *const draft = s.drafts + r * s.draft_count;
        for (i64 j = 0; j < num_logits; ++j) {
            const i64 index = num_tokens[r];
            const float uniform = s.uniform[r * s.window + index % s.window];
            i64 token = sample_row(logits + (first + j) * vocab, vocab, c[TEMPERATURE], own, uniform,
                                   s.logprobs + r * s.logprob_width + index);
            if (!thinking_ended[r] && index >= budget[r]) token = think_end[r];
            thinking_ended[r] |= token == think_end[r];
            tokens[i] = last[r] = s.tokens[r * s.token_width + index] = token;
            const bool stopped =
                std::find(stop_tokens, stop_tokens + s.stop_count, token) != stop_tokens + s.stop_count;
            ++position[r];
            ++num_tokens[r];
            finished[i] = stopped ? STOP_TOKEN : num_tokens[r] >= max_new_tokens[r] ? LENGTH_REACHED : RUNNING;
            if (finished[i] || j + 1 == num_logits || token != draft[j]) break;
        }
    }
    i64 &flags = finished[rows] = 0;
    for (i64 i = 0; i < rows; ++i) {
        const i64 r = rows_at[i];
        const bool buffers_full = num_tokens[r] + s.draft_count >= std::min(s.token_width, s.logprob_width);
        if (finished[i]) flags |= FINISHED;
        if (num_tokens[r] % s.window == 0 || buffers_full) flags |= NEEDS_PREPARE;
        if (position[r] >= num_blocks[r] * s.block) flags |= NEEDS_BLOCKS;
    }
}

}  // namespace

#define PARAMETERS(T)                                                                              \
    (const T *logits, i64 rows, i64 vocab, float temperature, float top_p, i64 top_k, float min_p, \
     const float *uniform, i64 *token, float *logprob)
EXPORT_F32_BF16(void, sample, PARAMETERS,
                (logits, rows, vocab, temperature, {top_p, top_k, min_p}, uniform, token, logprob))
#undef PARAMETERS
#define PARAMETERS(T) \
    (const T *logits, i64 rows, i64 vocab, const i64 *rows_at, const i64 *draft_rows, const i64 *batch, i64 *found)
EXPORT_F32_BF16(void, append_tokens, PARAMETERS, (logits, rows, vocab, rows_at, draft_rows, batch, found))
#undef PARAMETERS
