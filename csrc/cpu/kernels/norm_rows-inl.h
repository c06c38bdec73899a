// RMSNorm, affine map, SiLU, dropout and residual of one row, forward and backward; norm_silu-inl.h has the formulas. A
// row is a pixel's channels and stays in the first-level cache between two passes.
#pragma once

#include "convert-inl.h"
#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// How a vector of channels is read and written: whole, or the first `count` where a row ends.
// Elements are float, Half or Bfloat16.
struct Whole {
  template <typename T>
  DDPM_FAST_INLINE vf get(const T* from) const {
    return load(from);
  }
  template <typename T>
  DDPM_FAST_INLINE void put(T* to, vf value) const {
    store(to, value);
  }
  // The vector with zeros where there is no element, for sums over its lanes.
  DDPM_FAST_INLINE vf only(vf value) const { return value; }
};
struct Part {
  int64_t count;
  template <typename T>
  DDPM_FAST_INLINE vf get(const T* from) const {
    return load_partial(from, count);
  }
  template <typename T>
  DDPM_FAST_INLINE void put(T* to, vf value) const {
    store_partial(to, value, count);
  }
  DDPM_FAST_INLINE vf only(vf value) const {
    vf kept = {};
    __builtin_memcpy(&kept, &value, static_cast<unsigned long>(count) * 4);
    return kept;
  }
};

// body(c, Whole or Part) for every vector of C channels.
template <typename Body>
DDPM_FAST_INLINE void over_channels(int64_t C, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) body(c, Whole{});
  if (c < C) body(c, Part{C - c});
}

template <typename T, typename Lanes>
DDPM_FAST_INLINE vf get_biased(const T* v, const float* bias, int64_t c, Lanes lanes) {
  const vf value = lanes.get(v + c);
  return bias ? value + lanes.get(bias + c) : value;
}

template <typename Lanes>
DDPM_FAST_INLINE void accumulate(float* sums, int64_t c, Lanes lanes, vf value) {
  lanes.put(sums + c, lanes.get(sums + c) + value);
}

// Rows of the affine map; offset, scale and shift may be null.
struct Affine {
  const float *gain, *offset, *scale, *shift;
};

// y of x̂ and its slope in a vector of channels, for many pixels.
struct AffineAt {
  bool has_offset, has_scale, has_shift;
  vf gain, offset, scale, shift;

  template <typename Lanes>
  DDPM_FAST_INLINE AffineAt(const Affine& rows, int64_t c, Lanes lanes)
      : has_offset(rows.offset),
        has_scale(rows.scale),
        has_shift(rows.shift),
        gain(lanes.get(rows.gain + c)),
        offset(has_offset ? lanes.get(rows.offset + c) : vf{}),
        scale(has_scale ? lanes.get(rows.scale + c) : vf{}),
        shift(has_shift ? lanes.get(rows.shift + c) : vf{}) {}
  DDPM_FAST_INLINE vf operator()(vf normed) const {
    vf y = normed * gain;
    if (has_offset) y += offset;
    if (has_scale) y = y * scale + y;
    if (has_shift) y += shift;
    return y;
  }
  DDPM_FAST_INLINE vf slope() const { return has_scale ? gain * scale + gain : gain; }
};

// sigmoid() is not 0 where its exp() ends, which a large y would multiply.
DDPM_FAST_INLINE vf silu_gate(vf y) { return select(y < splat(-87.0f), vf{}, sigmoid(y)); }

template <typename T, typename Lanes>
DDPM_FAST_INLINE vf after_norm(vf y, bool activation, const float* keep, const T* residual, int64_t c, Lanes lanes) {
  if (activation) y *= silu_gate(y);
  if (keep) {
    const vf k = lanes.get(keep + c);
    y = select(k == vf{}, vf{}, y * k);  // a dropped element is 0, even if y is NaN or inf
  }
  return residual ? y + lanes.get(residual + c) : y;
}

// The gradient with respect to y = affine(x̂).
template <typename T, typename AffineOf, typename Lanes>
DDPM_FAST_INLINE vf before_activation(const T* grad, bool activation, const float* keep, const AffineOf& affine,
                                      vf normed, int64_t c, Lanes lanes) {
  vf g = lanes.get(grad + c);
  if (keep) {
    const vf k = lanes.get(keep + c);
    g = select(k == vf{}, vf{}, g * k);
  }
  if (activation) {
    const vf y = affine(normed), gate = silu_gate(y);
    g *= gate * (y * (splat(1.0f) - gate) + splat(1.0f));
  }
  return g;
}

// ‖v + bias‖₂
template <typename T>
DDPM_FAST_INLINE float row_norm(const T* v, const float* bias, int64_t C) {
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
template <typename T>
DDPM_FAST_INLINE void rms_apply(const T* v, float norm, const float* bias, const Affine& affine, bool activation,
                                const T* residual, T* out, int64_t C, const float* keep) {
  const vf factor = splat(rms_factor(norm, C));
  over_channels(C, [&](int64_t c, auto lanes) {
    const vf y = AffineAt(affine, c, lanes)(get_biased(v, bias, c, lanes) * factor);
    lanes.put(out + c, after_norm(y, activation, keep, residual, c, lanes));
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

// The mean of z·x̂ over the channels of a pixel from their sum. A norm at its bound is a constant: nothing flows through
// it.
DDPM_FAST_INLINE float rms_mean(float norm, float sum, int64_t C) {
  return norm < kMinNorm ? 0.0f : sum / static_cast<float>(C);
}

// The gradient of v = x + bias from z, that of x̂ = v·factor.
DDPM_FAST_INLINE vf rms_gradient(vf z, vf normed, vf mean, vf factor) { return (z - normed * mean) * factor; }

// The gradient of a row, by its `norm`. z: memory of C floats, which may be dx, and dx may be grad. The sums are added
// to.
template <typename T>
DDPM_FAST_INLINE void rms_row_backward(const T* grad, bool activation, const T* v, float norm, const float* bias,
                                       const float* gain, const float* scale, const float* shift, float* z, T* dx,
                                       const NormSums& sums, int64_t C, const float* keep = nullptr) {
  const Affine rows{.gain = gain, .offset = nullptr, .scale = scale, .shift = shift};
  const vf factor = splat(rms_factor(norm, C));
  vf dot = {};
  over_channels(C, [&](int64_t c, auto lanes) {
    const vf normed = get_biased(v, bias, c, lanes) * factor;
    const AffineAt affine(rows, c, lanes);
    const vf g = before_activation(grad, activation, keep, affine, normed, c, lanes);
    if (sums.products) accumulate(sums.products, c, lanes, g * normed);
    if (sums.slopes) accumulate(sums.slopes, c, lanes, g);
    const vf scaled = g * affine.slope();
    dot = scaled * normed + dot;
    lanes.put(z + c, scaled);
  });
  const vf mean = splat(rms_mean(norm, reduce_add(dot), C));
  over_channels(C, [&](int64_t c, auto lanes) {
    const vf normed = get_biased(v, bias, c, lanes) * factor;
    const vf d = rms_gradient(lanes.get(z + c), normed, mean, factor);
    if (sums.inputs) accumulate(sums.inputs, c, lanes, d);
    lanes.put(dx + c, d);
  });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
