// Matrix products of bfloat16 with sums in float32, by AVX512_BF16: twice the multiplications of float32 per second.
//
// The instruction multiplies pairs: each 32-bit lane has the terms k (low half) and k + 1 of one column. Factors are
// float32 and are rounded on the way: A row by row, B in the panels of gemm-inl.h, whose rows 2p and 2p + 1 become one
// row of pairs in place. A sum's order is that of its terms, whatever the number of threads.
#pragma once

#include "pack-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

#if defined(DDPM_FAST_BFLOAT16)
constexpr bool kHasPairs = true;

// By the assembler, since compilers disagree on the types of these intrinsics, and need a target of its own for them.
// The pair at `a`, broadcast: as a register of its own, gcc keeps two and spills sums.
DDPM_FAST_INLINE vf add_pair_products(vf sum, const uint32_t* a, vu b) {
  typedef uint32_t of_any_row __attribute__((aligned(2), may_alias));  // a row of pairs, or of a bfloat16 map
  __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*reinterpret_cast<const of_any_row*>(a)));
  return sum;
}
// `low` and then `high`, rounded to the nearest.
DDPM_FAST_INLINE vu narrow(vf low, vf high) {
  vu rounded;
  __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(rounded) : "v"(low), "v"(high));
  return rounded;
}
// The first and the second half's elements in turn.
DDPM_FAST_INLINE vu interleave(vu halves) {
  constexpr auto places = [](unsigned l) { return l | (l + 16) << 16; };
  const vu order = {places(0), places(1), places(2),  places(3),  places(4),  places(5),  places(6),  places(7),
                    places(8), places(9), places(10), places(11), places(12), places(13), places(14), places(15)};
  vu mixed;
  __asm__("vpermw %1, %2, %0" : "=v"(mixed) : "v"(halves), "v"(order));
  return mixed;
}
#else
constexpr bool kHasPairs = false;  // never called then, see Kernels::pairs

DDPM_FAST_INLINE vf add_pair_products(vf sum, const uint32_t*, vu) { return sum; }
DDPM_FAST_INLINE vu narrow(vf, vf) { return vu{}; }
DDPM_FAST_INLINE vu interleave(vu halves) { return halves; }
#endif

typedef uint32_t vu_unaligned __attribute__((vector_size(DDPM_FAST_LANES * 4), aligned(4), may_alias));
DDPM_FAST_INLINE vu load_pairs(const uint32_t* from) { return *reinterpret_cast<const vu_unaligned*>(from); }
DDPM_FAST_INLINE void store_pairs(uint32_t* to, vu value) { *reinterpret_cast<vu_unaligned*>(to) = value; }

DDPM_FAST_INLINE constexpr int64_t pairs_of(int64_t terms) { return ceil_div(terms, 2); }

// Pairs of a row of K terms, in whole vectors.
DDPM_FAST_INLINE constexpr int64_t narrowed_row(int64_t K) { return round_up(pairs_of(K), kLanes); }

// Room for A (M, K) as pairs in either order, in floats.
DDPM_FAST_INLINE constexpr int64_t narrowed_size(int64_t M, int64_t K) {
  return max(M * padded(narrowed_row(K)), pairs_of(K) * padded(round_up(M, kLanes)));
}

// Rows of A, (m, k) at a[m·row + k], as pairs to[m·stride + k/2]; whole vectors are written, zeros behind K.
inline void narrow_rows(const float* a, int64_t row, int64_t M, int64_t K, uint32_t* to, int64_t stride) {
  for (int64_t m = 0; m < M; ++m, a += row, to += stride) {
    for (int64_t k = 0; k < K; k += 2 * kLanes) {
      const vf high = K - k > kLanes ? load_upto(a + k + kLanes, K - k - kLanes) : vf{};
      store_pairs(to + k / 2, narrow(load_upto(a + k, K - k), high));
    }
  }
}

// Rows of terms, (k, m) at a[k·row + m], as rows of pairs: (k/2, m) at to[k/2·stride + m]. Whole vectors are written.
inline void narrow_terms(const float* a, int64_t row, int64_t M, int64_t K, uint32_t* to, int64_t stride) {
  for (int64_t k = 0; k < K; k += 2, a += 2 * row, to += stride) {
    for (int64_t m = 0; m < M; m += kLanes) {
      const vf next = k + 1 < K ? load_upto(a + row + m, M - m) : vf{};
      store_pairs(to + m, interleave(narrow(load_upto(a + m, M - m), next)));
    }
  }
}

