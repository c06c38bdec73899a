// The kernels for x86-64 with AVX-512 (F, BW, CD, DQ, VL), and the same with the products of AVX512_BF16.
#include "targets.h"
#if defined(DDPM_FAST_AVX512)
// The standard headers of philox.h come before the target pragma: the linker may keep these functions for all targets.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/runtime/parallel.h"
// DDPM_FAST_EMULATE_AVX512: the same vectors of 16 in halves, for tests of their arithmetic on a processor with AVX2.
#if defined(DDPM_FAST_EMULATE_AVX512)
#define DDPM_FAST_TARGET "arch=x86-64-v3"
#else
#define DDPM_FAST_TARGET "arch=x86-64-v4"
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(DDPM_FAST_TARGET))), apply_to = function)
#elif defined(DDPM_FAST_EMULATE_AVX512)
#pragma GCC target("arch=x86-64-v3")
#else
#pragma GCC target("arch=x86-64-v4")
#endif
#define DDPM_FAST_ISA avx512
#define DDPM_FAST_LANES 16
#if defined(DDPM_FAST_AVX512_BF16)
#define DDPM_FAST_BFLOAT16
#endif
#include "cpu/kernels/kernels-inl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace ddpm_fast {
extern const Kernels kAvx512Kernels;
constinit const Kernels kAvx512Kernels = avx512::make_kernels("avx512");
#if defined(DDPM_FAST_AVX512_BF16)
extern const Kernels kAvx512Bf16Kernels;
constinit const Kernels kAvx512Bf16Kernels = avx512::make_kernels("avx512_bf16", true);
#endif
}  // namespace ddpm_fast
#endif
