// A residual block as one operator: two 3×3 convolutions, norms, and the 1×1 convolution of the residual, by the
// kernels of the single ops. Backward recomputes the maps between the first norm and the second convolution.

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "conv3x3_weight.h"
#include "cpu/kernels/kernels.h"
#include "cpu/runtime/maps.h"
#include "cpu/runtime/narrow.h"
#include "cpu/runtime/parallel.h"
#include "dropout.h"
#include "ops.h"

namespace ddpm_fast::cpu {

namespace {

struct Block;

struct Norm {
  Tensor gain, offset;
  const float *scale, *shift;  // (B, K) or null
  const OptionalTensor& seed;
  int64_t groups;
  double eps, dropout_p;

  NormSiluArgs args(const Block& block, const float* x) const;
  Tensor empty_statistics(const Tensor& x) const {
    const int64_t B = x.size(0);
    return groups == 0 ? unpooled_tensor({B, x.size(2) * x.size(3)}) : unpooled_tensor({B, groups, 2});
  }

  PixelNorm of_pixels(const float* residual, float* out, float* norms) const {
    return {.gain = gain.const_data_ptr<float>(),
            .scale = scale,
            .shift = shift,
            .residual = residual,
            .out = out,
            .norms = norms};
  }

  void forward(const Block& block, const float* x, const float* residual, float* out, float* statistics) const {
    kernels().norm_silu.forward({.in = args(block, x), .residual = residual, .out = out, .statistics = statistics});
  }
};

// The checked float32 arguments of both directions, for all images or some of them.
struct Block {
  Tensor x_map, skip_map, scale, shift, weight1, weight2, res_weight;
  const float *x, *skip;
  Norm norm1, norm2;
  int64_t B, H, W, K, channels[2];

  Block(const Tensor& x_in, const OptionalTensor& skip_in, const Tensor& weight1_in, const Tensor& gain1,
        const OptionalTensor& offset1, const OptionalTensor& scale_in, const OptionalTensor& shift_in,
        const Tensor& weight2_in, const Tensor& gain2, const OptionalTensor& offset2,
        const OptionalTensor& res_weight_in, const OptionalTensor& seed, int64_t groups, double eps, double dropout_p)
      : norm1{.scale = nullptr, .seed = seed, .groups = groups, .eps = eps, .dropout_p = dropout_p},
        norm2{.scale = nullptr, .seed = no_seed, .groups = groups, .eps = eps, .dropout_p = 0.0} {
    TORCH_CHECK_VALUE(x_in.dim() == 4 && x_in.numel() > 0, "x must have shape (B, C, H, W) and not be empty, got ",
                      x_in.sizes());
    check_floating(x_in, "x");
    B = x_in.size(0);
    H = x_in.size(2);
    W = x_in.size(3);
    x_map = float_map(x_in);
    if (skip_in.has_value()) {
      skip_map = float_map(*skip_in, "skip", {B, skip_in->dim() == 4 ? skip_in->size(1) : 0, H, W});
    }
    x = x_map.const_data_ptr<float>();
    skip = data_or_null(skip_map);
    channels[0] = x_map.size(1);
    channels[1] = skip_map.defined() ? skip_map.size(1) : 0;
    const int64_t C = channels[0] + channels[1];
    TORCH_CHECK_VALUE(weight1_in.dim() == 4 && weight1_in.size(0) > 0, "weight1 must have shape (K, C, 3, 3), got ",
                      weight1_in.sizes());
    K = weight1_in.size(0);
    weight1 = as_weight(weight1_in, "weight1", C, 3);
    weight2 = as_weight(weight2_in, "weight2", K, 3);
    if (res_weight_in.has_value()) {
      res_weight = as_weight(*res_weight_in, "res_weight", C, 1);
    } else {
      TORCH_CHECK_VALUE(C == K && channels[1] == 0,
                        "res_weight must be given where the block changes the number of channels");
    }
    TORCH_CHECK_VALUE(groups >= 0 && (groups == 0 || K % groups == 0), "groups must divide ", K, " channels, got ",
                      groups);
    TORCH_CHECK_VALUE(groups > 0 || (!offset1.has_value() && !offset2.has_value()),
                      "offset1 and offset2 must not be given with groups = 0");
    scale = float_vector(scale_in, "scale", B * K);
    shift = float_vector(shift_in, "shift", B * K);
    norm1.gain = float_vector(gain1, "gain1", K);
    norm1.offset = float_vector(offset1, "offset1", K);
    norm1.scale = data_or_null(scale);
    norm1.shift = data_or_null(shift);
    norm2.gain = float_vector(gain2, "gain2", K);
    norm2.offset = float_vector(offset2, "offset2", K);
  }

