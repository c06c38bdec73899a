// Products of few rows, C (M, N) = A (M, K) · B (N, K)ᵀ, whose factors both have their terms side by side: B is read
// once and in its own order. For a dozen rows packing it takes longer than the product.
//
// Each sum is a vector of kLanes sums, whose lanes are added up at the end.
#pragma once

#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// Rows of A that pay for no packing of B. Without it, a residual block of 16 pixels took 0.58 to 0.84 of its time with
// AVX-512 and 0.77 to 0.9 with AVX2; of 32 it took 0.83 to 0.93 of that with Winograd's form, but 1.3 to 1.4 with AVX2
// (two threads of an Ice Lake).
constexpr int64_t kMaxDotRows = kLanes == 16 ? 32 : 16;
// Multiplications that pay for waking a thread.
constexpr int64_t kDotTask = int64_t{1} << 17;

// Rows of A and of B at a time: their sums and the vectors that these are made of are in registers.
constexpr int kDotRows = 4, kDotColumns = kRegisters == 32 ? 6 : 2;

// A vector of each of M rows, `stride` apart.
template <int M>
struct RowVectors {
  vf own;  // of row M-1
  RowVectors<M - 1> rest;

  DDPM_FAST_INLINE void load_whole(const float* a, int64_t stride) {
    own = load(a + (M - 1) * stride);
    rest.load_whole(a, stride);
  }
  DDPM_FAST_INLINE void load_first(const float* a, int64_t stride, int64_t count) {
    own = load_partial(a + (M - 1) * stride, count);
    rest.load_first(a, stride, count);
  }
};
template <>
struct RowVectors<0> {
  DDPM_FAST_INLINE void load_whole(const float*, int64_t) {}
  DDPM_FAST_INLINE void load_first(const float*, int64_t, int64_t) {}
};

// The sums of M rows of A with one row of B.
template <int M>
struct DotColumn {
  vf own;
  DotColumn<M - 1> rest;

  DDPM_FAST_INLINE void clear() {
    own = vf{};
    rest.clear();
  }
  DDPM_FAST_INLINE void add(const RowVectors<M>& a, vf b) {
    add_product(own, a.own, b);
    rest.add(a.rest, b);
  }
  DDPM_FAST_INLINE void write(vf* to) const {
    to[M - 1] = own;
    rest.write(to);
  }
};
template <>
struct DotColumn<0> {
  DDPM_FAST_INLINE void clear() {}
  DDPM_FAST_INLINE void add(const RowVectors<0>&, vf) {}
  DDPM_FAST_INLINE void write(vf*) const {}
};

// The same with N rows of B.
template <int M, int N>
struct DotSums {
  DotColumn<M> own;
  DotSums<M, N - 1> rest;

  DDPM_FAST_INLINE void clear() {
    own.clear();
    rest.clear();
  }
  DDPM_FAST_INLINE void add_whole(const RowVectors<M>& a, const float* b, int64_t stride) {
    own.add(a, load(b + (N - 1) * stride));
    rest.add_whole(a, b, stride);
  }
  DDPM_FAST_INLINE void add_first(const RowVectors<M>& a, const float* b, int64_t stride, int64_t count) {
    own.add(a, load_partial(b + (N - 1) * stride, count));
    rest.add_first(a, b, stride, count);
  }
  DDPM_FAST_INLINE void write(vf* to) const {
    own.write(to + (N - 1) * M);
    rest.write(to);
  }
};
template <int M>
struct DotSums<M, 0> {
  DDPM_FAST_INLINE void clear() {}
  DDPM_FAST_INLINE void add_whole(const RowVectors<M>&, const float*, int64_t) {}
  DDPM_FAST_INLINE void add_first(const RowVectors<M>&, const float*, int64_t, int64_t) {}
  DDPM_FAST_INLINE void write(vf*) const {}
};

// c[m·stride + n] for M rows of A and N of B.
template <int M, int N>
DDPM_FAST_NOINLINE void dot_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t K,
                                 float* c, int64_t stride) {
  DotSums<M, N> sums;
  RowVectors<M> rows;
  sums.clear();
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) {
    rows.load_whole(a + k, a_stride);
    sums.add_whole(rows, b + k, b_stride);
  }
  if (k < K) {
    rows.load_first(a + k, a_stride, K - k);
    sums.add_first(rows, b + k, b_stride, K - k);
  }
  vf lanes[M * N];
  float of_lanes[M * N];
  sums.write(lanes);
  reduce_add_many(lanes, M * N, of_lanes);
  for (int n = 0; n < N; ++n) {
    for (int m = 0; m < M; ++m) c[m * stride + n] = of_lanes[n * M + m];
  }
}

template <int N, int M = kDotRows>
DDPM_FAST_INLINE void dot_tile_of(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                  int64_t K, float* c, int64_t stride) {
  if constexpr (M > 0) {
    if (rows == M) return dot_tile<M, N>(a, a_stride, b, b_stride, K, c, stride);
    dot_tile_of<N, M - 1>(rows, a, a_stride, b, b_stride, K, c, stride);
  }
}

// C (M × N) = A · Bᵀ: (m, k) of A at a[m·a_stride + k], (n, k) of B at b[n·b_stride + k], (m, n) at c[m·stride + n].
inline void dot_products(const float* a, int64_t a_stride, int64_t M, const float* b, int64_t b_stride, int64_t N,
                         int64_t K, float* c, int64_t stride) {
  const auto over_rows = [&](auto tile, int64_t n) {
    const int64_t groups = ceil_div(M, kDotRows);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = M * g / groups;
      tile(M * (g + 1) / groups - first, a + first * a_stride, b + n * b_stride, c + first * stride + n);
    }
  };
  int64_t n = 0;
  for (; n + kDotColumns <= N; n += kDotColumns) {
    over_rows([&](int64_t rows, const float* of_a, const float* of_b, float* to)
                  DDPM_FAST_LAMBDA { dot_tile_of<kDotColumns>(rows, of_a, a_stride, of_b, b_stride, K, to, stride); },
              n);
  }
  for (; n < N; ++n) {
    over_rows([&](int64_t rows, const float* of_a, const float* of_b, float* to)
                  DDPM_FAST_LAMBDA { dot_tile_of<1>(rows, of_a, a_stride, of_b, b_stride, K, to, stride); },
              n);
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
