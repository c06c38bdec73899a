// A residual block as one operator: two 3×3 convolutions, norms, and the 1×1 convolution of the residual, by the
// kernels of their own rooms. What is between the first norm and the second convolution is made again in backward.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "cpu/kernels/kernels.h"
#include "cpu/runtime/maps.h"
#include "dropout.h"

namespace ddpm_fast {

namespace {

struct Block;

struct Norm {
  at::Tensor gain, affine;
  const float *scale, *shift;  // (B, K) or null
  const std::optional<at::Tensor>& seed;
  int64_t groups;
  double eps, dropout_p;

  NormSiluArgs args(const Block& block, const float* x) const;
  at::Tensor empty_statistics(const at::Tensor& x) const {
    const int64_t B = x.size(0);
    return groups == 0 ? at::empty({B, x.size(2) * x.size(3)}, at::kFloat) : at::empty({B, groups, 2}, at::kFloat);
  }

  PixelNorm of_pixels(const float* residual, float* out, float* norms) const {
    return {gain.const_data_ptr<float>(), scale, shift, residual, out, norms};
  }

  void forward(const Block& block, const float* x, const float* residual, float* out, float* statistics) const {
    NormSiluForwardArgs a{args(block, x)};
    a.residual = residual;
    a.out = out;
    a.statistics = statistics;
    kernels().norm_silu.forward(a);
  }
};

// What both directions are given, as float32 and checked; or some of its images.
struct Block {
  at::Tensor x_map, beside_map, scale, shift, weight1, weight2, res_weight;
  const float *x, *beside;
  Norm norm1, norm2;
  int64_t B, H, W, K, channels[2];

  Block(const at::Tensor& x_in, const std::optional<at::Tensor>& beside_in, const at::Tensor& weight1_in,
        const at::Tensor& gain1, const std::optional<at::Tensor>& affine1, const std::optional<at::Tensor>& scale_in,
        const std::optional<at::Tensor>& shift_in, const at::Tensor& weight2_in, const at::Tensor& gain2,
        const std::optional<at::Tensor>& affine2, const std::optional<at::Tensor>& res_weight_in,
        const std::optional<at::Tensor>& seed, int64_t groups, double eps, double dropout_p)
      : norm1{{}, {}, nullptr, nullptr, seed, groups, eps, dropout_p},
        norm2{{}, {}, nullptr, nullptr, no_seed, groups, eps, 0.0} {
    TORCH_CHECK_VALUE(x_in.dim() == 4 && x_in.numel() > 0, "x must have shape (B, C, H, W) and not be empty, got ",
                      x_in.sizes());
    check_floating(x_in, "x");
    B = x_in.size(0), H = x_in.size(2), W = x_in.size(3);
    x_map = float_map(x_in);
    if (beside_in.has_value()) {
      beside_map = float_map(*beside_in, "beside", {B, beside_in->dim() == 4 ? beside_in->size(1) : 0, H, W});
    }
    x = x_map.const_data_ptr<float>(), beside = data_or_null(beside_map);
    channels[0] = x_map.size(1), channels[1] = beside_map.defined() ? beside_map.size(1) : 0;
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
    TORCH_CHECK_VALUE(groups > 0 || (!affine1.has_value() && !affine2.has_value()),
                      "affine1 and affine2 must not be given with groups = 0");
    scale = float_vector(scale_in, "scale", B * K), shift = float_vector(shift_in, "shift", B * K);
    norm1.gain = float_vector(gain1, "gain1", K), norm1.affine = float_vector(affine1, "affine1", K);
    norm1.scale = data_or_null(scale), norm1.shift = data_or_null(shift);
    norm2.gain = float_vector(gain2, "gain2", K), norm2.affine = float_vector(affine2, "affine2", K);
  }

  Block images(int64_t first, int64_t count) const {
    Block some = *this;
    const auto skip = [&](const float*& from, int64_t per_image) {
      if (from != nullptr) from += first * per_image;
    };
    skip(some.x, H * W * channels[0]);
    skip(some.beside, H * W * channels[1]);
    skip(some.norm1.scale, K);
    skip(some.norm1.shift, K);
    some.B = count;
    return some;
  }

