// `Kernels`, the table of this folder's functions; each instruction set has one. Free of torch.
#pragma once

#include "adam_step.h"
#include "attention.h"
#include "conv3x3.h"
#include "convert.h"
#include "forward_diffusion.h"
#include "joined_norm.h"
#include "linear.h"
#include "linear_attention.h"
#include "noise.h"
#include "norm_linear.h"
#include "norm_silu.h"
#include "sampler_step.h"
#include "stem_conv.h"
#include "strided_conv.h"
#include "variational_bound.h"

namespace ddpm_fast {

struct Kernels {
  const char* name;
  int lanes;   // floats of a vector
  bool pairs;  // has bfloat16 products, see pairs-inl.h; a kernel's `narrow` is true only then
  Conv3x3Kernels conv3x3;
  NormSiluKernels norm_silu;
  JoinedNormKernels joined_norm;
  LinearKernels linear;
  NormLinearKernels norm_linear;
  AttentionKernels attention;
  LinearAttentionKernels linear_attention;
  StemConvKernels stem_conv;
  StridedConvKernels strided_conv;
  NoiseKernels noise;
  ConvertKernels convert;
  ForwardDiffusionKernels forward_diffusion;
  SamplerStepKernels sampler_step;
  VariationalBoundKernels variational_bound;
  AdamStepKernels adam_step;
};

// The table of the widest instruction set that this processor has, or of the one chosen by `use_instruction_set`.
const Kernels& kernels();

// For tests: the tables of this build are "avx512_bf16", "avx512", "avx2" (on x86-64) and "portable". Returns the name
// before, or null where the build has no such table or the processor could not run it.
const char* use_instruction_set(const char* name);

}  // namespace ddpm_fast
