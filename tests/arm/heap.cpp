// A heap at a fixed address that another process can share: loaded before Python (LD_PRELOAD), it gives out all the
// memory that Python, NumPy and PyTorch ask for, so that an address means the same here and in the ARM process
// (host.cpp), also where it stands in a table of numbers, as those of a decode step do.
//
// Pieces are powers of two, kept in lists when they are given back; memory that is not touched costs nothing.

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>

namespace {

constexpr uintptr_t START = 0x200000000000;  // far from what Linux gives out by itself
constexpr size_t SIZE = size_t(1) << 36, LEAST = 64;

struct Piece {
    size_t size;  // as a power of two
    Piece *next;
};
// What lies just below the memory given out, which begins at a multiple of LEAST or of what was asked for.
struct Mark {
    Piece *piece;
    size_t room;
};

std::mutex turn;
Piece *spare[64];
uintptr_t end = 0;
int file = -1;

void begin() {
    file = memfd_create("heap", 0);
    void *const start = reinterpret_cast<void *>(START);
    if (file < 0 || ftruncate(file, SIZE) ||
        mmap(start, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, file, 0) != start) {
        perror("a heap to share");
        _exit(1);
    }
    // A child that goes on with a copy of this process would write to its parent's memory: it crashes instead.
    madvise(start, SIZE, MADV_DONTFORK);
    end = START;
}

Mark &mark_of(void *p) { return reinterpret_cast<Mark *>(p)[-1]; }

void *give(size_t align, size_t size) {
    align = align < LEAST ? LEAST : align;
    const size_t wanted = size + align + LEAST;
    if (wanted < size || wanted > SIZE) return errno = ENOMEM, nullptr;
    int k = 7;
    while ((size_t(1) << k) < wanted) ++k;
    const std::lock_guard guard(turn);
    if (!end) begin();
    Piece *piece = spare[k];
    if (piece) {
        spare[k] = piece->next;
    } else {
        if (end + (size_t(1) << k) > START + SIZE) return errno = ENOMEM, nullptr;
        piece = reinterpret_cast<Piece *>(end);
        end += size_t(1) << k;
        piece->size = size_t(k);
    }
    const uintptr_t whole = reinterpret_cast<uintptr_t>(piece);
    const uintptr_t at = (whole + sizeof(Piece) + sizeof(Mark) + align - 1) / align * align;
    void *p = reinterpret_cast<void *>(at);
    mark_of(p) = {piece, whole + (size_t(1) << k) - at};
    return p;
}

}  // namespace

extern "C" {

void *malloc(size_t size) { return give(LEAST, size); }

void free(void *p) {
    if (!p) return;
    Piece *piece = mark_of(p).piece;
    const std::lock_guard guard(turn);
    piece->next = spare[piece->size];
    spare[piece->size] = piece;
}

void *calloc(size_t count, size_t size) {
    size_t all;
    if (__builtin_mul_overflow(count, size, &all)) return errno = ENOMEM, nullptr;
    void *p = give(LEAST, all);
    return p ? memset(p, 0, all) : p;
}

void *realloc(void *p, size_t size) {
    if (!p) return malloc(size);
    const size_t room = mark_of(p).room;
    if (size <= room) return p;
    void *q = malloc(size);
    if (!q) return q;
    memcpy(q, p, room);
    free(p);
    return q;
}

int posix_memalign(void **to, size_t align, size_t size) { return (*to = give(align, size)) ? 0 : ENOMEM; }
void *aligned_alloc(size_t align, size_t size) { return give(align, size); }
void *memalign(size_t align, size_t size) { return give(align, size); }
void *valloc(size_t size) { return give(4096, size); }
void *pvalloc(size_t size) { return give(4096, (size + 4095) / 4096 * 4096); }
size_t malloc_usable_size(void *p) { return p ? mark_of(p).room : 0; }

// What the other process needs to have the same memory at the same address.
int heap_file() { return file; }
uintptr_t heap_start() { return START; }
size_t heap_size() { return SIZE; }
}
