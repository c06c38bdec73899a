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

// A tile of a step that reads more earlier states. Nothing of it overlaps but x_next and x.
struct ExtendedStepTile {
  const float *x, *output, *previous, *previous2, *previous3, *eps;
  float *x_next, *x_start, *kept;  // kept: `kept_combination` of the row
  int64_t count;
};

// A tile of a guided step. Nothing of it overlaps but x_next and x, x_start and previous, next_update and update.
struct GuidedStepTile {
  const float *x, *output, *second, *update, *gradient, *known, *mask;
  const float* second_added;  // the second output where its x0 is added, else zeros
  const float *previous, *previous2, *previous3;
  const float *eps, *known_eps;  // the step's, times a learned scale, and that of the known region
  float *x_next, *x_start, *kept, *next_update;
  int64_t count;
};

struct SamplerStepKernels {
  void (*step)(const SamplerRow& row, bool clip_x_start, const SamplerStepTile& tile);
  void (*step_extended)(const SamplerRow& row, bool clip_x_start, const ExtendedStepTile& tile);
  // The sums of a tile of which x, output, second and update are given.
  GuidanceSums (*guidance_sums)(const SamplerRow& row, const GuidanceRow& guidance, const GuidedStepTile& tile);
  // Without `has_more`, the row and the call have a second output and nothing else of guidance.
  void (*step_guided)(const SamplerRow& row, const GuidanceRow& guidance, const GuidanceScales& scales,
                      bool clip_x_start, bool has_more, const GuidedStepTile& tile);
  // to = `learned_scale`(v)·eps.
  void (*scale_noise)(const SamplerRow& row, float* to, const float* v, const float* eps, int64_t count);
};

}  // namespace ddpm_fast
