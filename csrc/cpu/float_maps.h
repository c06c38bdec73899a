// Arguments of operators whose kernels read channels-last maps and contiguous parameters in float32: checked for memory
// safety, and converted where they are half types.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace ddpm_fast {

// Maps and parameters may be half types; what is computed is float32.
inline at::Tensor as_float(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(
      tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16,
      name, " must be float32, float16 or bfloat16, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " must be on the CPU, got ", tensor.device());
  return tensor.to(at::kFloat);
}

// A map that is read in place: (B, C, H, W), not empty, channels-last.
inline at::Tensor float_map(const at::Tensor& map, const char* name) {
  TORCH_CHECK_VALUE(map.dim() == 4 && map.numel() > 0, name, " must have shape (B, C, H, W) and elements, got ",
                    map.sizes());
  TORCH_CHECK_VALUE(map.is_contiguous(at::MemoryFormat::ChannelsLast), name, " must be channels-last, got strides ",
                    map.strides());
  return as_float(map, name);
}

// A map that is brought into channels-last, such as a gradient, of the batch and the positions of another.
inline at::Tensor float_map_like(const at::Tensor& map, const char* name, const at::Tensor& other, int64_t channels) {
  TORCH_CHECK_VALUE(map.dim() == 4 && map.size(0) == other.size(0) && map.size(1) == channels &&
                        map.size(2) == other.size(2) && map.size(3) == other.size(3),
                    name, " must have shape (", other.size(0), ", ", channels, ", ", other.size(2), ", ", other.size(3),
                    "), got ", map.sizes());
  return as_float(map, name).contiguous(at::MemoryFormat::ChannelsLast);
}

inline at::Tensor float_parameter(const at::Tensor& parameter, const char* name, int64_t elements) {
  TORCH_CHECK_VALUE(parameter.numel() == elements, name, " must have ", elements, " elements, got shape ",
                    parameter.sizes());
  return as_float(parameter, name).contiguous();
}

// Where a map lies in both formats its outputs are contiguous.
inline at::MemoryFormat format_of(const at::Tensor& map) {
  return map.is_contiguous() ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
}

}  // namespace ddpm_fast
