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

}  // namespace ddpm_fast::DDPM_FAST_ISA::sampler_step
