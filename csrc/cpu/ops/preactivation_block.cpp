// A pre-activation residual block as one operator: GroupNorm with SiLU, 3×3 convolution, twice, around a residual.
// Backward computes the convolutions' inputs again.

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "conv3x3_weight.h"
#include "cpu/kernels/kernels.h"
#include "cpu/runtime/maps.h"
#include "cpu/runtime/narrow.h"
#include "dropout.h"
#include "ops.h"

namespace ddpm_fast::cpu {

namespace {

// The checked float32 arguments of both directions.
struct PreactivationBlock {
  Tensor x_map, skip_map, weight1, weight2, res_weight, gain1, offset1, gain2, offset2, scale, shift;
  int64_t B, H, W, C, K, channels[2], groups1, groups2;
  Dropout dropout;

  PreactivationBlock(const Tensor& x, const OptionalTensor& skip, const Tensor& weight1_in, const Tensor& gain1_in,
                     const Tensor& offset1_in, const OptionalTensor& scale_in, const OptionalTensor& shift_in,
                     const Tensor& weight2_in, const Tensor& gain2_in, const Tensor& offset2_in,
                     const OptionalTensor& res_weight_in, const OptionalTensor& seed, int64_t of_first,
                     int64_t of_second, double dropout_p)
      : groups1(of_first), groups2(of_second) {
    TORCH_CHECK_VALUE(x.dim() == 4 && x.numel() > 0, "x must have shape (B, C, H, W) and not be empty, got ",
                      x.sizes());
    check_floating(x, "x");
    B = x.size(0);
    H = x.size(2);
    W = x.size(3);
    x_map = float_map(x);
    if (skip.has_value()) skip_map = float_map(*skip, "skip", {B, skip->dim() == 4 ? skip->size(1) : 0, H, W});
    channels[0] = x_map.size(1);
    channels[1] = skip_map.defined() ? skip_map.size(1) : 0;
    C = channels[0] + channels[1];
    TORCH_CHECK_VALUE(weight1_in.dim() == 4 && weight1_in.size(0) > 0, "weight1 must have shape (K, C, 3, 3), got ",
                      weight1_in.sizes());
    K = weight1_in.size(0);
    weight1 = as_weight(weight1_in, "weight1", C, 3);
    weight2 = as_weight(weight2_in, "weight2", K, 3);
    if (res_weight_in.has_value()) {
      res_weight = as_weight(*res_weight_in, "res_weight", C, 1);
    } else {
      TORCH_CHECK_VALUE(C == K && channels[1] == 0,
                        "res_weight must be given where the block has a skip or changes the number of channels");
    }
    TORCH_CHECK_VALUE(groups1 > 0 && C % groups1 == 0, "groups1 must divide ", C, " channels, got ", groups1);
    TORCH_CHECK_VALUE(groups2 > 0 && K % groups2 == 0, "groups2 must divide ", K, " channels, got ", groups2);
    gain1 = float_vector(gain1_in, "gain1", C);
    offset1 = float_vector(offset1_in, "offset1", C);
    gain2 = float_vector(gain2_in, "gain2", K);
    offset2 = float_vector(offset2_in, "offset2", K);
    scale = float_vector(scale_in, "scale", B * K);
    shift = float_vector(shift_in, "shift", B * K);
    dropout = check_dropout(seed, dropout_p, K * H * W);
  }

  int64_t pixels() const { return B * H * W; }

  JoinedNormArgs norm1() const {
    return {.x = {data_or_null(x_map), data_or_null(skip_map)},
            .channels = {channels[0], channels[1]},
            .gain = data_or_null(gain1),
            .offset = data_or_null(offset1),
            .B = B,
            .N = H * W,
            .groups = groups1,
            .dropout = {.keep_threshold = 0, .keep_scale = 1, .seed = 0}};
  }

  JoinedNormArgs norm2(const Tensor& y) const {
    return {.x = {data_or_null(y)},
            .channels = {K},
            .gain = data_or_null(gain2),
            .offset = data_or_null(offset2),
            .scale = data_or_null(scale),
            .shift = data_or_null(shift),
            .B = B,
            .N = H * W,
            .groups = groups2,
            .dropout = dropout};
  }

