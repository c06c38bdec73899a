// The layout of a torch weight (K, C, 3, 3) for the kernels of conv3x3.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/kernels/conv3x3.h"

namespace ddpm_fast {

// From C to K channels, for the output.
inline Conv3x3Weight forward_weight(const at::Tensor& weight) {
  return {.data = weight.const_data_ptr<float>(), .out_stride = 9 * weight.size(1), .in_stride = 9};
}

// From K to C channels, for the gradient of the input.
inline Conv3x3Weight data_gradient_weight(const at::Tensor& weight) {
  return {.data = weight.const_data_ptr<float>(), .out_stride = 9, .in_stride = 9 * weight.size(1), .mirrored = true};
}

}  // namespace ddpm_fast
