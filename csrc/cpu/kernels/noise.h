// Noise of tiles of samples: the arguments of the kernels in noise-inl.h. Free of torch.
#pragma once

#include <stdint.h>

#include "core/philox.h"

namespace ddpm_fast {

struct NoiseKernels {
  // z = elements [first, first + count) of a sample's noise. `first` is a multiple of 4; z has room for `count` rounded
  // up to a multiple of 4.
  void (*normal)(float* z, const NoiseIndex& index, int64_t first, int64_t count);
};

}  // namespace ddpm_fast
