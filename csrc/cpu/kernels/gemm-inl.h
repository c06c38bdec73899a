// Matrix products: C (M, N) = A (M, K) · B (K, N), with B packed in panels of kPanel columns.
//
// The kernel holds kRows × kPanel sums in registers. gcc keeps arrays of vectors in memory, a store after every FMA, so
// the sums are members of nested structs, one per row.
#pragma once

#include "dispatch-inl.h"
#include "prefetch_queue-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr int kPanel = 2 * kLanes;           // columns of a panel: two vectors
constexpr int kRows = (kRegisters - 4) / 2;  // of two sums each; two vectors of B and two elements of A have the rest

// Columns of a panel, from the `left` that there are on, in whole vectors.
DDPM_FAST_INLINE constexpr int64_t panel_width(int64_t left) { return left > kLanes ? kPanel : kLanes; }
DDPM_FAST_INLINE constexpr int64_t panels(int64_t N) { return ceil_div(N, kPanel); }
// Floats that K × N packed take: (panels, K, kPanel), the last panel filled up with zeros.
DDPM_FAST_INLINE constexpr int64_t packed_size(int64_t K, int64_t N) { return panels(N) * K * kPanel; }

// Rows further on have an address of their own: else multiples of the distance between rows take too many registers.
constexpr int kNearRows = 7;

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
  // Row R-1 is this struct's own: a + (R-1)·stride. Rows from kNearRows on are counted from `far`.
  DDPM_FAST_INLINE void add(const float* a, const float* far, int64_t stride, vf b0, vf b1) {
    const vf x = splat(R > kNearRows ? far[(R - 1 - kNearRows) * stride] : a[(R - 1) * stride]);
    add_product(left, x, b0);
    if constexpr (kWide) add_product(right, x, b1);
    if constexpr (R % 2 == 1) end_of_two_rows();
    rest.add(a, far, stride, b0, b1);
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
  DDPM_FAST_INLINE void add(const float*, const float*, int64_t, vf, vf) {}
  DDPM_FAST_INLINE void add(const Sums&) {}
  template <typename Out>
  DDPM_FAST_INLINE void write(Out&) {}
};

