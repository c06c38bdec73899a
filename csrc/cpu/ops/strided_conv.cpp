
#include "conv3x3_weight.h"
#include "cpu/kernels/kernels.h"
#include "cpu/runtime/maps.h"
#include "ops.h"

namespace ddpm_fast::cpu {

namespace {

// Sizes of a convolution, checked.
struct Geometry {
  int64_t B, C, H, W, K, padding, out_H, out_W;

  Geometry(const Tensor& x, const Tensor& weight, int64_t padding_of)
      : B(x.size(0)),
        C(x.size(1)),
        H(x.size(2)),
        W(x.size(3)),
        K(weight.dim() > 0 ? weight.size(0) : 0),
        padding(padding_of),
        out_H((H + 2 * padding - 3) / 2 + 1),
        out_W((W + 2 * padding - 3) / 2 + 1) {
    TORCH_CHECK_VALUE(K > 0, "weight must have shape (K, ", C, ", 3, 3), got ", weight.sizes());
    check_sizes(weight, "weight", {K, C, 3, 3});
    TORCH_CHECK_VALUE(padding == 0 || padding == 1, "padding must be 0 or 1, got ", padding);
    TORCH_CHECK_VALUE(H + 2 * padding >= 3 && W + 2 * padding >= 3,
                      "x and its padding must be at least 3 pixels high and wide, got ", x.sizes());
  }
};

}  // namespace

Tensor strided_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t padding) {
  const Tensor map = float_map(x, "x");
  const Geometry g(x, weight, padding);
  const Tensor w = as_type(weight, at::kFloat).contiguous(), b = float_vector(bias, "bias", g.K);
  const Tensor out = empty_float_map({g.B, g.K, g.out_H, g.out_W});
  kernels().strided_conv.forward({.B = g.B,
                                  .H = g.H,
                                  .W = g.W,
                                  .padding = padding,
                                  .out_H = g.out_H,
                                  .out_W = g.out_W,
                                  .input = map.const_data_ptr<float>(),
                                  .C = g.C,
                                  .weight = forward_weight(w),
                                  .bias = data_or_null(b),
                                  .output = out.data_ptr<float>(),
                                  .K = g.K});
  return as_type(out, x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> strided_conv_gradients(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                          int64_t padding, std::array<bool, 3> needs) {
  const Tensor map = float_map(x, "x");
  const Geometry g(x, weight, padding);
  const Tensor w = as_type(weight, at::kFloat).contiguous();
  const Tensor of_output = float_map(grad, "grad", {g.B, g.K, g.out_H, g.out_W});
  const Tensor dx = needs[0] ? empty_float_map(x.sizes()) : no_tensor(at::kFloat);
  const Tensor dweight = needs[1] ? empty_tensor(weight.sizes()) : no_tensor(at::kFloat);
  const Tensor dbias = needs[2] ? unpooled_tensor({g.K}) : no_tensor(at::kFloat);
  kernels().strided_conv.gradient({.B = g.B,
                                   .H = g.H,
                                   .W = g.W,
                                   .padding = padding,
                                   .out_H = g.out_H,
                                   .out_W = g.out_W,
                                   .grad = of_output.const_data_ptr<float>(),
                                   .K = g.K,
                                   .input = map.const_data_ptr<float>(),
                                   .weight = w.const_data_ptr<float>(),
                                   .C = g.C,
                                   .dinput = needs[0] ? dx.data_ptr<float>() : nullptr,
                                   .dweight = needs[1] ? dweight.data_ptr<float>() : nullptr,
                                   .dbias = needs[2] ? dbias.data_ptr<float>() : nullptr});
  return {as_type(dx, x.scalar_type()), as_type(dweight, weight.scalar_type()), dbias};
}

}  // namespace ddpm_fast::cpu
