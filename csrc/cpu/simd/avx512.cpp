// The kernels for x86-64 with AVX-512 (F, BW, CD, DQ, VL).
#if defined(__x86_64__)
// What philox.h includes of the standard library, before the target: those functions are everybody's.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../parallel.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4")
#endif
#define DDPM_FAST_ISA avx512
#define DDPM_FAST_LANES 16
#include "all.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace ddpm_fast {
extern const Kernels kAvx512Kernels;
constinit const Kernels kAvx512Kernels = avx512::make_kernels("avx512");
}  // namespace ddpm_fast
#endif
