// The formula of core/sampler_math.h for a tile of one sample. The compiler vectorises the loop.
#pragma once

#include "core/sampler_math.h"
#include "sampler_step.h"
#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA::sampler_step {

// Element i is read before it is written, and iterations are independent: in place is allowed.
inline void step(const SamplerRow& row, bool clip_x_start, const SamplerStepTile& tile) {
  const SamplerRow columns = row;  // a copy, since a store to x_next might change what `row` refers to
  const float *x = tile.x, *output = tile.output, *previous = tile.previous, *eps = tile.eps;
  float *x_next = tile.x_next, *x_start = tile.x_start;
  const int64_t count = tile.count;
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep
#endif
  for (int64_t i = 0; i < count; ++i) {
    const float start = predict_x_start(columns, x[i], output[i], clip_x_start);
    const float next = next_state(columns, start, x[i], previous[i], eps[i]);
    x_start[i] = start;
    x_next[i] = next;
  }
}

inline void step_extended(const SamplerRow& row, bool clip_x_start, const ExtendedStepTile& tile) {
  const SamplerRow columns = row;
  const float *x = tile.x, *output = tile.output, *eps = tile.eps;
  const float *previous = tile.previous, *previous2 = tile.previous2, *previous3 = tile.previous3;
  float *x_next = tile.x_next, *x_start = tile.x_start, *kept = tile.kept;
  const int64_t count = tile.count;
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep
#endif
  for (int64_t i = 0; i < count; ++i) {
    const float start = predict_x_start(columns, x[i], output[i], clip_x_start);
    const float next = next_state(columns, start, x[i], previous[i], previous2[i], previous3[i], eps[i]);
    kept[i] = kept_combination(columns, x[i], start);
    x_start[i] = start;
    x_next[i] = next;
  }
}

inline void scale_noise(const SamplerRow& row, float* to, const float* v, const float* eps, int64_t count) {
  const SamplerRow columns = row;
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep
#endif
  for (int64_t i = 0; i < count; ++i) to[i] = learned_scale(columns, v[i]) * eps[i];
}

}  // namespace ddpm_fast::DDPM_FAST_ISA::sampler_step
