// Calls the compiled functions for another process, with which it shares memory at the same address (heap.cpp):
//
//     host LIBRARY FILE START SIZE      FILE: the number of the open file that is that memory
//
// reads requests from standard input and answers each with an i64: 0, or the requested value.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

using i64 = int64_t;

extern "C" void omp_set_num_threads(int);

struct Request {
    char name[56];
    i64 value;    // whether the name is that of an i64 to be read
    i64 threads;  // that the other process has set
    i64 integers[32];  // and addresses
    float numbers[8];
};

// Where AArch64 and x86-64 (System V) pass arguments does not depend on how integers and numbers follow each other: the
// first of each have registers of their own, and more integers follow on the stack. Those that a function does not take
// do no harm.
using Function = void (*)(i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64,  //
                          i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64,  //
                          float, float, float, float, float, float, float, float);

int main(int, char **arguments) {
    void *const library = dlopen(arguments[1], RTLD_NOW);
    void *const start = reinterpret_cast<void *>(std::strtoull(arguments[3], nullptr, 10));
    if (!library || mmap(start, std::strtoull(arguments[4], nullptr, 10), PROT_READ | PROT_WRITE,
                         MAP_SHARED | MAP_FIXED, std::atoi(arguments[2]), 0) != start) {
        std::fprintf(stderr, "%s\n", library ? "the memory cannot be shared" : dlerror());
        return 1;
    }
    Request r;
    while (std::fread(&r, sizeof r, 1, stdin) == 1) {
        void *const found = dlsym(library, r.name);
        if (!found) {
            std::fprintf(stderr, "%s\n", dlerror());
            return 1;
        }
        i64 answer = 0;
        const i64 *n = r.integers;
        const float *x = r.numbers;
        omp_set_num_threads(int(r.threads));
        if (r.value)
            answer = *static_cast<const i64 *>(found);
        else
            reinterpret_cast<Function>(found)(
                n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12], n[13], n[14], n[15],
                n[16], n[17], n[18], n[19], n[20], n[21], n[22], n[23], n[24], n[25], n[26], n[27], n[28], n[29], n[30],
                n[31], x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]);
        std::fwrite(&answer, sizeof answer, 1, stdout);
        std::fflush(stdout);
    }
}
