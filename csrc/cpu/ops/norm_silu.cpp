
#include <cmath>
#include <tuple>

#include "cpu/kernels/kernels.h"
#include "cpu/runtime/maps.h"
#include "dropout.h"
#include "ops.h"

namespace ddpm_fast::cpu {

namespace {

// What the kernel reads and writes: half types only where all maps have the same.
MapType map_type(at::ScalarType of_x, at::ScalarType of_other) {
  if (of_x != of_other || of_x == at::kFloat) return MapType::kFloat;
  return of_x == at::kHalf ? MapType::kHalf : MapType::kBfloat16;
}

Tensor as_map(const Tensor& map, MapType type, at::MemoryFormat format) {
  return (type == MapType::kFloat ? as_type(map, at::kFloat) : map).contiguous(format);
}

// The arguments of both directions, and the tensors that they point into.
struct Inputs {
  Tensor x, gain, offset, bias, scale, shift;
  bool planes;  // the pixels of a channel are adjacent
  at::MemoryFormat format;
  NormSiluArgs args;

  Inputs(const Tensor& map, const Tensor& given_gain, const OptionalTensor& given_offset,
         const OptionalTensor& given_bias, const OptionalTensor& given_scale, const OptionalTensor& given_shift,
         const OptionalTensor& seed, int64_t groups, double eps, bool activation, double dropout_p, MapType type) {
    check_dense_map(map, "x");
    const int64_t B = map.size(0), C = map.size(1), N = map.size(2) * map.size(3);
    check_elements(given_gain, "gain", C);
    TORCH_CHECK_VALUE(groups >= 0 && (groups == 0 || C % groups == 0), "groups must divide the ", C,
                      " channels of x, got ", groups);
    planes = !map.is_contiguous(at::MemoryFormat::ChannelsLast);
    format = planes ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
    x = as_map(map, type, format);
    gain = float_vector(given_gain);
    offset = vector(given_offset, "offset", {C});
    bias = vector(given_bias, "bias", {C});
    scale = vector(given_scale, "scale", {B, C});
    shift = vector(given_shift, "shift", {B, C});
    args = {.x = x.const_data_ptr(),
            .gain = gain.const_data_ptr<float>(),
            .offset = data_or_null(offset),
            .bias = data_or_null(bias),
            .scale = data_or_null(scale),
            .shift = data_or_null(shift),
            .B = B,
            .N = N,
            .C = C,
            .groups = groups,
            .eps = static_cast<float>(eps),
            .activation = activation,
            .dropout = check_dropout(seed, dropout_p, C * N),
            .type = type};
  }

  static Tensor vector(const OptionalTensor& tensor, const char* name, at::IntArrayRef sizes) {
    if (!tensor.has_value()) return {};
    check_sizes(*tensor, name, sizes);
    return float_vector(*tensor);
  }
};

}  // namespace

std::tuple<Tensor, Tensor> norm_silu(const Tensor& x, const Tensor& gain, const OptionalTensor& offset,
                                     const OptionalTensor& bias, const OptionalTensor& scale,
                                     const OptionalTensor& shift, const OptionalTensor& residual,
                                     const OptionalTensor& seed, int64_t groups, double eps, bool activation,
                                     double dropout_p) {
  const MapType type = map_type(x.scalar_type(), residual.has_value() ? residual->scalar_type() : x.scalar_type());
  const Inputs inputs(x, gain, offset, bias, scale, shift, seed, groups, eps, activation, dropout_p, type);
  Tensor added;
  if (residual.has_value()) {
    check_sizes(*residual, "residual", x.sizes());
    added = as_map(*residual, type, inputs.format);
  }
  const Tensor out = empty_tensor_like(x, type == MapType::kFloat ? at::kFloat : x.scalar_type());
  const Tensor statistics = groups ? empty_tensor({x.size(0), groups, 2}) : empty_tensor({x.size(0), inputs.args.N});
  const NormSiluKernels& norm = kernels().norm_silu;
  (inputs.planes ? norm.planes_forward : norm.forward)({.in = inputs.args,
                                                        .residual = added.defined() ? added.const_data_ptr() : nullptr,
                                                        .out = out.data_ptr(),
                                                        .statistics = statistics.data_ptr<float>()});
  return {as_type(out, x.scalar_type()), statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_silu_backward(
    const Tensor& grad, const Tensor& x, const Tensor& statistics, const Tensor& gain, const OptionalTensor& offset,
    const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& seed,
    int64_t groups, bool activation, double dropout_p) {
  const MapType type = map_type(x.scalar_type(), grad.scalar_type());
  const Inputs inputs(x, gain, offset, bias, scale, shift, seed, groups, 0, activation, dropout_p, type);
  check_sizes(grad, "grad", x.sizes());
  TORCH_CHECK_TYPE(statistics.scalar_type() == at::kFloat, "statistics must be float32");
  check_elements(statistics, "statistics", x.size(0) * (groups ? 2 * groups : inputs.args.N));
  const Tensor gradient = as_map(grad, type, inputs.format), kept = statistics.contiguous();
  const auto like = [&](const Tensor& given) {
    if (!given.defined()) return given;
    return x.numel() ? empty_tensor(given.sizes()) : unpooled_tensor(given.sizes()).zero_();
  };
  const Tensor z = groups && type != MapType::kFloat && !inputs.planes ? empty_tensor({x.numel()}) : Tensor();
  const Tensor dx = empty_tensor_like(x, type == MapType::kFloat ? at::kFloat : x.scalar_type()),
               dgain = like(inputs.gain), doffset = like(inputs.offset), dbias = like(inputs.bias),
               dscale = like(inputs.scale), dshift = like(inputs.shift);
  const NormSiluKernels& norm = kernels().norm_silu;
  (inputs.planes ? norm.planes_backward : norm.backward)({.in = inputs.args,
                                                          .grad = gradient.const_data_ptr(),
                                                          .statistics = kept.const_data_ptr<float>(),
                                                          .dx = dx.data_ptr(),
                                                          .z = mutable_data_or_null(z),
                                                          .dgain = mutable_data_or_null(dgain),
                                                          .doffset = mutable_data_or_null(doffset),
                                                          .dbias = mutable_data_or_null(dbias),
                                                          .dscale = mutable_data_or_null(dscale),
                                                          .dshift = mutable_data_or_null(dshift)});
  // A gradient in the dtype of its argument; an empty tensor if the argument is absent.
  const auto result = [&](const Tensor& made, const OptionalTensor& given) {
    return given.has_value() ? as_type(made, given->scalar_type()) : no_tensor(x.scalar_type());
  };
  return {as_type(dx, x.scalar_type()), result(dgain, gain),   result(doffset, offset),
          result(dbias, bias),          result(dscale, scale), result(dshift, shift)};
}

}  // namespace ddpm_fast::cpu
