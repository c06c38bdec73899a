// The variational bound of one element and its gradients (Nichol & Dhariwal 2021, eq. 14 to 16; Ho et al. 2020, eq.
// 13), see ddpm_fast/ops/variational_bound/op.py. Torch-free, for host and device; no libm call and no branch, so that
// a host compiler vectorises the loop around it.
#pragma once

#include "philox.h"

namespace ddpm_fast {

// A row of the table; `over_low` below is log_variance − low.
struct BoundRow {
  float a, b, c, d, w, p, q, m1, m2, low, high, log_variance_true, is_decoder, weight;
};

constexpr int kBoundColumns = sizeof(BoundRow) / sizeof(float);
constexpr float kBitsOfNat = 1.44269504088896341f;
constexpr float kHalfBin = 1.0f / 255.0f;        // images of 8 bits in [−1, 1]
constexpr float kOpenBeyond = 0.999f;            // the first and the last bin are open
constexpr float kSaturated = 20.0f;              // standard deviations from where the cdf is 0 or 1
constexpr float kTwiceRoot = 1.59576912160573f;  // 2·√(2/π)

// NaN stays NaN.
DDPM_FAST_INLINE float clamped(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

// e^x to 1 ulp or so for x in [−87, 88]; beyond, the value at that bound.
DDPM_FAST_INLINE float bounded_exp(float x) {
  const float y = clamped(x, -87.0f, 88.0f);
  const float shifted = y * 1.44269504088896341f + 12582912.0f;  // 1.5·2^23: rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  float poly = 1.9875691500e-4f;
  poly = poly * r + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  return (poly * (r * r) + r + 1.0f) * float_of((bits_of(shifted) + 127u) << 23);
}

struct Exponentials {
  float whole, less_one, less_two;  // e^x, e^x − 1, e^x − 1 − x
};

// Without the cancellation of small x.
DDPM_FAST_INLINE Exponentials exponentials(float x) {
  const float y = clamped(x, -0.5f, 0.5f);
  float poly = 2.4801587e-5f;
  poly = poly * y + 1.9841270e-4f;
  poly = poly * y + 1.3888889e-3f;
  poly = poly * y + 8.3333333e-3f;
  poly = poly * y + 4.1666667e-2f;
  poly = poly * y + 1.6666667e-1f;
  poly = poly * y + 0.5f;
  const float least = (y * y) * poly, e = bounded_exp(x);
  const bool small = (x >= -0.5f) & (x <= 0.5f);
  return {small ? 1.0f + (y + least) : e, small ? y + least : e - 1.0f, small ? least : (e - 1.0f) - x};
}

// The bound in nats, its derivative with respect to the mean, and minus twice that with respect to log_variance.
struct Bound {
  float value, dmean, dvariance;
};

// KL(N(μ, σ²) ‖ N(mean, e^log_variance)) of the true posterior; precision is m1/σ², difference x0 − x̂0.
DDPM_FAST_INLINE Bound divergence(const BoundRow& row, float precision, float over_low, float difference) {
  const Exponentials e = exponentials((row.log_variance_true - row.low) - over_low);
  const float squared = e.whole * ((row.m1 * precision) * (difference * difference));
  return {0.5f * (e.less_two + squared), -e.whole * (precision * difference), e.less_one + squared};
}

struct Sigmoids {
  float positive, negative, log_positive;  // σ(u), σ(−u), ln σ(u)
};

DDPM_FAST_INLINE Sigmoids sigmoids(float u) {
  const float e = bounded_exp(u < 0.0f ? u : -u);
  const float larger = 1.0f / (1.0f + e), smaller = e * larger;
  return {u < 0.0f ? smaller : larger, u < 0.0f ? larger : smaller, (u > 0.0f ? 0.0f : u) - log_positive(1.0f + e)};
}

// −ln of the probability of the bin of x. With its edges in logits, a above b, that is σ(a) − σ(b) =
// σ(a)·σ(−b)·(1 − e^(b − a)), a product that does not cancel.
DDPM_FAST_INLINE Bound negative_log_probability(float x, float mean, float log_variance, float min_log_probability) {
  const float inverse_scale = bounded_exp(-0.5f * log_variance), centered = x - mean;
  const float above = clamped(inverse_scale * (centered + kHalfBin), -kSaturated, kSaturated);
  const float below = clamped(inverse_scale * (centered - kHalfBin), -kSaturated, kSaturated);
  const float width = clamped(inverse_scale * (2.0f * kHalfBin), 0.0f, 2.0f * kSaturated);
  const float a = (above + 0.044715f * (above * above * above)) * kTwiceRoot;
  const float b = (below + 0.044715f * (below * below * below)) * kTwiceRoot;
  const float distance = (width * kTwiceRoot) * (1.0f + 0.044715f * (above * above + above * below + below * below));
  const Sigmoids left = sigmoids(a), right = sigmoids(-b);
  const float share = -exponentials(-distance).less_one;
  const float inner = left.log_positive + right.log_positive + log_positive(share);
  const bool first = x<-kOpenBeyond, last = x> kOpenBeyond;
  const float found = first ? left.log_positive : (last ? right.log_positive : inner);
  const bool bounded = found < min_log_probability;
  // dΦ/dz of an edge over the probability of the bin.
  float at_above = first ? left.negative : left.negative / (right.positive * share);
  float at_below = last ? right.negative : right.negative / (left.positive * share);
  at_above = (bounded | last) ? 0.0f : at_above * ((1.0f + 0.134145f * (above * above)) * kTwiceRoot);
  at_below = (bounded | first) ? 0.0f : at_below * ((1.0f + 0.134145f * (below * below)) * kTwiceRoot);
  return {bounded ? -min_log_probability : -found, inverse_scale * (at_above - at_below),
          at_below * below - at_above * above};
}

}  // namespace ddpm_fast
