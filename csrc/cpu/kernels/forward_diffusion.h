// The forward diffusion and its loss on tiles of samples: the kernels of forward_diffusion-inl.h. Free of torch.
#pragma once

#include <stdint.h>

namespace ddpm_fast {

struct ForwardDiffusionKernels {
  // to = p·eps + q·x0, where x0 is x or, with `normalize`, 2·x − 1.
  void (*combine)(float* to, const float* x, const float* eps, float p, float q, bool normalize, int64_t count);
  // error = output − target; returns Σ error², in an order that depends on `count` alone.
  float (*subtract)(float* error, const float* output, const float* target, int64_t count);
  // to = from·factor.
  void (*scale)(float* to, const float* from, float factor, int64_t count);
};

}  // namespace ddpm_fast
