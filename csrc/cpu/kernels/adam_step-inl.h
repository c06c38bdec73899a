// Adam on chunks of parameters. It is bound by memory.
#pragma once

#include "adam_step.h"
#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA::adam_step {

// Memory is read fastest in several streams, and one sum would make each addition wait for the one before.
constexpr int kStreams = 4;
constexpr int64_t kPiece = 32 * kLanes;  // elements of a stream whose squares are summed in float

DDPM_FAST_INLINE vf square(vf value) { return value * value; }

inline double squares(const float* grad, int64_t count) {
  const int64_t length = count / kStreams / (2 * kLanes) * (2 * kLanes);
  double total = 0;
  for (int64_t first = 0; first < length; first += kPiece) {
    const int64_t end = min(first + kPiece, length);
    vf even[kStreams] = {}, odd[kStreams] = {};
    for (int64_t i = first; i < end; i += 2 * kLanes) {
      for (int k = 0; k < kStreams; ++k) {
        even[k] += square(load(grad + k * length + i));
        odd[k] += square(load(grad + k * length + i + kLanes));
      }
    }
    for (int k = 0; k < kStreams; ++k) total += static_cast<double>(reduce_add(even[k] + odd[k]));
  }
  vf rest = {};
  for (int64_t i = kStreams * length; i < count; i += kLanes) rest += square(load_upto(grad + i, count - i));
  return total + static_cast<double>(reduce_add(rest));
}

DDPM_FAST_INLINE vf root(vf value) {
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = __builtin_sqrtf(value[lane]);
  return value;
}

// `count` elements from i on, at most a vector; returns the squares of their gradients.
DDPM_FAST_INLINE vf update_vector(const AdamChunk& chunk, const AdamNumbers& numbers, int64_t i, int64_t count) {
  const vf param = load_upto(chunk.param + i, count), grad = load_upto(chunk.grad + i, count);
  const vf g = splat(numbers.factor) * grad + splat(numbers.weight_decay) * param;
  const vf m = splat(numbers.beta1) * load_upto(chunk.exp_avg + i, count) + splat(numbers.rest1) * g;
  const vf v = splat(numbers.beta2) * load_upto(chunk.exp_avg_sq + i, count) + splat(numbers.rest2) * square(g);
  const vf denominator = root(v) * splat(numbers.inverse_root) + splat(numbers.eps);
  store_upto(chunk.exp_avg + i, m, count);
  store_upto(chunk.exp_avg_sq + i, v, count);
  store_upto(chunk.param + i, splat(numbers.kept) * param - splat(numbers.step_size) * m / denominator, count);
  return square(grad);
}

inline double update(const AdamChunk& chunk, const AdamNumbers& numbers) {
  const AdamNumbers n = numbers;
  const int64_t whole = chunk.count / (2 * kLanes) * (2 * kLanes);
  double total = 0;
  for (int64_t first = 0; first < whole; first += kPiece) {
    const int64_t end = min(first + kPiece, whole);
    vf even = {}, odd = {};
    for (int64_t i = first; i < end; i += 2 * kLanes) {
      even += update_vector(chunk, n, i, kLanes);
      odd += update_vector(chunk, n, i + kLanes, kLanes);
    }
    total += static_cast<double>(reduce_add(even + odd));
  }
  vf rest = {};
  for (int64_t i = whole; i < chunk.count; i += kLanes) {
    rest += update_vector(chunk, n, i, min<int64_t>(kLanes, chunk.count - i));
  }
  return total + static_cast<double>(reduce_add(rest));
}

inline void move(float* __restrict__ average, const float* __restrict__ param, float weight, int64_t count) {
  if (weight < 0.5f) {
    for (int64_t i = 0; i < count; ++i) average[i] += weight * (param[i] - average[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) average[i] = param[i] - (param[i] - average[i]) * (1.0f - weight);
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA::adam_step
