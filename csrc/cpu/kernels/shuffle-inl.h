// Rearrangements of vectors in registers.
#pragma once

#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// Lane l is f(l), for constants of the compiler; indices from kLanes on mean the second vector.
template <typename F>
DDPM_FAST_INLINE constexpr vi lanes_of(F f) {
#if DDPM_FAST_LANES == 16
  return vi{f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)};
#elif DDPM_FAST_LANES == 8
  return vi{f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)};
#else
  return vi{f(0), f(1), f(2), f(3)};
#endif
}

// One step of a transposition: rows a and b = a + D exchange the lanes in which the bit D of row and lane differ.
template <int D>
DDPM_FAST_INLINE void exchange(vf& a, vf& b) {
  constexpr auto upper = [](int l) constexpr { return l & D ? kLanes + l - D : l; };
  constexpr auto lower = [](int l) constexpr { return l & D ? kLanes + l : l + D; };
  const vf x = shuffle(a, b, lanes_of(upper)), y = shuffle(a, b, lanes_of(lower));
  a = x;
  b = y;
}

template <int D>
DDPM_FAST_INLINE void transpose_from(vf (&rows)[kLanes]) {
  if constexpr (D < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & D) == 0) exchange<D>(rows[i], rows[i + D]);
    }
    transpose_from<2 * D>(rows);
  }
}

// rows[i] lane l becomes rows[l] lane i.
DDPM_FAST_INLINE void transpose(vf (&rows)[kLanes]) { transpose_from<1>(rows); }

}  // namespace ddpm_fast::DDPM_FAST_ISA
