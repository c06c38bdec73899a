// Conversions between float32 and half, bfloat16 and bytes: the kernels of convert-inl.h. Free of torch.
#pragma once

#include <stdint.h>

namespace ddpm_fast {

// Half and bfloat16 are passed as their bits. Rounding is to nearest, ties to even; NaN stays NaN.
struct ConvertKernels {
  void (*from_half)(float* to, const uint16_t* from, int64_t count);
  void (*from_bfloat16)(float* to, const uint16_t* from, int64_t count);
  void (*from_byte)(float* to, const uint8_t* from, int64_t count);  // from / 255
  void (*to_half)(uint16_t* to, const float* from, int64_t count);
  void (*to_bfloat16)(uint16_t* to, const float* from, int64_t count);
};

}  // namespace ddpm_fast
