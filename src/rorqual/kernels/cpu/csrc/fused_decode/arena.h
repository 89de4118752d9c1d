// One allocation for many buffers, described by one table.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../quantized_rows.h"

namespace {

// `table` is called with a function `buffer(pointer, count)` for each buffer: once to add up the sizes, once to set the
// pointers. So a size stands in one place. Buffers are uninitialised and begin at multiples of 64 bytes. With
// -DRORQUAL_CHECK each is followed by guard bytes, which check() compares.
class Arena {
  public:
    template <class F>
    explicit Arena(F table) {
        Cursor sizes{nullptr, 0, guards};
        table(sizes);
        memory.reset(static_cast<char *>(std::aligned_alloc(ALIGNMENT, std::max(sizes.used, ALIGNMENT))));
        if (!memory) throw std::bad_alloc();
        Cursor buffers{memory.get(), 0, guards};
        table(buffers);
    }
    ~Arena() { check(); }

    void check() const {
#if defined(RORQUAL_CHECK)
        for (const char *guard : guards)
            for (i64 i = 0; i < ALIGNMENT; ++i) RORQUAL_ASSERT(guard[i] == GUARD);
#endif
    }

  private:
    static constexpr i64 ALIGNMENT = 64;
    static constexpr char GUARD = 0x5a;

    struct Cursor {
        char *memory;
        i64 used;
        std::vector<char *> &guards;

        template <class U>
        void operator()(U *&pointer, i64 count) {
            RORQUAL_ASSERT(count >= 0);
            if (memory) pointer = reinterpret_cast<U *>(memory + used);
            used += (count * i64(sizeof(U)) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
#if defined(RORQUAL_CHECK)
            if (memory) std::fill_n(guards.emplace_back(memory + used), ALIGNMENT, GUARD);
            used += ALIGNMENT;
#endif
        }
    };

    struct Free {
        void operator()(char *p) const { std::free(p); }
    };
    std::unique_ptr<char, Free> memory;
    std::vector<char *> guards;
};

}  // namespace
