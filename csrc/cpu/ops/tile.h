// What the CPU operators share: a tile of one sample is computed in float32 by plain functions that the compiler
// vectorises, once per instruction set.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>

#include "core/philox.h"

// Each marked function is compiled for AVX-512, AVX2 with FMA, and the baseline; the loader picks one (needs ifunc).
// A build for one processor (DDPM_FAST_MARCH=native in setup.py) compiles all its code for that.
#if defined(DDPM_FAST_NATIVE)
#define DDPM_FAST_VECTORISED
#elif defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define DDPM_FAST_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define DDPM_FAST_VECTORISED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DDPM_FAST_VECTORISED
#endif

namespace ddpm_fast {

constexpr int64_t kTile = 2048;              // elements; a few tiles fit the first-level cache. A multiple of 4.
constexpr int64_t kElementsPerTask = 16384;  // less work than this does not pay for waking a thread

// Work is cut into tiles the same way whatever the number of threads, so results do not depend on it.
struct Tiling {
  int64_t per_sample, total, grain;

  Tiling(int64_t batch, int64_t elements)
      : per_sample((elements + kTile - 1) / kTile),
        total(batch * per_sample),
        grain(std::max<int64_t>(1, kElementsPerTask / std::clamp<int64_t>(elements, 1, kTile))) {}
};

// Elements [first, first + count) of a sample's noise. `first` is a multiple of 4; z has room for count rounded up to
// whole blocks.
void normal_tile(float* z, const NoiseIndex& index, int64_t first, int64_t count);

void convert(float* to, const float* from, int64_t count);
void convert(float* to, const c10::Half* from, int64_t count);
void convert(float* to, const c10::BFloat16* from, int64_t count);
void convert(c10::Half* to, const float* from, int64_t count);
void convert(c10::BFloat16* to, const float* from, int64_t count);

}  // namespace ddpm_fast
