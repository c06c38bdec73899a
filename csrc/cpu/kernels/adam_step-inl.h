// Adam on chunks of parameters: plain loops that the compiler vectorises.
#pragma once

#include "adam_step.h"
#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA::adam_step {

// gcc checks only a few arrays for overlap while running.
#if defined(__GNUC__) && !defined(__clang__)
#define DDPM_FAST_NO_OVERLAP _Pragma("GCC ivdep")
#else
#define DDPM_FAST_NO_OVERLAP
#endif

constexpr int64_t kPiece = 1024;  // elements whose squares are summed in float

// One sum would make each addition wait for the one before.
constexpr int kSums = 64;

inline double squares(const float* __restrict__ grad, int64_t count) {
  double total = 0;
  for (int64_t first = 0; first < count; first += kPiece) {
    const int64_t end = min(first + kPiece, count);
    float sums[kSums] = {};
    int64_t i = first;
    for (; i + kSums <= end; i += kSums) {
      for (int k = 0; k < kSums; ++k) sums[k] += grad[i + k] * grad[i + k];
    }
    for (int k = 0; i < end; ++i, ++k) sums[k] += grad[i] * grad[i];
    for (int half = kSums / 2; half > 0; half /= 2) {
      for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
    }
    total += static_cast<double>(sums[0]);
  }
  return total;
}

inline void update(const AdamChunk& chunk, const AdamNumbers& numbers) {
  const AdamNumbers n = numbers;
  float* __restrict__ params = chunk.param;
  float* __restrict__ moments = chunk.exp_avg;
  float* __restrict__ seconds = chunk.exp_avg_sq;
  const float* __restrict__ grads = chunk.grad;
  DDPM_FAST_NO_OVERLAP
  for (int64_t i = 0; i < chunk.count; ++i) {
    const float p = n.kept * params[i], g = n.factor * grads[i] + n.weight_decay * params[i];
    const float m = n.beta1 * moments[i] + n.rest1 * g, v = n.beta2 * seconds[i] + n.rest2 * g * g;
    moments[i] = m;
    seconds[i] = v;
    params[i] = p - n.step_size * m / (__builtin_sqrtf(v) * n.inverse_root + n.eps);
  }
}

inline void move(float* __restrict__ average, const float* __restrict__ param, float weight, int64_t count) {
  if (weight < 0.5f) {
    for (int64_t i = 0; i < count; ++i) average[i] += weight * (param[i] - average[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) average[i] = param[i] - (param[i] - average[i]) * (1.0f - weight);
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA::adam_step
