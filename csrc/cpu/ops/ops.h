// The CPU operators that register.cpp registers with torch. ddpm_fast/ops/*/op.py declares their schemas and documents
// the arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace ddpm_fast::cpu {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// noise.cpp
void fill_normal_(Tensor& out, const Tensor& seed, const Tensor& step, int64_t stream, int64_t start_index);

// sampler_step.cpp
std::tuple<Tensor, Tensor> sampler_step(const Tensor& x, const Tensor& model_output, const Tensor& table,
                                        const Tensor& step, const Tensor& seed, const OptionalTensor& x_start_previous,
                                        const OptionalTensor& x_start_previous2,
                                        const OptionalTensor& x_start_previous3, const OptionalTensor& noise,
                                        bool clip_x_start, int64_t start_index, int64_t stream,
                                        const OptionalTensor& second_output, const OptionalTensor& gradient,
                                        const OptionalTensor& known, const OptionalTensor& mask,
                                        const OptionalTensor& update, bool reduces);
void sampler_step_(Tensor& x, const Tensor& model_output, const Tensor& table, const Tensor& step, const Tensor& seed,
                   const OptionalTensor& x_start, const OptionalTensor& x_start2, const OptionalTensor& x_start3,
                   const OptionalTensor& noise, bool clip_x_start, int64_t start_index, int64_t stream,
                   const OptionalTensor& second_output, const OptionalTensor& gradient, const OptionalTensor& known,
                   const OptionalTensor& mask, const OptionalTensor& update, bool reduces);

// forward_diffusion.cpp
Tensor q_sample(const Tensor& x_start, const Tensor& t, const Tensor& table, const OptionalTensor& noise,
                const OptionalTensor& seed, const OptionalTensor& flip, bool normalize, double offset_noise_strength,
                at::ScalarType dtype, bool channels_last);
std::tuple<Tensor, Tensor, Tensor> diffusion_loss(const Tensor& model_output, const Tensor& x_start, const Tensor& t,
                                                  const Tensor& table, const OptionalTensor& noise,
                                                  const OptionalTensor& seed, const OptionalTensor& flip,
                                                  bool normalize, double offset_noise_strength, bool with_gradient);
Tensor diffusion_loss_backward(const Tensor& error, const Tensor& factor, const Tensor& dloss);

// variational_bound.cpp
std::tuple<Tensor, Tensor, Tensor, Tensor> variational_bound(
    const Tensor& model_output, const Tensor& x_start, const Tensor& t, const Tensor& table,
    const OptionalTensor& noise, const OptionalTensor& seed, const OptionalTensor& flip, bool normalize,
    double offset_noise_strength, bool clip_x_start, bool detach_mean, double min_probability, bool with_gradient);
Tensor variational_bound_backward(const Tensor& gradient, const Tensor& factor, const Tensor& dloss);

// adam_step.cpp
std::tuple<Tensor, Tensor> adam_step(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                                     at::TensorList exp_avg_sqs, at::TensorList steps, at::TensorList averages,
                                     at::IntArrayRef averaged, at::TensorList copies, at::IntArrayRef copied,
                                     at::TensorList rates, at::IntArrayRef rated, at::IntArrayRef counts,
                                     at::ArrayRef<double> numbers, std::optional<double> max_grad_norm,
                                     const OptionalTensor& grad_scale, const OptionalTensor& average_weight);

// norm_silu.cpp
std::tuple<Tensor, Tensor> norm_silu(const Tensor& x, const Tensor& gain, const OptionalTensor& offset,
                                     const OptionalTensor& bias, const OptionalTensor& scale,
                                     const OptionalTensor& shift, const OptionalTensor& residual,
                                     const OptionalTensor& seed, int64_t groups, double eps, bool activation,
                                     double dropout_p);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_silu_backward(
    const Tensor& grad, const Tensor& x, const Tensor& statistics, const Tensor& gain, const OptionalTensor& offset,
    const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& seed,
    int64_t groups, bool activation, double dropout_p);

// norm_linear.cpp
std::tuple<Tensor, Tensor> norm_linear(const Tensor& x, const Tensor& gain, const Tensor& weight);
std::tuple<Tensor, Tensor, Tensor> norm_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& norms,
                                                        const Tensor& gain, const Tensor& weight, bool needs_x_or_gain,
                                                        bool needs_weight);
Tensor linear(const Tensor& x, const OptionalTensor& skip, const Tensor& weight, const OptionalTensor& bias,
              const OptionalTensor& residual);
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& x,
                                                           const OptionalTensor& skip, const Tensor& weight,
                                                           const OptionalTensor& bias, bool needs_x, bool needs_skip,
                                                           bool needs_weight, bool needs_bias);
Tensor linears(const Tensor& x, at::TensorList weights, at::TensorList biases);

// conv3x3.cpp
Tensor conv3x3(const Tensor& x, const OptionalTensor& skip, const Tensor& weight, const OptionalTensor& bias,
               const OptionalTensor& residual, bool upsampled);
std::tuple<Tensor, Tensor, Tensor, Tensor> conv3x3_backward(const Tensor& grad, const Tensor& x,
                                                            const OptionalTensor& skip, const Tensor& weight,
                                                            bool upsampled, std::array<bool, 3> needs);

// stem_conv.cpp
Tensor stem_conv(const Tensor& x, const OptionalTensor& x2, const OptionalTensor& x3, const Tensor& weight,
                 const OptionalTensor& bias);
