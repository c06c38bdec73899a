// Matrix products: C (M, N) = A (M, K) · B (K, N), with B packed in panels of kPanel columns.
//
// The kernel holds kRows × kPanel sums in registers. gcc keeps arrays of vectors in memory, a store after every FMA, so
// the sums are members of nested structs, one per row.
#pragma once

#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr int kPanel = 2 * kLanes;           // columns of a panel: two vectors
constexpr int kRows = (kRegisters - 4) / 2;  // of two sums each; two vectors of B and two elements of A have the rest
constexpr int kRowsOfPieces = kRows / 2;     // where sums of pieces are in registers, too

// Columns of a panel, from the `left` that there are on, in whole vectors.
DDPM_FAST_INLINE constexpr int64_t panel_width(int64_t left) { return left > kLanes ? kPanel : kLanes; }
DDPM_FAST_INLINE constexpr int64_t panels(int64_t N) { return ceil_div(N, kPanel); }
// Floats that K × N packed take: (panels, K, kPanel), the last panel filled up with zeros.
DDPM_FAST_INLINE constexpr int64_t packed_size(int64_t K, int64_t N) { return panels(N) * K * kPanel; }

// For aarch64 gcc schedules the loads of all rows before the first multiply-add, which costs 25 spills a term of 14
// rows. It moves nothing across this statement. Other targets are scheduled after registers are chosen.
DDPM_FAST_INLINE void end_of_two_rows() {
#if defined(__aarch64__)
  __asm__ volatile("");
#endif
}

// Sums of R rows; see above. kWide: of the panel's two vectors of columns, or of the first alone.
template <int R, bool kWide = true>
struct Sums {
  vf left, right;
  Sums<R - 1, kWide> rest;

  DDPM_FAST_INLINE void clear() {
    left = vf{};
    right = vf{};
    rest.clear();
  }
  // Row R-1 is this struct's own: a + (R-1)·stride.
  DDPM_FAST_INLINE void add(const float* a, int64_t stride, vf b0, vf b1) {
    const vf x = splat(a[(R - 1) * stride]);
    left = x * b0 + left;
    if constexpr (kWide) right = x * b1 + right;
    if constexpr (R % 2 == 1) end_of_two_rows();
    rest.add(a, stride, b0, b1);
  }
  DDPM_FAST_INLINE void add(const Sums& other) {
    left += other.left;
    if constexpr (kWide) right += other.right;
    rest.add(other.rest);
  }
  template <typename Out>
  DDPM_FAST_INLINE void write(Out& out) {
    rest.write(out);
    out(R - 1, left, right);
  }
};
template <bool kWide>
struct Sums<0, kWide> {
  DDPM_FAST_INLINE void clear() {}
  DDPM_FAST_INLINE void add(const float*, int64_t, vf, vf) {}
  DDPM_FAST_INLINE void add(const Sums&) {}
  template <typename Out>
  DDPM_FAST_INLINE void write(Out&) {}
};

struct NoLine {
  DDPM_FAST_INLINE void operator()() const {}
};

// Adds K terms of R rows, and moves `a` and `panel` on; element (m, k) of A is at a[m·row + k·step]. In the same order
// for every R: how rows are grouped depends on the number of threads in places. Unrolled to hide the loop's
// instructions, and so that every second term prefetches a line, next_line().
template <int R, bool kWide, typename NextLine = NoLine>
DDPM_FAST_INLINE void add_terms(Sums<R, kWide>& sums, const float*& a, int64_t row, int64_t step, const float*& panel,
                                int64_t K, const NextLine& next_line = NextLine()) {
  const auto next = [&]() DDPM_FAST_LAMBDA {
    sums.add(a, row, load(panel), kWide ? load(panel + kLanes) : vf{});
    a += step;
    panel += kPanel;
  };
  const auto two = [&]() DDPM_FAST_LAMBDA {
    next_line();
    next(), next();
  };
  int64_t k = 0;
  if constexpr (R <= 6) {
    for (; k + 4 <= K; k += 4) two(), two();
  }
  if constexpr (R <= kRowsOfPieces) {
    for (; k + 2 <= K; k += 2) two();
  }
  for (; k < K; ++k) next();
}