  // Images whose maps stay in the cache from one convolution to the next, with tiles enough to keep the kernels busy.
  // Maps so small that the weights are what has to be moved are taken all at once.
  int64_t images_at_once() const {
    const int64_t tiles = (H + 3) / 4 * ((W + 3) / 4);
    const int64_t fitting = kCachedFloats / (H * W * std::max(K, channels[0] + channels[1]));
    return std::min(B, std::max({int64_t{1}, fitting, (kLeastTilesAtOnce + tiles - 1) / tiles}));
  }

  at::Tensor empty_output() const { return empty_float_map({B, K, H, W}); }

  Conv3x3Forward first_convolution() const {
    Conv3x3Forward p = {};
    p.B = B, p.H = H, p.W = W;
    p.input[0] = x, p.input[1] = beside;
    p.channels[0] = channels[0], p.channels[1] = channels[1];
    const int64_t C = channels[0] + channels[1];
    p.weight = {weight1.const_data_ptr<float>(), 9 * C, 9, false};
    p.output_channels[0] = K;
    return p;
  }

  Conv3x3Forward second_convolution(const float* h) const {
    Conv3x3Forward p = {};
    p.B = B, p.H = H, p.W = W;
    p.input[0] = h;
    p.channels[0] = K;
    p.weight = {weight2.const_data_ptr<float>(), 9 * K, 9, false};
    p.output_channels[0] = K;
    return p;
  }

 private:
  static constexpr int64_t kCachedFloats = 512 << 10, kLeastTilesAtOnce = 256;
  static inline const std::optional<at::Tensor> no_seed;

