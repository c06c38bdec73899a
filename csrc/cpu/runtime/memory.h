// Where the maps and gradients of native operators lie.
#pragma once

#include <ATen/core/Tensor.h>

namespace ddpm_fast {

// Tensors as at::empty makes them, of memory that is taken again in the next step, see memory.cpp.
at::Tensor empty_tensor(at::IntArrayRef sizes, at::ScalarType type = at::kFloat,
                        at::MemoryFormat format = at::MemoryFormat::Contiguous);
at::Tensor empty_tensor_like(const at::Tensor& tensor, at::ScalarType type);
at::Tensor empty_tensor_like(const at::Tensor& tensor);

// Gives what no tensor uses back to the system; returns how many bytes.
int64_t empty_cache();

// For tests: what no step has needed for so long goes back by itself.
void keep_memory_for(double seconds);

}  // namespace ddpm_fast