  Block images(int64_t first, int64_t count) const {
    Block some = *this;
    const auto advance = [&](const float*& from, int64_t per_image) {
      if (from != nullptr) from += first * per_image;
    };
    advance(some.x, H * W * channels[0]);
    advance(some.skip, H * W * channels[1]);
    advance(some.norm1.scale, K);
    advance(some.norm1.shift, K);
    some.B = count;
    return some;
  }

  // Images per pass: their maps stay in the cache between the convolutions, and there are enough tiles to keep the
  // kernels busy. Small maps, for which the weights are most of the memory traffic, are one pass. Of a third-level
  // cache of 48 MB, blocks of 64 and 128 channels take 0.91 to 1.0 of the time with a quarter that they take with 2 MB,
  // and as long with half or all of it.
  int64_t images_at_once() const {
    const int64_t tiles = (H + 3) / 4 * ((W + 3) / 4);
    const int64_t fitting = third_level_floats() / 4 / (H * W * std::max(K, channels[0] + channels[1]));
    return std::min(B, std::max({int64_t{1}, fitting, (kMinTilesAtOnce + tiles - 1) / tiles}));
  }

  Tensor empty_output() const { return empty_float_map({B, K, H, W}); }

  int64_t input_channels() const { return channels[0] + channels[1]; }

  Conv3x3Forward first_convolution(const float* bias, float* output, const PixelNorm* norm) const {
    return {.B = B,
            .H = H,
            .W = W,
            .input = {x, skip},
            .channels = {channels[0], channels[1]},
            .weight = forward_weight(weight1),
            .bias = bias,
            .output = {output},
            .output_channels = {K},
            .norm = norm};
  }

  Conv3x3Forward second_convolution(const float* h, const float* bias, float* output, const PixelNorm* norm) const {
    return {.B = B,
            .H = H,
            .W = W,
            .input = {h},
            .channels = {K},
            .weight = forward_weight(weight2),
            .bias = bias,
            .output = {output},
            .output_channels = {K},
            .norm = norm};
  }

  // The gradient of the first convolution's input, with `residual` added to it; dskip may be null.
  Conv3x3Forward first_data_gradient(const float* dy, float* dx, float* dskip, const float* dx_residual,
                                     const float* dskip_residual) const {
    return {.B = B,
            .H = H,
            .W = W,
            .input = {dy},
            .channels = {K},
            .weight = data_gradient_weight(weight1),
            .residual = {dx_residual, dskip_residual},
            .output = {dx, dskip},
            .output_channels = {channels[0], channels[1]}};
  }

  Conv3x3Forward second_data_gradient(const float* dy, float* dh) const {
    return {.B = B,
            .H = H,
            .W = W,
            .input = {dy},
            .channels = {K},
            .weight = data_gradient_weight(weight2),
            .output = {dh},
            .output_channels = {K}};
  }

 private:
  static constexpr int64_t kMinTilesAtOnce = 512;
  static inline const OptionalTensor no_seed;

