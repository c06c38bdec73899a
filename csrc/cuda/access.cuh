// Conversions, 16-byte accesses and the grid that both kernels use.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/philox.h"

namespace ddpm_fast {

constexpr int kThreads = 128;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// N elements from a 16-byte aligned address.
template <int N, typename T>
__device__ __forceinline__ void load_wide(float (&to)[N], const T* from) {
  constexpr int kPack = sizeof(uint4) / sizeof(T);
  static_assert(N % kPack == 0);
#pragma unroll
  for (int i = 0; i < N; i += kPack) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from + i);
    T values[kPack];
    memcpy(values, &bits, sizeof(bits));
#pragma unroll
    for (int j = 0; j < kPack; ++j) to[i + j] = to_float(values[j]);
  }
}

// In PTX, since the compiler splits a plain assignment into four stores where it likes.
template <int N, typename T>
__device__ __forceinline__ void store_wide(T* to, const float (&from)[N]) {
  constexpr int kPack = sizeof(uint4) / sizeof(T);
  static_assert(N % kPack == 0);
#pragma unroll
  for (int i = 0; i < N; i += kPack) {
    T values[kPack];
#pragma unroll
    for (int j = 0; j < kPack; ++j) values[j] = from_float<T>(from[i + j]);
    uint4 bits;
    memcpy(&bits, values, sizeof(bits));
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to + i)), "r"(bits.x),
                 "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
  }
}

// Noise of elements [first, first + N) of a sample; both are multiples of 4.
template <int N>
__device__ __forceinline__ void generate(float (&eps)[N], const NoiseIndex& index, int64_t first) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const Normal4 normals = normal4(index, static_cast<uint32_t>((first + i) / 4));
    eps[i] = normals.z0;
    eps[i + 1] = normals.z1;
    eps[i + 2] = normals.z2;
    eps[i + 3] = normals.z3;
  }
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// x over the units of a sample, y over the samples; kernels loop with the grid's stride over the rest.
inline dim3 make_grid(int64_t batch, int64_t elements, int per_thread) {
  const int64_t units = (elements + per_thread - 1) / per_thread;
  const int64_t blocks = (units + kThreads - 1) / kThreads;
  return dim3(static_cast<unsigned>(std::min<int64_t>(blocks, 1 << 20)),
              static_cast<unsigned>(std::min<int64_t>(batch, 65535)));
}

}  // namespace ddpm_fast
