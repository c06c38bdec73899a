// Packing for gemm-inl.h where rows or columns of B are contiguous, and memory laid out in pieces.
#pragma once

#include "gemm-inl.h"
#include "shuffle-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr int64_t kDeepest = 192;  // terms of a product's sum that are added one after another

// Hands out aligned pieces of one buffer; from a null buffer it only counts what they take.
struct Arena {
  float* buffer;
  int64_t used = 0;

  DDPM_FAST_INLINE float* take(int64_t floats) {
    float* piece = buffer == nullptr ? nullptr : buffer + used;
    used += round_up(floats, 16);
    return piece;
  }
};

// A stride of at least n floats whose rows fall into all sets of a cache: an odd number of lines of 64 bytes.
DDPM_FAST_INLINE constexpr int64_t padded(int64_t n) { return round_up(n, 16) | 16; }

// One row of a packed B: columns [0, N) from `from`; `row` is the row's place in the first of panels of K rows.
template <typename Value>
DDPM_FAST_INLINE void pack_row(const Value& value, int64_t K, int64_t N, float* row) {
  int64_t n = 0;
  for (; n + kPanel <= N; n += kPanel, row += K * kPanel) {
    store(row, value(n, kLanes));
    store(row + kLanes, value(n + kLanes, kLanes));
  }
  if (n < N) {
    const int64_t second = N - n - kLanes;
    store(row, value(n, min<int64_t>(N - n, kLanes)));
    store(row + kLanes, second > 0 ? value(n + kLanes, second) : vf{});
  }
}

// B (K, N), (k, n) at b[k·stride + n], in all its panels.
inline void pack_rows(const float* b, int64_t stride, int64_t K, int64_t N, float* packed) {
  for (int64_t k = 0; k < K; ++k) {
    const float* from = b + k * stride;
    pack_row([&](int64_t n, int64_t count) { return load_upto(from + n, count); }, K, N, packed + k * kPanel);
  }
}

// The same in panels [first, last).
inline void pack_rows(const float* b, int64_t stride, int64_t K, int64_t N, int64_t first, int64_t last,
                      float* packed) {
  const int64_t begin = first * kPanel, end = min(N, last * kPanel);
  pack_rows(b + begin, stride, K, end - begin, packed + begin * K);
}

// `product` for any K: sums of more than kDeepest terms are sums of partial sums, for a smaller rounding error.
inline void deep_product(const float* a, int64_t row, int64_t step, const float* packed, int64_t M, int64_t K,
                         int64_t N, float* c, int64_t stride, bool add) {
  const int64_t pieces = ceil_div(K, kDeepest);
  for (int64_t p = 0; p < panels(N); ++p) {
    const int64_t columns = min<int64_t>(kPanel, N - p * kPanel);
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t k = i * K / pieces;
      product_panel(a + k * step, row, step, packed + (p * K + k) * kPanel, M, (i + 1) * K / pieces - k, c + p * kPanel,
                    stride, columns, add || i > 0);
    }
  }
}

// put(k, column k) for all K columns of `rows` rows of floats, at most kLanes; lanes past `rows` are 0.
template <typename Put>
DDPM_FAST_INLINE void over_columns(const float* from, int64_t stride, int64_t rows, int64_t K, const Put& put) {
  for (int64_t k = 0; k < K; k += kLanes) {
    const int64_t count = min<int64_t>(kLanes, K - k);
    vf lines[kLanes];
    if (rows == kLanes && count == kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) lines[i] = load(from + i * stride + k);
      transpose(lines);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) put(k + i, lines[i]);
      continue;
    }
    for (int64_t i = 0; i < kLanes; ++i) lines[i] = i < rows ? load_upto(from + i * stride + k, count) : vf{};
    transpose(lines);
    for (int64_t i = 0; i < count; ++i) put(k + i, lines[i]);
  }
}

// Panels [first, last) of B (K, N), (k, n) = gain[k]·b[n·stride + k]: the transpose of a matrix of N rows. gain may be
// null.
DDPM_FAST_NOINLINE void pack_columns(const float* b, int64_t stride, const float* gain, int64_t K, int64_t N,
                                     int64_t first, int64_t last, float* packed) {
  const int64_t end = min(N, last * kPanel);
  for (int64_t n = first * kPanel; n < last * kPanel; n += kLanes) {
    float* to = packed + n / kPanel * K * kPanel + n % kPanel;
    const int64_t rows = max<int64_t>(0, min<int64_t>(kLanes, N - n));
    over_columns(b + n * stride, stride, rows, K, [&](int64_t k, vf value) DDPM_FAST_LAMBDA {
      if (n + kLanes + k % kLanes < end) prefetch(b + (n + kLanes + k % kLanes) * stride + k / kLanes * kLanes, 1);
      store(to + k * kPanel, gain == nullptr ? value : value * splat(gain[k]));
    });
  }
}
inline void pack_columns(const float* b, int64_t stride, int64_t K, int64_t N, int64_t first, int64_t last,
                         float* packed) {
  pack_columns(b, stride, nullptr, K, N, first, last, packed);
}
inline void pack_columns(const float* b, int64_t stride, int64_t K, int64_t N, float* packed) {
  pack_columns(b, stride, nullptr, K, N, 0, panels(N), packed);
}

// (rows, columns), rows `stride` apart, to (columns, rows) without gaps.
DDPM_FAST_NOINLINE void transpose(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t count = min<int64_t>(kLanes, rows - r);
    over_columns(from + r * stride, stride, count, columns,
                 [&](int64_t k, vf value) DDPM_FAST_LAMBDA { store_upto(to + k * rows + r, value, count); });
  }
}

// Of panels of K rows: row k times by[k].
inline void scale_packed_rows(float* packed, int64_t K, int64_t count, const float* by) {
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t k = 0; k < K; ++k, packed += kPanel) {
      store(packed, load(packed) * splat(by[k]));
      store(packed + kLanes, load(packed + kLanes) * splat(by[k]));
    }
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
