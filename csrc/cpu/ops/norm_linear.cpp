#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "cpu/kernels/kernels.h"
#include "cpu/runtime/maps.h"

namespace ddpm_fast {

namespace {

using OptionalTensor = std::optional<at::Tensor>;

int64_t pixels(const at::Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }

// (M, K, 1, 1) as float32 (M, K).
at::Tensor check_weight(const at::Tensor& weight, int64_t K) {
  check_floating(weight, "weight");
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(1) == K && weight.size(2) == 1 && weight.size(3) == 1,
                    "weight must have shape (M, ", K, ", 1, 1), got ", weight.sizes());
  return float_vector(weight);
}

// A gradient in the dtype of what it is the gradient of; empty where it was not made.
at::Tensor in_dtype_of(const at::Tensor& given, const at::Tensor& made) {
  return made.defined() ? made.to(given.scalar_type()) : at::empty({0}, given.options());
}

// Room for sums over pixels: zeros where there are none to add.
at::Tensor sums_like(const at::Tensor& tensor, int64_t rows) {
  const auto options = tensor.options().dtype(at::kFloat);
  return rows ? empty_tensor(tensor.sizes()) : at::zeros(tensor.sizes(), options);
}

std::tuple<at::Tensor, at::Tensor> norm_linear(const at::Tensor& x, const at::Tensor& g, const at::Tensor& weight) {
  check_map(x, "x");
  const int64_t C = x.size(1), M = weight.size(0);
  check_elements(g, "g", C);
  const at::Tensor matrix = check_weight(weight, C), map = float_map(x), gain = float_vector(g);
  const at::Tensor out = empty_float_map({x.size(0), M, x.size(2), x.size(3)});
  const at::Tensor norms = empty_tensor({x.size(0), x.size(2) * x.size(3)});
  kernels().norm_linear.forward({map.const_data_ptr<float>(), gain.const_data_ptr<float>(),
                                 matrix.const_data_ptr<float>(), pixels(x), C, M, out.data_ptr<float>(),
                                 norms.data_ptr<float>()});
  return {out.to(x.scalar_type()), norms};
}

// dx and dg are made together; what is not wanted is empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_linear_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                    const at::Tensor& norms, const at::Tensor& g,
                                                                    const at::Tensor& weight, bool want_x_or_g,
                                                                    bool want_weight) {
  check_map(x, "x");
  const int64_t C = x.size(1), M = weight.size(0), rows = pixels(x);
  check_elements(g, "g", C);
  check_sizes(grad, "grad", {x.size(0), M, x.size(2), x.size(3)});
  TORCH_CHECK_TYPE(norms.scalar_type() == at::kFloat, "norms must be float32");
  check_elements(norms, "norms", rows);
  const at::Tensor matrix = check_weight(weight, C), map = float_map(x), gain = float_vector(g),
                   gradient = float_map(grad), lengths = norms.contiguous();
  at::Tensor dx, dg, dweight;
  const at::Tensor factors = want_weight ? empty_tensor({rows}) : at::Tensor();
  NormLinearDataGradient args{gradient.const_data_ptr<float>(),
                              map.const_data_ptr<float>(),
                              lengths.const_data_ptr<float>(),
                              gain.const_data_ptr<float>(),
                              matrix.const_data_ptr<float>(),
                              rows,
                              C,
                              M,
                              nullptr,
                              nullptr,
                              want_weight ? factors.data_ptr<float>() : nullptr};
  if (want_x_or_g) {
    dx = empty_tensor_like(map);
    dg = sums_like(g, rows);
    args.dx = dx.data_ptr<float>();
    args.dgain = dg.data_ptr<float>();
  }
  kernels().norm_linear.data_gradient(args);
  if (want_weight) {
    dweight = sums_like(weight, rows);
    LinearWeightGradient weights{};
    weights.grad = args.grad;
    weights.a[0] = args.x;
    weights.k[0] = C;
    weights.rows = rows;
    weights.N = M;
    weights.dweight = dweight.data_ptr<float>();
    weights.row_scale = args.factors;
    weights.gain = args.gain;
    if (rows) kernels().linear.weight_gradient(weights);
  }
  return {in_dtype_of(x, dx), in_dtype_of(g, dg), in_dtype_of(weight, dweight)};
}

// One map or two maps side by side, of one dtype.
struct Parts {
  at::Tensor maps[2];
  int64_t k[2] = {0, 0};
  int64_t rows;

  Parts(const at::Tensor& first, const OptionalTensor& second) {
    check_map(first, "the first map");
    maps[0] = float_map(first);
    k[0] = first.size(1);
    rows = pixels(first);
    if (!second.has_value()) return;
    check_map(*second, "the second map");
    TORCH_CHECK_VALUE(
        second->size(0) == first.size(0) && second->size(2) == first.size(2) && second->size(3) == first.size(3),
        "the maps must agree in all but their channels, got ", first.sizes(), " and ", second->sizes());
    TORCH_CHECK_TYPE(second->scalar_type() == first.scalar_type(), "the maps must be of one dtype, got ",
                     first.scalar_type(), " and ", second->scalar_type());
    maps[1] = float_map(*second);
    k[1] = second->size(1);
  }

  const float* data(int part) const { return maps[part].defined() ? maps[part].const_data_ptr<float>() : nullptr; }
};

