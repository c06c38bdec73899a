// The universal sampler update, the same formula for every sampler: DDPM (Ho et al. 2020, eq. 7), DDIM (Song et al.
// 2021, eq. 12), Heun (Karras et al. 2022, algorithm 2), DPM-Solver++ (Lu et al. 2022) and UniPC (Zhao et al. 2023) are
// rows of a table. Torch-free, for host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.h"

namespace ddpm_fast {

// A table has the first 6 columns of a row, the first 10 (more history, learned variance), 12 (kept noise) or all 25
// (guidance, known region).
constexpr int kTableColumns = 6;
constexpr int kWideTableColumns = 10;
constexpr int kWidestTableColumns = 12;
constexpr int kGuidedTableColumns = 25;

struct SamplerRow {
  float p, q, r, s, u, sigma;
  float u2 = 0.0f, u3 = 0.0f, lo = 0.0f, hi = 0.0f;
  float e = 0.0f, f = 0.0f;
};

// Row `step` of the table; NaN, and no read, where the table has no such row.
DDPM_FAST_INLINE SamplerRow sampler_row(const float* table, int64_t rows, int64_t step, int columns = kTableColumns) {
  if (step < 0 || step >= rows) return {NAN, NAN, NAN, NAN, NAN, NAN};
  const float* row = table + step * columns;
  SamplerRow result{row[0], row[1], row[2], row[3], row[4], row[5]};
  if (columns >= kWideTableColumns) {
    result.u2 = row[6];
    result.u3 = row[7];
    result.lo = row[8];
    result.hi = row[9];
  }
  if (columns >= kWidestTableColumns) {
    result.e = row[10];
    result.f = row[11];
  }
  return result;
}

// x0 = p·x + q·out, clipped to [−1, 1] where asked; NaN passes through.
DDPM_FAST_INLINE float predict_x_start(const SamplerRow& row, float x, float model_output, bool clip) {
  const float x_start = row.p * x + row.q * model_output;
  const float clipped = x_start < -1.0f ? -1.0f : (x_start > 1.0f ? 1.0f : x_start);
  return clip ? clipped : x_start;
}

// x ← r·x0 + s·x + u·x0_previous + σ·ε. If a coefficient is 0, its tensor is not read: pass 0.
DDPM_FAST_INLINE float next_state(const SamplerRow& row, float x_start, float x, float previous, float eps) {
  return row.r * x_start + row.s * x + row.u * previous + row.sigma * eps;
}

// The same with two more x0 of earlier steps.
DDPM_FAST_INLINE float next_state(const SamplerRow& row, float x_start, float x, float previous, float previous2,
                                  float previous3, float eps) {
  return row.r * x_start + row.s * x + row.u * previous + row.u2 * previous2 + row.u3 * previous3 + row.sigma * eps;
}

// The combination of state and x0 that a step keeps for later ones: ε where e = 1/b and f = -a/b. Where e and f are 0
// the x0 of the step before is kept.
DDPM_FAST_INLINE bool keeps_combination(const SamplerRow& row) { return row.e != 0.0f || row.f != 0.0f; }
DDPM_FAST_INLINE float kept_combination(const SamplerRow& row, float x, float x_start) {
  return row.e * x + row.f * x_start;
}

// e^x to 1 ulp or so for x in [-87, 88]; beyond, the value at that bound. NaN stays NaN.
DDPM_FAST_INLINE float exp_bounded(float x) {
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5·2^23: rounds to an integer and leaves it in the low bits
  const float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float poly = 1.9875691500e-4f;
  poly = poly * r + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  poly = poly * (r * r) + r + 1.0f;
  return poly * float_of((bits_of(shifted) + 127u) << 23);
}

// What ε is multiplied with, besides σ of the row, for a learned variance v in [-1, 1] (Nichol & Dhariwal 2021,
// eq. 15): lo and hi are half the logarithms of the bounds over σ².
DDPM_FAST_INLINE float learned_scale(const SamplerRow& row, float v) {
  return exp_bounded(row.lo + (row.hi - row.lo) * (0.5f * v + 0.5f));
}

// The columns of a row from the 13th on, see ddpm_fast/ops/sampler_step/op.py.
struct GuidanceRow {
  float A = 0.0f, B = 0.0f;
  float w = 1.0f, phi = 0.0f, eta = 1.0f, rho = 0.0f, mu = 0.0f, space = 0.0f;
  float kg = 0.0f, kn = 0.0f, kc = 0.0f, h = 0.0f, j = 0.0f;
};

// Those of row `step` of a table of 25 columns; NaN, and no read, where the table has no such row.
DDPM_FAST_INLINE GuidanceRow guidance_row(const float* table, int64_t rows, int64_t step) {
  GuidanceRow result;
  if (step < 0 || step >= rows) {
    result.A = result.w = NAN;
    return result;
  }
  const float* row = table + step * kGuidedTableColumns + kWidestTableColumns;
  result.A = row[0];
  result.B = row[1];
  result.w = row[2];
  result.phi = row[3];
  result.eta = row[4];
  result.rho = row[5];
  result.mu = row[6];
  result.space = row[7];
  result.kg = row[8];
  result.kn = row[9];
  result.kc = row[10];
  result.h = row[11];
  result.j = row[12];
  return result;
}

// Whether u guides; whether it is made, be it to move the momentum; whether x0' is added; whether the second output is
// read at all, the gradient is, and sums over a sample are needed.
DDPM_FAST_INLINE bool guides(const GuidanceRow& row) { return row.w != 1.0f; }
DDPM_FAST_INLINE bool makes_update(const GuidanceRow& row) { return guides(row) || row.mu != 0.0f; }
DDPM_FAST_INLINE bool adds_second(const GuidanceRow& row) { return row.kn != 0.0f || row.kc != 0.0f; }
DDPM_FAST_INLINE bool reads_second(const GuidanceRow& row) { return makes_update(row) || adds_second(row); }
DDPM_FAST_INLINE bool reads_gradient(const GuidanceRow& row) { return row.h != 0.0f || row.j != 0.0f; }
DDPM_FAST_INLINE bool needs_sums(const GuidanceRow& row) {
  return guides(row) && (row.phi != 0.0f || row.eta != 1.0f || row.rho > 0.0f);
}

// Guidance of the output (space = 0) or of x0 (space = 1), as coefficients: y = y_x·x + y_out·out, and x0 of the guided
// g is g_x·x + g_g·g.
struct GuidanceSpace {
  float y_x, y_out, g_x, g_g;
};
DDPM_FAST_INLINE GuidanceSpace guidance_space(const SamplerRow& row, const GuidanceRow& guidance) {
  if (guidance.space == 1.0f) return {row.p, row.q, 0.0f, 1.0f};
  return {0.0f, 1.0f, row.p, row.q};
}

// y, and u = y − y' + mu·update; the x of y and y' cancel.
DDPM_FAST_INLINE float guidance_output(const GuidanceSpace& space, float x, float output) {
  return space.y_x * x + space.y_out * output;
}
DDPM_FAST_INLINE float guidance_update(const GuidanceSpace& space, float mu, float output, float second, float update) {
  return space.y_out * (output - second) + mu * update;
}

// Over one sample.
struct GuidanceSums {
  double y, u, yy, yu, uu;
};

// g = output·y + update·u.
struct GuidanceScales {
  float output, update;
};

// Without sums: g = y + (w − 1)·u (Ho & Salimans 2022, eq. 6). NaN where the row needs sums.
DDPM_FAST_INLINE GuidanceScales guidance_scales(const GuidanceRow& row) {
  if (needs_sums(row)) return {NAN, NAN};
  return {1.0f, row.w - 1.0f};
}

// Threshold and projection (Sadat et al. 2024, algorithm 1), then rescaling (Lin et al. 2023, eq. 15 and 16). Moments
// of g follow from those of y and u, so that one pass over a sample is enough. A constant g is not rescaled.
DDPM_FAST_INLINE GuidanceScales guidance_scales(const GuidanceRow& row, const GuidanceSums& sums, int64_t elements) {
  const double n = static_cast<double>(elements), strength = static_cast<double>(row.w) - 1.0;
  const double limit = row.rho > 0.0f ? row.rho / sqrt(sums.uu) : 1.0;
  const double shrink = limit > 1.0 ? 1.0 : limit;
  const double parallel = sums.yy == 0.0 ? 0.0 : shrink * sums.yu / sums.yy;
  double of_y = 1.0 - strength * (1.0 - row.eta) * parallel, of_u = strength * shrink;
  if (row.phi != 0.0f) {
    const double mean_y = sums.y / n, mean_g = of_y * mean_y + of_u * sums.u / n;
    const double terms = (of_y * of_y * sums.yy + of_u * of_u * sums.uu) / n;
    const double variance_g = terms + 2.0 * of_y * of_u * sums.yu / n - mean_g * mean_g;
    const double variance_y = sums.yy / n - mean_y * mean_y;
    const double ratio = variance_y < 0.0 ? 0.0 : variance_y / variance_g;
    const double scale = variance_g <= 1e-12 * terms ? 1.0 : sqrt(ratio);  // below is rounding of what cancels
    const double factor = row.phi * scale + 1.0 - row.phi;
    of_y *= factor;
    of_u *= factor;
  }
  return {static_cast<float>(of_y), static_cast<float>(of_u)};
}

// g of a pixel.
DDPM_FAST_INLINE float guided_output(const GuidanceScales& scales, float y, float u) {
  return scales.output * y + scales.update * u;
}

// x0 within ±limit: gcc vectorises this, and no choice by a flag. NaN passes through.
DDPM_FAST_INLINE float clip_limit(bool clip) { return clip ? 1.0f : INFINITY; }
DDPM_FAST_INLINE float clipped_x_start(float x_start, float limit) {
  return x_start < -limit ? -limit : (x_start > limit ? limit : x_start);
}

// A known region over the next state; a mask of 0 or 1 lets the other one hold anything.
DDPM_FAST_INLINE float masked_state(float mask, float known, float x_next) {
  const float mixed = mask * known + (1.0f - mask) * x_next;
  return mask == 0.0f ? x_next : (mask == 1.0f ? known : mixed);
}

// Where element e of sample b of the model's output is, C, H, W being its order in the state:
// b·batch_stride + (e / pixels)·channel_stride + (e % pixels)·pixel_stride.
struct OutputLayout {
  int64_t pixels;
  int64_t batch_stride, channel_stride, pixel_stride;
  bool dense;  // elements of a sample are adjacent and in order
};

// One call of the operator; every tensor but the model's output is contiguous.
struct SamplerStepParams {
  const float* x;         // (B, ...)
  const void* output;     // (B, ...) by `layout`; float, half or bfloat16
  const float* table;     // (S, table_columns)
  const int64_t* step;    // (1,)
  const int64_t* seed;    // (1,)
  const float* previous;  // (B, ...) or null; may be x_start
  const float* noise;     // (B, ...) or null
  float* x_next;          // (B, ...); may be x
  float* x_start;         // (B, ...) or null
  OutputLayout layout;
  int64_t batch, elements;  // elements of one sample
  int64_t table_rows;
  int64_t start_index;
  uint32_t stream;
  bool clip_x_start;
  int table_columns = kTableColumns;
  const float *previous2 = nullptr, *previous3 = nullptr;  // (B, ...) or null; may be x_start2 and x_start3
  float *x_start2 = nullptr, *x_start3 = nullptr;          // (B, ...) or null: where what is kept moves on to
  int64_t variance_offset = 0;  // elements from the mean to the variance in a sample of the output; 0: it has none

  // Whether a step may need more than one x0 of earlier steps, or a learned variance.
  bool is_extended() const { return table_columns != kTableColumns || previous2 != nullptr; }
};

// What a step with a table of 25 columns takes besides.
struct GuidanceParams {
  const void* second = nullptr;                       // (B, ...) by `second_layout`, of the output's type, or null
  const float *gradient = nullptr, *known = nullptr;  // (B, ...) contiguous, or null
  const float* mask = nullptr;                        // (B, ...) by `mask_layout`, or null
  float* update = nullptr;                            // (B, ...) contiguous, or null
  OutputLayout second_layout{.pixels = 1, .dense = true}, mask_layout{.pixels = 1, .dense = true};
  bool reduces = false;  // whether sums over samples may be made
};

}  // namespace ddpm_fast
