// Every kernel, for one instruction set.
#pragma once

#include "../kernels.h"
#include "conv3x3.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr Kernels make_kernels(const char* name) { return {name, kLanes, conv3x3_kernels}; }

}  // namespace ddpm_fast::DDPM_FAST_ISA
