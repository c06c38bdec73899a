// The kernel of the variational bound on a tile of one sample: plain loops that the compiler vectorises.
#pragma once

#include "variational_bound.h"
#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA::variational_bound {

template <bool kDecoder, bool kLearned>
inline void elements(const VariationalBoundTile& tile) {
  const BoundRow row = tile.row;
  const float* __restrict__ output = tile.output, * __restrict__ variance = tile.variance;
  const float* __restrict__ images = tile.x, * __restrict__ noise = tile.eps;
  float* __restrict__ errors = tile.error, * __restrict__ bounds = tile.bound;
  float* __restrict__ douts = tile.dout, * __restrict__ dvariances = tile.dvariance;
  const float scale = tile.normalize ? 2.0f : 1.0f, shift = tile.normalize ? -1.0f : 0.0f;
  const float limit = tile.clip ? 1.0f : 3.4e38f, least = tile.min_log_probability;
  const float half_span = 0.5f * (row.high - row.low), precision = row.m1 * bounded_exp(-row.log_variance_true);
  const float through_error = tile.detach_mean ? 1.0f : 2.0f * row.w;
  const float through_mean = tile.detach_mean ? 0.0f : (row.weight * kBitsOfNat) * row.q * row.m1;
  for (int64_t i = 0; i < tile.count; ++i) {
    const float x = scale * images[i] + shift, eps = noise[i], out = output[i];
    const float over_low = kLearned ? half_span * (variance[i] + 1.0f) : 0.0f;
    const float error = out - (row.c * eps + row.d * x), x_t = row.a * x + row.b * eps;
    const float predicted = row.p * x_t + row.q * out;
    const bool inside = (predicted >= -limit) & (predicted <= limit);
    const float x_start = clamped(predicted, -limit, limit);
    const Bound bound = kDecoder
                            ? negative_log_probability(x, row.m1 * x_start + row.m2 * x_t, row.low + over_low, least)
                            : divergence(row, precision, over_low, x - x_start);
    errors[i] = error;
    bounds[i] = bound.value;
    // A product with 0 would make NaN of an infinite dmean.
    const float dmean = through_mean == 0.0f ? 0.0f : through_mean * bound.dmean;
    douts[i] = through_error * error + (inside ? dmean : 0.0f);
    dvariances[i] = bound.dvariance;
  }
}

constexpr int kSums = 32;  // partial sums: one sum would make each addition wait for the previous one

template <bool kSquares>
inline float sum(const float* __restrict__ values, int64_t count) {
  float sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int k = 0; k < kSums; ++k) sums[k] += kSquares ? values[i + k] * values[i + k] : values[i + k];
  }
  for (int k = 0; i < count; ++i, ++k) sums[k] += kSquares ? values[i] * values[i] : values[i];
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  return sums[0];
}

inline VariationalBoundSums forward(const VariationalBoundTile& tile) {
  const bool learned = tile.variance != nullptr;
  if (tile.row.is_decoder > 0.5f) {
    learned ? elements<true, true>(tile) : elements<true, false>(tile);
  } else {
    learned ? elements<false, true>(tile) : elements<false, false>(tile);
  }
  return {sum<true>(tile.error, tile.count), sum<false>(tile.bound, tile.count)};
}

}  // namespace ddpm_fast::DDPM_FAST_ISA::variational_bound
