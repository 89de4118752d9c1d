// A team of threads that runs many short parallel loops with spin barriers between them. A waiting thread spins for
// some ten microseconds and then yields, so another program on a core costs no more than its share.
//
// Each thread owns a contiguous range of a loop's chunks, the same range for the same loop, so data it wrote is still
// in its caches when it reads it again. A thread that finishes early steals chunks from the others. One shared counter
// for all threads was 4 to 9 % slower on two cores because of contention.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <sched.h>

#include "dtypes.h"

namespace {

constexpr int SPINS = 4000;  // some ten microseconds, longer than the threads' finishing times differ

// State shared by all threads of a team.
class ThreadTeam {
  public:
    explicit ThreadTeam(int max_threads) : counters(new Counter[max_threads]) {}

  private:
    friend class Worker;
    // Chunks taken from one thread's range: for the current loop, and for the one after the next barrier.
    struct alignas(64) Counter {
        std::atomic<i64> taken[2]{};
    };

    const std::unique_ptr<Counter[]> counters;
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> round{0};
};

// One thread of the team.
class Worker {
  public:
    Worker(ThreadTeam &team, int rank, int size) : team(team), rank(rank), size(size) {}

    // Waits for all threads; calls `idle` repeatedly while it spins.
    template <class F>
    void barrier(F idle) {
        if (team.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            team.arrived.store(0, std::memory_order_relaxed);
            team.round.store(round + 1, std::memory_order_release);
        }
        for (int spin = 0; team.round.load(std::memory_order_acquire) == round; ++spin) {
            if (spin < SPINS) {
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
        // No thread uses this counter now: the loop before the barrier is over, the one after the next has not begun.
        team.counters[rank].taken[round % 2].store(0, std::memory_order_relaxed);
        ++round;
    }

    bool is_first() const { return rank == 0; }

    // The first of `chunks` chunks in this thread's range.
    i64 begin(i64 chunks) const { return begin(rank, chunks); }

    // Splits [0, count) into chunks of chunk_size and calls f(start, end, next) for the chunks this thread takes, its
    // own first. `next` is where its next chunk probably starts, for prefetching; -1: unknown.
    template <class F>
    void parallel_for_stealing(i64 count, i64 chunk_size, F f) {
        const i64 chunks = (count + chunk_size - 1) / chunk_size;
        for (int i = 0; i < size; ++i) {
            const int owner = (rank + i) % size;
            std::atomic<i64> &taken = team.counters[owner].taken[round % 2];
            const i64 first = begin(owner, chunks), last = begin(owner + 1, chunks);
            for (i64 chunk; (chunk = first + taken.fetch_add(1, std::memory_order_relaxed)) < last;)
                f(chunk * chunk_size, std::min(count, (chunk + 1) * chunk_size),
                  chunk + 1 < last ? (chunk + 1) * chunk_size : -1);
        }
    }

    // Calls f(i) for the i in [0, count) that this thread takes, in chunks of one.
    template <class F>
    void parallel_for(i64 count, F f) {
        parallel_for_stealing(count, 1, [&](i64 start, i64, i64) { f(start); });
    }

  private:
    i64 begin(int owner, i64 chunks) const { return owner * chunks / size; }

    ThreadTeam &team;
    const int rank, size;
    int round = 0;
};

}  // namespace
