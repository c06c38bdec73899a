// Half and bfloat16 by integer operations (Dukhan's FP16 library, as in c10/util/Half.h), so that every instruction set
// gives the same bits. They load and store as vectors of float32.
#pragma once

#include "convert.h"
#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// Elements of a map that is not float32.
struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

typedef uint16_t vh __attribute__((vector_size(DDPM_FAST_LANES * 2)));
typedef uint16_t vh_unaligned __attribute__((vector_size(DDPM_FAST_LANES * 2), aligned(2), may_alias));

DDPM_FAST_INLINE vf float_of(vu bits) {
  vf value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
DDPM_FAST_INLINE vu bits_of(vf value) {
  vu bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// The instructions by the assembler: gcc 12 extends and narrows vectors in halves, and intrinsics need headers.
#if defined(DDPM_FAST_X86)
DDPM_FAST_INLINE vu extended(vh low) {
  vu wide;
  __asm__("vpmovzxwd %1, %0" : "=v"(wide) : "vm"(low));
  return wide;
}
DDPM_FAST_INLINE vf widened(vh half, Half) {
  vf value;
  __asm__("vcvtph2ps %1, %0" : "=v"(value) : "vm"(half));
  return value;
}
DDPM_FAST_INLINE vh narrowed(vf value, Half) {
  // The instruction keeps the payload of a NaN.
  const vf canonical = value == value ? value : float_of((bits_of(value) & 0x80000000u) | 0x7FC00000u);
  vh half;
  __asm__("vcvtps2ph $0, %1, %0" : "=v"(half) : "v"(canonical));  // 0: to the nearest, ties to even
  return half;
}
#else
DDPM_FAST_INLINE vu extended(vh low) { return __builtin_convertvector(low, vu); }
DDPM_FAST_INLINE vf widened(vh half, Half) {
  const vu shifted = extended(half) << 16, magnitude = shifted + shifted;
  const vf normal = float_of((magnitude >> 4) + (0xE0u << 23)) * splat(0x1.0p-112f);
  const vf subnormal = float_of((magnitude >> 17) | (126u << 23)) - splat(0.5f);
  return float_of((shifted & 0x80000000u) | bits_of(magnitude < (1u << 27) ? subnormal : normal));
}

DDPM_FAST_INLINE vh narrowed(vf value, Half) {
  const vu bits = bits_of(value), magnitude = bits + bits;
  // The product turns numbers beyond half's range into infinity; adding 2^k rounds to half's bits at that exponent.
  const vf scaled = (float_of(bits & 0x7FFFFFFFu) * splat(0x1.0p+112f)) * splat(0x1.0p-110f);
  const vu exponent = magnitude & 0xFF000000u, least = vu{} + 0x71000000u;
  const vu bias = exponent < least ? least : exponent;
  const vu rounded = bits_of(float_of((bias >> 1) + 0x07800000u) + scaled);
  const vu finite = ((rounded >> 13) & 0x7C00u) + (rounded & 0x0FFFu);
  return __builtin_convertvector(((bits & 0x80000000u) >> 16) | (magnitude > 0xFF000000u ? vu{} + 0x7E00u : finite),
                                 vh);
}

#endif

#if defined(DDPM_FAST_X86) && DDPM_FAST_LANES == 16
DDPM_FAST_INLINE vh low_halves(vu wide) {
  vh low;
  __asm__("vpmovdw %1, %0" : "=v"(low) : "v"(wide));
  return low;
}
#elif defined(DDPM_FAST_X86)
DDPM_FAST_INLINE vh low_halves(vu wide) {
  vh low;
  __asm__("vextracti128 $1, %1, %0\n\tvpackusdw %0, %x1, %0" : "=&x"(low) : "x"(wide));
  return low;
}
#else
DDPM_FAST_INLINE vh low_halves(vu wide) { return __builtin_convertvector(wide, vh); }
#endif

DDPM_FAST_INLINE vf widened(vh bits, Bfloat16) { return float_of(extended(bits) << 16); }

DDPM_FAST_INLINE vh narrowed(vf value, Bfloat16) {
  const vu bits = bits_of(value), rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  return low_halves((value == value ? rounded : vu{} + 0x7FC00000u) >> 16);
}

// As the functions of floats in vec-inl.h; T is Half or Bfloat16.
template <typename T>
DDPM_FAST_INLINE vf load(const T* from) {
  return widened(static_cast<vh>(*reinterpret_cast<const vh_unaligned*>(from)), T{});
}
template <typename T>
DDPM_FAST_INLINE void store(T* to, vf value) {
  *reinterpret_cast<vh_unaligned*>(to) = narrowed(value, T{});
}
template <typename T>
DDPM_FAST_INLINE vf load_partial(const T* from, int64_t count) {
  vh bits = {};
  __builtin_memcpy(&bits, from, static_cast<unsigned long>(count) * 2);
  return widened(bits, T{});
}
template <typename T>
DDPM_FAST_INLINE void store_partial(T* to, vf value, int64_t count) {
  const vh bits = narrowed(value, T{});
  __builtin_memcpy(to, &bits, static_cast<unsigned long>(count) * 2);
}

namespace convert {

template <typename T>
DDPM_FAST_INLINE void widen(float* to, const uint16_t* from, int64_t count) {
  const T* elements = reinterpret_cast<const T*>(from);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(elements + i));
  if (i < count) store_partial(to + i, load_partial(elements + i, count - i), count - i);
}

template <typename T>
DDPM_FAST_INLINE void narrow(uint16_t* to, const float* from, int64_t count) {
  T* elements = reinterpret_cast<T*>(to);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(elements + i, load(from + i));
  if (i < count) store_partial(elements + i, load_partial(from + i, count - i), count - i);
}

inline void from_half(float* to, const uint16_t* from, int64_t count) { widen<Half>(to, from, count); }
inline void from_bfloat16(float* to, const uint16_t* from, int64_t count) { widen<Bfloat16>(to, from, count); }
inline void to_half(uint16_t* to, const float* from, int64_t count) { narrow<Half>(to, from, count); }
inline void to_bfloat16(uint16_t* to, const float* from, int64_t count) { narrow<Bfloat16>(to, from, count); }

inline void from_byte(float* to, const uint8_t* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]) / 255.0f;
}

}  // namespace convert

}  // namespace ddpm_fast::DDPM_FAST_ISA
