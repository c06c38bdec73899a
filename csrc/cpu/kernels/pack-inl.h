// Packing for gemm-inl.h where rows or columns of B are contiguous, and memory laid out in pieces.
#pragma once

#include "gemm-inl.h"

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

typedef float v4 __attribute__((vector_size(16)));
typedef float v4_unaligned __attribute__((vector_size(16), aligned(4), may_alias));

// Four elements of a and b side by side, by their index in [0, 8).
template <int i, int j, int k, int l>
DDPM_FAST_INLINE v4 pick(v4 a, v4 b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, i, j, k, l);
#else
  typedef int32_t indices __attribute__((vector_size(16)));
  return __builtin_shuffle(a, b, indices{i, j, k, l});
#endif
}

// Four rows of four at from[row·stride] become four columns at to[column·apart], each times its factor unless null.
DDPM_FAST_INLINE void transpose4(const float* from, int64_t stride, const float* factor, float* to, int64_t apart) {
  const auto at = [&](int64_t row) -> v4 { return *reinterpret_cast<const v4_unaligned*>(from + row * stride); };
  const auto put = [&](int64_t column, v4 value) {
    *reinterpret_cast<v4_unaligned*>(to + column * apart) = factor == nullptr ? value : value * factor[column];
  };
  const v4 a = at(0), b = at(1), c = at(2), d = at(3);
  const v4 ab01 = pick<0, 4, 1, 5>(a, b), ab23 = pick<2, 6, 3, 7>(a, b);
  const v4 cd01 = pick<0, 4, 1, 5>(c, d), cd23 = pick<2, 6, 3, 7>(c, d);
  put(0, pick<0, 1, 4, 5>(ab01, cd01));
  put(1, pick<2, 3, 6, 7>(ab01, cd01));
  put(2, pick<0, 1, 4, 5>(ab23, cd23));
  put(3, pick<2, 3, 6, 7>(ab23, cd23));
}

// Panels [first, last) of B (K, N), (k, n) = gain[k]·b[n·stride + k]: the transpose of a matrix of N rows, a line of
// the cache of every row at a time. gain may be null.
DDPM_FAST_NOINLINE void pack_columns(const float* b, int64_t stride, const float* gain, int64_t K, int64_t N,
                                     int64_t first, int64_t last, float* packed) {
  for (int64_t p = first; p < last; ++p) {
    const int64_t columns = min<int64_t>(kPanel, N - p * kPanel);
    float* panel = packed + p * K * kPanel;
    for (int64_t line = 0; line < K; line += 16) {
      const int64_t end = min(K, line + 16);
      for (int64_t n = 0; n < kPanel; n += 4) {
        const float* from = b + (p * kPanel + n) * stride;
        int64_t k = line;
        if (n + 4 <= columns) {
          for (; k + 4 <= end; k += 4) {
            transpose4(from + k, stride, gain == nullptr ? nullptr : gain + k, panel + k * kPanel + n, kPanel);
          }
        }
        for (; k < end; ++k) {
          for (int64_t i = 0; i < 4; ++i) {
            const float value = n + i < columns ? from[i * stride + k] : 0.0f;
            panel[k * kPanel + n + i] = gain == nullptr ? value : value * gain[k];
          }
        }
      }
    }
  }
}
inline void pack_columns(const float* b, int64_t stride, int64_t K, int64_t N, int64_t first, int64_t last,
                         float* packed) {
  pack_columns(b, stride, nullptr, K, N, first, last, packed);
}
inline void pack_columns(const float* b, int64_t stride, int64_t K, int64_t N, float* packed) {
  pack_columns(b, stride, nullptr, K, N, 0, panels(N), packed);
}

// (rows, columns) to (columns, rows), both without gaps.
DDPM_FAST_NOINLINE void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t r = 0; r < rows; r += 4) {
    int64_t c = 0;
    if (r + 4 <= rows) {
      for (; c + 4 <= columns; c += 4) transpose4(from + r * columns + c, columns, nullptr, to + c * rows + r, rows);
    }
    for (; c < columns; ++c) {
      for (int64_t i = r; i < min(r + 4, rows); ++i) to[c * rows + i] = from[i * columns + c];
    }
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
