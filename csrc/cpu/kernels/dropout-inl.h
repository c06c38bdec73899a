// The factors by which dropout keeps or drops the elements of a map, by the words of Philox.
#pragma once

#include "norm_silu.h"
#include "philox-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr int kNormMaskSlot = 4;        // of thread_scratch, beside those of norm_silu-inl.h
constexpr uint32_t kStreamDropout = 6;  // STREAM_DROPOUT of ddpm_fast/noise.py

DDPM_FAST_INLINE NoiseIndex dropout_index(const Dropout& dropout, int64_t sample) {
  return {
      .key = philox_key(dropout.seed), .sample = static_cast<uint32_t>(sample), .step = 0, .stream = kStreamDropout};
}

// The factors of elements by their words; the threshold is in [1, 2^32].
DDPM_FAST_INLINE vf factors_of(const Dropout& dropout, vu words) {
  const vu last_dropped = vu{} + static_cast<uint32_t>(dropout.keep_threshold - 1);
  return select(words > last_dropped, splat(dropout.keep_scale), vf{});
}

// Dropout's factors of elements [begin, begin + count) of a sample, `step` floats apart: keep_scale where an element is
// kept and 0 where not. Elements are counted in C, H, W order, four to a Philox block.
DDPM_FAST_INLINE void fill_keep_run(const Dropout& dropout, int64_t sample, int64_t begin, int64_t count, float* mask,
                                    int64_t step) {
  const NoiseIndex index = dropout_index(dropout, sample);
  const int64_t end = begin + count;
  if (count < kPhiloxBlocks) {  // a chunk of blocks would take longer
    for (int64_t block = begin / 4; 4 * block < end; ++block) {
      const PhiloxWords four = philox4x32(philox_counter(index, static_cast<uint32_t>(block)), index.key);
      const uint32_t words[4] = {four.x0, four.x1, four.x2, four.x3};
      for (int64_t element = max(begin, 4 * block); element < min(end, 4 * block + 4); ++element) {
        mask[(element - begin) * step] = words[element % 4] >= dropout.keep_threshold ? dropout.keep_scale : 0.0f;
      }
    }
    return;
  }
  for (int64_t first = begin / 4; 4 * first < end; first += kPhiloxBlocks) {
    const PhiloxChunk words(index, static_cast<uint32_t>(first), 1);
    alignas(64) float factors[4][kPhiloxBlocks];
    for (int i = 0; i < 4; ++i) {
      for (int n = 0; n < kPhiloxBlocks; n += kLanes) store(factors[i] + n, factors_of(dropout, words.load(i, n)));
    }
    const int64_t from = max(begin, 4 * first), to = min(end, 4 * (first + kPhiloxBlocks));
    for (int64_t element = from; element < to; ++element) {
      const int64_t place = element - 4 * first;
      mask[(element - begin) * step] = factors[place % 4][place / 4];
    }
  }
}

// Dropout's factors of pixels [first, first + rows) of a sample, (rows, C). Where blocks lie within channels, those of
// many channels are made at once.
DDPM_FAST_NOINLINE const float* fill_keep(const Dropout& dropout, int64_t sample, int64_t first, int64_t rows,
                                          int64_t N, int64_t C) {
  float* mask = thread_scratch(kNormMaskSlot, rows * C);
  if (first % 4 != 0 || rows % 4 != 0 || N % 4 != 0) {
    for (int64_t c = 0; c < C; ++c) fill_keep_run(dropout, sample, c * N + first, rows, mask + c, C);
    return mask;
  }
  const NoiseIndex index = dropout_index(dropout, sample);
  for (int64_t row = 0; row < rows; row += 4) {
    for (int64_t c = 0; c < C; c += kPhiloxBlocks) {
      const PhiloxChunk words(index, static_cast<uint32_t>((c * N + first + row) / 4), static_cast<uint32_t>(N / 4));
      const int64_t count = min<int64_t>(kPhiloxBlocks, C - c);
      for (int i = 0; i < 4; ++i) {
        float* to = mask + (row + i) * C + c;
        for (int64_t n = 0; n < count; n += kLanes) {
          store_upto(to + n, factors_of(dropout, words.load(i, n)), count - n);
        }
      }
    }
  }
  return mask;
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
