// The kernels of q_sample and the diffusion loss on a tile of one sample: plain loops that the compiler vectorises.
#pragma once

#include "forward_diffusion.h"
#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA::forward_diffusion {

inline void combine(float* __restrict__ to, const float* __restrict__ x, const float* __restrict__ eps, float p,
                    float q, bool normalize, int64_t count) {
  if (normalize) {
    for (int64_t i = 0; i < count; ++i) to[i] = p * eps[i] + q * (x[i] * 2.0f - 1.0f);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = p * eps[i] + q * x[i];
  }
}

inline float subtract(float* __restrict__ error, const float* __restrict__ output, const float* __restrict__ target,
                      int64_t count) {
  constexpr int kSums = 32;  // partial sums: one sum would make each addition wait for the previous one
  float sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int k = 0; k < kSums; ++k) {
      const float difference = output[i + k] - target[i + k];
      error[i + k] = difference;
      sums[k] += difference * difference;
    }
  }
  for (int k = 0; i < count; ++i, ++k) {
    const float difference = output[i] - target[i];
    error[i] = difference;
    sums[k] += difference * difference;
  }
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  return sums[0];
}

inline void scale(float* __restrict__ to, const float* __restrict__ from, float factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i] * factor;
}

}  // namespace ddpm_fast::DDPM_FAST_ISA::forward_diffusion
