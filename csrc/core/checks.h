// Argument checks of the native operators, CPU and CUDA: they keep memory safe if an operator is called without op.py.
// Users read the error messages of op.py first.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "sampler_math.h"

namespace ddpm_fast {

inline void check_one_int64(const at::Tensor& tensor, const char* name, at::Device device) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kLong && tensor.numel() == 1, name, " must be one int64 element, got ",
                   tensor.numel(), " of ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == device, name, " must be on ", device, ", got ", tensor.device());
}

inline void check_counter_range(const at::Tensor& tensor, int64_t start_index, int64_t stream) {
  TORCH_CHECK_VALUE(tensor.dim() >= 1, "a batch dimension is needed, got a tensor without dimensions");
  const int64_t batch = tensor.size(0);
  TORCH_CHECK_VALUE(batch == 0 || tensor.numel() / batch <= (int64_t{1} << 34),
                    "at most 2^34 elements per sample are possible, got ", tensor.numel() / batch);
  TORCH_CHECK_VALUE(start_index >= 0 && start_index <= (int64_t{1} << 32) - batch,
                    "start_index must be in [0, 2^32 - batch size], got ", start_index);
  TORCH_CHECK_VALUE(stream >= 0 && stream < (int64_t{1} << 32), "stream must be in [0, 2^32), got ", stream);
}

// A contiguous float32 tensor like x.
inline void check_state(const at::Tensor& tensor, const char* name, const at::Tensor& x) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, name, " must be float32, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == x.device(), name, " must be on ", x.device(), ", got ", tensor.device());
  TORCH_CHECK_VALUE(tensor.sizes() == x.sizes(), name, " must have shape ", x.sizes(), ", got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous");
}

inline float* state_or_null(const std::optional<at::Tensor>& tensor, const char* name, const at::Tensor& x) {
  if (!tensor.has_value()) return nullptr;
  check_state(*tensor, name, x);
  return tensor->data_ptr<float>();
}

// Dimensions from the third on must be evenly spaced, as in contiguous and channels-last tensors and their slices.
inline OutputLayout output_layout(const at::Tensor& output, const char* name = "model_output") {
  OutputLayout layout{.pixels = 1, .batch_stride = output.stride(0), .dense = true};
  for (int64_t dim = output.dim() - 1; dim >= 2; --dim) {
    if (output.size(dim) == 1) continue;
    if (layout.pixels == 1) layout.pixel_stride = output.stride(dim);
    TORCH_CHECK_VALUE(output.stride(dim) == layout.pixels * layout.pixel_stride, name,
                      " must be contiguous or channels-last, got strides ", output.strides());
    layout.pixels *= output.size(dim);
  }
  const bool has_channels = output.dim() >= 2 && output.size(1) != 1;
  if (has_channels) layout.channel_stride = output.stride(1);
  layout.dense =
      (layout.pixels == 1 || layout.pixel_stride == 1) && (!has_channels || layout.channel_stride == layout.pixels);
  return layout;
}

// The tensors of earlier steps, newest first: x0 of the step before, and what the steps before it kept.
struct History {
  const std::optional<at::Tensor>&first, &second, &third;
};

// True if the output has a second half of channels, the variance.
inline bool has_variance(const at::Tensor& x, const at::Tensor& output) {
  return x.dim() >= 2 && output.dim() == x.dim() && x.size(1) > 0 && output.size(1) == 2 * x.size(1);
}

inline void check_model_output(const at::Tensor& x, const at::Tensor& output, const char* name = "model_output") {
  const bool learned = has_variance(x, output);
  const at::Tensor mean = learned ? output.narrow(1, 0, x.size(1)) : output;
  TORCH_CHECK_VALUE(mean.sizes() == x.sizes() && output.device() == x.device(), name, " must have shape ", x.sizes(),
                    " or twice its channels on ", x.device(), ", got ", output.sizes(), " on ", output.device());
}