  Tensor as_weight(const Tensor& weight, const char* name, int64_t C, int64_t side) const {
    TORCH_CHECK_VALUE(weight.sizes() == at::IntArrayRef(std::array<int64_t, 4>{K, C, side, side}), name,
                      " must have shape (", K, ", ", C, ", ", side, ", ", side, "), got ", weight.sizes());
    check_floating(weight, name);
    return as_type(weight, at::kFloat).contiguous();
  }
};

NormSiluArgs Norm::args(const Block& block, const float* x) const {
  const int64_t pixels = block.H * block.W;
  return {.x = x,
          .gain = gain.const_data_ptr<float>(),
          .offset = data_or_null(offset),
          .scale = scale,
          .shift = shift,
          .B = block.B,
          .N = pixels,
          .C = block.K,
          .groups = groups,
          .eps = static_cast<float>(eps),
          .activation = true,
          .dropout = check_dropout(seed, dropout_p, block.K * pixels)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> resnet_block(
    const Tensor& x, const OptionalTensor& skip, const Tensor& weight1, const Tensor& bias1, const Tensor& gain1,
    const OptionalTensor& offset1, const OptionalTensor& scale, const OptionalTensor& shift, const Tensor& weight2,
    const Tensor& bias2, const Tensor& gain2, const OptionalTensor& offset2, const OptionalTensor& res_weight,
    const OptionalTensor& res_bias, const OptionalTensor& seed, int64_t groups, double eps, double dropout_p,
    bool keep) {
  const Block block(x, skip, weight1, gain1, offset1, scale, shift, weight2, gain2, offset2, res_weight, seed, groups,
                    eps, dropout_p);
  const Tensor b1 = float_vector(bias1, "bias1", block.K), b2 = float_vector(bias2, "bias2", block.K);
  const Tensor rb = float_vector(res_bias, "res_bias", block.K);
  // RMSNorm without dropout is per pixel, so the convolution's epilogue applies it while the pixel is in cache.
  const bool fused1 = groups == 0 && dropout_p == 0, fused2 = groups == 0;
  const bool keeps1 = keep || !fused1, keeps2 = keep || !fused2;
  const int64_t B = block.B, K = block.K, pixels = block.H * block.W;
  const Tensor out = block.empty_output();
  const Tensor y1 = keeps1 ? block.empty_output() : Tensor(), y2 = keeps2 ? block.empty_output() : out;
  const Tensor statistics1 = keeps1 ? block.norm1.empty_statistics(y1) : Tensor();
  const Tensor statistics2 = keeps2 ? block.norm2.empty_statistics(y2) : Tensor();
  const int64_t count = groups == 0 && dropout_p == 0 ? block.images_at_once() : B;
  const Tensor h_buffer = empty_tensor({count * pixels * K});
  // The residual's convolution goes into out, unless the second convolution writes there before its norm reads it.
  const bool convolved = block.res_weight.defined(), apart = convolved && !keeps2;
  const Tensor residual_buffer = apart ? empty_tensor({count * pixels * K}) : Tensor();

  for (int64_t first = 0; first < B; first += count) {
    const Block images = block.images(first, std::min(count, B - first));
    const int64_t offset = first * pixels * K;
    const auto at_images = [&](const Tensor& map) { return map.defined() ? map.data_ptr<float>() + offset : nullptr; };
    float* const h = h_buffer.data_ptr<float>();
    float* const y1_now = keeps1 ? at_images(y1) : h;
    const int64_t per_image = groups == 0 ? pixels : 2 * groups;
    const auto at_statistics = [&](const Tensor& t) {
      return t.defined() ? t.data_ptr<float>() + first * per_image : nullptr;
    };

    const PixelNorm norm1 = images.norm1.of_pixels(nullptr, h, at_statistics(statistics1));
    kernels().conv3x3.forward(images.first_convolution(b1.const_data_ptr<float>(), y1_now, fused1 ? &norm1 : nullptr));
    if (!fused1) images.norm1.forward(images, y1_now, nullptr, h, at_statistics(statistics1));

    const float* residual = images.x;
    if (convolved) {
      float* const to = apart ? residual_buffer.data_ptr<float>() : at_images(out);
      kernels().linear.forward({.input = {images.x, images.skip},
                                .channels = {images.channels[0], images.channels[1]},
                                .rows = images.B * pixels,
                                .K = K,
                                .weight = images.res_weight.const_data_ptr<float>(),
                                .bias = data_or_null(rb),
                                .out = to,
                                .narrow = multiplies_narrowly(x)});
      residual = to;
    }

    const PixelNorm norm2 = images.norm2.of_pixels(residual, at_images(out), at_statistics(statistics2));
    kernels().conv3x3.forward(
        images.second_convolution(h, b2.const_data_ptr<float>(), at_images(y2), fused2 ? &norm2 : nullptr));
    if (!fused2) images.norm2.forward(images, at_images(y2), residual, at_images(out), at_statistics(statistics2));
  }

  const auto kept = [&](const Tensor& t) { return keep ? t : no_tensor(at::kFloat); };
  return {as_type(out, x.scalar_type()), kept(y1), kept(statistics1), kept(y2), kept(statistics2)};
}

std::vector<Tensor> resnet_block_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& skip,
                                          const Tensor& weight1, const Tensor& gain1, const OptionalTensor& offset1,
                                          const OptionalTensor& scale, const OptionalTensor& shift,
                                          const Tensor& weight2, const Tensor& gain2, const OptionalTensor& offset2,
                                          const OptionalTensor& res_weight, const OptionalTensor& seed,
                                          const Tensor& y1, const Tensor& statistics1, const Tensor& y2,
                                          const Tensor& statistics2, int64_t groups, double eps, double dropout_p,
                                          bool needs_dx) {
  const Block block(x, skip, weight1, gain1, offset1, scale, shift, weight2, gain2, offset2, res_weight, seed, groups,
                    eps, dropout_p);
  const int64_t B = block.B, K = block.K, H = block.H, W = block.W;
  const std::array<int64_t, 4> map{B, K, H, W};
  const Tensor g = float_map(grad, "grad", map);
  for (const Tensor* y : {&y1, &y2}) {
    TORCH_CHECK_VALUE(y->sizes() == at::IntArrayRef(map) && y->scalar_type() == at::kFloat &&
                          y->is_contiguous(at::MemoryFormat::ChannelsLast),
                      "y1 and y2 must be what the forward gave");
  }
  for (const Tensor* s : {&statistics1, &statistics2}) {
    TORCH_CHECK_VALUE(s->numel() == (groups == 0 ? B * H * W : 2 * B * groups) && s->scalar_type() == at::kFloat &&
                          s->is_contiguous(),
                      "statistics1 and statistics2 must be what the forward gave");
  }
  const auto floats = [](at::IntArrayRef shape) { return empty_tensor(shape); };
  const auto row = [&](const Tensor& given) { return given.defined() ? floats(given.sizes()) : Tensor(); };

  // Allocate the returned gradients first and temporaries last: the pool (memory.cpp) is first-fit, so freeing the
  // temporaries leaves one contiguous piece.
  const int64_t C = block.input_channels();
  const Tensor dweight1 = floats({K, C, 3, 3}), dweight2 = floats({K, K, 3, 3});
  Tensor dres_weight, dres_bias, dx, dskip;
  if (block.res_weight.defined()) {
    dres_weight = floats({K, C, 1, 1});
    dres_bias = floats({K});
  }
  if (needs_dx && block.skip_map.defined()) dskip = empty_float_map(block.skip_map.sizes());
  if (needs_dx) dx = empty_float_map(block.x_map.sizes());

  // The second norm and convolution.
  const Tensor dgain2 = floats({K}), doffset2 = row(block.norm2.offset), dbias2 = floats({K});
  const Tensor dy = block.empty_output();
  const auto backward_norm = [&](const Norm& norm, const Tensor& y, const Tensor& statistics, const Tensor& incoming,
                                 const Tensor& dgain, const Tensor& doffset, const Tensor& dbias, const Tensor& dscale,
                                 const Tensor& dshift) {
    kernels().norm_silu.backward({.in = norm.args(block, y.const_data_ptr<float>()),
                                  .grad = incoming.const_data_ptr<float>(),
                                  .statistics = statistics.const_data_ptr<float>(),
                                  .dx = dy.data_ptr<float>(),
                                  .dgain = dgain.data_ptr<float>(),
                                  .doffset = mutable_data_or_null(doffset),
                                  .dbias = dbias.data_ptr<float>(),
                                  .dscale = mutable_data_or_null(dscale),
                                  .dshift = mutable_data_or_null(dshift)});
  };
  backward_norm(block.norm2, y2, statistics2, g, dgain2, doffset2, dbias2, Tensor(), Tensor());

  const Tensor h = block.empty_output();
  const Tensor unused = block.norm1.empty_statistics(y1);
  block.norm1.forward(block, y1.const_data_ptr<float>(), nullptr, h.data_ptr<float>(), unused.data_ptr<float>());
  kernels().conv3x3.weight_gradient({.B = B,
                                     .H = H,
                                     .W = W,
                                     .input = {h.const_data_ptr<float>()},
                                     .channels = {K},
                                     .grad = dy.const_data_ptr<float>(),
                                     .K = K,
                                     .dweight = dweight2.data_ptr<float>()});
  float* const dh = h.data_ptr<float>();  // in place of h
  kernels().conv3x3.forward(block.second_data_gradient(dy.const_data_ptr<float>(), dh));

  // The first norm and convolution.
  const Tensor dgain1 = floats({K}), doffset1 = row(block.norm1.offset), dbias1 = floats({K});
  const Tensor dscale = block.scale.defined() ? floats({B, K}) : Tensor();
  const Tensor dshift = block.shift.defined() ? floats({B, K}) : Tensor();
  backward_norm(block.norm1, y1, statistics1, h, dgain1, doffset1, dbias1, dscale, dshift);
  kernels().conv3x3.weight_gradient({.B = B,
                                     .H = H,
                                     .W = W,
                                     .input = {block.x, block.skip},
                                     .channels = {block.channels[0], block.channels[1]},
                                     .grad = dy.const_data_ptr<float>(),
                                     .K = K,
                                     .dweight = dweight1.data_ptr<float>()});

  // The residual, and the input.
  if (block.res_weight.defined()) {
    kernels().linear.weight_gradient({.grad = g.const_data_ptr<float>(),
                                      .input = {block.x, block.skip},
                                      .channels = {block.channels[0], block.channels[1]},
                                      .rows = B * H * W,
                                      .K = K,
                                      .dweight = dres_weight.data_ptr<float>(),
                                      .dbias = dres_bias.data_ptr<float>()});
  }
  if (needs_dx) {
    float *const dx_data = dx.data_ptr<float>(), *const dskip_data = mutable_data_or_null(dskip);
    if (block.res_weight.defined()) {
      kernels().linear.data_gradient({.grad = g.const_data_ptr<float>(),
                                      .weight = block.res_weight.const_data_ptr<float>(),
                                      .rows = B * H * W,
                                      .K = K,
                                      .dinput = {dx_data, dskip_data},
                                      .channels = {block.channels[0], block.channels[1]},
                                      .narrow = multiplies_narrowly(x)});
    }
    const float* dx_residual = block.res_weight.defined() ? dx_data : g.const_data_ptr<float>();
    kernels().conv3x3.forward(
        block.first_data_gradient(dy.const_data_ptr<float>(), dx_data, dskip_data, dx_residual, dskip_data));
  }
  const auto like = [](const Tensor& t, const Tensor& given) {
    return t.defined() ? as_type(t.reshape(given.sizes()), given.scalar_type()) : no_tensor(given.scalar_type());
  };
  const auto like_optional = [&](const Tensor& t, const OptionalTensor& given) {
    return given.has_value() ? like(t, *given) : no_tensor(at::kFloat);
  };
  const auto map_like = [](const Tensor& t, const Tensor& given) {
    return t.defined() ? as_type(t, given.scalar_type()) : no_tensor(given.scalar_type());
  };
  return {map_like(dx, x),
          skip.has_value() ? map_like(dskip, *skip) : no_tensor(at::kFloat),
          like(dweight1, weight1),
          dbias1,
          like(dgain1, gain1),
          like_optional(doffset1, offset1),
          like_optional(dscale, scale),
          like_optional(dshift, shift),
          like(dweight2, weight2),
          dbias2,
          like(dgain2, gain2),
          like_optional(doffset2, offset2),
          like_optional(dres_weight, res_weight),
          dres_bias.defined() ? dres_bias : no_tensor(at::kFloat)};
}

}  // namespace ddpm_fast::cpu
