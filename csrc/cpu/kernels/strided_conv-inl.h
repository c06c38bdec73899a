// 3×3 convolutions of stride 2, channels-last, as matrix products:
//
//   A[pixel][block][tap][c] = the 3×3 inputs of an output pixel      output = A · W + bias, W[block][tap][c][k]
//
// with blocks of kLanes channels and W packed panel by panel (conv3x3_direct-inl.h). Winograd's form of a stride of 2,
// four convolutions of the input's phases, was no faster: it saves less than half of the products.
//
// A thread packs all taps for itself, then takes as many pixels at a time as have their A in its second-level cache.
//
// The gradients are products with the taps of a pixel one after another, (tap, c), which are copies of whole pixels:
//
//   dA = grad · W, dinput = the sum of dA's rows where they lie          dW = gradᵀ · A
#pragma once

#include "conv3x3_direct-inl.h"
#include "linear-inl.h"
#include "strided_conv.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// A of output pixels [first, first + count) of all images, rows of `row` floats.
inline void gather_strided(const StridedConvForward& p, int64_t first, int64_t count, float* a, int64_t row) {
  for (int64_t m = first; m < first + count; ++m, a += row) {
    const int64_t image = m / (p.out_H * p.out_W), rest = m % (p.out_H * p.out_W);
    const int64_t top = rest / p.out_W * 2 - p.padding, left = rest % p.out_W * 2 - p.padding;
    for (int64_t tap = 0; tap < 9; ++tap) {
      const int64_t y = top + tap / 3, x = left + tap % 3;
      const bool inside = y >= 0 && y < p.H && x >= 0 && x < p.W;
      const float* from = inside ? p.input + ((image * p.H + y) * p.W + x) * p.C : nullptr;
      for (int64_t c = 0; c < p.C; c += kLanes) {
        const int64_t channels = min<int64_t>(kLanes, p.C - c);
        store_upto(a + 9 * c + tap * channels, inside ? load_upto(from + c, channels) : vf{}, channels);
      }
    }
  }
}

// A panel's columns of the rows of `count` pixels.
inline void fill_with_bias(const float* bias, int64_t columns, int64_t count, int64_t row, float* to) {
  for (int64_t k = 0; k < columns; k += kLanes) {
    const int64_t some = min<int64_t>(kLanes, columns - k);
    const vf value = bias == nullptr ? vf{} : load_upto(bias + k, some);
    for (int64_t m = 0; m < count; ++m) store_upto(to + m * row + k, value, some);
  }
}

inline void strided_conv_forward(const StridedConvForward& p) {
  const int64_t depth = 9 * p.C, row = padded(depth), pixels = p.B * p.out_H * p.out_W;
  const int64_t most = max<int64_t>(kRows, second_level_floats() / 2 / row);
  const int64_t blocks = min(pixels, round_up(ceil_div(pixels, most), thread_count()));
  const auto block = [&](int64_t i) { return pixels * i / blocks; };
  const int64_t size = ceil_div(pixels, blocks), piece = piece_of(depth, kForwardPiece);
  parallel(blocks, pieces_of(size * depth * panels(p.K)), [&](int64_t begin, int64_t end) {
    float* packed = thread_scratch(kScratchU, packed_size(depth, p.K));
    float* a = thread_scratch(kScratchV, size * row);
    for (int64_t column = 0; column < p.K; column += kPanel) {
      pack_taps(p.weight, column, min<int64_t>(kPanel, p.K - column), p.C, packed + column * depth);
    }
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = block(i), count = block(i + 1) - first;
      gather_strided(p, first, count, a, row);
      for (int64_t column = 0; column < p.K; column += kPanel) {
        const int64_t columns = min<int64_t>(kPanel, p.K - column);
        float* to = p.output + first * p.K + column;
        fill_with_bias(p.bias == nullptr ? nullptr : p.bias + column, columns, count, p.K, to);
        product_panel(a, row, 1, packed + column * depth, count, depth, to, p.K, columns, true, piece);
      }
    }
  });
}

