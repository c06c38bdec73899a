// Registers the operators of ops.h with torch. All are registered here, since torch/library.h takes a compiler as long
// as two files of operators do.
#include <torch/library.h>

#include "ops.h"

namespace ddpm_fast::cpu {

TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) {
  m.impl("fill_normal_", &fill_normal_);
  m.impl("sampler_step", &sampler_step);
  m.impl("sampler_step_", &sampler_step_);
  m.impl("native_q_sample", &q_sample);
  m.impl("native_diffusion_loss", &diffusion_loss);
  m.impl("native_diffusion_loss_backward", &diffusion_loss_backward);
  m.impl("native_variational_bound", &variational_bound);
  m.impl("native_variational_bound_backward", &variational_bound_backward);
  m.impl("native_adam_step", &adam_step);
  m.impl("native_norm_silu", &norm_silu);
  m.impl("native_norm_silu_backward", &norm_silu_backward);
  m.impl("native_norm_linear", &norm_linear);
  m.impl("native_norm_linear_backward", &norm_linear_backward);
  m.impl("native_linear", &linear);
  m.impl("native_linear_backward", &linear_backward);
  m.impl("native_linears", &linears);
  m.impl("native_conv3x3", &conv3x3);
  m.impl("native_conv3x3_backward", &conv3x3_backward);
  m.impl("native_stem_conv", &stem_conv);
  m.impl("native_stem_conv_backward", &stem_conv_backward);
  m.impl("native_strided_conv", &strided_conv);
  m.impl("native_strided_conv_gradients", &strided_conv_gradients);
  m.impl("native_attention", &attention);
  m.impl("native_attention_backward", &attention_backward);
  m.impl("native_attention_block", &attention_block);
  m.impl("native_attention_block_backward", &attention_block_backward);
  m.impl("native_group_norm_attention_block", &group_norm_attention_block);
  m.impl("native_group_norm_attention_block_backward", &group_norm_attention_block_backward);
  m.impl("native_linear_attention", &linear_attention);
  m.impl("native_linear_attention_backward", &linear_attention_backward);
  m.impl("native_linear_attention_block", &linear_attention_block);
  m.impl("native_linear_attention_block_backward", &linear_attention_block_backward);
  m.impl("native_resnet_block", &resnet_block);
  m.impl("native_resnet_block_backward", &resnet_block_backward);
  m.impl("native_preactivation_block", &preactivation_block);
  m.impl("native_preactivation_block_backward", &preactivation_block_backward);
}

}  // namespace ddpm_fast::cpu
