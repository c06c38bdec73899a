// The table of all native CPU kernels (kernels.h), compiled for one instruction set.
#pragma once

#include "adam_step-inl.h"
#include "conv3x3_phases-inl.h"
#include "convert-inl.h"
#include "folded_attention_block-inl.h"
#include "forward_diffusion-inl.h"
#include "joined_norm-inl.h"
#include "kernels.h"
#include "linear_attention_backward-inl.h"
#include "linear_pairs-inl.h"
#include "noise-inl.h"
#include "norm_linear_pairs-inl.h"
#include "norm_planes-inl.h"
#include "sampler_step-inl.h"
#include "stem_conv-inl.h"
#include "strided_conv-inl.h"
#include "variational_bound-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr Kernels make_kernels(const char* name, bool pairs = false) {
  return {
      .name = name,
      .lanes = kLanes,
      .pairs = pairs,
      .conv3x3 = {.forward = conv3x3_forward, .weight_gradient = conv3x3_weight_gradient},
      .norm_silu = {.forward = norm_silu_forward,
                    .backward = norm_silu_backward,
                    .planes_forward = norm_planes_forward,
                    .planes_backward = norm_planes_backward},
      .joined_norm = {.forward = joined_norm_forward, .backward = joined_norm_backward},
      .linear = {.forward = any_linear_forward,
                 .forward_many = linears_forward,
                 .data_gradient = any_linear_data_gradient,
                 .weight_gradient = linear_weight_gradient},
      .norm_linear = {.forward = norm_linear_forward,
                      .backward = norm_linear_backward,
                      .forward_by_pairs = kHasPairs ? norm_linear_forward_by_pairs : nullptr,
                      .backward_by_pairs = kHasPairs ? norm_linear_backward_by_pairs : nullptr},
      .attention = {.forward = attention::forward,
                    .backward = attention::backward,
                    .block_forward = attention::block_forward,
                    .block_backward = attention::block_backward,
                    .group_block_forward = attention::group_block_forward,
                    .group_block_backward = attention::group_block_backward},
      .linear_attention = {.forward = linear_attention::forward, .backward = linear_attention::backward},
      .stem_conv = {.forward = stem_conv_forward, .weight_gradient = stem_conv_weight_gradient},
      .strided_conv = {.forward = strided_conv_forward, .gradient = strided_conv_gradient},
      .noise = {.normal = noise::normal},
      .convert = {.from_half = convert::from_half,
                  .from_bfloat16 = convert::from_bfloat16,
                  .from_byte = convert::from_byte,
                  .to_half = convert::to_half,
                  .to_bfloat16 = convert::to_bfloat16},
      .forward_diffusion = {.combine = forward_diffusion::combine,
                            .subtract = forward_diffusion::subtract,
                            .scale = forward_diffusion::scale},
      .sampler_step = {.step = sampler_step::step,
                       .step_extended = sampler_step::step_extended,
                       .guidance_sums = sampler_step::guidance_sums,
                       .step_guided = sampler_step::step_guided,
                       .scale_noise = sampler_step::scale_noise},
      .variational_bound = {.forward = variational_bound::forward},
      .adam_step = {.squares = adam_step::squares, .update = adam_step::update, .move = adam_step::move},
  };
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
