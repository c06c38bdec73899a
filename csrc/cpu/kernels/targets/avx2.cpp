// The kernels for x86-64 with AVX2 and FMA.
#include "targets.h"
#if defined(DDPM_FAST_AVX2)
// The standard headers of philox.h come before the target pragma: the linker may keep these functions for all targets.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/runtime/parallel.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v3")
#endif
#define DDPM_FAST_ISA avx2
#define DDPM_FAST_LANES 8
#include "cpu/kernels/kernels-inl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace ddpm_fast {
extern const Kernels kAvx2Kernels;
constinit const Kernels kAvx2Kernels = avx2::make_kernels("avx2");
}  // namespace ddpm_fast
#endif
