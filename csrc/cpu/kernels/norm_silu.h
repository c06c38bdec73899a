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

// What the elements of the maps x, residual, out, grad and dx are. Arithmetic is float32.
enum class MapType { kFloat, kHalf, kBfloat16 };

// Maps are (B, N, C): N pixels, the channels of one adjacent. Null is an absent argument.
struct NormSiluArgs {
  const void* x;        // (B, N, C)
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
  MapType type = MapType::kFloat;
};

struct NormSiluForward {
  NormSiluArgs in;
  const void* residual;  // (B, N, C) or null
  void* out;             // (B, N, C); may be x or residual
  float* statistics;     // RMSNorm: (B, N), ‖x + bias‖₂. GroupNorm: (B, groups, 2), mean and 1/√(variance + eps)
};

struct NormSiluBackward {
  NormSiluArgs in;
  const void* grad;         // (B, N, C)
  const float* statistics;  // of forward
  void* dx;                 // (B, N, C); may be grad
  float* z;                 // (B, N, C), memory for GroupNorm's of other types than float32; planes need none
  float* dgain;             // (C) or null, as are the others
  float* doffset;           // (C)
  float* dbias;             // (C)
  float* dscale;            // (B, C)
  float* dshift;            // (B, C)
};

// `planes_`: of maps (B, C, N), the pixels of a channel adjacent.
struct NormSiluKernels {
  void (*forward)(const NormSiluForward&);
  void (*backward)(const NormSiluBackward&);
  void (*planes_forward)(const NormSiluForward&);
  void (*planes_backward)(const NormSiluBackward&);
};

}  // namespace ddpm_fast
