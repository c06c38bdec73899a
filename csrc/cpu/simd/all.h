// Every kernel, for one instruction set.
#pragma once

#include "../kernels.h"
#include "gemm.h"
#include "parallel.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr Kernels make_kernels(const char* name) { return {name, kLanes}; }

}  // namespace ddpm_fast::DDPM_FAST_ISA
