#include <iterator>

#include "launchers.h"
#include "step_access.cuh"

namespace ddpm_fast {

namespace {

// Where an element of a sample is.
struct Place {
  int64_t channel, pixel;
};
__device__ __forceinline__ Place place_of(const OutputLayout& layout, int64_t e) {
  const int64_t channel = e / layout.pixels;
  return {channel, e - channel * layout.pixels};
}

// N elements of one sample from a place on, by its strides.
template <typename T, int N>
__device__ __forceinline__ void load_strided(float (&to)[N], const T* sample, const OutputLayout& layout, Place place,
                                             int64_t left) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int64_t at = place.channel * layout.channel_stride + place.pixel * layout.pixel_stride;
    to[i] = i < left ? to_float(sample[at]) : 0.0f;
    if (++place.pixel == layout.pixels) {
      place.pixel = 0;
      ++place.channel;
    }
  }
}

// Sums over the threads of a block, for its first thread, always in the same order.
__device__ __forceinline__ GuidanceSums sum_over_block(const GuidanceSums& mine) {
  __shared__ double sums[5][kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();  // the sums of the call before may still be read
  sums[0][thread] = mine.y;
  sums[1][thread] = mine.u;
  sums[2][thread] = mine.yy;
  sums[3][thread] = mine.yu;
  sums[4][thread] = mine.uu;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) {
#pragma unroll
      for (int i = 0; i < 5; ++i) sums[i][thread] += sums[i][thread + half];
    }
  }
  return {sums[0][0], sums[1][0], sums[2][0], sums[3][0], sums[4][0]};
}

// Each block sums pieces of samples, whose cuts depend on nothing but a sample's size. Rows that need no sums leave the
// memory as it is.
template <typename T, Access kAccess>
__global__ void __launch_bounds__(kThreads) guidance_sums_kernel(const GuidedStepParams params) {
  constexpr int N = 4;
  const SamplerStepParams& p = params.step;
  const GuidanceParams& g = params.guidance;
  const int64_t step = *p.step;
  const SamplerRow row = sampler_row(p.table, p.table_rows, step, p.table_columns);
  const GuidanceRow guidance = guidance_row(p.table, p.table_rows, step);
  if (!needs_sums(guidance) || g.second == nullptr) return;
  const GuidanceSpace space = guidance_space(row, guidance);
  const int64_t size = guidance_piece(p.elements), pieces = guidance_pieces(p.elements);
  for (int64_t i = blockIdx.x; i < p.batch * pieces; i += gridDim.x) {
    const int64_t b = i / pieces, begin = (i - b * pieces) * size;
    const int64_t end = begin + size < p.elements ? begin + size : p.elements;
    const T* outputs = static_cast<const T*>(p.output) + b * p.layout.batch_stride;
    const T* seconds = static_cast<const T*>(g.second) + b * g.second_layout.batch_stride;
    GuidanceSums mine{};
    for (int64_t e = begin + static_cast<int64_t>(threadIdx.x) * N; e < end; e += kThreads * N) {
      const int64_t left = end - e, at = b * p.elements + e;
      float x[N], output[N], second[N], update[N];
      const Place place = place_of(p.layout, e);
      load_previous<kAccess>(x, p.x, at, left, space.y_x != 0.0f);
      load_strided(output, outputs, p.layout, place, left);
      load_strided(second, seconds, g.second_layout, place, left);
      load_previous<kAccess>(update, g.update, at, left, guidance.mu != 0.0f);
#pragma unroll
      for (int n = 0; n < N; ++n) {  // beyond `left` all is 0
        const double y = guidance_output(space, x[n], output[n]);
        const double u = guidance_update(space, guidance.mu, output[n], second[n], update[n]);
        mine.y += y;
        mine.u += u;
        mine.yy += y * y;
        mine.yu += y * u;
        mine.uu += u * u;
      }
    }
    const GuidanceSums all = sum_over_block(mine);
    if (threadIdx.x == 0) params.sums[i] = all;
  }
}