  // Memory for the convolutions' inputs, one after another, each in its middle: half of the samples lie in each half,
  // so that with two threads a line of cache stays with the thread that wrote it.
  Tensor inputs() const { return empty_tensor({pixels() * std::max(C, K)}); }
  float* input(const Tensor& memory, int64_t of_channels) const {
    return memory.data_ptr<float>() + pixels() * (std::max(C, K) - of_channels) / 2 / 16 * 16;
  }

  // A convolution of one map to one map.
  Conv3x3Forward convolution(const float* from, int64_t inputs, Conv3x3Weight weight, float* to,
                             int64_t outputs) const {
    return {.B = B,
            .H = H,
            .W = W,
            .input = {from},
            .channels = {inputs},
            .weight = weight,
            .output = {to},
            .output_channels = {outputs}};
  }

  Conv3x3WeightGradient weight_gradient(const float* from, int64_t inputs, const float* grad, const Tensor& dweight,
                                        const Tensor& dbias) const {
    return {.B = B,
            .H = H,
            .W = W,
            .input = {from},
            .channels = {inputs},
            .grad = grad,
            .K = K,
            .dweight = dweight.data_ptr<float>(),
            .dbias = mutable_data_or_null(dbias)};
  }

 private:
  Tensor as_weight(const Tensor& weight, const char* name, int64_t inputs, int64_t side) const {
    TORCH_CHECK_VALUE(weight.sizes() == at::IntArrayRef(std::array<int64_t, 4>{K, inputs, side, side}), name,
                      " must have shape (", K, ", ", inputs, ", ", side, ", ", side, "), got ", weight.sizes());
    check_floating(weight, name);
    return as_type(weight, at::kFloat).contiguous();
  }
};

// A forward's norm, whose statistics it makes.
JoinedNormForward norm_of(const JoinedNormArgs& in, double eps, const Tensor& statistics, float* out) {
  return {
      .in = in, .eps = static_cast<float>(eps), .statistics = statistics.data_ptr<float>(), .known = false, .out = out};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> preactivation_block(
    const Tensor& x, const OptionalTensor& skip, const Tensor& weight1, const OptionalTensor& bias1,
    const Tensor& gain1, const Tensor& offset1, const OptionalTensor& embedding, const OptionalTensor& scale,
    const OptionalTensor& shift, const Tensor& weight2, const OptionalTensor& bias2, const Tensor& gain2,
    const Tensor& offset2, const OptionalTensor& res_weight, const OptionalTensor& res_bias, const OptionalTensor& seed,
    int64_t groups1, int64_t groups2, double eps1, double eps2, double output_scale, double dropout_p, bool keep) {
  const PreactivationBlock block(x, skip, weight1, gain1, offset1, scale, shift, weight2, gain2, offset2, res_weight,
                                 seed, groups1, groups2, dropout_p);
  const int64_t B = block.B, C = block.C, K = block.K;
  const Tensor b1 = float_vector(bias1, "bias1", K), b2 = float_vector(bias2, "bias2", K);
  const Tensor rb = float_vector(res_bias, "res_bias", K);
  Tensor added = float_vector(embedding, "embedding", B * K);  // (B, K), the first convolution's bias among it
  if (added.defined() && b1.defined()) added = added.reshape({B, K}).add(b1);
  const Tensor out = empty_float_map({B, K, block.H, block.W}), y1 = empty_float_map({B, K, block.H, block.W});
  const Tensor statistics1 = unpooled_tensor({B, groups1, 2}), statistics2 = unpooled_tensor({B, groups2, 2});
  const Tensor inputs = block.inputs();
  float *const h1 = block.input(inputs, C), *const h2 = block.input(inputs, K);

  const JoinedNormForward norm1 = norm_of(block.norm1(), eps1, statistics1, h1);
  Conv3x3Forward first = block.convolution(h1, C, forward_weight(block.weight1), y1.data_ptr<float>(), K);
  first.bias = data_or_null(added.defined() ? added : b1);
  first.bias_stride = added.defined() ? K : 0;
  first.input_norm = &norm1;
  JoinedNormForward norm2 = norm_of(block.norm2(y1), eps2, statistics2, h2);
  first.output_norm = &norm2;
  kernels().conv3x3.forward(first);

  if (block.res_weight.defined()) {
    kernels().linear.forward({.input = {data_or_null(block.x_map), data_or_null(block.skip_map)},
                              .channels = {block.channels[0], block.channels[1]},
                              .rows = block.pixels(),
                              .K = K,
                              .weight = block.res_weight.const_data_ptr<float>(),
                              .bias = data_or_null(rb),
                              .out = out.data_ptr<float>(),
                              .narrow = multiplies_narrowly(x)});
  }
  Conv3x3Forward second = block.convolution(h2, K, forward_weight(block.weight2), out.data_ptr<float>(), K);
  second.input_norm = &norm2;
  second.bias = data_or_null(b2);
  second.residual[0] = block.res_weight.defined() ? out.const_data_ptr<float>() : data_or_null(block.x_map);
  second.factor = static_cast<float>(output_scale);
  kernels().conv3x3.forward(second);

  const auto kept = [&](const Tensor& t) { return keep ? t : no_tensor(at::kFloat); };
  return {as_type(out, x.scalar_type()), kept(statistics1), kept(y1), kept(statistics2)};
}

std::vector<Tensor> preactivation_block_backward(
    const Tensor& grad, const Tensor& x, const OptionalTensor& skip, const Tensor& weight1, const Tensor& gain1,
    const Tensor& offset1, const OptionalTensor& embedding, const OptionalTensor& scale, const OptionalTensor& shift,
    const Tensor& weight2, const Tensor& gain2, const Tensor& offset2, const OptionalTensor& res_weight,
    const OptionalTensor& seed, const Tensor& statistics1, const Tensor& y1, const Tensor& statistics2, int64_t groups1,
    int64_t groups2, double output_scale, double dropout_p, bool needs_dx) {
  const PreactivationBlock block(x, skip, weight1, gain1, offset1, scale, shift, weight2, gain2, offset2, res_weight,
                                 seed, groups1, groups2, dropout_p);
  const int64_t B = block.B, C = block.C, K = block.K, pixels = block.pixels();
  const std::array<int64_t, 4> map{B, K, block.H, block.W};
  Tensor g = float_map(grad, "grad", map);
  if (output_scale != 1.0) g = g.mul(output_scale);
  const auto check_kept = [](const Tensor& t, const char* name, int64_t elements, at::MemoryFormat format) {
    TORCH_CHECK_VALUE(t.numel() == elements && t.scalar_type() == at::kFloat && t.is_contiguous(format), name,
                      " must be what the forward gave");
  };
  check_kept(y1, "y1", pixels * K, at::MemoryFormat::ChannelsLast);
  check_kept(statistics1, "statistics1", B * groups1 * 2, at::MemoryFormat::Contiguous);
  check_kept(statistics2, "statistics2", B * groups2 * 2, at::MemoryFormat::Contiguous);
  const auto floats = [](at::IntArrayRef shape) { return empty_tensor(shape); };

  // The returned gradients first and temporaries last, see resnet_block.cpp.
  const Tensor dweight1 = floats({K, C, 3, 3}), dweight2 = floats({K, K, 3, 3});
  Tensor dres_weight, dres_bias, dx, dskip;
  if (block.res_weight.defined()) {
    dres_weight = floats({K, C, 1, 1});
    dres_bias = floats({K});
  }
  if (needs_dx && block.skip_map.defined()) dskip = empty_float_map(block.skip_map.sizes());
  if (needs_dx) dx = empty_float_map(block.x_map.sizes());
  const Tensor dgain1 = floats({C}), doffset1 = floats({C}), dgain2 = floats({K}), doffset2 = floats({K});
  const Tensor dbias2 = floats({K}), dembedding = floats({B, K});
  const Tensor dscale = block.scale.defined() ? floats({B, K}) : Tensor();
  const Tensor dshift = block.shift.defined() ? floats({B, K}) : Tensor();
  const Tensor inputs = block.inputs(), dy = floats({pixels * K});
  const float* const g_data = g.const_data_ptr<float>();
  float *const h1 = block.input(inputs, C), *const h2 = block.input(inputs, K), *const dy_data = dy.data_ptr<float>();

  // The second convolution and norm.
  kernels().joined_norm.forward(
      {.in = block.norm2(y1), .statistics = statistics2.data_ptr<float>(), .known = true, .out = h2});
  kernels().conv3x3.weight_gradient(block.weight_gradient(h2, K, g_data, dweight2, dbias2));
  kernels().conv3x3.forward(block.convolution(g_data, K, data_gradient_weight(block.weight2), dy_data, K));
  kernels().joined_norm.backward({.in = block.norm2(y1),
                                  .statistics = statistics2.const_data_ptr<float>(),
                                  .grad = dy_data,
                                  .dx = {dy_data},
                                  .dgain = dgain2.data_ptr<float>(),
                                  .doffset = doffset2.data_ptr<float>(),
                                  .dscale = mutable_data_or_null(dscale),
                                  .dshift = mutable_data_or_null(dshift),
                                  .sums = dembedding.data_ptr<float>()});

  // The first.
  kernels().joined_norm.forward(
      {.in = block.norm1(), .statistics = statistics1.data_ptr<float>(), .known = true, .out = h1});
  kernels().conv3x3.weight_gradient(block.weight_gradient(h1, C, dy_data, dweight1, Tensor()));
  kernels().conv3x3.forward(block.convolution(dy_data, K, data_gradient_weight(block.weight1), h1, C));

  // The residual, whose gradient the first norm's joins.
  float *const dx_data = mutable_data_or_null(dx), *const dskip_data = mutable_data_or_null(dskip);
  if (block.res_weight.defined()) {
    kernels().linear.weight_gradient({.grad = g_data,
                                      .input = {data_or_null(block.x_map), data_or_null(block.skip_map)},
                                      .channels = {block.channels[0], block.channels[1]},
                                      .rows = pixels,
                                      .K = K,
                                      .dweight = dres_weight.data_ptr<float>(),
                                      .dbias = dres_bias.data_ptr<float>()});
    if (needs_dx) {
      kernels().linear.data_gradient({.grad = g_data,
                                      .weight = block.res_weight.const_data_ptr<float>(),
                                      .rows = pixels,
                                      .K = K,
                                      .dinput = {dx_data, dskip_data},
                                      .channels = {block.channels[0], block.channels[1]},
                                      .narrow = multiplies_narrowly(x)});
    }
  }
  kernels().joined_norm.backward({.in = block.norm1(),
                                  .statistics = statistics1.const_data_ptr<float>(),
                                  .grad = h1,
                                  .dx = {dx_data, dskip_data},
                                  .added = {block.res_weight.defined() ? dx_data : g_data, dskip_data},
                                  .dgain = dgain1.data_ptr<float>(),
                                  .doffset = doffset1.data_ptr<float>()});

  const auto like = [](const Tensor& t, const Tensor& given) { return as_type(t, given.scalar_type()); };
  const auto like_optional = [&](const Tensor& t, const OptionalTensor& given) {
    return given.has_value() && t.defined() ? as_type(t, given->scalar_type()) : no_tensor(at::kFloat);
  };
  const auto map_like = [](const Tensor& t, const Tensor& given) {
    return t.defined() ? as_type(t, given.scalar_type()) : no_tensor(given.scalar_type());
  };
  return {map_like(dx, x),
          skip.has_value() ? map_like(dskip, *skip) : no_tensor(at::kFloat),
          like(dweight1, weight1),
          dembedding.sum(0),
          like(dgain1, gain1),
          like(doffset1, offset1),
          like_optional(dembedding, embedding),
          like_optional(dscale, scale),
          like_optional(dshift, shift),
          like(dweight2, weight2),
          dbias2,
          like(dgain2, gain2),
          like(doffset2, offset2),
          like_optional(dres_weight, res_weight),
          dres_bias.defined() ? dres_bias : no_tensor(at::kFloat)};
}

}  // namespace ddpm_fast::cpu
