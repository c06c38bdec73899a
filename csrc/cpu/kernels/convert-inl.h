// Half and bfloat16 by integer operations (Dukhan's FP16 library, as in c10/util/Half.h), so that every instruction set
// gives the same bits and the compiler vectorises the loops.
#pragma once

#include "convert.h"
#include "core/philox.h"
#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA::convert {

DDPM_FAST_INLINE float half_to_float(uint16_t half) {
  const uint32_t shifted = static_cast<uint32_t>(half) << 16, magnitude = shifted + shifted;
  const float normal = float_of((magnitude >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = float_of((magnitude >> 17) | (126u << 23)) - 0.5f;
  return float_of((shifted & 0x80000000u) | (magnitude < (1u << 27) ? bits_of(subnormal) : bits_of(normal)));
}

DDPM_FAST_INLINE uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits + bits;
  // The product turns numbers beyond half's range into infinity; adding 2^k rounds to half's bits at that exponent.
  const float scaled = (float_of(bits & 0x7FFFFFFFu) * 0x1.0p+112f) * 0x1.0p-110f;
  const uint32_t exponent = magnitude & 0xFF000000u, bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const uint32_t rounded = bits_of(float_of((bias >> 1) + 0x07800000u) + scaled);
  const uint32_t finite = ((rounded >> 13) & 0x7C00u) + (rounded & 0x0FFFu);
  return static_cast<uint16_t>(((bits & 0x80000000u) >> 16) | (magnitude > 0xFF000000u ? 0x7E00u : finite));
}

DDPM_FAST_INLINE uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value), rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

inline void from_half(float* to, const uint16_t* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = half_to_float(from[i]);
}

inline void from_bfloat16(float* to, const uint16_t* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = float_of(static_cast<uint32_t>(from[i]) << 16);
}

inline void from_byte(float* to, const uint8_t* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]) / 255.0f;
}

inline void to_half(uint16_t* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = float_to_half(from[i]);
}

inline void to_bfloat16(uint16_t* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = float_to_bfloat16(from[i]);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA::convert
