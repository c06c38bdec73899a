// RMSNorm, affine map, SiLU, dropout and residual of one row, forward and backward; norm_silu-inl.h has the formulas. A
// row is a pixel's channels and stays in the first-level cache between two passes.
#pragma once

#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// How a vector of channels is read and written: whole, or the first `count` where a row ends.
struct Whole {
  DDPM_FAST_INLINE vf get(const float* from) const { return load(from); }
  DDPM_FAST_INLINE void put(float* to, vf value) const { store(to, value); }
};
struct Part {
  int64_t count;
  DDPM_FAST_INLINE vf get(const float* from) const { return load_partial(from, count); }
  DDPM_FAST_INLINE void put(float* to, vf value) const { store_partial(to, value, count); }
};

// body(c, Whole or Part) for every vector of C channels.
template <typename Body>
DDPM_FAST_INLINE void over_channels(int64_t C, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) body(c, Whole{});
  if (c < C) body(c, Part{C - c});
}

template <typename Lanes>
DDPM_FAST_INLINE vf get_biased(const float* v, const float* bias, int64_t c, Lanes lanes) {
  const vf value = lanes.get(v + c);
  return bias ? value + lanes.get(bias + c) : value;
}

template <typename Lanes>
DDPM_FAST_INLINE void accumulate(float* sums, int64_t c, Lanes lanes, vf value) {
  lanes.put(sums + c, lanes.get(sums + c) + value);
}

// y of x̂ and its slope; offset, scale and shift may be null.
struct Affine {
  const float *gain, *offset, *scale, *shift;

  template <typename Lanes>
  DDPM_FAST_INLINE vf operator()(vf normed, int64_t c, Lanes lanes) const {
    vf y = normed * lanes.get(gain + c);
    if (offset) y += lanes.get(offset + c);
    if (scale) y = y * lanes.get(scale + c) + y;
    if (shift) y += lanes.get(shift + c);
    return y;
  }
  template <typename Lanes>
  DDPM_FAST_INLINE vf slope(int64_t c, Lanes lanes) const {
    const vf a = lanes.get(gain + c);
    return scale ? a * lanes.get(scale + c) + a : a;
  }
};

// sigmoid() is not 0 where its exp() ends, which a large y would multiply.
DDPM_FAST_INLINE vf silu_gate(vf y) { return select(y < splat(-87.0f), vf{}, sigmoid(y)); }

template <bool kActivation, typename Lanes>
DDPM_FAST_INLINE vf after_norm(vf y, const float* keep, const float* residual, int64_t c, Lanes lanes) {
  if constexpr (kActivation) y *= silu_gate(y);
  if (keep) {
    const vf k = lanes.get(keep + c);
    y = select(k == vf{}, vf{}, y * k);  // a dropped element is 0, even if y is NaN or inf
  }
  return residual ? y + lanes.get(residual + c) : y;
}

// The gradient with respect to y.
template <bool kActivation, typename Lanes>
DDPM_FAST_INLINE vf before_activation(const float* grad, const float* keep, const Affine& affine, vf normed, int64_t c,
                                      Lanes lanes) {
  vf g = lanes.get(grad + c);
  if (keep) {
    const vf k = lanes.get(keep + c);
    g = select(k == vf{}, vf{}, g * k);
  }
  if constexpr (kActivation) {
    const vf y = affine(normed, c, lanes), gate = silu_gate(y);
    g *= gate * (y * (splat(1.0f) - gate) + splat(1.0f));
  }
  return g;
}

// ‖v + bias‖₂
DDPM_FAST_INLINE float row_norm(const float* v, const float* bias, int64_t C) {
  vf even = {}, odd = {};
  int64_t c = 0;
  for (; c + 2 * kLanes <= C; c += 2 * kLanes) {
    const vf a = get_biased(v, bias, c, Whole{}), b = get_biased(v, bias, c + kLanes, Whole{});
    even = a * a + even;
    odd = b * b + odd;
  }
  for (; c + kLanes <= C; c += kLanes) {
    const vf a = get_biased(v, bias, c, Whole{});
    even = a * a + even;
  }
  if (c < C) {
    const vf a = get_biased(v, bias, c, Part{C - c});
    odd = a * a + odd;
  }
  return __builtin_sqrtf(reduce_add(even + odd));
}

constexpr float kMinNorm = 1e-12f;

// √C / max(norm, 1e-12); NaN stays NaN.
DDPM_FAST_INLINE float rms_factor(float norm, int64_t C) {
  return __builtin_sqrtf(static_cast<float>(C)) / (norm < kMinNorm ? kMinNorm : norm);
}

// One row: out = keep·SiLU(x̂·gain·(1 + scale) + shift) + residual, x̂ = (v + bias)·√C / norm with row_norm's `norm`.
// bias, residual and keep may be null; out may be v or residual.
template <bool kActivation>
DDPM_FAST_INLINE void rms_apply(const float* v, float norm, const float* bias, const Affine& affine,
                                const float* residual, float* out, int64_t C, const float* keep) {
  const vf factor = splat(rms_factor(norm, C));
  over_channels(C, [&](int64_t c, auto lanes) {
    const vf y = affine(get_biased(v, bias, c, lanes) * factor, c, lanes);
    lanes.put(out + c, after_norm<kActivation>(y, keep, residual, c, lanes));
  });
}

// Sums over pixels of one sample, per channel; those that are null are not made. With g the gradient with respect to y:
// dgain = Σ over samples of (1 + scale)·products, dscale = gain·products + offset·slopes, dshift = slopes,
// doffset = Σ over samples of (1 + scale)·slopes, dbias = Σ over samples of inputs.
struct NormSums {
  float* products;  // Σ g·x̂
  float* slopes;    // Σ g
  float* inputs;    // Σ dx
};

// The gradient of a row, by its `norm`. dx may be grad. The sums are added to.
template <bool kActivation>
DDPM_FAST_INLINE void rms_row_backward(const float* grad, const float* v, float norm, const float* bias,
                                       const float* gain, const float* scale, const float* shift, float* dx,
                                       const NormSums& sums, int64_t C, const float* keep = nullptr) {
  const Affine affine{.gain = gain, .offset = nullptr, .scale = scale, .shift = shift};
  const vf factor = splat(rms_factor(norm, C));
  vf dot = {};
  over_channels(C, [&](int64_t c, auto lanes) {
    const vf normed = get_biased(v, bias, c, lanes) * factor;
    const vf g = before_activation<kActivation>(grad, keep, affine, normed, c, lanes);
    if (sums.products) accumulate(sums.products, c, lanes, g * normed);
    if (sums.slopes) accumulate(sums.slopes, c, lanes, g);
    const vf z = g * affine.slope(c, lanes);
    dot = z * normed + dot;
    lanes.put(dx + c, z);
  });
  // A norm at its bound is a constant: nothing flows through it.
  const vf mean = splat(norm < kMinNorm ? 0.0f : reduce_add(dot) / static_cast<float>(C));
  over_channels(C, [&](int64_t c, auto lanes) {
    const vf normed = get_biased(v, bias, c, lanes) * factor;
    const vf d = (lanes.get(dx + c) - normed * mean) * factor;
    if (sums.inputs) accumulate(sums.inputs, c, lanes, d);
    lanes.put(dx + c, d);
  });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
