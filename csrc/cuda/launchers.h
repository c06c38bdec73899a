// Torch-free launchers, called by bindings.cpp. Each returns the launch's error and does not synchronise.
#pragma once

#include <cuda_runtime_api.h>

#include "core/sampler_math.h"

namespace ddpm_fast {

enum class Element { kFloat, kHalf, kBFloat16 };

struct FillNormalParams {
  void* out;                // (B, ...) contiguous
  const int64_t* seed;      // (1,)
  const int64_t* step;      // (1,)
  int64_t batch, elements;  // elements of one sample
  int64_t start_index;
  uint32_t stream;
};

cudaError_t launch_sampler_step(const SamplerStepParams& params, Element output, cudaStream_t stream);
cudaError_t launch_fill_normal(const FillNormalParams& params, Element out, cudaStream_t stream);

}  // namespace ddpm_fast
