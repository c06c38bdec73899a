
#include <tuple>
#include <vector>

#include "cpu/kernels/kernels.h"
#include "cpu/runtime/maps.h"
#include "cpu/runtime/narrow.h"
#include "ops.h"

namespace ddpm_fast::cpu {

namespace {

int64_t pixels(const Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }

// (K, C, 1, 1) as float32 (K, C).
Tensor check_weight(const Tensor& weight, int64_t C) {
  check_floating(weight, "weight");
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(1) == C && weight.size(2) == 1 && weight.size(3) == 1,
                    "weight must have shape (K, ", C, ", 1, 1), got ", weight.sizes());
  return float_vector(weight);
}

// A gradient in the dtype of its argument; an empty tensor if it was not computed.
Tensor in_dtype_of(const Tensor& given, const Tensor& made) {
  return made.defined() ? as_type(made, given.scalar_type()) : no_tensor(given.scalar_type());
}

// Room for sums over pixels: zeros where there are none to add.
Tensor sums_like(const Tensor& tensor, int64_t rows) {
  return rows ? empty_tensor(tensor.sizes()) : unpooled_tensor(tensor.sizes()).zero_();
}

// Bfloat16 maps whose rows are whole pairs are read and written as they are.
bool is_by_pairs(const Tensor& x, int64_t K) {
  return multiplies_narrowly(x) && x.size(1) % 2 == 0 && K > 0 && K % 2 == 0;
}

uint16_t* bits(const Tensor& map) { return map.defined() ? reinterpret_cast<uint16_t*>(map.data_ptr()) : nullptr; }

}  // namespace

std::tuple<Tensor, Tensor> norm_linear(const Tensor& x, const Tensor& gain, const Tensor& weight) {
  check_map(x, "x");
  const int64_t C = x.size(1), K = weight.size(0);
  check_elements(gain, "gain", C);
  const Tensor matrix = check_weight(weight, C), row = float_vector(gain);
  const Tensor norms = empty_tensor({x.size(0), x.size(2) * x.size(3)});
  const at::DimVector sizes = {x.size(0), K, x.size(2), x.size(3)};
  const auto run = [&](auto kernel, const auto* data, auto* out) {
    kernel({.x = data,
            .gain = row.const_data_ptr<float>(),
            .weight = matrix.const_data_ptr<float>(),
            .rows = pixels(x),
            .C = C,
            .K = K,
            .out = out,
            .norms = norms.data_ptr<float>()});
  };
  if (is_by_pairs(x, K)) {
    const Tensor out = empty_tensor(sizes, at::kBFloat16, at::MemoryFormat::ChannelsLast);
    run(kernels().norm_linear.forward_by_pairs, bits(x), bits(out));
    return {out, norms};
  }
  const Tensor map = float_map(x), out = empty_float_map(sizes);
  run(kernels().norm_linear.forward, map.const_data_ptr<float>(), out.data_ptr<float>());
  return {as_type(out, x.scalar_type()), norms};
}

