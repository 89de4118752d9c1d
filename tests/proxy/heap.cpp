// A heap at a fixed address that another process can share: loaded before Python (LD_PRELOAD), it serves all
// allocations of Python, NumPy and PyTorch, so that an address means the same here and in the kernels' process (host.cpp),
// also where it is an element of a tensor, as in a fused decode step.
//
// Blocks are powers of two, kept in free lists; untouched memory costs nothing.

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

constexpr uintptr_t START = 0x7e8000000000;  // below what Linux maps by itself, where ThreadSanitizer allows it
constexpr size_t SIZE = size_t(1) << 36, MIN_ALIGN = 64;

struct Block {
    size_t size;  // as a power of two
    Block *next;
};
// Lies just below the allocated memory, which is aligned to MIN_ALIGN or to the requested alignment.
struct Header {
    Block *block;
    size_t capacity;
};

std::mutex mutex;
Block *free_lists[64];
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

Header &header_of(void *p) { return reinterpret_cast<Header *>(p)[-1]; }

void *allocate(size_t align, size_t size) {
    align = align < MIN_ALIGN ? MIN_ALIGN : align;
    const size_t needed = size + align + MIN_ALIGN;
    if (needed < size || needed > SIZE) return errno = ENOMEM, nullptr;
    int k = 7;
    while ((size_t(1) << k) < needed) ++k;
    const std::lock_guard guard(mutex);
    if (!end) begin();
    Block *block = free_lists[k];
    if (block) {
        free_lists[k] = block->next;
    } else {
        if (end + (size_t(1) << k) > START + SIZE) return errno = ENOMEM, nullptr;
        block = reinterpret_cast<Block *>(end);
        end += size_t(1) << k;
        block->size = size_t(k);
    }
    const uintptr_t start = reinterpret_cast<uintptr_t>(block);
    const uintptr_t at = (start + sizeof(Block) + sizeof(Header) + align - 1) / align * align;
    void *p = reinterpret_cast<void *>(at);
    header_of(p) = {block, start + (size_t(1) << k) - at};
    return p;
}

}  // namespace

extern "C" {

void *malloc(size_t size) { return allocate(MIN_ALIGN, size); }

void free(void *p) {
    if (!p) return;
    Block *block = header_of(p).block;
    const std::lock_guard guard(mutex);
    block->next = free_lists[block->size];
    free_lists[block->size] = block;
}

void *calloc(size_t count, size_t size) {
    size_t all;
    if (__builtin_mul_overflow(count, size, &all)) return errno = ENOMEM, nullptr;
    void *p = allocate(MIN_ALIGN, all);
    return p ? memset(p, 0, all) : p;
}

void *realloc(void *p, size_t size) {
    if (!p) return malloc(size);
    const size_t capacity = header_of(p).capacity;
    if (size <= capacity) return p;
    void *q = malloc(size);
    if (!q) return q;
    memcpy(q, p, capacity);
    free(p);
    return q;
}

int posix_memalign(void **to, size_t align, size_t size) { return (*to = allocate(align, size)) ? 0 : ENOMEM; }
void *aligned_alloc(size_t align, size_t size) { return allocate(align, size); }
void *memalign(size_t align, size_t size) { return allocate(align, size); }
void *valloc(size_t size) { return allocate(4096, size); }
void *pvalloc(size_t size) { return allocate(4096, (size + 4095) / 4096 * 4096); }
size_t malloc_usable_size(void *p) { return p ? header_of(p).capacity : 0; }

// What the other process needs to map the same memory at the same address.
int heap_file() { return file; }
uintptr_t heap_start() { return START; }
size_t heap_size() { return SIZE; }
}
