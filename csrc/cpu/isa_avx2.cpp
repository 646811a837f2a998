#include <cstddef>
#include <cstdint>

#include "kernels.h"

#if MLORA_X86

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
// GCC 12 warns about its own intrinsics (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx2,fma,f16c")
#endif

#define MLORA_ISA avx2
#define MLORA_HAVE_AVX2 1
#define MLORA_HAVE_AVX512 0
#define MLORA_HAVE_BF16 0
#include "table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