// The scales of a sample, the same in every thread of the block.
__device__ __forceinline__ GuidanceScales scales_of_sample(const GuidedStepParams& params, int64_t step, int64_t b) {
  const SamplerStepParams& p = params.step;
  const GuidanceRow guidance = guidance_row(p.table, p.table_rows, step);
  if (!needs_sums(guidance) || params.sums == nullptr) return guidance_scales(guidance);
  const int64_t pieces = guidance_pieces(p.elements);
  const GuidanceSums mine = threadIdx.x < pieces ? params.sums[b * pieces + threadIdx.x] : GuidanceSums{};
  __shared__ GuidanceScales scales;
  const GuidanceSums all = sum_over_block(mine);
  if (threadIdx.x == 0) scales = guidance_scales(guidance, all, p.elements);
  __syncthreads();
  return scales;
}

// Threads and elements as in sampler_step_kernel, with registers for five blocks of a multiprocessor. Every block of a
// sample adds its pieces' sums again, in the same order, which costs less than a third launch.
template <typename T, Access kAccess>
__global__ void __launch_bounds__(kThreads, 5) guided_step_kernel(const GuidedStepParams params) {
  constexpr int N = 4;
  const SamplerStepParams& p = params.step;
  const GuidanceParams& g = params.guidance;
  const int64_t step = *p.step;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * N;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const GuidanceScales scales = scales_of_sample(params, step, b);
    // Read after the scales are made, whose doubles need the registers.
    const SamplerRow row = sampler_row(p.table, p.table_rows, step, p.table_columns);
    const GuidanceRow guidance = guidance_row(p.table, p.table_rows, step);
    const GuidanceSpace space = guidance_space(row, guidance);
    const float limit = clip_limit(p.clip_x_start);
    const bool has_known_noise = g.mask != nullptr && guidance.B != 0.0f;
    const NoiseIndex index{philox_key(*p.seed), static_cast<uint32_t>(p.start_index + b), static_cast<uint32_t>(step),
                           p.stream};
    const int64_t first = b * p.elements;
    const T* outputs = static_cast<const T*>(p.output) + b * p.layout.batch_stride;
    const T* seconds = static_cast<const T*>(g.second) + b * g.second_layout.batch_stride;
    const float* masks = g.mask + b * g.mask_layout.batch_stride;
    for (int64_t e = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N; e < p.elements; e += stride) {
      const int64_t left = p.elements - e, at = first + e;
      float x[N], guided[N], second[N];           // `guided`: the output, then g, then x0 of g
      const Place place = place_of(p.layout, e);  // in the second output and the mask, too
      load_state<kAccess>(x, p.x + at, left);
      load_strided(guided, outputs, p.layout, place, left);
      fill(second, 0.0f);
      if (reads_second(guidance)) {
        if (g.second == nullptr) {
          fill(second, NAN);
        } else {
          load_strided(second, seconds, g.second_layout, place, left);
        }
      }
      if (makes_update(guidance)) {
        float update[N];
        load_previous<kAccess>(update, g.update, at, left, guidance.mu != 0.0f);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float y = guidance_output(space, x[i], guided[i]);
          update[i] = guidance_update(space, guidance.mu, guided[i], second[i], update[i]);
          guided[i] = guides(guidance) ? guided_output(scales, y, update[i]) : y;
        }
        if (g.update != nullptr) store_state<kAccess>(g.update + at, update, left);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) guided[i] = guidance_output(space, x[i], guided[i]);
      }
      float eps[N], known[N], gradient[N];
      if (row.sigma == 0.0f && !has_known_noise) {
        fill(eps, 0.0f);
      } else if (p.noise != nullptr) {
        load_state<kAccess>(eps, p.noise + at, left);
      } else {
        generate(eps, index, e);
      }
      load_previous<kAccess>(known, g.known, at, left, g.mask != nullptr && guidance.A != 0.0f);