// The gradients of x and gain are made together. A gradient that is not needed is empty.
std::tuple<Tensor, Tensor, Tensor> norm_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& norms,
                                                        const Tensor& gain, const Tensor& weight, bool needs_x_or_gain,
                                                        bool needs_weight) {
  check_map(x, "x");
  const int64_t C = x.size(1), K = weight.size(0), rows = pixels(x);
  check_elements(gain, "gain", C);
  check_sizes(grad, "grad", {x.size(0), K, x.size(2), x.size(3)});
  TORCH_CHECK_TYPE(norms.scalar_type() == at::kFloat, "norms must be float32");
  check_elements(norms, "norms", rows);
  const Tensor matrix = check_weight(weight, C), row = float_vector(gain), lengths = norms.contiguous();
  const bool by_pairs = is_by_pairs(x, K) && grad.scalar_type() == at::kBFloat16;
  const Tensor map = by_pairs ? x : float_map(x);
  const Tensor gradient = by_pairs ? grad.contiguous(at::MemoryFormat::ChannelsLast) : float_map(grad);
  Tensor dx, dgain, dweight;
  if (needs_x_or_gain) {
    dx = empty_tensor_like(map);
    dgain = sums_like(gain, rows);
  }
  if (needs_weight) dweight = sums_like(weight, rows);
  const auto run = [&](auto kernel, const auto* of_out, const auto* data, auto* of_x) {
    kernel({.grad = of_out,
            .x = data,
            .norms = lengths.const_data_ptr<float>(),
            .gain = row.const_data_ptr<float>(),
            .weight = matrix.const_data_ptr<float>(),
            .rows = rows,
            .C = C,
            .K = K,
            .dx = of_x,
            .dgain = mutable_data_or_null(dgain),
            .dweight = mutable_data_or_null(dweight)});
  };
  if (by_pairs) {
    run(kernels().norm_linear.backward_by_pairs, bits(gradient), bits(map), bits(dx));
  } else {
    run(kernels().norm_linear.backward, gradient.const_data_ptr<float>(), map.const_data_ptr<float>(),
        mutable_data_or_null(dx));
  }
  return {in_dtype_of(x, dx), in_dtype_of(gain, dgain), in_dtype_of(weight, dweight)};
}

namespace {

// One map or two maps side by side, of one dtype.
struct Parts {
  Tensor maps[2];
  int64_t channels[2] = {0, 0};
  int64_t rows;

  Parts(const Tensor& x, const OptionalTensor& skip) {
    check_map(x, "the first map");
    maps[0] = float_map(x);
    channels[0] = x.size(1);
    rows = pixels(x);
    if (!skip.has_value()) return;
    check_map(*skip, "the second map");
    TORCH_CHECK_VALUE(skip->size(0) == x.size(0) && skip->size(2) == x.size(2) && skip->size(3) == x.size(3),
                      "the maps must agree in all but their channels, got ", x.sizes(), " and ", skip->sizes());
    TORCH_CHECK_TYPE(skip->scalar_type() == x.scalar_type(), "the maps must be of one dtype, got ", x.scalar_type(),
                     " and ", skip->scalar_type());
    maps[1] = float_map(*skip);
    channels[1] = skip->size(1);
  }

  int64_t C() const { return channels[0] + channels[1]; }
};

}  // namespace

Tensor linear(const Tensor& x, const OptionalTensor& skip, const Tensor& weight, const OptionalTensor& bias,
              const OptionalTensor& residual) {
  const Parts parts(x, skip);
  const Tensor matrix = check_weight(weight, parts.C());
  const int64_t K = matrix.size(0);
  Tensor row, added;
  if (bias.has_value()) {
    check_sizes(*bias, "bias", {K});
    row = float_vector(*bias);
  }
  if (residual.has_value()) {
    check_sizes(*residual, "residual", {x.size(0), K, x.size(2), x.size(3)});
    added = float_map(*residual);
  }
  const Tensor out = empty_float_map({x.size(0), K, x.size(2), x.size(3)});
  kernels().linear.forward({.input = {data_or_null(parts.maps[0]), data_or_null(parts.maps[1])},
                            .channels = {parts.channels[0], parts.channels[1]},
                            .rows = parts.rows,
                            .K = K,
                            .weight = matrix.const_data_ptr<float>(),
                            .bias = data_or_null(row),
                            .residual = data_or_null(added),
                            .out = out.data_ptr<float>(),
                            .narrow = multiplies_narrowly(x)});
  return as_type(out, x.scalar_type());
}

