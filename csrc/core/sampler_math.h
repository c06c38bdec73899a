// The universal sampler update, the same formula for every sampler: DDPM (Ho et al. 2020, eq. 7), DDIM (Song et al.
// 2021, eq. 12), Heun (Karras et al. 2022, algorithm 2), DPM-Solver++ (Lu et al. 2022) and UniPC (Zhao et al. 2023) are
// rows of a table. Torch-free, for host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.h"

namespace ddpm_fast {

// A table has the first 6 columns of a row, the first 10 (more history, learned variance) or all 12 (kept noise).
constexpr int kTableColumns = 6;
constexpr int kWideTableColumns = 10;
constexpr int kWidestTableColumns = 12;

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

}  // namespace ddpm_fast
