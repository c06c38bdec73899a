
#include <array>
#include <tuple>

#include "cpu/kernels/kernels.h"
#include "cpu/runtime/maps.h"
#include "ops.h"

namespace ddpm_fast::cpu {

namespace {

// The maps in float32, in whichever layout they are.
struct Inputs {
  std::array<Tensor, 3> maps;

  Inputs(const Tensor& x, const OptionalTensor& x2, const OptionalTensor& x3) {
    check_floating(x, "x");
    TORCH_CHECK_VALUE(x.dim() == 4 && x.numel() > 0, "x must have shape (B, C, H, W) and elements, got ", x.sizes());
    maps[0] = as_type(x, at::kFloat);
    const OptionalTensor others[] = {x2, x3};
    const char* names[] = {"x2", "x3"};
    for (int i = 0; i < 2; ++i) {
      if (!others[i].has_value()) continue;
      const Tensor& other = *others[i];
      check_floating(other, names[i]);
      TORCH_CHECK_VALUE(other.dim() == 4 && other.numel() > 0 && other.size(0) == x.size(0) &&
                            other.size(2) == x.size(2) && other.size(3) == x.size(3),
                        names[i], " must have the batch, height and width of x ", x.sizes(), ", got ", other.sizes());
      maps[i + 1] = as_type(other, at::kFloat);
    }
  }

  int64_t channels() const {
    int64_t sum = 0;
    for (const Tensor& map : maps) sum += map.defined() ? map.size(1) : 0;
    return sum;
  }

  StemConvMaps read() const {
    StemConvMaps read{};
    for (size_t i = 0; i < maps.size(); ++i) {
      const Tensor& map = maps[i];
      if (!map.defined()) continue;
      read.map[i] = {
          map.const_data_ptr<float>(), map.size(1), map.stride(0), map.stride(1), map.stride(2), map.stride(3)};
    }
    return read;
  }
};

StemConvSizes sizes_of(const Inputs& inputs, const Tensor& weight) {
  const Tensor& x = inputs.maps[0];
  const int64_t C = inputs.channels();
  check_floating(weight, "weight");
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) == C &&
                        weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1,
                    "weight must have shape (K, ", C, ", side, side) with an odd side, got ", weight.sizes());
  return {.B = x.size(0), .H = x.size(2), .W = x.size(3), .C = C, .K = weight.size(0), .side = weight.size(2)};
}

}  // namespace

Tensor stem_conv(const Tensor& x, const OptionalTensor& x2, const OptionalTensor& x3, const Tensor& weight,
                 const OptionalTensor& bias) {
  const Inputs inputs(x, x2, x3);
  const StemConvSizes sizes = sizes_of(inputs, weight);
  const Tensor taps = float_vector(weight), row = float_vector(bias, "bias", sizes.K);
  const Tensor out = empty_float_map({sizes.B, sizes.K, sizes.H, sizes.W});
  kernels().stem_conv.forward({.in = sizes,
                               .x = inputs.read(),
                               .weight = taps.const_data_ptr<float>(),
                               .bias = data_or_null(row),
                               .out = out.data_ptr<float>()});
  return as_type(out, x.scalar_type());
}

std::tuple<Tensor, Tensor> stem_conv_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& x2,
                                              const OptionalTensor& x3, const Tensor& weight, bool needs_bias) {
  const Inputs inputs(x, x2, x3);
  const StemConvSizes sizes = sizes_of(inputs, weight);
  const Tensor gradient = float_map(grad, "grad", {sizes.B, sizes.K, sizes.H, sizes.W});
  const Tensor dweight = empty_tensor(weight.sizes()), dbias = unpooled_tensor({needs_bias ? sizes.K : 0});
  kernels().stem_conv.weight_gradient({.in = sizes,
                                       .x = inputs.read(),
                                       .grad = gradient.const_data_ptr<float>(),
                                       .dweight = dweight.data_ptr<float>(),
                                       .dbias = needs_bias ? dbias.data_ptr<float>() : nullptr});
  return {as_type(dweight, weight.scalar_type()), dbias};
}

}  // namespace ddpm_fast::cpu
