// A 1×1 convolution of an RMSNorm: the arguments of the kernels in norm_linear-inl.h and norm_linear_pairs-inl.h. Free
// of torch.
#pragma once

#include <stdint.h>

namespace ddpm_fast {

// Element: of the maps x, out, grad and dx, float or the bits of a bfloat16.

// out = W·(x̂·gain) per pixel, x̂ = x·√C / max(‖x‖₂, 1e-12).
template <typename Element>
struct NormLinearForward {
  const Element* x;     // (rows, C)
  const float* gain;    // (C)
  const float* weight;  // (K, C)
  int64_t rows, C, K;
  Element* out;  // (rows, K)
  float* norms;  // (rows), ‖x‖₂
};

// Null: a gradient that is not made. dx and dgain are made together.
template <typename Element>
struct NormLinearBackward {
  const Element* grad;  // (rows, K)
  const Element* x;     // (rows, C)
  const float* norms;
  const float* gain;
  const float* weight;
  int64_t rows, C, K;
  Element* dx;     // (rows, C)
  float* dgain;    // (C)
  float* dweight;  // (K, C)
};

struct NormLinearKernels {
  void (*forward)(const NormLinearForward<float>&);
  void (*backward)(const NormLinearBackward<float>&);
  // By bfloat16 pairs, where Kernels::pairs is true, for even C and K.
  void (*forward_by_pairs)(const NormLinearForward<uint16_t>&);
  void (*backward_by_pairs)(const NormLinearBackward<uint16_t>&);
};

}  // namespace ddpm_fast
