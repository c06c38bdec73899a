// Philox and Box-Muller (core/philox.h) for the noise of a tile. The compiler vectorises the loops.
#pragma once

#include "noise.h"
#include "philox-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA::noise {

inline void normal_chunk(float* z, const NoiseIndex& index, uint32_t first_block, int blocks) {
  const PhiloxChunk words(index, first_block, 1);
  for (int i = 0; i < blocks; ++i) {
    const Normal4 normals = normal4({words.x[0][i], words.x[1][i], words.x[2][i], words.x[3][i]});
    z[4 * i] = normals.z0;
    z[4 * i + 1] = normals.z1;
    z[4 * i + 2] = normals.z2;
    z[4 * i + 3] = normals.z3;
  }
}

inline void normal(float* z, const NoiseIndex& index, int64_t first, int64_t count) {
  const int64_t blocks = ceil_div(count, 4);
  for (int64_t done = 0; done < blocks; done += kPhiloxBlocks) {
    const int chunk = static_cast<int>(min<int64_t>(kPhiloxBlocks, blocks - done));
    normal_chunk(z + 4 * done, index, static_cast<uint32_t>(first / 4 + done), chunk);
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA::noise
