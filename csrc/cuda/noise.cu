#include "access.cuh"
#include "launchers.h"

namespace ddpm_fast {

namespace {

// Each thread computes whole Philox blocks: with kWide 8 adjacent elements, stored in 16-byte accesses; otherwise 4,
// and a sample's last thread stores only the remaining ones.
template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads) fill_normal_kernel(const FillNormalParams p) {
  constexpr int N = kWide ? 8 : 4;
  NoiseIndex index{philox_key(*p.seed), 0, static_cast<uint32_t>(*p.step), p.stream};
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * N;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    T* out = static_cast<T*>(p.out) + b * p.elements;
    index.sample = static_cast<uint32_t>(p.start_index + b);
    for (int64_t e = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N; e < p.elements; e += stride) {
      float z[N];
      generate(z, index, e);
      if constexpr (kWide) {
        store_wide(out + e, z);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (e + i < p.elements) out[e + i] = from_float<T>(z[i]);
        }
      }
    }
  }
}

template <typename T>
cudaError_t launch(const FillNormalParams& p, cudaStream_t stream) {
  if (p.elements % 8 == 0 && is_aligned(p.out)) {
    fill_normal_kernel<T, true><<<make_grid(p.batch, p.elements, 8), kThreads, 0, stream>>>(p);
  } else {
    fill_normal_kernel<T, false><<<make_grid(p.batch, p.elements, 4), kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_fill_normal(const FillNormalParams& params, Element out, cudaStream_t stream) {
  switch (out) {
    case Element::kHalf: return launch<__half>(params, stream);
    case Element::kBFloat16: return launch<__nv_bfloat16>(params, stream);
    default: return launch<float>(params, stream);
  }
}

}  // namespace ddpm_fast
