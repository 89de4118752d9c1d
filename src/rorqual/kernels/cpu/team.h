// Threads that stay together through many short pieces of work and meet at barriers of their own: they wait in a loop,
// and give the processor up after a while, so that another program on one of the cores costs no more than its share.
//
// Of the pieces between two barriers every thread has a stretch, which lies side by side in memory and is the same for the
// same work, so that what a thread has made is near when it is read; whoever is ready with its own helps the others. One
// counter for all, of which everybody took the next piece, was 4 to 9 % slower with two cores: they fought for it.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <sched.h>

#include "numbers.h"

namespace {

class Team {
  public:
    explicit Team(int most) : next(new Next[most]) {}

  private:
    friend class Member;
    // How many pieces of a thread's stretch have been taken, between two barriers and between the next two.
    struct alignas(64) Next {
        std::atomic<i64> taken[2]{};
    };

    const std::unique_ptr<Next[]> next;
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> round{0};
};

// One of its `size` threads.
class Member {
  public:
    Member(Team &team, int number, int size) : team(team), number(number), size(size) {}

    // Whoever arrives last lets all go on; `idle` is called again and again while others are awaited.
    template <class F>
    void meet(F idle) {
        if (team.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            team.arrived.store(0, std::memory_order_relaxed);
            team.round.store(round + 1, std::memory_order_release);
        }
        for (int turn = 0; team.round.load(std::memory_order_acquire) == round; ++turn) {
            if (turn < 4000) {  // some ten microseconds, longer than the pieces differ
                idle();
#if defined(__x86_64__)
                __builtin_ia32_pause();
#elif defined(__aarch64__)
                asm volatile("yield");
#endif
            } else {
                sched_yield();
            }
        }
        // Nobody takes pieces of the time before any more, nor of the time after the next barrier yet.
        team.next[number].taken[round % 2].store(0, std::memory_order_relaxed);
        ++round;
    }

    // Where of `pieces` the thread's own stretch begins.
    i64 begin(i64 pieces) const { return begin(number, pieces); }

    // Calls f(start, end, next) for stretches of the numbers below `count` that nobody else has taken, `some` at a time;
    // the one after probably begins at `next`, if that is not negative.
    template <class F>
    void share_some(i64 count, i64 some, F f) {
        const i64 pieces = (count + some - 1) / some;
        for (int i = 0; i < size; ++i) {
            const int whose = (number + i) % size;
            std::atomic<i64> &taken = team.next[whose].taken[round % 2];
            const i64 first = begin(whose, pieces), last = begin(whose + 1, pieces);
            for (i64 piece; (piece = first + taken.fetch_add(1, std::memory_order_relaxed)) < last;)
                f(piece * some, std::min(count, (piece + 1) * some), piece + 1 < last ? (piece + 1) * some : -1);
        }
    }

    // Calls f with every number below `count` that nobody else has taken.
    template <class F>
    void share(i64 count, F f) {
        share_some(count, 1, [&](i64 start, i64, i64) { f(start); });
    }

  private:
    i64 begin(int whose, i64 pieces) const { return whose * pieces / size; }

    Team &team;
    const int number, size;
    int round = 0;
};

}  // namespace
