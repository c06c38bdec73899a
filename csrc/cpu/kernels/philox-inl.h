// Philox (core/philox.h) for many blocks at once. The compiler vectorises the loops.
#pragma once

#include "core/philox.h"
#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr int kPhiloxBlocks = 64;  // of four words; they stay in the first-level cache between rounds

// The words of kPhiloxBlocks blocks: x[w][i] is word w of block i.
struct PhiloxChunk {
  alignas(64) uint32_t x[4][kPhiloxBlocks];

  // Rounds outside, blocks inside: the compiler finds the cheap widening multiplication only in so small a loop.
  // Block i is number first + i·step.
  PhiloxChunk(const NoiseIndex& index, uint32_t first, uint32_t step) {
    for (int i = 0; i < kPhiloxBlocks; ++i) {
      const PhiloxWords words = philox_counter(index, first + static_cast<uint32_t>(i) * step);
      x[0][i] = words.x0;
      x[1][i] = words.x1;
      x[2][i] = words.x2;
      x[3][i] = words.x3;
    }
    PhiloxKey key = index.key;
    for (int round = 0; round < kPhiloxRounds; ++round, key = next_round_key(key)) {
      for (int i = 0; i < kPhiloxBlocks; ++i) {
        const PhiloxWords words = philox_round({x[0][i], x[1][i], x[2][i], x[3][i]}, key);
        x[0][i] = words.x0;
        x[1][i] = words.x1;
        x[2][i] = words.x2;
        x[3][i] = words.x3;
      }
    }
  }

  // Word w of blocks [i, i + kLanes).
  DDPM_FAST_INLINE vu load(int w, int64_t i) const {
    vu words;
    __builtin_memcpy(&words, x[w] + i, sizeof(words));
    return words;
  }
};

}  // namespace ddpm_fast::DDPM_FAST_ISA
