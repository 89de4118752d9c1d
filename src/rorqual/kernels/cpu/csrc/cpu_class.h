// The processor classes, named as in rorqual/processor.py, and whether RORQUAL_CPU allows one. RORQUAL_CPU can only
// lower the class.
#pragma once

#include <cstdlib>
#include <cstring>

enum CpuClass { NONE, PORTABLE, AVX2, AVX512, AVX512_VNNI, AVX512_BF16, AMX };
constexpr const char *CPU_CLASSES[] = {"none", "portable", "avx2", "avx512", "avx512-vnni", "avx512-bf16", "amx"};

inline bool allows(CpuClass wanted) {
    const char *name = std::getenv("RORQUAL_CPU");
    if (!name || !*name) return true;
    int highest = NONE;
    while (highest < AMX && std::strcmp(name, CPU_CLASSES[highest])) ++highest;
    return wanted <= highest;
}
