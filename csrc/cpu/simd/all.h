// Every kernel, for one instruction set.
#pragma once

#include "../kernels.h"
#include "attention_block.h"
#include "gemm.h"
#include "linear_attention_backward.h"
#include "parallel.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr Kernels make_kernels(const char* name) {
  return {name, kLanes,
          {attention::forward, attention::backward, attention::block_forward, attention::block_backward},
          {linear_attention::forward, linear_attention::backward}};
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
