// Whether products of a map are made of bfloat16.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/kernels/kernels.h"

namespace ddpm_fast {

// A bfloat16 map's factors have lost their digits before: its products take theirs by bfloat16 pairs, with float32
// sums.
inline bool multiplies_narrowly(const at::Tensor& map) { return map.scalar_type() == at::kBFloat16 && kernels().pairs; }

}  // namespace ddpm_fast