// A of all output pixels, (B·out_H·out_W, 9, C).
inline void gather_whole(const StridedConvGradient& p, float* a) {
  parallel(p.B * p.out_H, pieces_of(9 * p.C * p.out_W), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / p.out_H, top = row % p.out_H * 2 - p.padding;
      float* to = a + row * p.out_W * 9 * p.C;
      for (int64_t left = -p.padding, last = left + 2 * p.out_W; left < last; left += 2) {
        for (int64_t tap = 0; tap < 9; ++tap, to += p.C) {
          const int64_t y = top + tap / 3, x = left + tap % 3;
          const bool inside = y >= 0 && y < p.H && x >= 0 && x < p.W;
          const float* from = inside ? p.input + ((image * p.H + y) * p.W + x) * p.C : nullptr;
          over_channels(p.C, [&](int64_t c, auto lanes) { lanes.put(to + c, inside ? lanes.get(from + c) : vf{}); });
        }
      }
    }
  });
}

// dinput = the sum of the rows of dA, (B·out_H·out_W, 9, C), that belong to each pixel: at most four.
inline void add_taps(const StridedConvGradient& p, const float* da) {
  // Taps i with an output row or column at (at + padding - i) / 2.
  const auto taps_of = [&](int64_t at, int64_t outputs, int64_t (&taps)[2], int64_t (&where)[2]) {
    int64_t count = 0;
    for (int64_t i = (at + p.padding) % 2; i < 3; i += 2) {
      const int64_t output = (at + p.padding - i) / 2;
      if (at + p.padding >= i && output < outputs) taps[count] = i, where[count++] = output;
    }
    return count;
  };
  parallel(p.B * p.H, pieces_of(3 * p.C * p.W), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t rows[2], tops[2], columns[2], lefts[2];
      const int64_t image = row / p.H, row_count = taps_of(row % p.H, p.out_H, rows, tops);
      for (int64_t x = 0; x < p.W; ++x) {
        const int64_t column_count = taps_of(x, p.out_W, columns, lefts);
        const float* from[4];
        int64_t count = 0;
        for (int64_t i = 0; i < row_count; ++i) {
          for (int64_t j = 0; j < column_count; ++j) {
            const int64_t pixel = (image * p.out_H + tops[i]) * p.out_W + lefts[j];
            from[count++] = da + (pixel * 9 + rows[i] * 3 + columns[j]) * p.C;
          }
        }
        float* to = p.dinput + (row * p.W + x) * p.C;
        over_channels(p.C, [&](int64_t c, auto lanes) {
          vf sum = {};
          for (int64_t i = 0; i < count; ++i) sum += lanes.get(from[i] + c);
          lanes.put(to + c, sum);
        });
      }
    }
  });
}

// (count, rows, columns) to (count, columns, rows).
inline void transpose_each(const float* from, int64_t count, int64_t rows, int64_t columns, float* to) {
  const int64_t size = rows * columns;
  parallel(count, pieces_of(size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) transpose(from + i * size, rows, columns, to + i * size);
  });
}

inline void strided_conv_gradient(const StridedConvGradient& p) {
  const int64_t depth = 9 * p.C, pixels = p.B * p.out_H * p.out_W;
  // Slots beside those of the products in linear-inl.h.
  float* a = p.dinput || p.dweight ? thread_scratch(kScratchV, pixels * depth) : nullptr;
  float* w = p.dinput || p.dweight ? thread_scratch(kScratchM, p.K * depth) : nullptr;
  if (p.dinput) {
    transpose_each(p.weight, p.K, p.C, 9, w);
    linear_data_gradient(
        {.grad = p.grad, .weight = w, .rows = pixels, .K = p.K, .dinput = {a}, .channels = {depth, 0}});
    add_taps(p, a);
  }
  if (p.dweight) gather_whole(p, a);
  if (p.dweight || p.dbias) {
    linear_weight_gradient({.grad = p.grad,
                            .input = {a},
                            .channels = {depth, 0},
                            .rows = pixels,
                            .K = p.K,
                            .dweight = p.dweight ? w : nullptr,
                            .dbias = p.dbias});
  }
  if (p.dweight) transpose_each(w, p.K, 9, p.C, p.dweight);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