inline SamplerStepParams check_sampler_step(const at::Tensor& x, const at::Tensor& model_output,
                                            const at::Tensor& table, const at::Tensor& step, const at::Tensor& seed,
                                            const History& history, const std::optional<at::Tensor>& noise,
                                            const at::Tensor& x_next, const std::optional<at::Tensor>& x_start,
                                            bool clip_x_start, int64_t start_index, int64_t stream) {
  check_counter_range(x, start_index, stream);
  check_state(x, "x", x);
  check_state(x_next, "x_next", x);
  check_one_int64(step, "step", x.device());
  check_one_int64(seed, "seed", x.device());
  TORCH_CHECK_TYPE(table.scalar_type() == at::kFloat, "table must be float32, got ", table.scalar_type());
  const int64_t columns = table.dim() == 2 ? table.size(1) : 0;
  TORCH_CHECK_VALUE(table.is_contiguous() && (columns == kTableColumns || columns == kWideTableColumns ||
                                              columns == kWidestTableColumns || columns == kGuidedTableColumns),
                    "table must be contiguous, of shape (S, 6), (S, 10), (S, 12) or (S, 25), got ", table.sizes());
  TORCH_CHECK_VALUE(table.device() == x.device(), "table must be on ", x.device(), ", got ", table.device());
  check_model_output(x, model_output);
  const bool learned = has_variance(x, model_output);
  TORCH_CHECK_VALUE(!learned || columns >= kWideTableColumns,
                    "table must have 10 columns where model_output has a variance, got ", table.sizes());
  TORCH_CHECK_VALUE(!history.third.has_value() || history.second.has_value(),
                    "the second of the earlier x_start is needed where the third is given");
  return {.x = x.data_ptr<float>(),
          .output = model_output.data_ptr(),
          .table = table.data_ptr<float>(),
          .step = step.data_ptr<int64_t>(),
          .seed = seed.data_ptr<int64_t>(),
          .previous = state_or_null(history.first, "x_start_previous", x),
          .noise = state_or_null(noise, "noise", x),
          .x_next = x_next.data_ptr<float>(),
          .x_start = state_or_null(x_start, "x_start", x),
          .layout = x.numel() == 0 ? OutputLayout{.pixels = 1, .dense = true} : output_layout(model_output),
          .batch = x.size(0),
          .elements = x.numel() == 0 ? 0 : x.numel() / x.size(0),
          .table_rows = table.size(0),
          .start_index = start_index,
          .stream = static_cast<uint32_t>(stream),
          .clip_x_start = clip_x_start,
          .table_columns = static_cast<int>(columns),
          .previous2 = state_or_null(history.second, "x_start_previous2", x),
          .previous3 = state_or_null(history.third, "x_start_previous3", x),
          .variance_offset = learned ? x.size(1) * model_output.stride(1) : 0};
}

// The tensors of guidance and of a known region.
struct Guidance {
  const std::optional<at::Tensor>&second_output, &gradient, &known, &mask, &update;
  bool reduces;
};

inline GuidanceParams check_guidance(const at::Tensor& x, const at::Tensor& model_output, const at::Tensor& table,
                                     const Guidance& guidance) {
  GuidanceParams params{.gradient = state_or_null(guidance.gradient, "gradient", x),
                        .known = state_or_null(guidance.known, "known", x),
                        .update = state_or_null(guidance.update, "update", x),
                        .reduces = guidance.reduces};
  const bool any = guidance.second_output.has_value() || guidance.gradient.has_value() || guidance.known.has_value() ||
                   guidance.mask.has_value() || guidance.update.has_value() || guidance.reduces;
  TORCH_CHECK_VALUE(!any || table.size(1) == kGuidedTableColumns,
                    "table must have 25 columns where a step is guided or masked, got ", table.sizes());
  if (guidance.second_output.has_value()) {
    const at::Tensor& second = *guidance.second_output;
    check_model_output(x, second, "second_output");
    TORCH_CHECK_TYPE(second.scalar_type() == model_output.scalar_type(), "second_output must be ",
                     model_output.scalar_type(), ", got ", second.scalar_type());
    params.second = second.data_ptr();
    if (x.numel() != 0) params.second_layout = output_layout(second, "second_output");
  }
  if (guidance.mask.has_value()) {
    const at::Tensor& mask = *guidance.mask;
    TORCH_CHECK_TYPE(mask.scalar_type() == at::kFloat, "mask must be float32, got ", mask.scalar_type());
    TORCH_CHECK_VALUE(mask.device() == x.device(), "mask must be on ", x.device(), ", got ", mask.device());
    bool fits = mask.dim() == x.dim();
    for (int64_t i = 0; fits && i < x.dim(); ++i) {
      fits = mask.size(i) == x.size(i) || (i < 2 && mask.size(i) == 1);
    }
    TORCH_CHECK_VALUE(fits, "mask must have shape ", x.sizes(), ", or 1 instead of its batch or channels, got ",
                      mask.sizes());
    params.mask = mask.data_ptr<float>();
    if (x.numel() != 0) params.mask_layout = output_layout(mask.expand(x.sizes()), "mask");
  }
  return params;
}

// The parameters of a step in place, which writes what it keeps over what it has read.
inline SamplerStepParams check_sampler_step_inplace(const at::Tensor& x, const at::Tensor& model_output,
                                                    const at::Tensor& table, const at::Tensor& step,
                                                    const at::Tensor& seed, const History& history,
                                                    const std::optional<at::Tensor>& noise, bool clip_x_start,
                                                    int64_t start_index, int64_t stream) {
  SamplerStepParams params = check_sampler_step(x, model_output, table, step, seed, history, noise, x, history.first,
                                                clip_x_start, start_index, stream);
  TORCH_CHECK_VALUE(!history.second.has_value() || history.first.has_value(),
                    "x_start is needed where the second of the earlier x_start is given");
  params.x_start2 = const_cast<float*>(params.previous2);
  params.x_start3 = const_cast<float*>(params.previous3);
  return params;
}

}  // namespace ddpm_fast
