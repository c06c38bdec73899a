// 3×3 convolutions of stride 2 on channels-last maps; the kernel of strided_conv-inl.h. Free of torch.
#pragma once

#include "conv3x3.h"

namespace ddpm_fast {

// output = conv3x3(input, weight) + bias at every second pixel of every second row, with `padding` zeros before the
// first pixel of an axis and as many as needed after the last.
struct StridedConvForward {
  int64_t B, H, W, padding;  // of the input
  int64_t out_H, out_W;
  const float* input;  // (B, H, W, C)
  int64_t C;
  Conv3x3Weight weight;
  const float* bias;  // (K) or null
  float* output;      // (B, out_H, out_W, K)
  int64_t K;
};

// Its gradients for grad, that of the output; a null pointer is a gradient that is left out.
struct StridedConvGradient {
  int64_t B, H, W, padding;
  int64_t out_H, out_W;
  const float* grad;  // (B, out_H, out_W, K)
  int64_t K;
  const float* input;   // (B, H, W, C)
  const float* weight;  // (K, C, 3, 3)
  int64_t C;
  float *dinput, *dweight, *dbias;
};

struct StridedConvKernels {
  void (*forward)(const StridedConvForward&);
  void (*gradient)(const StridedConvGradient&);
};

}  // namespace ddpm_fast