  at::Tensor as_weight(const at::Tensor& weight, const char* name, int64_t C, int64_t side) const {
    TORCH_CHECK_VALUE(weight.sizes() == at::IntArrayRef(std::array<int64_t, 4>{K, C, side, side}), name,
                      " must have shape (", K, ", ", C, ", ", side, ", ", side, "), got ", weight.sizes());
    check_floating(weight, name);
    return weight.to(at::kFloat).contiguous();
  }
};

NormSiluArgs Norm::args(const Block& block, const float* x) const {
  NormSiluArgs a = {};
  a.x = x;
  a.weight = gain.const_data_ptr<float>();
  a.bias_affine = data_or_null(affine);
  a.scale = scale;
  a.shift = shift;
  a.B = block.B;
  a.N = block.H * block.W;
  a.C = block.K;
  a.groups = groups;
  a.eps = static_cast<float>(eps);
  a.activation = true;
  set_dropout(a, seed, dropout_p);
  return a;
}

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Outputs forward(const at::Tensor& x, const std::optional<at::Tensor>& beside, const at::Tensor& weight1,
                const at::Tensor& bias1, const at::Tensor& gain1, const std::optional<at::Tensor>& affine1,
                const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift,
                const at::Tensor& weight2, const at::Tensor& bias2, const at::Tensor& gain2,
                const std::optional<at::Tensor>& affine2, const std::optional<at::Tensor>& res_weight,
                const std::optional<at::Tensor>& res_bias, const std::optional<at::Tensor>& seed, int64_t groups,
                double eps, double dropout_p, bool keep) {
  const Block block(x, beside, weight1, gain1, affine1, scale, shift, weight2, gain2, affine2, res_weight, seed, groups,
                    eps, dropout_p);
  const at::Tensor b1 = float_vector(bias1, "bias1", block.K), b2 = float_vector(bias2, "bias2", block.K);
  const at::Tensor rb = float_vector(res_bias, "res_bias", block.K);
  // Where a pixel's norm needs nothing but the pixel, the convolution does it while the pixel is at hand.
  const bool joined1 = groups == 0 && dropout_p == 0, joined2 = groups == 0;
  const bool keeps1 = keep || !joined1, keeps2 = keep || !joined2;
  const int64_t B = block.B, K = block.K, pixels = block.H * block.W;
  const at::Tensor out = block.empty_output();
  const at::Tensor y1 = keeps1 ? block.empty_output() : at::Tensor(), y2 = keeps2 ? block.empty_output() : out;
  const at::Tensor statistics1 = keeps1 ? block.norm1.empty_statistics(y1) : at::Tensor();
  const at::Tensor statistics2 = keeps2 ? block.norm2.empty_statistics(y2) : at::Tensor();
  const int64_t count = groups == 0 && dropout_p == 0 ? block.images_at_once() : B;
  const at::Tensor h_room = empty_tensor({count * pixels * K});
  // The residual's convolution goes into out, unless the second convolution writes there before its norm reads it.
  const bool convolved = block.res_weight.defined(), apart = convolved && !keeps2;
  const at::Tensor residual_room = apart ? empty_tensor({count * pixels * K}) : at::Tensor();

  for (int64_t first = 0; first < B; first += count) {
    const Block images = block.images(first, std::min(count, B - first));
    const int64_t offset = first * pixels * K;
    const auto at_images = [&](const at::Tensor& map) {
      return map.defined() ? map.data_ptr<float>() + offset : nullptr;
    };
    float* const h = h_room.data_ptr<float>();
    float* const y1_now = keeps1 ? at_images(y1) : h;
    const int64_t per_image = groups == 0 ? pixels : 2 * groups;
    const auto at_statistics = [&](const at::Tensor& t) {
      return t.defined() ? t.data_ptr<float>() + first * per_image : nullptr;
    };

    Conv3x3Forward conv1 = images.first_convolution();
    conv1.bias = b1.const_data_ptr<float>();
    conv1.output[0] = y1_now;
    const PixelNorm norm1 = images.norm1.of_pixels(nullptr, h, at_statistics(statistics1));
    if (joined1) conv1.norm = &norm1;
    kernels().conv3x3.forward(conv1);
    if (!joined1) images.norm1.forward(images, y1_now, nullptr, h, at_statistics(statistics1));

    const float* residual = images.x;
    if (convolved) {
      float* const to = apart ? residual_room.data_ptr<float>() : at_images(out);
      LinearForward linear = {};
      linear.a[0] = images.x, linear.a[1] = images.beside;
      linear.k[0] = images.channels[0], linear.k[1] = images.channels[1];
      linear.rows = images.B * pixels, linear.N = K;
      linear.weight = images.res_weight.const_data_ptr<float>();
      linear.bias = data_or_null(rb);
      linear.out = to;
      kernels().linear.forward(linear);
      residual = to;
    }

    Conv3x3Forward conv2 = images.second_convolution(h);
    conv2.bias = b2.const_data_ptr<float>();
    conv2.output[0] = at_images(y2);
    const PixelNorm norm2 = images.norm2.of_pixels(residual, at_images(out), at_statistics(statistics2));
    if (joined2) conv2.norm = &norm2;
    kernels().conv3x3.forward(conv2);
    if (!joined2) images.norm2.forward(images, at_images(y2), residual, at_images(out), at_statistics(statistics2));
  }

  const auto kept = [&](const at::Tensor& t) { return keep ? t : at::empty({0}, at::kFloat); };
  return {out.to(x.scalar_type()), kept(y1), kept(statistics1), kept(y2), kept(statistics2)};
}

std::vector<at::Tensor> backward(const at::Tensor& grad, const at::Tensor& x, const std::optional<at::Tensor>& beside,
                                 const at::Tensor& weight1, const at::Tensor& gain1,
                                 const std::optional<at::Tensor>& affine1, const std::optional<at::Tensor>& scale,
                                 const std::optional<at::Tensor>& shift, const at::Tensor& weight2,
                                 const at::Tensor& gain2, const std::optional<at::Tensor>& affine2,
                                 const std::optional<at::Tensor>& res_weight, const std::optional<at::Tensor>& seed,
                                 const at::Tensor& y1, const at::Tensor& statistics1, const at::Tensor& y2,
                                 const at::Tensor& statistics2, int64_t groups, double eps, double dropout_p,
                                 bool wants_dx) {
  const Block block(x, beside, weight1, gain1, affine1, scale, shift, weight2, gain2, affine2, res_weight, seed, groups,
                    eps, dropout_p);
  const int64_t B = block.B, K = block.K, H = block.H, W = block.W;
  const std::array<int64_t, 4> map{B, K, H, W};
  const at::Tensor g = float_map(grad, "grad", map);
  for (const at::Tensor* y : {&y1, &y2}) {
    TORCH_CHECK_VALUE(y->sizes() == at::IntArrayRef(map) && y->scalar_type() == at::kFloat &&
                          y->is_contiguous(at::MemoryFormat::ChannelsLast),
                      "y1 and y2 must be what the forward gave");
  }
  for (const at::Tensor* s : {&statistics1, &statistics2}) {
    TORCH_CHECK_VALUE(s->numel() == (groups == 0 ? B * H * W : 2 * B * groups) && s->scalar_type() == at::kFloat &&
                          s->is_contiguous(),
                      "statistics1 and statistics2 must be what the forward gave");
  }
  const auto floats = [](at::IntArrayRef shape) { return empty_tensor(shape); };
  const auto row = [&](const at::Tensor& given) { return given.defined() ? floats(given.sizes()) : at::Tensor(); };

  // First what outlives this call, so that what does not lies above it, and leaves one free piece (memory.cpp).
  const int64_t C = block.channels[0] + block.channels[1];
  const at::Tensor dweight1 = floats({K, C, 3, 3}), dweight2 = floats({K, K, 3, 3});
  at::Tensor dres_weight, dres_bias, dx, dbeside;
  if (block.res_weight.defined()) dres_weight = floats({K, C, 1, 1}), dres_bias = floats({K});
  if (wants_dx && block.beside_map.defined()) dbeside = empty_float_map(block.beside_map.sizes());
  if (wants_dx) dx = empty_float_map(block.x_map.sizes());

  // The second norm and convolution.
  const at::Tensor dgain2 = floats({K}), daffine2 = row(block.norm2.affine), dbias2 = floats({K});
  const at::Tensor dy = block.empty_output();
  const auto backward_norm = [&](const Norm& norm, const at::Tensor& y, const at::Tensor& statistics,
                                 const at::Tensor& incoming, const at::Tensor& dgain, const at::Tensor& daffine,
                                 const at::Tensor& dbias, const at::Tensor& dscale, const at::Tensor& dshift) {
    NormSiluBackwardArgs a{norm.args(block, y.const_data_ptr<float>())};
    a.grad = incoming.const_data_ptr<float>();
    a.statistics = statistics.const_data_ptr<float>();
    a.dx = dy.data_ptr<float>();
    a.dweight = dgain.data_ptr<float>();
    a.dbias_affine = mutable_data_or_null(daffine);
    a.dbias = dbias.data_ptr<float>();
    a.dscale = mutable_data_or_null(dscale);
    a.dshift = mutable_data_or_null(dshift);
    kernels().norm_silu.backward(a);
  };
  backward_norm(block.norm2, y2, statistics2, g, dgain2, daffine2, dbias2, at::Tensor(), at::Tensor());

  const at::Tensor h = block.empty_output();
  const at::Tensor unused = block.norm1.empty_statistics(y1);
  block.norm1.forward(block, y1.const_data_ptr<float>(), nullptr, h.data_ptr<float>(), unused.data_ptr<float>());
  kernels().conv3x3.weight_gradient({B,
                                     H,
                                     W,
                                     false,
                                     {h.const_data_ptr<float>(), nullptr},
                                     {K, 0},
                                     dy.const_data_ptr<float>(),
                                     K,
                                     dweight2.data_ptr<float>(),
                                     nullptr});
  Conv3x3Forward to_h = {};
  to_h.B = B, to_h.H = H, to_h.W = W;
  to_h.input[0] = dy.const_data_ptr<float>();
  to_h.channels[0] = K;
  to_h.weight = {block.weight2.const_data_ptr<float>(), 9, 9 * K, true};
  to_h.output[0] = h.data_ptr<float>();  // dh in place of h
  to_h.output_channels[0] = K;
  kernels().conv3x3.forward(to_h);

  // The first norm and convolution.
  const at::Tensor dgain1 = floats({K}), daffine1 = row(block.norm1.affine), dbias1 = floats({K});
  const at::Tensor dscale = block.scale.defined() ? floats({B, K}) : at::Tensor();
  const at::Tensor dshift = block.shift.defined() ? floats({B, K}) : at::Tensor();
  backward_norm(block.norm1, y1, statistics1, h, dgain1, daffine1, dbias1, dscale, dshift);
  kernels().conv3x3.weight_gradient({B,
                                     H,
                                     W,
                                     false,
                                     {block.x, block.beside},
                                     {block.channels[0], block.channels[1]},
                                     dy.const_data_ptr<float>(),
                                     K,
                                     dweight1.data_ptr<float>(),
                                     nullptr});

  // The residual, and the input.
  if (block.res_weight.defined()) {
    LinearWeightGradient linear = {};
    linear.grad = g.const_data_ptr<float>();
    linear.a[0] = block.x, linear.a[1] = block.beside;
    linear.k[0] = block.channels[0], linear.k[1] = block.channels[1];
    linear.rows = B * H * W, linear.N = K;
    linear.dweight = dres_weight.data_ptr<float>();
    linear.dbias = dres_bias.data_ptr<float>();
    kernels().linear.weight_gradient(linear);
  }
  if (wants_dx) {
    Conv3x3Forward to_x = {};
    to_x.B = B, to_x.H = H, to_x.W = W;
    to_x.input[0] = dy.const_data_ptr<float>();
    to_x.channels[0] = K;
    to_x.weight = {block.weight1.const_data_ptr<float>(), 9, 9 * C, true};
    to_x.output[0] = dx.data_ptr<float>(), to_x.output[1] = mutable_data_or_null(dbeside);
    to_x.output_channels[0] = block.channels[0], to_x.output_channels[1] = block.channels[1];
    if (block.res_weight.defined()) {
      LinearDataGradient linear = {};
      linear.grad = g.const_data_ptr<float>();
      linear.weight = block.res_weight.const_data_ptr<float>();
      linear.rows = B * H * W, linear.N = K;
      linear.dx[0] = dx.data_ptr<float>(), linear.dx[1] = mutable_data_or_null(dbeside);
      linear.k[0] = block.channels[0], linear.k[1] = block.channels[1];
      kernels().linear.data_gradient(linear);
      to_x.residual[0] = dx.const_data_ptr<float>(), to_x.residual[1] = data_or_null(dbeside);
    } else {
      to_x.residual[0] = g.const_data_ptr<float>();
    }
    kernels().conv3x3.forward(to_x);
  }
  const auto like = [](const at::Tensor& t, const at::Tensor& given) {
    return t.defined() ? t.reshape(given.sizes()).to(given.scalar_type()) : at::empty({0}, given.options());
  };
  const auto like_optional = [&](const at::Tensor& t, const std::optional<at::Tensor>& given) {
    return given.has_value() ? like(t, *given) : at::empty({0}, at::kFloat);
  };
  const auto map_like = [](const at::Tensor& t, const at::Tensor& given) {
    return t.defined() ? t.to(given.scalar_type()) : at::empty({0}, given.options());
  };
  return {map_like(dx, x),
          beside.has_value() ? map_like(dbeside, *beside) : at::empty({0}, at::kFloat),
          like(dweight1, weight1),
          dbias1,
          like(dgain1, gain1),
          like_optional(daffine1, affine1),
          like_optional(dscale, scale),
          like_optional(dshift, shift),
          like(dweight2, weight2),
          dbias2,
          like(dgain2, gain2),
          like_optional(daffine2, affine2),
          like_optional(dres_weight, res_weight),
          dres_bias.defined() ? dres_bias : at::empty({0}, at::kFloat)};
}

}  // namespace

TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) {
  m.impl("native_resnet_block", &forward);
  m.impl("native_resnet_block_backward", &backward);
}

}  // namespace ddpm_fast
