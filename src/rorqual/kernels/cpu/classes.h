// The classes of processors, as in processor.py, and whether RORQUAL_CPU leaves one; it can only lower.
#pragma once

#include <cstdlib>
#include <cstring>

enum Class { NONE, PORTABLE, AVX2, AVX512, AVX512_VNNI, AVX512_BF16, AMX };
constexpr const char *CLASSES[] = {"none", "portable", "avx2", "avx512", "avx512-vnni", "avx512-bf16", "amx"};

inline bool allows(Class wanted) {
    const char *name = std::getenv("RORQUAL_CPU");
    if (!name || !*name) return true;
    int highest = NONE;
    while (highest < AMX && std::strcmp(name, CLASSES[highest])) ++highest;
    return wanted <= highest;
}
