// The variational bound on tiles of samples: the kernel of variational_bound-inl.h. Free of torch.
#pragma once

#include <stdint.h>

#include "core/variational_bound.h"

namespace ddpm_fast {

// A tile of a sample in float32.
struct VariationalBoundTile {
  const float *output, *variance;  // both halves of the model's output; `variance` is null where it is fixed
  const float *x, *eps;            // x0 is x or, with `normalize`, 2·x − 1
  float *error, *bound;            // results: out − target, and the bound in nats
  float *dout, *dvariance;         // results: the gradients of both halves without their factors
  int64_t count;
  BoundRow row;
  bool normalize, clip, detach_mean;
  float min_log_probability;
};

struct VariationalBoundSums {
  float squares, bounds;  // Σ error², Σ bound, in an order that depends on `count` alone
};

struct VariationalBoundKernels {
  VariationalBoundSums (*forward)(const VariationalBoundTile& tile);
};

}  // namespace ddpm_fast
