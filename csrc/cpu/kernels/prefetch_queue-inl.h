// Memory that a thread will read or write a while from now. Products ask for it line by line (gemm-inl.h): an
// instruction that asks for a line waits where about ten others are on their way, for as long as one of them takes. A
// dozen at once between two products were a tenth of a convolution's time on an Ice Lake. What still waits when the
// products end is not asked for.
#pragma once

#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

struct PrefetchQueue {
  struct Lines {
    const float *first, *end;
    bool to_write;
  };
  static constexpr int64_t kMost = 128;
  static constexpr int kAtATime = 2;  // lines, for a step of a product
  int64_t begin = 0, end = 0;
  bool twice = false;  // in a step, where steps are too few for what waits
  Lines waiting[kMost];

  PrefetchQueue() {}  // what waits is written before it is read

  DDPM_FAST_NOINLINE void add(const float* from, int64_t floats, bool to_write = false) {
    if (end == kMost) ask_for_all();
    if (floats > 0) waiting[end++] = {from, from + floats, to_write};
  }
  DDPM_FAST_INLINE void add_to_write(const float* to, int64_t floats) { add(to, floats, true); }

  // Lines for `steps` steps, at most, that are no longer waiting.
  DDPM_FAST_INLINE Lines take(int64_t steps) {
    if (begin == end) return {};
    const int64_t count = steps * (twice ? 2 * kAtATime : kAtATime);
    Lines& next = waiting[begin];
    const Lines taken = {next.first, min(next.end, next.first + count * kCacheLine), next.to_write};
    next.first = taken.end;
    if (taken.end == next.end && ++begin == end) begin = end = 0;
    return taken;
  }

  // Where no product asks.
  DDPM_FAST_NOINLINE void ask_for_all() {
    for (; begin < end; ++begin) {
      const Lines& lines = waiting[begin];
      const int64_t floats = lines.end - lines.first;
      lines.to_write ? prefetch_to_write(lines.first, floats) : prefetch(lines.first, floats);
    }
    begin = end = 0;
  }
};

}  // namespace ddpm_fast::DDPM_FAST_ISA
