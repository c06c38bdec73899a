// Every kernel, for one instruction set.
#pragma once

#include "attention_block-inl.h"
#include "conv3x3_forward-inl.h"
#include "conv3x3_gradient-inl.h"
#include "kernels.h"
#include "linear-inl.h"
#include "linear_attention_backward-inl.h"
#include "norm_linear-inl.h"
#include "norm_silu-inl.h"
#include "stem_conv-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr Kernels make_kernels(const char* name) {
  return {
      .name = name,
      .lanes = kLanes,
      .conv3x3 = {conv3x3_forward, conv3x3_weight_gradient},
      .norm_silu = {norm_silu_forward, norm_silu_backward},
      .linear = {linear_forward, linears_forward, linear_data_gradient, linear_weight_gradient},
      .norm_linear = {norm_linear_forward, norm_linear_data_gradient},
      .attention = {attention::forward, attention::backward, attention::block_forward, attention::block_backward},
      .linear_attention = {linear_attention::forward, linear_attention::backward},
      .stem = {stem_forward, stem_weight_gradient},
  };
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