// Panels of B, packed as float32, to pairs in place: a panel keeps its address, and its pairs lie at its beginning.
DDPM_FAST_NOINLINE void narrow_panels(float* packed, int64_t K, int64_t N) {
  for (int64_t p = 0; p < panels(N); ++p) {
    float* panel = packed + p * K * kPanel;
    uint32_t* to = reinterpret_cast<uint32_t*>(panel);
    for (int64_t k = 0; k < K; k += 2, to += kPanel) {
      const float *first = panel + k * kPanel, *second = first + kPanel;
      const bool last = k + 1 == K;
      const vu left = interleave(narrow(load(first), last ? vf{} : load(second)));
      const vu right = interleave(narrow(load(first + kLanes), last ? vf{} : load(second + kLanes)));
      store_pairs(to, left);
      store_pairs(to + kLanes, right);
    }
  }
}

// Panels [first, last) by pack_columns and narrow_panels, with half of the transposing. rows: memory of
// narrowed_size(kPanel, K).
inline void pack_narrowed_columns(const float* b, int64_t stride, int64_t K, int64_t N, int64_t first, int64_t last,
                                  uint32_t* rows, float* packed) {
  const int64_t apart = padded(narrowed_row(K));
  for (int64_t p = first; p < last; ++p) {
    const int64_t columns = min<int64_t>(kPanel, N - p * kPanel);
    narrow_rows(b + p * kPanel * stride, stride, columns, K, rows, apart);
    pack_columns(reinterpret_cast<const float*>(rows), apart, pairs_of(K), columns, packed + p * K * kPanel);
  }
}

// Sums of R rows, as `Sums` of gemm-inl.h.
template <int R>
struct PairSums {
  vf left, right;
  PairSums<R - 1> rest;

  DDPM_FAST_INLINE void clear() {
    left = vf{};
    right = vf{};
    rest.clear();
  }
  DDPM_FAST_INLINE void add(const uint32_t* a, int64_t stride, vu b0, vu b1) {
    left = add_pair_products(left, a + (R - 1) * stride, b0);
    right = add_pair_products(right, a + (R - 1) * stride, b1);
    rest.add(a, stride, b0, b1);
  }
  template <typename Out>
  DDPM_FAST_INLINE void write(Out& out) {
    rest.write(out);
    out(R - 1, left, right);
  }
};
template <>
struct PairSums<0> {
  DDPM_FAST_INLINE void clear() {}
  DDPM_FAST_INLINE void add(const uint32_t*, int64_t, vu, vu) {}
  template <typename Out>
  DDPM_FAST_INLINE void write(Out&) {}
};

// R rows of the product of `pairs` pairs with one panel; the pair p of row m is a[m·row + p·step].
template <int R>
DDPM_FAST_INLINE PairSums<R> pair_sums(const uint32_t* a, int64_t row, int64_t step, const float* panel,
                                       int64_t pairs) {
  PairSums<R> sums;
  sums.clear();
  const uint32_t* b = reinterpret_cast<const uint32_t*>(panel);
  for (int64_t p = 0; p < pairs; ++p, a += step, b += kPanel) {
    sums.add(a, row, load_pairs(b), load_pairs(b + kLanes));
  }
  return sums;
}

// Stores rows of a product of a whole panel, or adds them to C.
struct StorePanel {
  float* c;
  int64_t stride;
  bool add;

  DDPM_FAST_INLINE void operator()(int m, vf left, vf right) const {
    float* to = c + m * stride;
    store(to, add ? left + load(to) : left);
    store(to + kLanes, add ? right + load(to + kLanes) : right);
  }
};

template <int R, typename Out>
DDPM_FAST_NOINLINE void pair_tile(const uint32_t* a, int64_t row, int64_t step, const float* panel, int64_t pairs,
                                  Out out) {
  PairSums<R> sums = pair_sums<R>(a, row, step, panel, pairs);
  sums.write(out);
}

// Out: an epilogue of few instructions, since it stands in the tile of every height.
template <int R = kRows, typename Out>
DDPM_FAST_INLINE void pair_tile_of(int64_t rows, const uint32_t* a, int64_t row, int64_t step, const float* panel,
                                   int64_t pairs, const Out& out) {
  if constexpr (R > 0) {
    if (rows == R) return pair_tile<R>(a, row, step, panel, pairs, out);
    pair_tile_of<R - 1>(rows, a, row, step, panel, pairs, out);
  }
}

