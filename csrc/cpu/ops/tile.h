// Tiles of samples, in which the element-wise operators compute in float32.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/kernels.h"

namespace ddpm_fast {

constexpr int64_t kTile = 2048;              // elements; a few tiles fit the first-level cache. A multiple of 4.
constexpr int64_t kElementsPerTask = 16384;  // less work than this does not pay for waking a thread

// Work is cut into tiles the same way whatever the number of threads, so results do not depend on it.
struct Tiling {
  int64_t per_sample, total, grain;

  Tiling(int64_t batch, int64_t elements)
      : per_sample((elements + kTile - 1) / kTile),
        total(batch * per_sample),
        grain(std::max<int64_t>(1, kElementsPerTask / std::clamp<int64_t>(elements, 1, kTile))) {}
};

// Between float32 and a tensor's type.
inline void convert(float* to, const float* from, int64_t count) { std::copy(from, from + count, to); }
inline void convert(float* to, const c10::Half* from, int64_t count) {
  kernels().convert.from_half(to, reinterpret_cast<const uint16_t*>(from), count);
}
inline void convert(float* to, const c10::BFloat16* from, int64_t count) {
  kernels().convert.from_bfloat16(to, reinterpret_cast<const uint16_t*>(from), count);
}
inline void convert(float* to, const uint8_t* from, int64_t count) { kernels().convert.from_byte(to, from, count); }
inline void convert(c10::Half* to, const float* from, int64_t count) {
  kernels().convert.to_half(reinterpret_cast<uint16_t*>(to), from, count);
}
inline void convert(c10::BFloat16* to, const float* from, int64_t count) {
  kernels().convert.to_bfloat16(reinterpret_cast<uint16_t*>(to), from, count);
}

}  // namespace ddpm_fast