// R rows of the product with one panel. out(m, left, right) takes row m.
template <int R, bool kWide = true, typename Out>
DDPM_FAST_INLINE void product_rows(const float* a, int64_t row, int64_t step, const float* panel, int64_t K, Out& out) {
  Sums<R, kWide> sums;
  sums.clear();
  add_terms(sums, a, row, step, panel, K);
  sums.write(out);
}

// Stores rows of a product, or adds them to C.
struct Store {
  float* c;
  int64_t stride, columns;  // of the panel's columns those that exist
  bool add;

  DDPM_FAST_INLINE void operator()(int m, vf left, vf right) {
    float* to = c + m * stride;
    if (columns == kPanel) {
      if (add) left += load(to), right += load(to + kLanes);
      store(to, left);
      store(to + kLanes, right);
      return;
    }
    const int64_t second = columns - kLanes;
    if (add) {
      left += load_upto(to, columns);
      if (second > 0) right += load_partial(to + kLanes, second);
    }
    store_upto(to, left, columns);
    if (second > 0) store_partial(to + kLanes, right, second);
  }
};

template <int R, bool kWide>
DDPM_FAST_NOINLINE void product_tile(const float* a, int64_t row, int64_t step, const float* panel, int64_t K, float* c,
                                     int64_t stride, int64_t columns, bool add, int64_t piece) {
  Store out{c, stride, columns, add};
  for (int64_t k = 0; k == 0 || k < K; k += piece) {  // once where K = 0: zeros
    product_rows<R, kWide>(a + k * step, row, step, panel + k * kPanel, min(piece, K - k), out);
    out.add = true;
  }
}

// Where sums of finished pieces fit into registers, too, for half as many rows, no piece is stored. On a Zen 4 pieces
// of 32 terms are faster than one of any length, and have smaller errors.
//
// Rows side by side are prefetched kGroupsAhead groups ahead: processors do not see the order in which a tile reads
// them. On an Ice Lake products whose A comes from the third-level cache took 0.54 to 0.85 of the time.
constexpr bool kTwoSums = kLanes == 16 && kRegisters == 32;
constexpr int64_t kLongestPiece = 32, kGroupsAhead = 3;

template <int R, bool kWide>
DDPM_FAST_NOINLINE void product_of_pieces(const float* a, int64_t row, int64_t step, const float* panel, int64_t K,
                                          float* c, int64_t stride, int64_t columns, bool add, int64_t piece) {
  Sums<R, kWide> total, sums;
  const float* ahead = a + kGroupsAhead * kRowsOfPieces * row;
  const int64_t line = step == 1 && row <= K + 2 * kCacheLine ? kCacheLine : 0;
  const auto next_line = [&]() DDPM_FAST_LAMBDA {
    __builtin_prefetch(ahead, 0, 3);
    ahead += line;
  };
  total.clear();
  add_terms(total, a, row, step, panel, piece, next_line);
  for (int64_t k = piece; k < K; k += piece) {
    sums.clear();
    add_terms(sums, a, row, step, panel, min(piece, K - k), next_line);
    total.add(sums);
  }
  Store out{c, stride, columns, add};
  total.write(out);
}

template <bool kWide, int R = kRowsOfPieces>
DDPM_FAST_INLINE void product_of_pieces_of(int64_t rows, const float* a, int64_t row, int64_t step, const float* panel,
                                           int64_t K, float* c, int64_t stride, int64_t columns, bool add,
                                           int64_t piece) {
  if constexpr (R > 0) {
    if (rows == R) return product_of_pieces<R, kWide>(a, row, step, panel, K, c, stride, columns, add, piece);
    product_of_pieces_of<kWide, R - 1>(rows, a, row, step, panel, K, c, stride, columns, add, piece);
  }
}

