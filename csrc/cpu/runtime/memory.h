// Memory for the tensors of native operators.
#pragma once

#include <ATen/core/Tensor.h>

namespace ddpm_fast {

// Tensors as at::empty makes them, from a pool whose memory the next step uses again, see memory.cpp.
at::Tensor empty_tensor(at::IntArrayRef sizes, at::ScalarType type = at::kFloat,
                        at::MemoryFormat format = at::MemoryFormat::Contiguous);
at::Tensor empty_tensor_like(const at::Tensor& tensor, at::ScalarType type);
at::Tensor empty_tensor_like(const at::Tensor& tensor);

// The tensor in a type, in memory of the pool where that is another: a converted map is as large as any other.
at::Tensor as_type(const at::Tensor& tensor, at::ScalarType type);

// The same from malloc: for small tensors, and for results that a caller may keep for long.
at::Tensor unpooled_tensor(at::IntArrayRef sizes, at::ScalarType type = at::kFloat,
                           at::MemoryFormat format = at::MemoryFormat::Contiguous);
at::Tensor unpooled_tensor_like(const at::Tensor& tensor);

// Stands for an output that was not asked for.
inline at::Tensor no_tensor(at::ScalarType type) { return unpooled_tensor({0}, type); }

// Returns unused memory to the system; the result is the number of bytes.
int64_t empty_cache();

// For tests: as if so many seconds had passed since the last look at what is kept.
void age_memory(double seconds);

}  // namespace ddpm_fast
