// Threads that stay together through many short pieces of work and meet at barriers of their own: they wait in a loop,
// and give the processor up after a while, so that another program on one of the cores costs no more than its share.
#pragma once

#include <algorithm>
#include <atomic>
#include <sched.h>

#include "numbers.h"

namespace {

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

    // Calls f(start, end) for stretches of the numbers below `count` that nobody else has taken, `some` at a time.
    template <class F>
    void share_some(i64 count, i64 some, F f) {
        for (i64 start; (start = next.fetch_add(some, std::memory_order_relaxed)) < count;)
            f(start, std::min(count, start + some));
    }

    // Calls f with every number below `count` that nobody else has taken.
    template <class F>
    void share(i64 count, F f) {
        share_some(count, 1, [&](i64 start, i64) { f(start); });
    }

  private:
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> round{0};
    alignas(64) std::atomic<i64> next{0};
};

}  // namespace
