#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "cpu/kernels/kernels.h"
#include "cpu/runtime/maps.h"

namespace ddpm_fast {

namespace {

// The input of a convolution: one map or two side by side, as float32 channels-last.
struct Parts {
  at::Tensor first, second;
  int64_t channels[2], C, B, H, W;  // H and W of the convolution
  bool upsampled;

  Parts(const at::Tensor& x, const std::optional<at::Tensor>& beside, const at::Tensor& weight, bool up)
      : upsampled(up) {
    TORCH_CHECK_VALUE(x.dim() == 4, "x must have shape (B, C, H, W), got ", x.sizes());
    first = float_map(x);
    B = x.size(0);
    H = x.size(2) * (up ? 2 : 1);
    W = x.size(3) * (up ? 2 : 1);
    if (beside.has_value())
      second = float_map(*beside, "beside", {B, beside->dim() == 4 ? beside->size(1) : 0, x.size(2), x.size(3)});
    channels[0] = x.size(1);
    channels[1] = second.defined() ? second.size(1) : 0;
    C = channels[0] + channels[1];
    TORCH_CHECK_VALUE(x.numel() > 0, "x must not be empty, got ", x.sizes());
    check_floating(weight, "weight");
    TORCH_CHECK_VALUE(
        weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) == C && weight.size(2) == 3 && weight.size(3) == 3,
        "weight must have shape (K, ", C, ", 3, 3), got ", weight.sizes());
  }
};

at::Tensor forward(const at::Tensor& x, const std::optional<at::Tensor>& beside, const at::Tensor& weight,
                   const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual, bool upsampled) {
  const Parts parts(x, beside, weight, upsampled);
  const int64_t K = weight.size(0);
  const at::Tensor w = weight.to(at::kFloat).contiguous(), b = float_vector(bias, "bias", K);
  const at::Tensor out = empty_float_map({parts.B, K, parts.H, parts.W});
  const at::Tensor r = residual.has_value() ? float_map(*residual, "residual", out.sizes()) : at::Tensor();
  kernels().conv3x3.forward({parts.B,
                             parts.H,
                             parts.W,
                             upsampled,
                             false,
                             {data_or_null(parts.first), data_or_null(parts.second)},
                             {parts.channels[0], parts.channels[1]},
                             {w.const_data_ptr<float>(), 9 * parts.C, 9, false},
                             data_or_null(b),
                             {data_or_null(r), nullptr},
                             {out.data_ptr<float>(), nullptr},
                             {K, 0}});
  return out.to(x.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& x,
                                                                    const std::optional<at::Tensor>& beside,
                                                                    const at::Tensor& weight, bool upsampled,
                                                                    std::array<bool, 3> wanted) {
  const Parts parts(x, beside, weight, upsampled);
  const int64_t K = weight.size(0);
  const at::Tensor w = weight.to(at::kFloat).contiguous();
  const at::Tensor g = float_map(grad, "grad", {parts.B, K, parts.H, parts.W});
  const auto none = [&](at::ScalarType type) { return at::empty({0}, type); };
  at::Tensor dx = none(x.scalar_type()), dbeside = none(x.scalar_type()), dweight = none(weight.scalar_type());
  at::Tensor dbias = none(at::kFloat);
  if (wanted[0]) {
    const at::Tensor d0 = empty_float_map(parts.first.sizes());
    const at::Tensor d1 = parts.second.defined() ? empty_float_map(parts.second.sizes()) : at::Tensor();
    kernels().conv3x3.forward({parts.B,
                               parts.H,
                               parts.W,
                               false,
                               upsampled,
                               {g.const_data_ptr<float>(), nullptr},
                               {K, 0},
                               {w.const_data_ptr<float>(), 9, 9 * parts.C, true},
                               nullptr,
                               {nullptr, nullptr},
                               {d0.data_ptr<float>(), mutable_data_or_null(d1)},
                               {parts.channels[0], parts.channels[1]}});
    dx = d0.to(x.scalar_type());
    if (d1.defined()) dbeside = d1.to(beside->scalar_type());
  }
  if (wanted[1] || wanted[2]) {
    const at::Tensor dw = wanted[1] ? empty_tensor(weight.sizes()) : at::Tensor();
    const at::Tensor db = wanted[2] ? at::empty({K}, at::kFloat) : at::Tensor();
    kernels().conv3x3.weight_gradient({parts.B,
                                       parts.H,
                                       parts.W,
                                       upsampled,
                                       {data_or_null(parts.first), data_or_null(parts.second)},
                                       {parts.channels[0], parts.channels[1]},
                                       g.const_data_ptr<float>(),
                                       K,
                                       mutable_data_or_null(dw),
                                       mutable_data_or_null(db)});
    if (wanted[1]) dweight = dw.to(weight.scalar_type());
    if (wanted[2]) dbias = db;
  }
  return {dx, dbeside, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) {
  m.impl("native_conv3x3", &forward);
  m.impl("native_conv3x3_backward", &backward);
}

}  // namespace ddpm_fast