// Adds K terms of R rows, and moves `a` and `panel` on; element (m, k) of A is at a[m·row + k·step]. In the same order
// for every R: how rows are grouped depends on the number of threads in places. By 4 where a loop's own instructions
// cost: they hide behind many rows of AVX2, but not where they are executed in place of a multiply-add.
template <int R, bool kWide>
DDPM_FAST_INLINE void add_terms(Sums<R, kWide>& sums, const float*& a, int64_t row, int64_t step, const float*& panel,
                                int64_t K) {
  const auto next = [&]() DDPM_FAST_LAMBDA {
    sums.add(a, a + kNearRows * row, row, load(panel), kWide ? load(panel + kLanes) : vf{});
    a += step;
    panel += kPanel;
  };
  int64_t k = 0;
  if constexpr (R <= 6 || kLanes == 16) {
    for (; k + 4 <= K; k += 4) next(), next(), next(), next();
  }
  for (; k < K; ++k) next();
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

// Stores whole rows, one or two vectors each, or adds them to C.
template <bool kWide>
struct StoreWhole {
  float* c;
  int64_t stride;
  bool add;

  DDPM_FAST_INLINE void operator()(int m, vf left, vf right) {
    float* to = c + m * stride;
    store(to, add ? left + load(to) : left);
    if constexpr (kWide) store(to + kLanes, add ? right + load(to + kLanes) : right);
  }
};

// Stores the first columns of rows of kPanel, or adds them to C.
DDPM_FAST_NOINLINE void store_columns(const float* rows, int64_t count, float* c, int64_t stride, int64_t columns,
                                      bool add) {
  Store out{c, stride, columns, add};
  for (int64_t m = 0; m < count; ++m) out(m, load(rows + m * kPanel), load(rows + m * kPanel + kLanes));
}

// Stores R rows of a product, or adds them to C. Code for columns that end anywhere is shared by all R: with one copy
// for each row of each R the extension was a sixth larger.
template <int R, bool kWide>
DDPM_FAST_INLINE void store_sums(Sums<R, kWide>& sums, float* c, int64_t stride, int64_t columns, bool add) {
  if (columns >= (kWide ? kPanel : kLanes)) {
    StoreWhole<kWide> out{c, stride, add};
    return sums.write(out);
  }
  float rows[R * kPanel];
  StoreWhole<kWide> out{rows, kPanel, false};
  sums.write(out);
  store_columns(rows, R, c, stride, columns, add);
}

template <int R, bool kWide>
DDPM_FAST_NOINLINE void product_tile(const float* a, int64_t row, int64_t step, const float* panel, int64_t K, float* c,
                                     int64_t stride, int64_t columns, bool add, int64_t piece) {
  do {  // once where K = 0: zeros
    const int64_t terms = min(piece, K);
    Sums<R, kWide> sums;
    sums.clear();
    add_terms(sums, a, row, step, panel, terms);
    store_sums(sums, c, stride, columns, add);
    K -= terms;
    add = true;
  } while (K > 0);
}

// With AVX-512 products take groups of rows in one call, in sums of kLongestPiece terms: on a Zen 4 those are faster
// than sums of any length, and have smaller errors. What comes next is prefetched: of rows side by side the next
// group's, of rows in columns the next terms, what lies behind the panel, and what waits in a queue. A tile reads seven
// or more rows or columns at once, an order that processors do not follow. Eight terms at a time: a loop's own
// instructions are executed where two of three multiply-adds would be.
// Where kStored, each piece is stored. Else, of half as many rows, sums of pieces are in registers, too: for rows in
// columns, for the short pieces of gradients and where a caller adds up pieces of its own, whose sums are more accurate
// so. Gradients of weights took 5% longer with stored pieces, Winograd's products up to 10% with two sums.
constexpr bool kInGroups = kLanes == 16 && kRegisters == 32;
constexpr int64_t kLongestPiece = 32;
template <bool kStored>
constexpr int kRowsOfGroup = kStored ? kRows : kRows / 2;
constexpr int kTermsAtATime = 8, kPanelLines = 2;  // lines behind the panel in that time

// Asks for the next lines of a queue, and moves on.
DDPM_FAST_INLINE void ask(PrefetchQueue::Lines& lines) {
#pragma GCC unroll 4
  for (int i = 0; i < PrefetchQueue::kAtATime; ++i) __builtin_prefetch(lines.first + i * kCacheLine, 0, 2);
  lines.first += PrefetchQueue::kAtATime * kCacheLine;
}

// `groups` groups of R rows, in one call: of 64 terms a call takes a tenth of their time. Of kTerms, a row's terms lie
// side by side and rows `apart` from each other; else the rows of a term side by side. `piece` is a multiple of
// kTermsAtATime.
// To prefetch: what is `ahead` of a group's rows, or next_terms.
template <int R, bool kWide, bool kTerms, bool kStored>
DDPM_FAST_NOINLINE void product_of_groups(int64_t groups, const float* rows, int64_t apart, const float* panel,
                                          int64_t K, float* c, int64_t stride, int64_t columns, bool add, int64_t piece,
                                          int64_t ahead, const float* next_terms, PrefetchQueue* queue) {
  constexpr int kNextLines = (R * kTermsAtATime + kCacheLine - 1) / kCacheLine;  // of as many terms of the next group
  const int64_t row = kTerms ? apart : 1, step = kTerms ? 1 : apart;
  const float* next_panel = panel + K * kPanel;
  for (; groups > 0; --groups, rows += R * row, c += R * stride) {
    const float *a = rows, *far = rows + kNearRows * row, *b = panel;
    if constexpr (kTerms) next_terms = rows + ahead;
    int64_t left = K;
    bool adding = add;
    Sums<R, kWide> sums, total;
    do {  // once where K = 0: zeros
      sums.clear();
      const auto next = [&]() DDPM_FAST_LAMBDA {
        sums.add(a, kTerms ? far : a + kNearRows, row, load(b), kWide ? load(b + kLanes) : vf{});
        a += step;
        far += step;
        b += kPanel;
      };
      const int64_t terms = left < piece + kTermsAtATime ? left : piece;
      const int64_t steps_of_piece = terms / kTermsAtATime;
      PrefetchQueue::Lines lines = queue->take(steps_of_piece);
      const float* const also_between = queue->twice ? lines.end : nullptr;
      for (int64_t steps = steps_of_piece; steps > 0; --steps) {
        if (lines.first < lines.end) ask(lines);
#pragma GCC unroll 8
        for (int i = 0; i < kTermsAtATime; ++i) {
          if (i == kTermsAtATime / 2 && lines.first < also_between) ask(lines);
          constexpr auto next_line = [](int term) constexpr { return term * kNextLines / kTermsAtATime; };
          if (next_line(i + 1) > next_line(i)) __builtin_prefetch(next_terms + next_line(i) * kCacheLine, 0, 3);
          if (i % (kTermsAtATime / kPanelLines) == 0) {
            __builtin_prefetch(next_panel + i * kPanelLines / kTermsAtATime * kCacheLine, 0, 3);
          }
          next();
        }
        // Else gcc has an address for each row, and moves them all on.
        __asm__("" : "+r"(a));
        if constexpr (kTerms) __asm__("" : "+r"(far));
        next_terms += kNextLines * kCacheLine;
        next_panel += kPanelLines * kCacheLine;
      }
#pragma GCC unroll 1
      for (int64_t k = terms % kTermsAtATime; k > 0; --k) next();
      if constexpr (kStored) {
        store_sums(sums, c, stride, columns, adding);
        adding = true;
      } else if (left == K) {
        total = sums;
      } else {
        total.add(sums);
      }
      left -= terms;
    } while (left > 0);
    if constexpr (!kStored) store_sums(total, c, stride, columns, add);
  }
}

template <bool kWide, bool kTerms, bool kStored, int R = kRowsOfGroup<kStored>>
DDPM_FAST_INLINE void product_of_groups_of(int64_t rows, int64_t groups, const float* a, int64_t apart,
                                           const float* panel, int64_t K, float* c, int64_t stride, int64_t columns,
                                           bool add, int64_t piece, int64_t ahead, const float* next_terms,
                                           PrefetchQueue* queue) {
  if constexpr (R > 0) {
    if (rows == R) {
      return product_of_groups<R, kWide, kTerms, kStored>(groups, a, apart, panel, K, c, stride, columns, add, piece,
                                                          ahead, next_terms, queue);
    }
    product_of_groups_of<kWide, kTerms, kStored, R - 1>(rows, groups, a, apart, panel, K, c, stride, columns, add,
                                                        piece, ahead, next_terms, queue);
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

template <bool kWide, bool kTerms, bool kStored>
inline void product_panel_in_groups(const float* a, int64_t apart, const float* panel, int64_t M, int64_t K, float* c,
                                    int64_t stride, int64_t columns, bool add, int64_t piece, PrefetchQueue* queue) {
  constexpr int kMost = kRowsOfGroup<kStored>;
  const int64_t groups = ceil_div(M, kMost);
  // Without a division of unknown numbers where all groups are full, as most are.
  const int64_t rows = groups * kMost == M ? kMost : M / groups, longer = M - groups * rows;
  const int64_t ahead = apart <= K + 2 * kCacheLine ? kRows * apart : 0;
  const int64_t done = longer * (rows + 1);
  PrefetchQueue none;
  if (queue == nullptr) queue = &none;
  const auto product = [&](int64_t of, int64_t count, int64_t first, int64_t groups_before) {
    product_of_groups_of<kWide, kTerms, kStored>(of, count, a + first * (kTerms ? apart : 1), apart, panel, K,
                                                 c + first * stride, stride, columns, add, piece, ahead,
                                                 a + K * apart + groups_before * (K / 2) * kCacheLine, queue);
  };
  if (longer > 0) product(rows + 1, longer, 0, 0);
  if (groups > longer) product(rows, groups - longer, done, longer);
}

// C (M × columns of one panel) = A · panel, or += with `add`. A: (m, k) at a[m·row + k·step], where row or step is 1;
// C: (m, n) at c[m·stride + n]. Rows are taken in balanced groups: 15 rows are 8 and 7, not 14 and 1. Sums over k are
// made of pieces of `piece` terms, with AVX-512 of at most kLongestPiece. Of a panel with one vector of columns or less
// the second vector is not read.
DDPM_FAST_NOINLINE void product_panel(const float* a, int64_t row, int64_t step, const float* panel, int64_t M,
                                      int64_t K, float* c, int64_t stride, int64_t columns, bool add,
                                      int64_t piece = kOnePiece, PrefetchQueue* queue = nullptr) {
  if constexpr (kInGroups) {
    piece = min(round_up(min(piece, kLongestPiece), kTermsAtATime), kLongestPiece);
    const auto product = [&](auto wide, auto terms, auto stored) {
      constexpr bool kTerms = decltype(terms)::value, kStored = kTerms && decltype(stored)::value;
      product_panel_in_groups<decltype(wide)::value, kTerms, kStored>(a, kTerms ? row : step, panel, M, K, c, stride,
                                                                      columns, add, piece, queue);
    };
    const bool whole = K < piece + kTermsAtATime, long_pieces = queue != nullptr && piece == kLongestPiece;
    dispatch(product, columns > kLanes, step == 1, whole || long_pieces);
    return;
  }
  if (queue != nullptr) queue->ask_for_all();
  const int64_t groups = ceil_div(M, kRows);
  for (int64_t g = 0, m = 0; g < groups; ++g) {
    const int64_t rows = (M - m + groups - g - 1) / (groups - g);
    if (columns > kLanes) {
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
