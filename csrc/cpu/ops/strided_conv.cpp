
#include "conv3x3_weight.h"
#include "cpu/kernels/kernels.h"
#include "cpu/runtime/maps.h"
#include "ops.h"

namespace ddpm_fast::cpu {

Tensor strided_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t padding) {
  const Tensor map = float_map(x, "x");
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), K = weight.dim() > 0 ? weight.size(0) : 0;
  TORCH_CHECK_VALUE(K > 0, "weight must have shape (K, ", C, ", 3, 3), got ", weight.sizes());
  check_sizes(weight, "weight", {K, C, 3, 3});
  TORCH_CHECK_VALUE(padding == 0 || padding == 1, "padding must be 0 or 1, got ", padding);
  TORCH_CHECK_VALUE(H + 2 * padding >= 3 && W + 2 * padding >= 3,
                    "x and its padding must be at least 3 pixels high and", " wide, got ", x.sizes());
  const Tensor w = as_type(weight, at::kFloat).contiguous(), b = float_vector(bias, "bias", K);
  const int64_t out_H = (H + 2 * padding - 3) / 2 + 1, out_W = (W + 2 * padding - 3) / 2 + 1;
  const Tensor out = empty_float_map({B, K, out_H, out_W});
  kernels().strided_conv.forward({.B = B,
                                  .H = H,
                                  .W = W,
                                  .padding = padding,
                                  .out_H = out_H,
                                  .out_W = out_W,
                                  .input = map.const_data_ptr<float>(),
                                  .C = C,
                                  .weight = forward_weight(w),
                                  .bias = data_or_null(b),
                                  .output = out.data_ptr<float>(),
                                  .K = K});
  return as_type(out, x.scalar_type());
}

}  // namespace ddpm_fast::cpu
