// What the kernels use of GCC's OpenMP runtime, on C++ threads. ThreadSanitizer sees what orders these, but nothing of
// libgomp, which is not instrumented. Loops hand out chunks by relaxed counters, so that nothing is ordered by chance.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Loop {
    std::atomic<long> next;
    long end, step, chunk;
};

struct Team {
    int size;
    std::mutex mutex;
    std::condition_variable turned;
    int arrived = 0, turn = 0;
    std::deque<std::unique_ptr<Loop>> loops;  // in the order in which every thread comes to them

    void barrier() {
        std::unique_lock lock(mutex);
        if (++arrived == size) {
            arrived = 0;
            ++turn;
            turned.notify_all();
            return;
        }
        turned.wait(lock, [this, mine = turn] { return turn != mine; });
    }
};

int most = 1;
thread_local Team *team = nullptr;
thread_local int rank = 0;
thread_local size_t loops_begun = 0;
thread_local Loop *loop = nullptr;

}  // namespace

extern "C" {
int omp_get_thread_num() { return rank; }
int omp_get_num_threads() { return team ? team->size : 1; }
int omp_get_max_threads() { return most; }
void omp_set_num_threads(int threads) { most = threads; }

// Regions do not nest.
void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned) {
    Team here{threads ? int(threads) : most, {}, {}, 0, 0, {}};
    const auto run = [&](int number) {
        team = &here;
        rank = number;
        loops_begun = 0;
        body(data);
        team = nullptr;
        rank = 0;
    };
    std::vector<std::thread> others;
    for (int i = 1; i < here.size; ++i) others.emplace_back(run, i);
    run(0);
    for (std::thread &other : others) other.join();
}

void GOMP_barrier() {
    if (team) team->barrier();
}

bool GOMP_loop_nonmonotonic_dynamic_next(long *begin, long *end) {
    const long first = loop->next.fetch_add(loop->chunk * loop->step, std::memory_order_relaxed);
    if (first >= loop->end) return false;
    *begin = first;
    *end = std::min(loop->end, first + loop->chunk * loop->step);
    return true;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long *begin, long *last) {
    {
        const std::lock_guard lock(team->mutex);
        if (loops_begun == team->loops.size()) team->loops.emplace_back(new Loop{start, end, step, chunk});
        loop = team->loops[loops_begun++].get();
    }
    return GOMP_loop_nonmonotonic_dynamic_next(begin, last);
}

void GOMP_loop_end() { GOMP_barrier(); }
void GOMP_loop_end_nowait() {}
}
