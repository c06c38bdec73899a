// GroupNorm, affine map, SiLU and dropout of one map or two side by side: the arguments of the kernels in
// joined_norm-inl.h. Free of torch.
#pragma once

#include <stdint.h>

#include "norm_silu.h"

namespace ddpm_fast {

// The input has C channels in all, each map its own memory; channels[1] is 0 where there is one map. Null is an absent
// argument.
struct JoinedNormArgs {
  const float* x[2];  // (B, N, channels[i])
  int64_t channels[2];
  const float* gain;    // (C)
  const float* offset;  // (C)
  const float* scale;   // (B, C) or null
  const float* shift;   // (B, C) or null
  int64_t B, N, groups;
  Dropout dropout;
};

struct JoinedNormForward {
  JoinedNormArgs in;
  float eps;
  float* statistics;  // (B, groups, 2): mean and 1/√(variance + eps)
  bool known;         // the statistics are of an earlier call, and are read
  float* out;         // (B, N, C)
};

struct JoinedNormBackward {
  JoinedNormArgs in;
  const float* statistics;  // of forward
  float* grad;              // (B, N, C), overwritten
  float* dx[2];             // like x, or null; dx[0] may be grad where there is one map
  const float* added[2];    // like x, added to dx, or null; may be dx
  float* dgain;             // (C)
  float* doffset;           // (C)
  float* dscale;            // (B, C) or null
  float* dshift;            // (B, C) or null
  float* sums;              // (B, C) or null: Σ over pixels of dx, without `added`
};

struct JoinedNormKernels {
  void (*forward)(const JoinedNormForward&);
  void (*backward)(const JoinedNormBackward&);
};

}  // namespace ddpm_fast
