#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "core/checks.h"
#include "launchers.h"

namespace ddpm_fast {

namespace {

Element element_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Element::kFloat;
    case at::kHalf: return Element::kHalf;
    case at::kBFloat16: return Element::kBFloat16;
    default: TORCH_CHECK_TYPE(false, name, " must be float32, float16 or bfloat16, got ", tensor.scalar_type());
  }
}

void run(const SamplerStepParams& params, const GuidanceParams& guidance, const at::Tensor& model_output) {
  const Element element = element_of(model_output, "model_output");
  if (params.batch * params.elements == 0) return;
  const c10::cuda::CUDAGuard guard(model_output.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  if (params.table_columns != kGuidedTableColumns) {
    C10_CUDA_CHECK(launch_sampler_step(params, element, stream));
    return;
  }
  GuidedStepParams guided{params, guidance};
  at::Tensor sums;  // its memory is free again, for later work of this stream, when it goes
  if (guidance.reduces) {
    const int64_t doubles = params.batch * guidance_pieces(params.elements) * (sizeof(GuidanceSums) / sizeof(double));
    sums = at::empty({doubles}, model_output.options().dtype(at::kDouble));
    guided.sums = reinterpret_cast<GuidanceSums*>(sums.data_ptr<double>());
  }
  C10_CUDA_CHECK(launch_guided_step(guided, element, stream));
}

std::tuple<at::Tensor, at::Tensor> sampler_step(
    const at::Tensor& x, const at::Tensor& model_output, const at::Tensor& table, const at::Tensor& step,
    const at::Tensor& seed, const std::optional<at::Tensor>& x_start_previous,
    const std::optional<at::Tensor>& x_start_previous2, const std::optional<at::Tensor>& x_start_previous3,
    const std::optional<at::Tensor>& noise, bool clip_x_start, int64_t start_index, int64_t stream,
    const std::optional<at::Tensor>& second_output, const std::optional<at::Tensor>& gradient,
    const std::optional<at::Tensor>& known, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& update, bool reduces) {
  const at::Tensor x_next = at::empty_like(x), x_start = at::empty_like(x);
  run(check_sampler_step(x, model_output, table, step, seed, {x_start_previous, x_start_previous2, x_start_previous3},
                         noise, x_next, x_start, clip_x_start, start_index, stream),
      check_guidance(x, model_output, table, {second_output, gradient, known, mask, update, reduces}), model_output);
  return {x_next, x_start};
}

void sampler_step_(at::Tensor& x, const at::Tensor& model_output, const at::Tensor& table, const at::Tensor& step,
                   const at::Tensor& seed, const std::optional<at::Tensor>& x_start,
                   const std::optional<at::Tensor>& x_start2, const std::optional<at::Tensor>& x_start3,
                   const std::optional<at::Tensor>& noise, bool clip_x_start, int64_t start_index, int64_t stream,
                   const std::optional<at::Tensor>& second_output, const std::optional<at::Tensor>& gradient,
                   const std::optional<at::Tensor>& known, const std::optional<at::Tensor>& mask,
                   const std::optional<at::Tensor>& update, bool reduces) {
  run(check_sampler_step_inplace(x, model_output, table, step, seed, {x_start, x_start2, x_start3}, noise, clip_x_start,
                                 start_index, stream),
      check_guidance(x, model_output, table, {second_output, gradient, known, mask, update, reduces}), model_output);
}

void fill_normal_(at::Tensor& out, const at::Tensor& seed, const at::Tensor& step, int64_t stream,
                  int64_t start_index) {
  check_counter_range(out, start_index, stream);
  check_one_int64(seed, "seed", out.device());
  check_one_int64(step, "step", out.device());
  TORCH_CHECK_VALUE(out.is_contiguous(), "out must be contiguous");
  const Element element = element_of(out, "out");
  if (out.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(out.device());
  const FillNormalParams params{.out = out.data_ptr(),
                                .seed = seed.const_data_ptr<int64_t>(),
                                .step = step.const_data_ptr<int64_t>(),
                                .batch = out.size(0),
                                .elements = out.numel() / out.size(0),
                                .start_index = start_index,
                                .stream = static_cast<uint32_t>(stream)};
  C10_CUDA_CHECK(launch_fill_normal(params, element, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(ddpm_fast, CUDA, m) {
  m.impl("sampler_step", &sampler_step);
  m.impl("sampler_step_", &sampler_step_);
  m.impl("fill_normal_", &fill_normal_);
}

}  // namespace ddpm_fast
