// 3×3 convolutions of stride 2, channels-last, as matrix products:
//
//   A[pixel][block][tap][c] = the 3×3 inputs of an output pixel      output = A · W + bias, W[block][tap][c][k]
//
// with blocks of kLanes channels and W packed panel by panel (conv3x3_direct-inl.h). Winograd's form of a stride of 2,
// four convolutions of the input's phases, was no faster: it saves less than half of the products.
//
// A thread packs all taps for itself, then takes as many pixels at a time as have their A in its second-level cache.
#pragma once

#include "conv3x3_direct-inl.h"
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

}  // namespace ddpm_fast::DDPM_FAST_ISA
