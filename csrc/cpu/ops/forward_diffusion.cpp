// x_t = a·x0 + b·ε and w · mean((out − (c·ε + d·x0))²), see ddpm_fast/ops/forward_diffusion/op.py.
#include <tuple>
#include <vector>

#include "images.h"

namespace ddpm_fast::cpu {

Tensor q_sample(const Tensor& x_start, const Tensor& t, const Tensor& table, const OptionalTensor& noise,
                const OptionalTensor& seed, const OptionalTensor& flip, bool normalize, double offset_noise_strength,
                at::ScalarType dtype, bool channels_last) {
  const Images images(x_start, t, table, noise, seed, flip, normalize, offset_noise_strength, 2);
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  TORCH_CHECK_VALUE(!channels_last || x_start.dim() == 4, "only (B, C, H, W) can be channels-last, got ",
                    x_start.sizes());
  const Tensor x_t = unpooled_tensor(x_start.sizes(), dtype, format);
  const Layout layout = layout_of(x_t, "x_t");
  DDPM_FAST_FLOATS(dtype, "q_sample", [&] {
    scalar_t* out = x_t.data_ptr<scalar_t>();
    for_tiles(images.batch, layout.elements, [&](int64_t, int64_t sample, int64_t first, int64_t count) {
      alignas(64) float x_buffer[kTile], eps_buffer[kTile], buffer[kTile];
      scalar_t* of_sample = out + sample * layout.elements;
      float ab[2];
      images.coefficients(ab, sample);
      const float* x = images.load_x_start(x_buffer, sample, first, count);
      const float* eps = images.load_noise(eps_buffer, sample, first, count);
      float* result = place_of_tile(buffer, of_sample, layout, first);
      kernels().forward_diffusion.combine(result, x, eps, ab[1], ab[0], images.normalize, count);
      store_tile(of_sample, result, layout, first, count);
    });
  });
  return x_t;
}

std::tuple<Tensor, Tensor, Tensor> diffusion_loss(const Tensor& model_output, const Tensor& x_start, const Tensor& t,
                                                  const Tensor& table, const OptionalTensor& noise,
                                                  const OptionalTensor& seed, const OptionalTensor& flip,
                                                  bool normalize, double offset_noise_strength, bool with_gradient) {
  const Images images(x_start, t, table, noise, seed, flip, normalize, offset_noise_strength, 3);
  TORCH_CHECK_VALUE(model_output.sizes() == x_start.sizes() && model_output.device() == x_start.device(),
                    "model_output must have x_start's shape ", x_start.sizes(), ", got ", model_output.sizes());
  const Layout layout = layout_of(model_output, "model_output");
  const Tensor loss = unpooled_tensor({images.batch});
  const Tensor factor = unpooled_tensor_like(loss);
  const Tensor error = with_gradient ? unpooled_tensor_like(model_output) : no_tensor(model_output.scalar_type());
  const Tiling tiling(images.batch, layout.elements);
  std::vector<float> sums(tiling.total);
  DDPM_FAST_FLOATS(model_output.scalar_type(), "diffusion_loss", [&] {
    const scalar_t* out = model_output.const_data_ptr<scalar_t>();
    scalar_t* errors = with_gradient ? error.data_ptr<scalar_t>() : nullptr;
    for_tiles(images.batch, layout.elements, [&](int64_t tile, int64_t sample, int64_t first, int64_t count) {
      alignas(64) float x_buffer[kTile], eps_buffer[kTile], target[kTile];
      const int64_t offset = sample * layout.elements;
      float cdw[3];
      images.coefficients(cdw, sample);
      const float* x = images.load_x_start(x_buffer, sample, first, count);
      const float* eps = images.load_noise(eps_buffer, sample, first, count);
      kernels().forward_diffusion.combine(target, x, eps, cdw[0], cdw[1], images.normalize, count);
      // The target is made, and x0 and ε may go.
      const float* output = load_tile(x_buffer, out + offset, layout, first, count, false);
      float* difference = with_gradient ? place_of_tile(eps_buffer, errors + offset, layout, first) : eps_buffer;
      sums[tile] = kernels().forward_diffusion.subtract(difference, output, target, count);
      if (with_gradient) store_tile(errors + offset, difference, layout, first, count);
    });
  });
  for (int64_t sample = 0; sample < images.batch; ++sample) {
    double sum = 0;
    for (int64_t i = 0; i < tiling.per_sample; ++i) sum += sums[sample * tiling.per_sample + i];
    float cdw[3];
    images.coefficients(cdw, sample);
    const double weight = cdw[2], elements = static_cast<double>(layout.elements);
    loss.data_ptr<float>()[sample] = static_cast<float>(weight * (sum / elements));
    factor.data_ptr<float>()[sample] = static_cast<float>(weight * (2 / elements));
  }
  return {loss, factor, error};
}

// error · factor · dloss of each sample.
Tensor diffusion_loss_backward(const Tensor& error, const Tensor& factor, const Tensor& dloss) {
  TORCH_CHECK_VALUE(error.dim() >= 2 && error.numel() > 0, "error must be (B, C, ...) and not empty, got ",
                    error.sizes());
  Layout in_memory = layout_of(error, "error");
  in_memory.dense = true;  // the gradient has the error's layout, so one loop serves both
  for (const Tensor* tensor : {&factor, &dloss}) {
    TORCH_CHECK_TYPE(tensor->scalar_type() == at::kFloat, "factor and dloss must be float32, got ",
                     tensor->scalar_type());
    TORCH_CHECK_VALUE(tensor->dim() == 1 && tensor->size(0) == error.size(0) && tensor->is_contiguous() &&
                          tensor->device() == error.device(),
                      "factor and dloss must be contiguous, of shape (B,), got ", tensor->sizes());
  }
  const Tensor doutput = unpooled_tensor_like(error);
  const int64_t batch = error.size(0), elements = error.numel() / batch;
  const float *of_sample = factor.const_data_ptr<float>(), *above = dloss.const_data_ptr<float>();
  DDPM_FAST_FLOATS(error.scalar_type(), "diffusion_loss_backward", [&] {
    const scalar_t* from = error.const_data_ptr<scalar_t>();
    scalar_t* to = doutput.data_ptr<scalar_t>();
    for_tiles(batch, elements, [&](int64_t, int64_t sample, int64_t first, int64_t count) {
      alignas(64) float error_buffer[kTile], buffer[kTile];
      const int64_t offset = sample * elements;
      const float* errors = load_tile(error_buffer, from + offset, in_memory, first, count, false);
      float* result = place_of_tile(buffer, to + offset, in_memory, first);
      kernels().forward_diffusion.scale(result, errors, of_sample[sample] * above[sample], count);
      store_tile(to + offset, result, in_memory, first, count);
    });
  });
  return doutput;
}

}  // namespace ddpm_fast::cpu