// The gradients of x, skip, weight and bias. A gradient that is not needed is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& x,
                                                           const OptionalTensor& skip, const Tensor& weight,
                                                           const OptionalTensor& bias, bool needs_x, bool needs_skip,
                                                           bool needs_weight, bool needs_bias) {
  const Parts parts(x, skip);
  const Tensor matrix = check_weight(weight, parts.C());
  const int64_t K = matrix.size(0);
  check_sizes(grad, "grad", {x.size(0), K, x.size(2), x.size(3)});
  if (bias.has_value()) check_sizes(*bias, "bias", {K});
  const Tensor gradient = float_map(grad);
  Tensor dx, dskip, dweight, dbias;
  if (needs_x) dx = empty_tensor_like(parts.maps[0]);
  if (needs_skip && skip.has_value()) dskip = empty_tensor_like(parts.maps[1]);
  kernels().linear.data_gradient({.grad = gradient.const_data_ptr<float>(),
                                  .weight = matrix.const_data_ptr<float>(),
                                  .rows = parts.rows,
                                  .K = K,
                                  .dinput = {mutable_data_or_null(dx), mutable_data_or_null(dskip)},
                                  .channels = {parts.channels[0], parts.channels[1]},
                                  .narrow = multiplies_narrowly(x)});
  if (needs_weight) dweight = sums_like(weight, parts.rows);
  if (needs_bias && bias.has_value()) dbias = sums_like(*bias, parts.rows);
  const LinearWeightGradient weights{.grad = gradient.const_data_ptr<float>(),
                                     .input = {data_or_null(parts.maps[0]), data_or_null(parts.maps[1])},
                                     .channels = {parts.channels[0], parts.channels[1]},
                                     .rows = parts.rows,
                                     .K = K,
                                     .dweight = mutable_data_or_null(dweight),
                                     .dbias = mutable_data_or_null(dbias)};
  if (parts.rows) kernels().linear.weight_gradient(weights);
  return {in_dtype_of(x, dx), in_dtype_of(skip.value_or(x), dskip), in_dtype_of(weight, dweight),
          in_dtype_of(bias.value_or(weight), dbias)};
}

// x (B, C) times each weight (K_i, C), plus its bias, side by side; all float32.
Tensor linears(const Tensor& x, at::TensorList weights, at::TensorList biases) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x must have shape (B, K), got ", x.sizes());
  TORCH_CHECK_VALUE(weights.size() == biases.size(), "there must be as many biases as weights, got ", biases.size(),
                    " and ", weights.size());
  const int64_t C = x.size(1), count = static_cast<int64_t>(weights.size());
  std::vector<Tensor> kept;  // copies of tensors in another layout than the kernel's
  kept.reserve(2 * weights.size() + 1);
  const auto read = [&](const Tensor& tensor, const char* name) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, name, " must be float32, got ", tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " must be on the CPU, got ", tensor.device());
    if (tensor.is_contiguous()) return tensor.const_data_ptr<float>();
    kept.push_back(tensor.contiguous());
    return kept.back().const_data_ptr<float>();
  };
  std::vector<const float*> matrices, vectors;
  std::vector<int64_t> widths;
  int64_t K = 0;
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(weights[i].dim() == 2 && weights[i].size(1) == C, "weights must have shape (N, ", C, "), got ",
                      weights[i].sizes());
    widths.push_back(weights[i].size(0));
    TORCH_CHECK_VALUE(biases[i].dim() == 1 && biases[i].size(0) == widths[i], "a bias must have shape (", widths[i],
                      "), got ", biases[i].sizes());
    matrices.push_back(read(weights[i], "weights"));
    vectors.push_back(read(biases[i], "biases"));
    K += widths[i];
  }
  const Tensor out = unpooled_tensor({x.size(0), K});
  kernels().linear.forward_many({.x = read(x, "x"),
                                 .rows = x.size(0),
                                 .C = C,
                                 .count = count,
                                 .weights = matrices.data(),
                                 .biases = vectors.data(),
                                 .widths = widths.data(),
                                 .out = out.data_ptr<float>(),
                                 .K = K});
  return out;
}

}  // namespace ddpm_fast::cpu
