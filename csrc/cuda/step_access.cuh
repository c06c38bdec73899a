// Loads and stores of the sampler step's kernels.
#pragma once

#include "access.cuh"
#include "core/sampler_math.h"

namespace ddpm_fast {

// How a thread reads and writes its elements.
enum class Access {
  kWide,     // 8 elements, everything in 16-byte accesses
  kStrided,  // 4 elements, the state in 16-byte accesses, the model's output by its strides (channels-last)
  kAny,      // 4 elements one by one, a sample's last thread the remaining ones
};

template <Access kAccess, int N>
__device__ __forceinline__ void load_state(float (&to)[N], const float* from, int64_t left) {
  if constexpr (kAccess != Access::kAny) {
    load_wide(to, from);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = i < left ? from[i] : 0.0f;
  }
}

template <Access kAccess, int N>
__device__ __forceinline__ void store_state(float* to, const float (&from)[N], int64_t left) {
  if constexpr (kAccess != Access::kAny) {
    store_wide(to, from);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < left) to[i] = from[i];
    }
  }
}

// Elements [e, e + N) of one sample of the model's output.
template <Access kAccess, typename T, int N>
__device__ __forceinline__ void load_output(float (&to)[N], const T* sample, const OutputLayout& layout, int64_t e,
                                            int64_t left) {
  if constexpr (kAccess == Access::kWide) {
    load_wide(to, sample + e);
  } else {
    int64_t channel = e / layout.pixels;
    int64_t pixel = e - channel * layout.pixels;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      to[i] = i < left ? to_float(sample[channel * layout.channel_stride + pixel * layout.pixel_stride]) : 0.0f;
      if (++pixel == layout.pixels) {
        pixel = 0;
        ++channel;
      }
    }
  }
}

template <int N>
__device__ __forceinline__ void fill(float (&to)[N], float value) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = value;
}

// A state of an earlier step: 0 where nothing multiplies it; NaN, visible in the result without a synchronisation,
// where there is none to read.
template <Access kAccess, int N>
__device__ __forceinline__ void load_previous(float (&to)[N], const float* from, int64_t first, int64_t left,
                                              bool wanted) {
  if (!wanted) {
    fill(to, 0.0f);
  } else if (from == nullptr) {
    fill(to, NAN);
  } else {
    load_state<kAccess>(to, from + first, left);
  }
}

}  // namespace ddpm_fast
