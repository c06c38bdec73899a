#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <tuple>
#include <vector>

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

// Elements [first, first + count) of one sample, where they are if they are adjacent floats, else in the buffer.
template <typename T>
const float* output_tile(float* buffer, const T* sample, const OutputLayout& layout, int64_t first, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    if (layout.dense) return sample + first;
  }
  load_output(buffer, sample, layout, first, count);
  return buffer;
}

// A step with anything of guidance, or with a mask.
template <typename T>
class GuidedStep {
 public:
  GuidedStep(const SamplerStepParams& params, const GuidanceParams& guidance, const SamplerRow& row,
             const GuidanceRow& more)
      : p_(params), g_(guidance), row_(row), more_(more), tiling_(params.batch, params.elements) {}

  void run() {
    std::vector<GuidanceScales> scales(p_.batch, guidance_scales(more_));
    if (needs_sums(more_)) reduce(scales);
    at::parallel_for(0, tiling_.total, tiling_.grain, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t sample = tile / tiling_.per_sample;
        step(sample, tile % tiling_.per_sample * kTile, scales[sample]);
      }
    });
  }

 private:
  // The tiles' sums are added in their order, so that scales depend on nothing but their sample.
  void reduce(std::vector<GuidanceScales>& scales) {
    std::vector<GuidanceSums> sums(tiling_.total);
    at::parallel_for(0, tiling_.total, tiling_.grain, [&](int64_t begin, int64_t end) {
      alignas(64) float output[kTile], second[kTile];
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t sample = tile / tiling_.per_sample, first = tile % tiling_.per_sample * kTile;
        sums[tile] = kernels().sampler_step.guidance_sums(row_, more_, inputs(sample, first, output, second));
      }
    });
    for (int64_t sample = 0; sample < p_.batch; ++sample) {
      GuidanceSums total{};
      for (int64_t tile = sample * tiling_.per_sample; tile < (sample + 1) * tiling_.per_sample; ++tile) {
        total.y += sums[tile].y;
        total.u += sums[tile].u;
        total.yy += sums[tile].yy;
        total.yu += sums[tile].yu;
        total.uu += sums[tile].uu;
      }
      scales[sample] = guidance_scales(more_, total, p_.elements);
    }
  }

  // x, both outputs and the momentum of a tile; zeros stand for what is not read.
  GuidedStepTile inputs(int64_t sample, int64_t first, float* output, float* second) const {
    const int64_t count = std::min(kTile, p_.elements - first), offset = sample * p_.elements + first;
    const T* const of_output = static_cast<const T*>(p_.output) + sample * p_.layout.batch_stride;
    GuidedStepTile tile{.x = p_.x + offset,
                        .output = output_tile(output, of_output, p_.layout, first, count),
                        .second = kZeros,
                        .update = more_.mu == 0 ? kZeros : g_.update + offset,
                        .count = count};
    if (reads_second(more_)) {
      const T* const of_second = static_cast<const T*>(g_.second) + sample * g_.second_layout.batch_stride;
      tile.second = output_tile(second, of_second, g_.second_layout, first, count);
    }
    return tile;
  }

  void step(int64_t sample, int64_t first, const GuidanceScales& scales) const {
    alignas(64) float output[kTile], second[kTile], mask[kTile], generated[kTile], scaled[kTile];
    alignas(64) float start[kTile], kept[kTile], unwanted[kTile];
    const int64_t offset = sample * p_.elements + first;
    GuidedStepTile tile = inputs(sample, first, output, second);
    const int64_t count = tile.count;
    const float* const eps = noise(sample, first, count, generated);
    tile.eps = row_.sigma == 0 ? kZeros : eps;
    if (p_.variance_offset != 0 && row_.sigma != 0) {
      const T* const of_output = static_cast<const T*>(p_.output) + sample * p_.layout.batch_stride;
      load_output(start, of_output + p_.variance_offset, p_.layout, first, count);
      kernels().sampler_step.scale_noise(row_, scaled, start, eps, count);
      tile.eps = scaled;
    }
    const auto or_zeros = [&](bool is_read, const float* from) { return is_read ? from + offset : kZeros; };
    tile.gradient = or_zeros(reads_gradient(more_), g_.gradient);
    tile.known = or_zeros(g_.mask != nullptr && more_.A != 0, g_.known);
    tile.known_eps = g_.mask != nullptr && more_.B != 0 ? eps : kZeros;
    tile.second_added = adds_second(more_) ? tile.second : kZeros;
    tile.mask = kZeros;
    if (g_.mask != nullptr) {
      tile.mask = output_tile(mask, g_.mask + sample * g_.mask_layout.batch_stride, g_.mask_layout, first, count);
    }
    tile.previous = or_zeros(row_.u != 0, p_.previous);
    tile.previous2 = or_zeros(row_.u2 != 0, p_.previous2);
    tile.previous3 = or_zeros(row_.u3 != 0, p_.previous3);
    tile.x_next = p_.x_next + offset;
    const bool moves = p_.x_start2 != nullptr;  // then x_start is read once more before it is written
    tile.x_start = p_.x_start != nullptr && !moves ? p_.x_start + offset : start;
    tile.kept = kept;
    tile.next_update = g_.update != nullptr ? g_.update + offset : unwanted;
    kernels().sampler_step.step_guided(row_, more_, scales, p_.clip_x_start, has_more(), tile);
    if (!moves) return;
    const auto move = [&](float* to, const float* from) { std::copy(from, from + count, to + offset); };
    if (p_.x_start3 != nullptr) move(p_.x_start3, p_.previous2 + offset);
    move(p_.x_start2, keeps_combination(row_) ? kept : p_.previous + offset);
    move(p_.x_start, start);
  }

  // ε of a tile, or null where nothing reads it.
  const float* noise(int64_t sample, int64_t first, int64_t count, float* generated) const {
    if (row_.sigma == 0 && (g_.mask == nullptr || more_.B == 0)) return nullptr;
    if (p_.noise != nullptr) return p_.noise + sample * p_.elements + first;
    const NoiseIndex index{.key = philox_key(*p_.seed),
                           .sample = static_cast<uint32_t>(p_.start_index + sample),
                           .step = static_cast<uint32_t>(*p_.step),
                           .stream = p_.stream};
    kernels().noise.normal(generated, index, first, count);
    return generated;
  }

  // Whether there is more than a second output that guides.
  bool has_more() const {
    return !guides(more_) || g_.update != nullptr || g_.mask != nullptr || reads_gradient(more_) || more_.kg != 0 ||
           more_.kn != 0 || more_.kc != 0;
  }

  const SamplerStepParams& p_;
  const GuidanceParams& g_;
  const SamplerRow& row_;
  const GuidanceRow& more_;
  const Tiling tiling_;
};