// `rows` rows of a product with one panel, each handed to out(m, left, right). LinearForward's epilogue in the tiles
// would be 14 copies of itself, and up to 20 KB in each of 14 tiles.
template <typename Out>
DDPM_FAST_INLINE void pair_rows(int64_t rows, const uint32_t* a, int64_t row, int64_t step, const float* panel,
                                int64_t pairs, Out& out) {
  alignas(64) float sums[kRows * kPanel];
  pair_tile_of(rows, a, row, step, panel, pairs, StorePanel{sums, kPanel, false});
  for (int m = 0; m < rows; ++m) out(m, load(sums + m * kPanel), load(sums + m * kPanel + kLanes));
}

// `product_panel` of pairs.
inline void pair_product_panel(const uint32_t* a, int64_t row, int64_t step, const float* panel, int64_t M,
                               int64_t pairs, float* c, int64_t stride, int64_t columns, bool add) {
  const int64_t groups = ceil_div(M, kRows);
  for (int64_t g = 0, m = 0; g < groups; ++g) {
    const int64_t rows = (M - m + groups - g - 1) / (groups - g);
    if (columns == kPanel) {
      pair_tile_of(rows, a + m * row, row, step, panel, pairs, StorePanel{c + m * stride, stride, add});
    } else {
      Store out{c + m * stride, stride, columns, add};
      pair_rows(rows, a + m * row, row, step, panel, pairs, out);
    }
    m += rows;
  }
}

// The first factor A (M, K) of products, (m, k) at a[m·row + k·step]; or by pairs, the pair p of row m at
// pairs[m·row + p·step].
struct Factor {
  const float* a;
  const uint32_t* pairs;  // or null
  int64_t row, step;
};

// With `narrowed`, memory of narrowed_size(M, K), by bfloat16 pairs; `row` or `step` is 1 then.
inline Factor factor_of(uint32_t* narrowed, const float* a, int64_t row, int64_t step, int64_t M, int64_t K) {
  if (!kHasPairs || narrowed == nullptr) return {a, nullptr, row, step};
  if (step == 1) {
    const int64_t apart = padded(narrowed_row(K));
    narrow_rows(a, row, M, K, narrowed, apart);
    return {a, narrowed, apart, 1};
  }
  const int64_t apart = padded(round_up(M, kLanes));
  narrow_terms(a, step, M, K, narrowed, apart);
  return {a, narrowed, 1, apart};
}

// `product_panel`; by pairs the panel is packed by narrow_panels, and its sums have one piece.
inline void multiply_panel(const Factor& factor, const float* panel, int64_t M, int64_t K, float* c, int64_t stride,
                           int64_t columns, bool add, int64_t piece = kOnePiece) {
  if (kHasPairs && factor.pairs != nullptr) {
    pair_product_panel(factor.pairs, factor.row, factor.step, panel, M, pairs_of(K), c, stride, columns, add);
  } else {
    product_panel(factor.a, factor.row, factor.step, panel, M, K, c, stride, columns, add, piece);
  }
}

struct NothingMore {
  DDPM_FAST_INLINE void operator()(int64_t, int64_t) const {}
};

// `deep_product`, or by pairs with `narrowed` as for factor_of, and then B is packed by narrow_panels. finish(first
// column, columns) follows each panel while it is in the cache.
template <typename Finish = NothingMore>
inline void multiply(uint32_t* narrowed, const float* a, int64_t row, int64_t step, const float* packed, int64_t M,
                     int64_t K, int64_t N, float* c, int64_t stride, bool add, const Finish& finish = {}) {
  const Factor factor = factor_of(narrowed, a, row, step, M, K);
  for (int64_t p = 0; p < panels(N); ++p) {
    const int64_t first = p * kPanel, columns = min<int64_t>(kPanel, N - first), next = first + kPanel;
    for (int64_t m = 0; m < M && next < N; ++m) {
      prefetch_to_write(c + m * stride + next, min<int64_t>(kPanel, N - next));
    }
    multiply_panel(factor, packed + p * K * kPanel, M, K, c + first, stride, columns, add, piece_of(K, kDeepest));
    finish(first, columns);
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
