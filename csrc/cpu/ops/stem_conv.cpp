
#include <tuple>

#include "cpu/kernels/kernels.h"
#include "cpu/runtime/maps.h"
#include "ops.h"

namespace ddpm_fast::cpu {

namespace {

StemConvSizes sizes_of(const Tensor& x, const Tensor& weight) {
  check_floating(x, "x");
  check_floating(weight, "weight");
  TORCH_CHECK_VALUE(x.dim() == 4 && x.numel() > 0, "x must have shape (B, C, H, W) and elements, got ", x.sizes());
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) == x.size(1) &&
                        weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1,
                    "weight must have shape (K, ", x.size(1), ", side, side) with an odd side, got ", weight.sizes());
  return {.B = x.size(0), .H = x.size(2), .W = x.size(3), .C = x.size(1), .K = weight.size(0), .side = weight.size(2)};
}

}  // namespace

Tensor stem_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const StemConvSizes sizes = sizes_of(x, weight);
  const Tensor map = float_map(x), taps = float_vector(weight), row = float_vector(bias, "bias", sizes.K);
  const Tensor out = empty_float_map({sizes.B, sizes.K, sizes.H, sizes.W});
  kernels().stem_conv.forward({.in = sizes,
                               .x = map.const_data_ptr<float>(),
                               .weight = taps.const_data_ptr<float>(),
                               .bias = data_or_null(row),
                               .out = out.data_ptr<float>()});
  return out.to(x.scalar_type());
}

std::tuple<Tensor, Tensor> stem_conv_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                              bool needs_bias) {
  const StemConvSizes sizes = sizes_of(x, weight);
  const Tensor map = float_map(x), gradient = float_map(grad, "grad", {sizes.B, sizes.K, sizes.H, sizes.W});
  const Tensor dweight = empty_tensor(weight.sizes()), dbias = unpooled_tensor({needs_bias ? sizes.K : 0});
  kernels().stem_conv.weight_gradient({.in = sizes,
                                       .x = map.const_data_ptr<float>(),
                                       .grad = gradient.const_data_ptr<float>(),
                                       .dweight = dweight.data_ptr<float>(),
                                       .dbias = needs_bias ? dbias.data_ptr<float>() : nullptr});
  return {dweight.to(weight.scalar_type()), dbias};
}

}  // namespace ddpm_fast::cpu
