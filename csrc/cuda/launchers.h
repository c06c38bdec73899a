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

struct GuidedStepParams {
  SamplerStepParams step;
  GuidanceParams guidance;
  GuidanceSums* sums = nullptr;  // (B, guidance_pieces) to work in, or null where no row needs sums
};

// A sample is summed in at most 128 pieces, one per thread of a block: multiples of 2048 elements.
constexpr int64_t kGuidancePieces = 128, kGuidancePiece = 2048;
DDPM_FAST_INLINE int64_t guidance_piece(int64_t elements) {
  const int64_t most = kGuidancePieces * kGuidancePiece;
  return elements <= most ? kGuidancePiece : (elements + most - 1) / most * kGuidancePiece;
}
DDPM_FAST_INLINE int64_t guidance_pieces(int64_t elements) {
  const int64_t piece = guidance_piece(elements);
  return (elements + piece - 1) / piece;
}

cudaError_t launch_guided_step(const GuidedStepParams& params, Element output, cudaStream_t stream);
cudaError_t launch_sampler_step(const SamplerStepParams& params, Element output, cudaStream_t stream);
cudaError_t launch_fill_normal(const FillNormalParams& params, Element out, cudaStream_t stream);

}  // namespace ddpm_fast
