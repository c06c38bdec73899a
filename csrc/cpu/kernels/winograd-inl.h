// The transforms of Winograd's F(4×4, 3×3) (Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks",
// section 4): 4×4 outputs from 6×6 inputs with 36 products per pair of channels, where the plain form takes 144.
//
// The interpolation points are 0, ±p, ±q and infinity with p = 1/√2 and q = √2. Their errors are 1.5 to 2 times those
// of a direct convolution; the textbook's 0, ±1, ±2 lose a digit. Along one axis, with d the inputs, g the taps, y the
// outputs:
//
//   input    v0 = d0 - 5/2·d2 + d4         v1, v2 = (d4 - 2·d2) ± p·(d3 - 2·d1)
//            v5 = d1 - 5/2·d3 + d5         v3, v4 = (d4 - ½·d2) ± q·(d3 - ½·d1)
//   taps     u0 = g0     u5 = g2           u1, u2 = -⅔·(g0 ± p·g1 + ½·g2)     u3, u4 = ⅙·(g0 ± q·g1 + 2·g2)
//   output   y0 = m0 + (m1 + m2) + (m3 + m4)           y1 = p·(m1 - m2) + q·(m3 - m4)
//            y2 = ½·(m1 + m2) + 2·(m3 + m4)            y3 = ½·p·(m1 - m2) + 2·q·(m3 - m4) + m5        for m = u·v
//
// A gradient takes the transposed forms: of the outputs y → m, and of the taps u → g.
#pragma once

#include "tiles-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr float kP = 0.70710678118654752f, kQ = 1.41421356237309505f;

// The same address, of which the compiler knows nothing: it would keep each of a loop's 36 in memory.
template <typename T>
DDPM_FAST_INLINE T* fresh(T* address) {
  __asm__("" : "+r"(address));
  return address;
}

struct Six {
  vf a0, a1, a2, a3, a4, a5;
};
struct Four {
  vf a0, a1, a2, a3;
};
struct Three {
  vf a0, a1, a2;
};

struct Two {
  vf a0, a1;
};

// v0 of d0, d2, d4, or v5 of d1, d3, d5.
DDPM_FAST_INLINE vf outer_input_point(vf a, vf b, vf c) { return b * splat(-2.5f) + (a + c); }
// v1 and v2 with factor -2 and point p, v3 and v4 with -½ and q.
DDPM_FAST_INLINE Two inner_input_points(vf d1, vf d2, vf d3, vf d4, float factor, float point) {
  const vf even = d2 * splat(factor) + d4, odd = d1 * splat(factor) + d3;
  return {odd * splat(point) + even, odd * splat(-point) + even};
}
DDPM_FAST_INLINE Six input_points(const Six& d) {
  const Two p = inner_input_points(d.a1, d.a2, d.a3, d.a4, -2.0f, kP),
            q = inner_input_points(d.a1, d.a2, d.a3, d.a4, -0.5f, kQ);
  return {outer_input_point(d.a0, d.a2, d.a4), p.a0, p.a1, q.a0, q.a1, outer_input_point(d.a1, d.a3, d.a5)};
}

DDPM_FAST_INLINE Six tap_points(const Three& g) {
  const vf even_p = g.a2 * splat(-1.0f / 3.0f) + g.a0 * splat(-2.0f / 3.0f), odd_p = g.a1 * splat(-kP * 2.0f / 3.0f);
  const vf even_q = g.a2 * splat(1.0f / 3.0f) + g.a0 * splat(1.0f / 6.0f), odd_q = g.a1 * splat(kQ / 6.0f);
  return {g.a0, even_p + odd_p, even_p - odd_p, even_q + odd_q, even_q - odd_q, g.a2};
}

// y0 and y2.
DDPM_FAST_INLINE Two even_outputs(vf m0, vf m1, vf m2, vf m3, vf m4) {
  const vf p = m1 + m2, q = m3 + m4;
  return {m0 + p + q, p * splat(0.5f) + q * splat(2.0f)};
}
// y1 and y3.
DDPM_FAST_INLINE Two odd_outputs(vf m1, vf m2, vf m3, vf m4, vf m5) {
  const vf p = m1 - m2, q = m3 - m4;
  return {p * splat(kP) + q * splat(kQ), p * splat(kP / 2.0f) + (q * splat(2.0f * kQ) + m5)};
}
DDPM_FAST_INLINE Four outputs(const Six& m) {
  const Two even = even_outputs(m.a0, m.a1, m.a2, m.a3, m.a4), odd = odd_outputs(m.a1, m.a2, m.a3, m.a4, m.a5);
  return {even.a0, odd.a0, even.a1, odd.a1};
}

// The transpose of `outputs`.
DDPM_FAST_INLINE Six output_gradients(const Four& y) {
  const vf even_p = y.a2 * splat(0.5f) + y.a0, odd_p = (y.a3 * splat(0.5f) + y.a1) * splat(kP);
  const vf even_q = y.a2 * splat(2.0f) + y.a0, odd_q = (y.a3 * splat(2.0f) + y.a1) * splat(kQ);
  return {y.a0, even_p + odd_p, even_p - odd_p, even_q + odd_q, even_q - odd_q, y.a3};
}

// The transpose of `tap_points`.
DDPM_FAST_INLINE Three tap_gradients(const Six& u) {
  const vf even_p = u.a1 + u.a2, odd_p = u.a1 - u.a2, even_q = u.a3 + u.a4, odd_q = u.a3 - u.a4;
  return {even_p * splat(-2.0f / 3.0f) + (even_q * splat(1.0f / 6.0f) + u.a0),
          odd_p * splat(-kP * 2.0f / 3.0f) + odd_q * splat(kQ / 6.0f),
          even_p * splat(-1.0f / 3.0f) + (even_q * splat(1.0f / 3.0f) + u.a5)};
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
