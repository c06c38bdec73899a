// A 1×1 convolution of an RMSNorm: the arguments of the kernels in norm_linear-inl.h. Free of torch.
#pragma once

#include <stdint.h>

namespace ddpm_fast {

// out = W·(x̂·gain) per pixel, x̂ = x·√C / max(‖x‖₂, 1e-12).
struct NormLinearForward {
  const float* x;       // (rows, C)
  const float* gain;    // (C)
  const float* weight;  // (K, C)
  int64_t rows, C, K;
  float* out;    // (rows, K)
  float* norms;  // (rows), ‖x‖₂
};

// The gradients of x and gain; that of the weight is linear's, with the factors √C / max(‖x‖₂, 1e-12) as its row_scale.
struct NormLinearDataGradient {
  const float* grad;  // (rows, K)
  const float* x;     // (rows, C)
  const float* norms;
  const float* gain;
  const float* weight;
  int64_t rows, C, K;
  float* dx;       // (rows, C), or null: then dgain is not made either
  float* dgain;    // (C)
  float* factors;  // (rows) or null: receives √C / max(‖x‖₂, 1e-12)
};

struct NormLinearKernels {
  void (*forward)(const NormLinearForward&);
  void (*data_gradient)(const NormLinearDataGradient&);
};

}  // namespace ddpm_fast