void check_reads(const GuidanceParams& g, const GuidanceRow& row) {
  TORCH_CHECK_VALUE(!reads_second(row) || g.second, "second_output is needed where w, mu, kn or kc guides");
  TORCH_CHECK_VALUE(row.mu == 0 || g.update, "update is needed where mu of the table is not 0");
  TORCH_CHECK_VALUE(!reads_gradient(row) || g.gradient, "gradient is needed where h or j of the table is not 0");
  TORCH_CHECK_VALUE(!g.mask || row.A == 0 || g.known, "known is needed where A of the table is not 0");
  TORCH_CHECK_VALUE(!needs_sums(row) || g.reduces, "reduces is needed where phi, eta or rho needs sums over a sample");
}

void run(const SamplerStepParams& p, const GuidanceParams& guidance, at::ScalarType output_type) {
  if (p.batch * p.elements == 0) return;
  TORCH_CHECK_VALUE(0 <= *p.step && *p.step < p.table_rows, "step must be in [0, ", p.table_rows,
                    "), the rows of table, got ", *p.step);
  const SamplerRow row = sampler_row(p.table, p.table_rows, *p.step, p.table_columns);
  TORCH_CHECK_VALUE(row.u == 0 || p.previous, "the previous x_start is needed where u of the table is not 0");
  TORCH_CHECK_VALUE(row.u2 == 0 || p.previous2, "the second previous x_start is needed where u2 of the table is not 0");
  TORCH_CHECK_VALUE(row.u3 == 0 || p.previous3, "the third previous x_start is needed where u3 of the table is not 0");
  GuidanceRow more;
  if (p.table_columns == kGuidedTableColumns) more = guidance_row(p.table, p.table_rows, *p.step);
  check_reads(guidance, more);
  const bool guided = reads_second(more) || guidance.mask || reads_gradient(more) || more.kg != 0;
  const auto run_as = [&]<typename T>(T) {
    if (guided) return GuidedStep<T>(p, guidance, row, more).run();
    step_samples<T>(p, row);
  };
  AT_DISPATCH_SWITCH(output_type, "sampler_step",
                     AT_DISPATCH_CASE(at::kFloat, [&] { run_as(scalar_t{}); })
                         AT_DISPATCH_CASE(at::kHalf, [&] { run_as(scalar_t{}); })
                             AT_DISPATCH_CASE(at::kBFloat16, [&] { run_as(scalar_t{}); }));
}

}  // namespace

std::tuple<Tensor, Tensor> sampler_step(const Tensor& x, const Tensor& model_output, const Tensor& table,
                                        const Tensor& step, const Tensor& seed, const OptionalTensor& x_start_previous,
                                        const OptionalTensor& x_start_previous2,
                                        const OptionalTensor& x_start_previous3, const OptionalTensor& noise,
                                        bool clip_x_start, int64_t start_index, int64_t stream,
                                        const OptionalTensor& second_output, const OptionalTensor& gradient,
                                        const OptionalTensor& known, const OptionalTensor& mask,
                                        const OptionalTensor& update, bool reduces) {
  const Tensor x_next = unpooled_tensor_like(x), x_start = unpooled_tensor_like(x);
  run(check_sampler_step(x, model_output, table, step, seed, {x_start_previous, x_start_previous2, x_start_previous3},
                         noise, x_next, x_start, clip_x_start, start_index, stream),
      check_guidance(x, model_output, table, {second_output, gradient, known, mask, update, reduces}),
      model_output.scalar_type());
  return {x_next, x_start};
}

void sampler_step_(Tensor& x, const Tensor& model_output, const Tensor& table, const Tensor& step, const Tensor& seed,
                   const OptionalTensor& x_start, const OptionalTensor& x_start2, const OptionalTensor& x_start3,
                   const OptionalTensor& noise, bool clip_x_start, int64_t start_index, int64_t stream,
                   const OptionalTensor& second_output, const OptionalTensor& gradient, const OptionalTensor& known,
                   const OptionalTensor& mask, const OptionalTensor& update, bool reduces) {
  run(check_sampler_step_inplace(x, model_output, table, step, seed, {x_start, x_start2, x_start3}, noise, clip_x_start,
                                 start_index, stream),
      check_guidance(x, model_output, table, {second_output, gradient, known, mask, update, reduces}),
      model_output.scalar_type());
}

}  // namespace ddpm_fast::cpu
