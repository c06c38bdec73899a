#include "launchers.h"
#include "step_access.cuh"

namespace ddpm_fast {

namespace {

// Each thread computes whole Philox blocks and owns the elements it reads and writes, so x_next may be x and x_start
// may be previous. Step and seed are read here, so that a CUDA graph replays with new ones. The extended form reads
// more earlier states and a learned variance; it has no 8-element accesses, for the registers they would take.
template <typename T, Access kAccess, bool kExtended>
__global__ void __launch_bounds__(kThreads) sampler_step_kernel(const SamplerStepParams p) {
  constexpr int N = kAccess == Access::kWide ? 8 : 4;
  const int64_t step = *p.step;
  const SamplerRow row = sampler_row(p.table, p.table_rows, step, p.table_columns);
  NoiseIndex index{philox_key(*p.seed), 0, static_cast<uint32_t>(step), p.stream};
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * N;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const int64_t first = b * p.elements;
    const T* sample = static_cast<const T*>(p.output) + b * p.layout.batch_stride;
    index.sample = static_cast<uint32_t>(p.start_index + b);
    for (int64_t e = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N; e < p.elements; e += stride) {
      const int64_t left = p.elements - e;
      float x[N], output[N], previous[N], eps[N];
      load_state<kAccess>(x, p.x + first + e, left);
      load_output<kAccess>(output, sample, p.layout, e, left);
      load_previous<kAccess>(previous, p.previous, first + e, left,
                             row.u != 0.0f || (kExtended && p.x_start2 != nullptr));
      if (row.sigma == 0.0f) {
        fill(eps, 0.0f);
      } else if (p.noise != nullptr) {
        load_state<kAccess>(eps, p.noise + first + e, left);
      } else {
        generate(eps, index, e);
      }
      if constexpr (kExtended) {
        if (p.variance_offset != 0 && row.sigma != 0.0f) {
          float v[N];
          load_output<kAccess>(v, sample + p.variance_offset, p.layout, e, left);
#pragma unroll
          for (int i = 0; i < N; ++i) eps[i] *= learned_scale(row, v[i]);
        }
        float previous2[N], previous3[N];
        load_previous<kAccess>(previous2, p.previous2, first + e, left, row.u2 != 0.0f || p.x_start3 != nullptr);
        load_previous<kAccess>(previous3, p.previous3, first + e, left, row.u3 != 0.0f);
        if (p.x_start3 != nullptr) store_state<kAccess>(p.x_start3 + first + e, previous2, left);
        const bool keeps = keeps_combination(row);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float x_start = predict_x_start(row, x[i], output[i], p.clip_x_start);
          const float kept = keeps ? kept_combination(row, x[i], x_start) : previous[i];
          x[i] = next_state(row, x_start, x[i], row.u == 0.0f ? 0.0f : previous[i],
                            row.u2 == 0.0f ? 0.0f : previous2[i], previous3[i], eps[i]);
          output[i] = x_start;
          previous[i] = kept;
        }
        if (p.x_start2 != nullptr) store_state<kAccess>(p.x_start2 + first + e, previous, left);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float x_start = predict_x_start(row, x[i], output[i], p.clip_x_start);
          x[i] = next_state(row, x_start, x[i], previous[i], eps[i]);
          output[i] = x_start;
        }
      }
      store_state<kAccess>(p.x_next + first + e, x, left);
      if (p.x_start != nullptr) store_state<kAccess>(p.x_start + first + e, output, left);
    }
  }
}

template <typename T, Access kAccess, bool kExtended>
cudaError_t launch_with(const SamplerStepParams& p, cudaStream_t stream) {
  constexpr int per_thread = kAccess == Access::kWide ? 8 : 4;
  sampler_step_kernel<T, kAccess, kExtended><<<make_grid(p.batch, p.elements, per_thread), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const SamplerStepParams& p, cudaStream_t stream) {
  const bool state_is_aligned =
      is_aligned(p.x) && is_aligned(p.x_next) && is_aligned(p.x_start) && is_aligned(p.previous) && is_aligned(p.noise);
  const bool history_is_aligned = is_aligned(p.previous2) && is_aligned(p.previous3);
  const bool in_fours = state_is_aligned && history_is_aligned && p.elements % 4 == 0;
  if (p.is_extended()) {
    return in_fours ? launch_with<T, Access::kStrided, true>(p, stream) : launch_with<T, Access::kAny, true>(p, stream);
  }
  const bool output_is_wide = p.layout.dense && is_aligned(p.output) &&
                              (p.batch == 1 || p.layout.batch_stride * static_cast<int64_t>(sizeof(T)) % 16 == 0);
  if (state_is_aligned && output_is_wide && p.elements % 8 == 0) return launch_with<T, Access::kWide, false>(p, stream);
  if (in_fours) return launch_with<T, Access::kStrided, false>(p, stream);
  return launch_with<T, Access::kAny, false>(p, stream);
}

}  // namespace

cudaError_t launch_sampler_step(const SamplerStepParams& params, Element output, cudaStream_t stream) {
  switch (output) {
    case Element::kHalf: return launch<__half>(params, stream);
    case Element::kBFloat16: return launch<__nv_bfloat16>(params, stream);
    default: return launch<float>(params, stream);
  }
}

}  // namespace ddpm_fast
