// Philox and Box-Muller (core/philox.h) for the noise of a tile. The compiler vectorises the loops.
#pragma once

#include "core/philox.h"
#include "noise.h"
#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA::noise {

constexpr int kChunk = 64;  // blocks of four elements; their words stay in the first-level cache between rounds

// Rounds outside, blocks inside: the compiler finds the cheap widening multiplication only in so small a loop.
inline void normal_chunk(float* z, const NoiseIndex& index, uint32_t first_block, int blocks) {
  alignas(64) uint32_t x0[kChunk], x1[kChunk], x2[kChunk], x3[kChunk];
  for (int i = 0; i < kChunk; ++i) {
    const PhiloxWords words = philox_counter(index, first_block + static_cast<uint32_t>(i));
    x0[i] = words.x0;
    x1[i] = words.x1;
    x2[i] = words.x2;
    x3[i] = words.x3;
  }
  PhiloxKey key = index.key;
  for (int round = 0; round < kPhiloxRounds; ++round, key = next_round_key(key)) {
    for (int i = 0; i < kChunk; ++i) {
      const PhiloxWords words = philox_round({x0[i], x1[i], x2[i], x3[i]}, key);
      x0[i] = words.x0;
      x1[i] = words.x1;
      x2[i] = words.x2;
      x3[i] = words.x3;
    }
  }
  for (int i = 0; i < blocks; ++i) {
    const Normal4 normals = normal4({x0[i], x1[i], x2[i], x3[i]});
    z[4 * i] = normals.z0;
    z[4 * i + 1] = normals.z1;
    z[4 * i + 2] = normals.z2;
    z[4 * i + 3] = normals.z3;
  }
}

inline void normal(float* z, const NoiseIndex& index, int64_t first, int64_t count) {
  const int64_t blocks = ceil_div(count, 4);
  for (int64_t done = 0; done < blocks; done += kChunk) {
    const int chunk = static_cast<int>(min<int64_t>(kChunk, blocks - done));
    normal_chunk(z + 4 * done, index, static_cast<uint32_t>(first / 4 + done), chunk);
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA::noise