at::Tensor linear(const at::Tensor& first, const OptionalTensor& second, const at::Tensor& weight,
                  const OptionalTensor& bias, const OptionalTensor& residual) {
  const Parts parts(first, second);
  const at::Tensor matrix = check_weight(weight, parts.k[0] + parts.k[1]);
  const int64_t M = matrix.size(0);
  Optional row, added;
  if (bias.has_value()) {
    check_sizes(*bias, "bias", {M});
    row = {float_vector(*bias)};
  }
  if (residual.has_value()) {
    check_sizes(*residual, "residual", {first.size(0), M, first.size(2), first.size(3)});
    added = {float_map(*residual)};
  }
  const at::Tensor out = empty_float_map({first.size(0), M, first.size(2), first.size(3)});
  LinearForward args{};
  for (int i = 0; i < 2; ++i) {
    args.a[i] = parts.data(i);
    args.k[i] = parts.k[i];
  }
  args.rows = parts.rows;
  args.N = M;
  args.weight = matrix.const_data_ptr<float>();
  args.bias = row.data();
  args.residual = added.data();
  args.out = out.data_ptr<float>();
  kernels().linear.forward(args);
  return out.to(first.scalar_type());
}

// Of the first map, the second, the weight and the bias those that are wanted; the others are empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_backward(
    const at::Tensor& grad, const at::Tensor& first, const OptionalTensor& second, const at::Tensor& weight,
    const OptionalTensor& bias, bool want_first, bool want_second, bool want_weight, bool want_bias) {
  const Parts parts(first, second);
  const at::Tensor matrix = check_weight(weight, parts.k[0] + parts.k[1]);
  const int64_t M = matrix.size(0);
  check_sizes(grad, "grad", {first.size(0), M, first.size(2), first.size(3)});
  if (bias.has_value()) check_sizes(*bias, "bias", {M});
  want_second = want_second && second.has_value();
  want_bias = want_bias && bias.has_value();
  const at::Tensor gradient = float_map(grad);

  LinearDataGradient data{};
  LinearWeightGradient weights{};
  data.grad = weights.grad = gradient.const_data_ptr<float>();
  data.weight = matrix.const_data_ptr<float>();
  data.rows = weights.rows = parts.rows;
  data.N = weights.N = M;
  at::Tensor maps[2];
  for (int i = 0; i < 2; ++i) {
    data.k[i] = weights.k[i] = parts.k[i];
    weights.a[i] = parts.data(i);
    if (!(i ? want_second : want_first)) continue;
    maps[i] = empty_tensor_like(parts.maps[i]);
    data.dx[i] = maps[i].data_ptr<float>();
  }
  kernels().linear.data_gradient(data);
  at::Tensor dweight, dbias;
  if (want_weight) {
    dweight = sums_like(weight, parts.rows);
    weights.dweight = dweight.data_ptr<float>();
  }
  if (want_bias) {
    dbias = sums_like(*bias, parts.rows);
    weights.dbias = dbias.data_ptr<float>();
  }
  if (parts.rows) kernels().linear.weight_gradient(weights);
  return {in_dtype_of(first, maps[0]), in_dtype_of(second.value_or(first), maps[1]), in_dtype_of(weight, dweight),
          in_dtype_of(bias.value_or(weight), dbias)};
}

// (B, K) times each of (N_i, K), plus its bias, side by side; all float32.
at::Tensor linears(const at::Tensor& x, at::TensorList weights, at::TensorList biases) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x must have shape (B, K), got ", x.sizes());
  TORCH_CHECK_VALUE(weights.size() == biases.size(), "there must be as many biases as weights, got ", biases.size(),
                    " and ", weights.size());
  const int64_t K = x.size(1), count = static_cast<int64_t>(weights.size());
  std::vector<at::Tensor> kept;  // copies of what does not lie as the kernel reads it
  kept.reserve(2 * weights.size() + 1);
  const auto read = [&](const at::Tensor& tensor, const char* name) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, name, " must be float32, got ", tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " must be on the CPU, got ", tensor.device());
    if (tensor.is_contiguous()) return tensor.const_data_ptr<float>();
    kept.push_back(tensor.contiguous());
    return kept.back().const_data_ptr<float>();
  };
  std::vector<const float*> matrices, vectors;
  std::vector<int64_t> widths;
  int64_t N = 0;
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(weights[i].dim() == 2 && weights[i].size(1) == K, "weights must have shape (N, ", K, "), got ",
                      weights[i].sizes());
    widths.push_back(weights[i].size(0));
    TORCH_CHECK_VALUE(biases[i].dim() == 1 && biases[i].size(0) == widths[i], "a bias must have shape (", widths[i],
                      "), got ", biases[i].sizes());
    matrices.push_back(read(weights[i], "weights"));
    vectors.push_back(read(biases[i], "biases"));
    N += widths[i];
  }
  const at::Tensor out = at::empty({x.size(0), N}, x.options());
  kernels().linear.forward_many(
      {read(x, "x"), x.size(0), K, count, matrices.data(), vectors.data(), widths.data(), out.data_ptr<float>(), N});
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) {
  m.impl("native_norm_linear", &norm_linear);
  m.impl("native_norm_linear_backward", &norm_linear_backward);
  m.impl("native_linear", &linear);
  m.impl("native_linear_backward", &linear_backward);
  m.impl("native_linears", &linears);
}

}  // namespace ddpm_fast
