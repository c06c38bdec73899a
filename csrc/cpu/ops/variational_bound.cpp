// The hybrid loss of learned variance and its gradient, see ddpm_fast/ops/variational_bound/op.py.
#include <tuple>
#include <vector>

#include "images.h"

namespace ddpm_fast::cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor> variational_bound(
    const Tensor& model_output, const Tensor& x_start, const Tensor& t, const Tensor& table,
    const OptionalTensor& noise, const OptionalTensor& seed, const OptionalTensor& flip, bool normalize,
    double offset_noise_strength, bool clip_x_start, bool detach_mean, double min_probability, bool with_gradient) {
  const Images images(x_start, t, table, noise, seed, flip, normalize, offset_noise_strength, kBoundColumns);
  const int64_t elements = images.x_layout.elements;  // of a half
  const bool learned = model_output.dim() == x_start.dim() && model_output.size(1) == 2 * x_start.size(1);
  std::vector<int64_t> shape = x_start.sizes().vec();
  if (learned) shape[1] *= 2;
  TORCH_CHECK_VALUE(model_output.sizes() == at::IntArrayRef(shape) && model_output.device() == x_start.device(),
                    "model_output must have x_start's shape or twice its channels, got ", model_output.sizes());
  TORCH_CHECK_VALUE(min_probability > 0, "min_probability must be positive, got ", min_probability);
  const Layout layout = layout_of(model_output, "model_output");
  const Tensor gradient = with_gradient ? unpooled_tensor_like(model_output) : no_tensor(model_output.scalar_type());
  const Tensor loss = unpooled_tensor({images.batch}), terms = unpooled_tensor({images.batch, 2});
  const Tensor factor = unpooled_tensor({images.batch, 2});
  const Tiling tiling(images.batch, elements);
  std::vector<VariationalBoundSums> sums(tiling.total);
  DDPM_FAST_FLOATS(model_output.scalar_type(), "variational_bound", [&] {
    const scalar_t* outputs = model_output.const_data_ptr<scalar_t>();
    scalar_t* gradients = with_gradient ? gradient.data_ptr<scalar_t>() : nullptr;
    for_tiles(images.batch, elements, [&](int64_t tile, int64_t sample, int64_t first, int64_t count) {
      alignas(64) float x_buffer[kTile], eps_buffer[kTile], out_buffer[kTile], variance_buffer[kTile];
      alignas(64) float error[kTile], bound[kTile], dout_buffer[kTile], dvariance_buffer[kTile];
      const scalar_t* output = outputs + sample * layout.elements;
      scalar_t* of_sample = gradients + (with_gradient ? sample * layout.elements : 0);
      VariationalBoundTile work{
          .output = load_tile(out_buffer, output, layout, first, count, false),
          .variance = learned ? load_tile(variance_buffer, output, layout, elements + first, count, false) : nullptr,
          .x = images.load_x_start(x_buffer, sample, first, count),
          .eps = images.load_noise(eps_buffer, sample, first, count),
          .error = error,
          .bound = bound,
          .dout = with_gradient ? place_of_tile(dout_buffer, of_sample, layout, first) : dout_buffer,
          .dvariance = with_gradient && learned ? place_of_tile(dvariance_buffer, of_sample, layout, elements + first)
                                                : dvariance_buffer,
          .count = count,
          .normalize = normalize,
          .clip = clip_x_start,
          .detach_mean = detach_mean,
          .min_log_probability = static_cast<float>(std::log(min_probability))};
      images.coefficients(&work.row.a, sample);
      sums[tile] = kernels().variational_bound.forward(work);
      if (with_gradient) store_tile(of_sample, work.dout, layout, first, count);
      if (with_gradient && learned) store_tile(of_sample, work.dvariance, layout, elements + first, count);
    });
  });
  for (int64_t sample = 0; sample < images.batch; ++sample) {
    double squares = 0, bounds = 0;
    for (int64_t i = sample * tiling.per_sample; i < (sample + 1) * tiling.per_sample; ++i) {
      squares += sums[i].squares;
      bounds += sums[i].bounds;
    }
    BoundRow row;
    images.coefficients(&row.a, sample);
    const double all = static_cast<double>(elements), bits = 1 / std::log(2.0);
    const double square = squares / all, bound = bits * (bounds / all), weight = row.weight;
    const double first = (detach_mean ? 2.0 * row.w : 1.0) / all;
    const double second = -0.25 * bits * (static_cast<double>(row.high) - row.low) * weight / all;
    terms.data_ptr<float>()[2 * sample] = static_cast<float>(square);
    terms.data_ptr<float>()[2 * sample + 1] = static_cast<float>(bound);
    loss.data_ptr<float>()[sample] = static_cast<float>(row.w * square + weight * bound);
    factor.data_ptr<float>()[2 * sample] = static_cast<float>(first);
    factor.data_ptr<float>()[2 * sample + 1] = static_cast<float>(learned ? second : first);
  }
  return {loss, terms, factor, gradient};
}

// gradient · factor · dloss of each sample, each half along channels with its factor.
Tensor variational_bound_backward(const Tensor& gradient, const Tensor& factor, const Tensor& dloss) {
  TORCH_CHECK_VALUE(gradient.dim() >= 2 && gradient.numel() > 0, "gradient must be (B, C, ...) and not empty, got ",
                    gradient.sizes());
  const Layout layout = layout_of(gradient, "gradient");
  const int64_t batch = gradient.size(0), half = layout.elements / 2;
  for (const Tensor* tensor : {&factor, &dloss}) {
    TORCH_CHECK_TYPE(tensor->scalar_type() == at::kFloat, "factor and dloss must be float32, got ",
                     tensor->scalar_type());
    TORCH_CHECK_VALUE(tensor->dim() >= 1 && tensor->size(0) == batch && tensor->is_contiguous() &&
                          tensor->numel() == (tensor == &factor ? 2 * batch : batch) &&
                          tensor->device() == gradient.device(),
                      "factor and dloss must be contiguous, of shapes (B, 2) and (B,), got ", tensor->sizes());
  }
  const Tensor doutput = unpooled_tensor_like(gradient);
  const float *factors = factor.const_data_ptr<float>(), *above = dloss.const_data_ptr<float>();
  DDPM_FAST_FLOATS(gradient.scalar_type(), "variational_bound_backward", [&] {
    const scalar_t* from = gradient.const_data_ptr<scalar_t>();
    scalar_t* to = doutput.data_ptr<scalar_t>();
    for_tiles(batch, layout.elements, [&](int64_t, int64_t sample, int64_t first, int64_t count) {
      alignas(64) float gradient_buffer[kTile], buffer[kTile];
      const int64_t offset = sample * layout.elements;
      const float* gradients = load_tile(gradient_buffer, from + offset, layout, first, count, false);
      float* result = place_of_tile(buffer, to + offset, layout, first);
      const int64_t of_first = std::clamp<int64_t>(half - first, 0, count);  // elements of the first half
      const float *factor_of = factors + 2 * sample, scale = above[sample];
      kernels().forward_diffusion.scale(result, gradients, factor_of[0] * scale, of_first);
      kernels().forward_diffusion.scale(result + of_first, gradients + of_first, factor_of[1] * scale,
                                        count - of_first);
      store_tile(to + offset, result, layout, first, count);
    });
  });
  return doutput;
}

}  // namespace ddpm_fast::cpu
