
#include <array>
#include <tuple>

#include "conv3x3_weight.h"
#include "cpu/kernels/kernels.h"
#include "cpu/runtime/maps.h"
#include "ops.h"

namespace ddpm_fast::cpu {

namespace {

// The input of a convolution: one map or two side by side, as float32 channels-last.
struct Parts {
  Tensor first, second;
  int64_t channels[2], C, B, H, W;  // H and W of the convolution
  bool upsampled;

  Parts(const Tensor& x, const OptionalTensor& skip, const Tensor& weight, bool up) : upsampled(up) {
    TORCH_CHECK_VALUE(x.dim() == 4, "x must have shape (B, C, H, W), got ", x.sizes());
    first = float_map(x);
    B = x.size(0);
    H = x.size(2) * (up ? 2 : 1);
    W = x.size(3) * (up ? 2 : 1);
    if (skip.has_value())
      second = float_map(*skip, "skip", {B, skip->dim() == 4 ? skip->size(1) : 0, x.size(2), x.size(3)});
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

}  // namespace

Tensor conv3x3(const Tensor& x, const OptionalTensor& skip, const Tensor& weight, const OptionalTensor& bias,
               const OptionalTensor& residual, bool upsampled) {
  const Parts parts(x, skip, weight, upsampled);
  const int64_t K = weight.size(0);
  const Tensor w = as_type(weight, at::kFloat).contiguous(), b = float_vector(bias, "bias", K);
  const Tensor out = empty_float_map({parts.B, K, parts.H, parts.W});
  const Tensor r = residual.has_value() ? float_map(*residual, "residual", out.sizes()) : Tensor();
  kernels().conv3x3.forward({.B = parts.B,
                             .H = parts.H,
                             .W = parts.W,
                             .upsampled = upsampled,
                             .input = {data_or_null(parts.first), data_or_null(parts.second)},
                             .channels = {parts.channels[0], parts.channels[1]},
                             .weight = forward_weight(w),
                             .bias = data_or_null(b),
                             .residual = {data_or_null(r)},
                             .output = {out.data_ptr<float>()},
                             .output_channels = {K}});
  return as_type(out, x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv3x3_backward(const Tensor& grad, const Tensor& x,
                                                            const OptionalTensor& skip, const Tensor& weight,
                                                            bool upsampled, std::array<bool, 3> needs) {
  const Parts parts(x, skip, weight, upsampled);
  const int64_t K = weight.size(0);
  const Tensor w = as_type(weight, at::kFloat).contiguous();
  const Tensor g = float_map(grad, "grad", {parts.B, K, parts.H, parts.W});
  Tensor dx = no_tensor(x.scalar_type()), dskip = no_tensor(x.scalar_type()), dweight = no_tensor(weight.scalar_type());
  Tensor dbias = no_tensor(at::kFloat);
  if (needs[0]) {
    const Tensor d0 = empty_float_map(parts.first.sizes());
    const Tensor d1 = parts.second.defined() ? empty_float_map(parts.second.sizes()) : Tensor();
    kernels().conv3x3.forward({.B = parts.B,
                               .H = parts.H,
                               .W = parts.W,
                               .pooled = upsampled,
                               .input = {g.const_data_ptr<float>()},
                               .channels = {K},
                               .weight = data_gradient_weight(w),
                               .output = {d0.data_ptr<float>(), mutable_data_or_null(d1)},
                               .output_channels = {parts.channels[0], parts.channels[1]}});
    dx = as_type(d0, x.scalar_type());
    if (d1.defined()) dskip = as_type(d1, skip->scalar_type());
  }
  if (needs[1] || needs[2]) {
    const Tensor dw = needs[1] ? empty_tensor(weight.sizes()) : Tensor();
    const Tensor db = needs[2] ? unpooled_tensor({K}) : Tensor();
    kernels().conv3x3.weight_gradient({.B = parts.B,
                                       .H = parts.H,
                                       .W = parts.W,
                                       .upsampled = upsampled,
                                       .input = {data_or_null(parts.first), data_or_null(parts.second)},
                                       .channels = {parts.channels[0], parts.channels[1]},
                                       .grad = g.const_data_ptr<float>(),
                                       .K = K,
                                       .dweight = mutable_data_or_null(dw),
                                       .dbias = mutable_data_or_null(db)});
    if (needs[1]) dweight = as_type(dw, weight.scalar_type());
    if (needs[2]) dbias = db;
  }
  return {dx, dskip, dweight, dbias};
}

}  // namespace ddpm_fast::cpu