template <bool kWide, int R = kRows>
DDPM_FAST_INLINE void product_tile_of(int64_t rows, const float* a, int64_t row, int64_t step, const float* panel,
                                      int64_t K, float* c, int64_t stride, int64_t columns, bool add, int64_t piece) {
  if constexpr (R > 0) {
    if (rows == R) return product_tile<R, kWide>(a, row, step, panel, K, c, stride, columns, add, piece);
    product_tile_of<kWide, R - 1>(rows, a, row, step, panel, K, c, stride, columns, add, piece);
  }
}

// Terms of each of the equal pieces, of at most `most` terms, that a sum of K terms is cut into. The rounding error of
// a sum in one row grows with √K, that of a sum of pieces with √(most + K/most).
DDPM_FAST_INLINE int64_t piece_of(int64_t K, int64_t most) {
  return max<int64_t>(1, ceil_div(K, max<int64_t>(1, ceil_div(K, most))));
}

constexpr int64_t kOnePiece = int64_t{1} << 40;

// C (M × columns of one panel) = A · panel, or += with `add`. A: (m, k) at a[m·row + k·step]; C: (m, n) at c[m·stride +
// n]. Rows are taken in balanced groups: 15 rows are 8 and 7, not 14 and 1. Sums over k are made of pieces of `piece`
// terms, or of kLongestPiece where that is shorter and sums of pieces stay in registers. Of a panel with one vector of
// columns or less the second vector is not read.
DDPM_FAST_NOINLINE void product_panel(const float* a, int64_t row, int64_t step, const float* panel, int64_t M,
                                      int64_t K, float* c, int64_t stride, int64_t columns, bool add,
                                      int64_t piece = kOnePiece) {
  if constexpr (kTwoSums) piece = min(piece, kLongestPiece);
  const bool in_pieces = kTwoSums && piece < K;
  const int64_t groups = ceil_div(M, in_pieces ? kRowsOfPieces : kRows);
  for (int64_t g = 0, m = 0; g < groups; ++g) {
    const int64_t rows = (M - m + groups - g - 1) / (groups - g);
    if (in_pieces && columns > kLanes) {
      product_of_pieces_of<true>(rows, a + m * row, row, step, panel, K, c + m * stride, stride, columns, add, piece);
    } else if (in_pieces) {
      product_of_pieces_of<false>(rows, a + m * row, row, step, panel, K, c + m * stride, stride, columns, add, piece);
    } else if (columns > kLanes) {
      product_tile_of<true>(rows, a + m * row, row, step, panel, K, c + m * stride, stride, columns, add, piece);
    } else {
      product_tile_of<false>(rows, a + m * row, row, step, panel, K, c + m * stride, stride, columns, add, piece);
    }
    m += rows;
  }
}

// C = A · B over all panels.
inline void product(const float* a, int64_t row, int64_t step, const float* packed, int64_t M, int64_t K, int64_t N,
                    float* c, int64_t stride, bool add) {
  for (int64_t p = 0; p < panels(N); ++p) {
    product_panel(a, row, step, packed + p * K * kPanel, M, K, c + p * kPanel, stride,
                  min<int64_t>(kPanel, N - p * kPanel), add);
  }
}

// Packs panels [first, last) of B, (k, n) at b[k·row + n·step].
inline void pack_panels(const float* b, int64_t row, int64_t step, int64_t K, int64_t N, int64_t first, int64_t last,
                        float* packed) {
  for (int64_t p = first; p < last; ++p) {
    const int64_t columns = min<int64_t>(kPanel, N - p * kPanel);
    for (int64_t k = 0; k < K; ++k) {
      const float* from = b + k * row + p * kPanel * step;
      float* to = packed + (p * K + k) * kPanel;
      for (int64_t n = 0; n < columns; ++n) to[n] = from[n * step];
      for (int64_t n = columns; n < kPanel; ++n) to[n] = 0;
    }
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
