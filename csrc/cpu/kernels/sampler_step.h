// The sampler update on tiles of samples: the arguments of the kernel in sampler_step-inl.h. Free of torch.
#pragma once

#include <stdint.h>

#include "core/sampler_math.h"

namespace ddpm_fast {

struct SamplerStepTile {
  const float *x, *output, *previous, *eps;
  float *x_next, *x_start;  // x_next may be x, and x_start may be previous
  int64_t count;
};

struct SamplerStepKernels {
  void (*step)(const SamplerRow& row, bool clip_x_start, const SamplerStepTile& tile);
};

}  // namespace ddpm_fast
