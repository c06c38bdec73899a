#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "cpu/kernels/kernels.h"
#include "cpu/runtime/maps.h"
#include "dropout.h"

namespace ddpm_fast {

namespace {

using OptionalTensor = std::optional<at::Tensor>;

// The arguments of both directions, and the float32 tensors that they point into.
struct Inputs {
  at::Tensor x, weight;
  Optional bias_affine, bias, scale, shift;
  NormSiluArgs args{};

  Inputs(const at::Tensor& map, const at::Tensor& gain, const OptionalTensor& bias_affine_, const OptionalTensor& bias_,
         const OptionalTensor& scale_, const OptionalTensor& shift_, const OptionalTensor& seed, int64_t groups,
         bool activation, double dropout_p) {
    check_map(map, "x");
    const int64_t B = map.size(0), C = map.size(1), N = map.size(2) * map.size(3);
    check_elements(gain, "weight", C);
    TORCH_CHECK_VALUE(groups >= 0 && (groups == 0 || C % groups == 0), "groups must divide the ", C,
                      " channels of x, got ", groups);
    x = float_map(map);
    weight = float_vector(gain);
    bias_affine = vector(bias_affine_, "bias_affine", {C});
    bias = vector(bias_, "bias", {C});
    scale = vector(scale_, "scale", {B, C});
    shift = vector(shift_, "shift", {B, C});
    args.x = x.const_data_ptr<float>();
    args.weight = weight.const_data_ptr<float>();
    args.bias_affine = bias_affine.data();
    args.bias = bias.data();
    args.scale = scale.data();
    args.shift = shift.data();
    args.B = B;
    args.N = N;
    args.C = C;
    args.groups = groups;
    args.activation = activation;
    set_dropout(args, seed, dropout_p);
  }

  static Optional vector(const OptionalTensor& tensor, const char* name, at::IntArrayRef sizes) {
    if (!tensor.has_value()) return {};
    check_sizes(*tensor, name, sizes);
    return {float_vector(*tensor)};
  }
};

std::tuple<at::Tensor, at::Tensor> norm_silu(const at::Tensor& x, const at::Tensor& weight,
                                             const OptionalTensor& bias_affine, const OptionalTensor& bias,
                                             const OptionalTensor& scale, const OptionalTensor& shift,
                                             const OptionalTensor& residual, const OptionalTensor& seed, int64_t groups,
                                             double eps, bool activation, double dropout_p) {
  const Inputs inputs(x, weight, bias_affine, bias, scale, shift, seed, groups, activation, dropout_p);
  Optional added;
  if (residual.has_value()) {
    check_sizes(*residual, "residual", x.sizes());
    added = {float_map(*residual)};
  }
  const at::Tensor out = empty_tensor_like(x, at::kFloat);
  const at::Tensor statistics =
      groups ? empty_tensor({x.size(0), groups, 2}) : empty_tensor({x.size(0), inputs.args.N});
  NormSiluForwardArgs args{inputs.args};
  args.eps = static_cast<float>(eps);
  args.residual = added.data();
  args.out = out.data_ptr<float>();
  args.statistics = statistics.data_ptr<float>();
  kernels().norm_silu.forward(args);
  return {out.to(x.scalar_type()), statistics};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_silu_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& statistics, const at::Tensor& weight,
    const OptionalTensor& bias_affine, const OptionalTensor& bias, const OptionalTensor& scale,
    const OptionalTensor& shift, const OptionalTensor& seed, int64_t groups, bool activation, double dropout_p) {
  const Inputs inputs(x, weight, bias_affine, bias, scale, shift, seed, groups, activation, dropout_p);
  check_sizes(grad, "grad", x.sizes());
  TORCH_CHECK_TYPE(statistics.scalar_type() == at::kFloat, "statistics must be float32");
  check_elements(statistics, "statistics", x.size(0) * (groups ? 2 * groups : inputs.args.N));
  const at::Tensor gradient = float_map(grad), kept = statistics.contiguous();
  const auto floats = x.options().dtype(at::kFloat);
  const auto like = [&](const at::Tensor& given) {
    if (!given.defined()) return given;
    return x.numel() ? empty_tensor(given.sizes()) : at::zeros(given.sizes(), floats);
  };
  const at::Tensor dx = empty_tensor_like(x, at::kFloat), dweight = like(inputs.weight),
                   dbias_affine = like(inputs.bias_affine.tensor), dbias = like(inputs.bias.tensor),
                   dscale = like(inputs.scale.tensor), dshift = like(inputs.shift.tensor);
  const auto data = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.data_ptr<float>() : nullptr; };
  NormSiluBackwardArgs args{inputs.args};
  args.grad = gradient.const_data_ptr<float>();
  args.statistics = kept.const_data_ptr<float>();
  args.dx = dx.data_ptr<float>();
  args.dweight = data(dweight);
  args.dbias_affine = data(dbias_affine);
  args.dbias = data(dbias);
  args.dscale = data(dscale);
  args.dshift = data(dshift);
  kernels().norm_silu.backward(args);
  // In the dtype of what it is the gradient of; an empty tensor where that was not given.
  const auto result = [&](const at::Tensor& made, const OptionalTensor& given) {
    return given.has_value() ? made.to(given->scalar_type()) : at::empty({0}, x.options());
  };
  return {dx.to(x.scalar_type()), result(dweight, weight), result(dbias_affine, bias_affine),
          result(dbias, bias),    result(dscale, scale),   result(dshift, shift)};
}

}  // namespace

TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) {
  m.impl("native_norm_silu", &norm_silu);
  m.impl("native_norm_silu_backward", &norm_silu_backward);
}

}  // namespace ddpm_fast
