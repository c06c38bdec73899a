#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <tuple>

#include "core/checks.h"
#include "cpu/runtime/memory.h"
#include "ops.h"
#include "tile.h"

namespace ddpm_fast::cpu {

namespace {

// Elements [first, first + count) of one sample of the model's output, in the state's order and float32.
template <typename T>
void load_output(float* to, const T* sample, const OutputLayout& layout, int64_t first, int64_t count) {
  if (layout.dense) return convert(to, sample + first, count);
  T gathered[kTile];
  int64_t channel = first / layout.pixels, pixel = first % layout.pixels;
  for (int64_t done = 0; done < count; ++channel, pixel = 0) {
    const int64_t run = std::min(layout.pixels - pixel, count - done);
    const T* from = sample + channel * layout.channel_stride + pixel * layout.pixel_stride;
    for (int64_t i = 0; i < run; ++i) gathered[done + i] = from[i * layout.pixel_stride];
    done += run;
  }
  convert(to, gathered, count);
}

alignas(64) constexpr float kZeros[kTile] = {};

// One tile, elements [first, first + count) of a sample, which start at `offset` in the states.
template <typename T>
struct TileOfSample {
  const T* sample;  // the model's output
  int64_t first, count, offset;
};

// A step that reads more than one earlier state, or a learned variance. The results stand in `start` and `kept` until
// every state is read.
template <typename T>
void step_extended(const SamplerStepParams& p, const SamplerRow& row, const float* output, const float* eps,
                   const TileOfSample<T>& tile) {
  alignas(64) float scaled[kTile], start[kTile], kept[kTile];
  if (p.variance_offset != 0 && row.sigma != 0) {
    load_output(start, tile.sample + p.variance_offset, p.layout, tile.first, tile.count);
    kernels().sampler_step.scale_noise(row, scaled, start, eps, tile.count);
    eps = scaled;
  }
  kernels().sampler_step.step_extended(row, p.clip_x_start,
                                       {.x = p.x + tile.offset,
                                        .output = output,
                                        .previous = row.u == 0 ? kZeros : p.previous + tile.offset,
                                        .previous2 = row.u2 == 0 ? kZeros : p.previous2 + tile.offset,
                                        .previous3 = row.u3 == 0 ? kZeros : p.previous3 + tile.offset,
                                        .eps = eps,
                                        .x_next = p.x_next + tile.offset,
                                        .x_start = start,
                                        .kept = kept,
                                        .count = tile.count});
  const auto move = [&tile](float* to, const float* from) { std::copy(from, from + tile.count, to + tile.offset); };
  if (p.x_start3 != nullptr) move(p.x_start3, p.previous2 + tile.offset);
  if (p.x_start2 != nullptr) move(p.x_start2, keeps_combination(row) ? kept : p.previous + tile.offset);
  if (p.x_start != nullptr) move(p.x_start, start);
}

template <typename T>
void step_samples(const SamplerStepParams& p, const SamplerRow& row) {
  const Tiling tiling(p.batch, p.elements);
  const NoiseIndex index{
      .key = philox_key(*p.seed), .sample = 0, .step = static_cast<uint32_t>(*p.step), .stream = p.stream};
  at::parallel_for(0, tiling.total, tiling.grain, [&](int64_t begin, int64_t end) {
    alignas(64) float output[kTile], generated[kTile], unwanted[kTile];
    NoiseIndex mine = index;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t sample = tile / tiling.per_sample;
      const int64_t first = tile % tiling.per_sample * kTile;
      const int64_t count = std::min(kTile, p.elements - first);
      const int64_t offset = sample * p.elements + first;
      const T* const from = static_cast<const T*>(p.output) + sample * p.layout.batch_stride;
      load_output(output, from, p.layout, first, count);
      const float* eps = row.sigma == 0 ? kZeros : p.noise ? p.noise + offset : generated;
      if (eps == generated) {
        mine.sample = static_cast<uint32_t>(p.start_index + sample);
        kernels().noise.normal(generated, mine, first, count);
      }
      if (p.is_extended()) {
        step_extended<T>(p, row, output, eps, {from, first, count, offset});
        continue;
      }
      kernels().sampler_step.step(row, p.clip_x_start,
                                  {.x = p.x + offset,
                                   .output = output,
                                   .previous = row.u == 0 ? kZeros : p.previous + offset,
                                   .eps = eps,
                                   .x_next = p.x_next + offset,
                                   .x_start = p.x_start ? p.x_start + offset : unwanted,
                                   .count = count});
    }
  });
}

void run(const SamplerStepParams& p, at::ScalarType output_type) {
  if (p.batch * p.elements == 0) return;
  TORCH_CHECK_VALUE(0 <= *p.step && *p.step < p.table_rows, "step must be in [0, ", p.table_rows,
                    "), the rows of table, got ", *p.step);
  const SamplerRow row = sampler_row(p.table, p.table_rows, *p.step, p.table_columns);
  TORCH_CHECK_VALUE(row.u == 0 || p.previous, "the previous x_start is needed where u of the table is not 0");
  TORCH_CHECK_VALUE(row.u2 == 0 || p.previous2, "the second previous x_start is needed where u2 of the table is not 0");
  TORCH_CHECK_VALUE(row.u3 == 0 || p.previous3, "the third previous x_start is needed where u3 of the table is not 0");
  AT_DISPATCH_SWITCH(output_type, "sampler_step",
                     AT_DISPATCH_CASE(at::kFloat, [&] { step_samples<scalar_t>(p, row); })
                         AT_DISPATCH_CASE(at::kHalf, [&] { step_samples<scalar_t>(p, row); })
                             AT_DISPATCH_CASE(at::kBFloat16, [&] { step_samples<scalar_t>(p, row); }));
}

}  // namespace

std::tuple<Tensor, Tensor> sampler_step(const Tensor& x, const Tensor& model_output, const Tensor& table,
                                        const Tensor& step, const Tensor& seed, const OptionalTensor& x_start_previous,
                                        const OptionalTensor& x_start_previous2,
                                        const OptionalTensor& x_start_previous3, const OptionalTensor& noise,
                                        bool clip_x_start, int64_t start_index, int64_t stream) {
  const Tensor x_next = unpooled_tensor_like(x), x_start = unpooled_tensor_like(x);
  run(check_sampler_step(x, model_output, table, step, seed, {x_start_previous, x_start_previous2, x_start_previous3},
                         noise, x_next, x_start, clip_x_start, start_index, stream),
      model_output.scalar_type());
  return {x_next, x_start};
}

void sampler_step_(Tensor& x, const Tensor& model_output, const Tensor& table, const Tensor& step, const Tensor& seed,
                   const OptionalTensor& x_start, const OptionalTensor& x_start2, const OptionalTensor& x_start3,
                   const OptionalTensor& noise, bool clip_x_start, int64_t start_index, int64_t stream) {
  run(check_sampler_step_inplace(x, model_output, table, step, seed, {x_start, x_start2, x_start3}, noise, clip_x_start,
                                 start_index, stream),
      model_output.scalar_type());
}

}  // namespace ddpm_fast::cpu
