// A network's first convolution: few channels, a large odd kernel, stride 1, zero padding. The arguments of the kernels
// in stem_conv-inl.h; free of torch.
#pragma once

#include <stdint.h>

namespace ddpm_fast {

struct StemConvSizes {
  int64_t B, H, W, C, K, side;  // side: of the kernel, odd
};

// A map in any layout: float strides of an image, a channel, a line and a pixel. Without data it has no channels.
struct StemConvMap {
  const float* data;
  int64_t C, image, channel, line, pixel;
};

// The input: the channels of these maps, one after another.
struct StemConvMaps {
  StemConvMap map[3];
};

// out = conv(x, weight) + bias.
struct StemConvForward {
  StemConvSizes in;
  StemConvMaps x;
  const float* weight;  // (K, C, side, side)
  const float* bias;    // (K) or null
  float* out;           // (B, H, W, K)
};

struct StemConvWeightGradient {
  StemConvSizes in;
  StemConvMaps x;
  const float* grad;  // (B, H, W, K)
  float* dweight;     // (K, C, side, side)
  float* dbias;       // (K) or null
};

struct StemConvKernels {
  void (*forward)(const StemConvForward&);
  void (*weight_gradient)(const StemConvWeightGradient&);
};

}  // namespace ddpm_fast