#pragma unroll
      for (int i = 0; i < N; ++i) known[i] = guidance.A * known[i] + (has_known_noise ? guidance.B * eps[i] : 0.0f);
      if (row.sigma == 0.0f) {
        fill(eps, 0.0f);
      } else if (p.variance_offset != 0) {
        float v[N];
        load_strided(v, outputs + p.variance_offset, p.layout, place, left);
#pragma unroll
        for (int i = 0; i < N; ++i) eps[i] *= learned_scale(row, v[i]);
      }
      load_previous<kAccess>(gradient, g.gradient, at, left, reads_gradient(guidance));
      float previous[N], previous2[N], previous3[N];
      load_previous<kAccess>(previous, p.previous, at, left, row.u != 0.0f || p.x_start2 != nullptr);
      load_previous<kAccess>(previous2, p.previous2, at, left, row.u2 != 0.0f || p.x_start3 != nullptr);
      load_previous<kAccess>(previous3, p.previous3, at, left, row.u3 != 0.0f);
      if (p.x_start3 != nullptr) store_state<kAccess>(p.x_start3 + at, previous2, left);
      const bool keeps = keeps_combination(row);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float x_start_guided = space.g_x * x[i] + space.g_g * guided[i];
        const float x_start_second = adds_second(guidance) ? row.p * x[i] + row.q * second[i] : 0.0f;
        const float x_start = clipped_x_start(x_start_guided + guidance.h * gradient[i], limit);
        const float kept = keeps ? kept_combination(row, x[i], x_start) : previous[i];
        x[i] = next_state(row, x_start, x[i], row.u == 0.0f ? 0.0f : previous[i], row.u2 == 0.0f ? 0.0f : previous2[i],
                          previous3[i], eps[i]) +
               guidance.kg * x_start_guided + guidance.kn * x_start_second +
               guidance.kc * clipped_x_start(x_start_second, limit) + guidance.j * gradient[i];
        guided[i] = x_start;
        previous[i] = kept;
      }
      if (g.mask != nullptr) {
        float mask[N];
        load_strided(mask, masks, g.mask_layout, place, left);
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = masked_state(mask[i], known[i], x[i]);
      }
      if (p.x_start2 != nullptr) store_state<kAccess>(p.x_start2 + at, previous, left);
      store_state<kAccess>(p.x_next + at, x, left);
      if (p.x_start != nullptr) store_state<kAccess>(p.x_start + at, guided, left);
    }
  }
}

template <typename T, Access kAccess>
cudaError_t launch_with(const GuidedStepParams& p, cudaStream_t stream) {
  const int64_t batch = p.step.batch, elements = p.step.elements;
  if (p.sums != nullptr) {
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(batch * guidance_pieces(elements), 1 << 20)));
    guidance_sums_kernel<T, kAccess><<<grid, kThreads, 0, stream>>>(p);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  guided_step_kernel<T, kAccess><<<make_grid(batch, elements, 4), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const GuidedStepParams& p, cudaStream_t stream) {
  const SamplerStepParams& s = p.step;
  const void* const states[] = {s.x,      s.previous, s.previous2,         s.previous3,      s.noise,
                                s.x_next, s.x_start,  p.guidance.gradient, p.guidance.known, p.guidance.update};
  const bool aligned = std::all_of(std::begin(states), std::end(states), is_aligned);
  return aligned && s.elements % 4 == 0 ? launch_with<T, Access::kStrided>(p, stream)
                                        : launch_with<T, Access::kAny>(p, stream);
}

}  // namespace

cudaError_t launch_guided_step(const GuidedStepParams& params, Element output, cudaStream_t stream) {
  switch (output) {
    case Element::kHalf: return launch<__half>(params, stream);
    case Element::kBFloat16: return launch<__nv_bfloat16>(params, stream);
    default: return launch<float>(params, stream);
  }
}

}  // namespace ddpm_fast
