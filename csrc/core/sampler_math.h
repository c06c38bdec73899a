// The universal sampler update, the same formula for every sampler: DDPM (Ho et al. 2020, eq. 7), DDIM (Song et al.
// 2021, eq. 12) and DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) are rows of a table. Torch-free, for host and
// device.
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.h"

namespace ddpm_fast {

constexpr int kTableColumns = 6;

struct SamplerRow {
  float p, q, r, s, u, sigma;
};

// Row `step` of the table; NaN, and no read, where the table has no such row.
DDPM_FAST_INLINE SamplerRow sampler_row(const float* table, int64_t rows, int64_t step) {
  if (step < 0 || step >= rows) return {NAN, NAN, NAN, NAN, NAN, NAN};
  const float* row = table + step * kTableColumns;
  return {row[0], row[1], row[2], row[3], row[4], row[5]};
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
  const float* table;     // (S, 6)
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
};

}  // namespace ddpm_fast