std::tuple<Tensor, Tensor> stem_conv_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& x2,
                                              const OptionalTensor& x3, const Tensor& weight, bool needs_bias);

// strided_conv.cpp
Tensor strided_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t padding);
std::tuple<Tensor, Tensor, Tensor> strided_conv_gradients(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                          int64_t padding, std::array<bool, 3> needs);

// attention.cpp
Tensor attention(const Tensor& qkv, const Tensor& mem_kv, int64_t heads);
std::tuple<Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& qkv, const Tensor& mem_kv,
                                              int64_t heads);
Tensor attention_block(const Tensor& x, const Tensor& gain_in, const Tensor& weight_qkv, const Tensor& mem_kv,
                       const Tensor& weight, const Tensor& bias, const OptionalTensor& residual, int64_t heads);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_block_backward(
    const Tensor& grad, const Tensor& x, const Tensor& gain_in, const Tensor& weight_qkv, const Tensor& mem_kv,
    const Tensor& weight, const Tensor& bias, int64_t heads);
std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_attention_block(
    const Tensor& x, const OptionalTensor& gain, const OptionalTensor& offset, const Tensor& weight_qkv,
    const OptionalTensor& bias_qkv, const Tensor& weight, const OptionalTensor& bias, int64_t groups, double eps,
    int64_t heads, bool by_head, bool folded, bool residual, double output_scale, bool keep);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_attention_block_backward(
    const Tensor& grad, const Tensor& x, const OptionalTensor& gain, const OptionalTensor& offset,
    const Tensor& weight_qkv, const OptionalTensor& bias_qkv, const Tensor& weight, const Tensor& statistics,
    const Tensor& qkv, const Tensor& attended, int64_t groups, int64_t heads, bool by_head, bool folded, bool residual,
    double output_scale, bool wants_weights);

// linear_attention.cpp
std::tuple<Tensor, Tensor, Tensor> linear_attention(const Tensor& qkv, const Tensor& mem_kv, const Tensor& weight,
                                                    const Tensor& bias, const Tensor& gain,
                                                    const OptionalTensor& residual, int64_t heads);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_backward(const Tensor& grad, const Tensor& qkv,
                                                                             const Tensor& mem_kv, const Tensor& weight,
                                                                             const Tensor& bias, const Tensor& gain,
                                                                             const Tensor& statistics,
                                                                             const Tensor& sums, int64_t heads);
std::tuple<Tensor, Tensor, Tensor> linear_attention_block(const Tensor& x, const Tensor& gain_in,
                                                          const Tensor& weight_qkv, const Tensor& mem_kv,
                                                          const Tensor& weight, const Tensor& bias, const Tensor& gain,
                                                          const OptionalTensor& residual, int64_t heads);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_block_backward(
    const Tensor& grad, const Tensor& x, const Tensor& gain_in, const Tensor& weight_qkv, const Tensor& mem_kv,
    const Tensor& weight, const Tensor& bias, const Tensor& gain, const Tensor& statistics, const Tensor& sums,
    int64_t heads);

// resnet_block.cpp
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> resnet_block(
    const Tensor& x, const OptionalTensor& skip, const Tensor& weight1, const Tensor& bias1, const Tensor& gain1,
    const OptionalTensor& offset1, const OptionalTensor& scale, const OptionalTensor& shift, const Tensor& weight2,
    const Tensor& bias2, const Tensor& gain2, const OptionalTensor& offset2, const OptionalTensor& res_weight,
    const OptionalTensor& res_bias, const OptionalTensor& seed, int64_t groups, double eps, double dropout_p,
    bool keep);
std::vector<Tensor> resnet_block_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& skip,
                                          const Tensor& weight1, const Tensor& gain1, const OptionalTensor& offset1,
                                          const OptionalTensor& scale, const OptionalTensor& shift,
                                          const Tensor& weight2, const Tensor& gain2, const OptionalTensor& offset2,
                                          const OptionalTensor& res_weight, const OptionalTensor& seed,
                                          const Tensor& y1, const Tensor& statistics1, const Tensor& y2,
                                          const Tensor& statistics2, int64_t groups, double eps, double dropout_p,
                                          bool needs_dx);

// preactivation_block.cpp
std::tuple<Tensor, Tensor, Tensor, Tensor> preactivation_block(
    const Tensor& x, const OptionalTensor& skip, const Tensor& weight1, const OptionalTensor& bias1,
    const Tensor& gain1, const Tensor& offset1, const OptionalTensor& embedding, const OptionalTensor& scale,
    const OptionalTensor& shift, const Tensor& weight2, const OptionalTensor& bias2, const Tensor& gain2,
    const Tensor& offset2, const OptionalTensor& res_weight, const OptionalTensor& res_bias, const OptionalTensor& seed,
    int64_t groups1, int64_t groups2, double eps1, double eps2, double output_scale, double dropout_p, bool keep);
std::vector<Tensor> preactivation_block_backward(
    const Tensor& grad, const Tensor& x, const OptionalTensor& skip, const Tensor& weight1, const Tensor& gain1,
    const Tensor& offset1, const OptionalTensor& embedding, const OptionalTensor& scale, const OptionalTensor& shift,
    const Tensor& weight2, const Tensor& gain2, const Tensor& offset2, const OptionalTensor& res_weight,
    const OptionalTensor& seed, const Tensor& statistics1, const Tensor& y1, const Tensor& statistics2, int64_t groups1,
    int64_t groups2, double output_scale, double dropout_p, bool needs_dx);

}  // namespace ddpm_fast::cpu
