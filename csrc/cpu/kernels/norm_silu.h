// RMSNorm or GroupNorm, affine map, SiLU, dropout and residual: the arguments of the kernels in norm_silu-inl.h. Free
// of torch.
#pragma once

#include <stdint.h>

namespace ddpm_fast {

// Dropout keeps an element whose word of Philox is at least keep_threshold, and multiplies it by keep_scale.
struct Dropout {
  uint64_t keep_threshold;  // 0: no dropout
  float keep_scale;
  int64_t seed;
};

// Maps are (B, N, C): N pixels, the channels of one adjacent. Null is an absent argument.
struct NormSiluArgs {
  const float* x;       // (B, N, C)
  const float* gain;    // (C)
  const float* offset;  // (C), GroupNorm's, added after gain; null: zeros
  const float* bias;    // (C) or null, added to x before the norm
  const float* scale;   // (B, C) or null
  const float* shift;   // (B, C) or null
  int64_t B, N, C;
  int64_t groups;  // 0: RMSNorm
  float eps;       // GroupNorm's, of forward
  bool activation;
  Dropout dropout;
};

struct NormSiluForward {
  NormSiluArgs in;
  const float* residual;  // (B, N, C) or null
  float* out;             // (B, N, C); may be x or residual
  float* statistics;      // RMSNorm: (B, N), ‖x + bias‖₂. GroupNorm: (B, groups, 2), mean and 1/√(variance + eps)
};

struct NormSiluBackward {
  NormSiluArgs in;
  const float* grad;        // (B, N, C)
  const float* statistics;  // of forward
  float* dx;                // (B, N, C); may be grad
  float* dgain;             // (C) or null, as are the others
  float* doffset;           // (C)
  float* dbias;             // (C)
  float* dscale;            // (B, C)
  float* dshift;            // (B, C)
};

struct NormSiluKernels {
  void (*forward)(const NormSiluForward&);
  void (*backward)(const NormSiluBackward&);
};

}  // namespace ddpm_fast
