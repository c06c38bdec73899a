// The kernels of simd/, which are compiled once for every instruction set, as tables of functions; free of torch.
#pragma once

#include "attention.h"
#include "linear_attention.h"

namespace ddpm_fast {

struct Kernels {
  const char* name;
  int lanes;  // floats of a vector
  AttentionKernels attention;
  LinearAttentionKernels linear_attention;
};

// The table of the widest instruction set that this processor has, or of the one chosen by `use_instruction_set`.
const Kernels& kernels();

// For tests: the tables of this build are "avx512", "avx2" (both on x86-64) and "portable". Returns the name before, or
// null where the build has no such table or the processor could not run it.
const char* use_instruction_set(const char* name);

}  // namespace ddpm_fast
