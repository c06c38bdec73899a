// 3×3 convolutions of stride 2, channels-last, as matrix products:
//
//   A[pixel][block][tap][c] = the 3×3 inputs of an output pixel      output = A · W + bias, W[block][tap][c][k]
//
// with blocks of kLanes channels and W packed panel by panel (conv3x3_direct-inl.h). Winograd's form of a stride of 2,
// four convolutions of the input's phases, was no faster: it saves less than half of the products.
//
// A thread packs all taps for itself, then takes as many pixels at a time as have their A in its second-level cache. Of
// few pixels it takes some of the output's channels instead, and packs the taps of those.
//
//   dW = gradᵀ · A          dA = grad · W, of which dinput's pixels are sums of up to four
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

// Some pixels' outputs of the channels from `column` on that are in a panel.
inline void strided_conv_panel(const StridedConvForward& p, int64_t first, int64_t count, const float* a, int64_t row,
                               const float* packed, int64_t column) {
  const int64_t depth = 9 * p.C, columns = min<int64_t>(kPanel, p.K - column);
  float* to = p.output + first * p.K + column;
  fill_with_bias(p.bias == nullptr ? nullptr : p.bias + column, columns, count, p.K, to);
  product_panel(a, row, 1, packed, count, depth, to, p.K, columns, true, piece_of(depth, kForwardPiece));
}

inline void strided_conv_of_few(const StridedConvForward& p, int64_t pixels) {
  const int64_t depth = 9 * p.C, row = padded(depth);
  parallel(panels(p.K), pieces_of(p.C * (9 * pixels + kCyclesOfTaps / 2)), [&](int64_t begin, int64_t end) {
    float* packed = thread_scratch(kScratchU, depth * kPanel);
    float* a = thread_scratch(kScratchV, pixels * row);
    gather_strided(p, 0, pixels, a, row);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t column = panel * kPanel;
      pack_taps(p.weight, column, min<int64_t>(kPanel, p.K - column), p.C, packed);
      strided_conv_panel(p, 0, pixels, a, row, packed, column);
    }
  });
}

inline void strided_conv_forward(const StridedConvForward& p) {
  const int64_t depth = 9 * p.C, row = padded(depth), pixels = p.B * p.out_H * p.out_W;
  if (!packs_apart(pixels)) return strided_conv_of_few(p, pixels);
  const int64_t most = max<int64_t>(kRows, second_level_floats() / 2 / row);
  const int64_t blocks = min(pixels, round_up(ceil_div(pixels, most), thread_count()));
  const auto block = [&](int64_t i) { return pixels * i / blocks; };
  const int64_t size = ceil_div(pixels, blocks);
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
        strided_conv_panel(p, first, count, a, row, packed + column * depth, column);
      }
    }
  });
}

// The gradients, by blocks of input channels, a panel of each tap: what a task makes in between stays in its caches.

constexpr int64_t kPixelsOfSum = 64, kOutputsOfTask = 128;

// Of output pixels [first, first + count) the inputs of a block's channels: count rows of kPanel for each tap.
inline void gather_panels(const StridedConvGradient& p, int64_t first, int64_t count, int64_t channel, float* packed) {
  const int64_t columns = min<int64_t>(kPanel, p.C - channel);
  for (int64_t m = 0; m < count; ++m) {
    const int64_t image = (first + m) / (p.out_H * p.out_W), rest = (first + m) % (p.out_H * p.out_W);
    const int64_t top = rest / p.out_W * 2 - p.padding, left = rest % p.out_W * 2 - p.padding;
    for (int64_t tap = 0; tap < 9; ++tap) {
      const int64_t y = top + tap / 3, x = left + tap % 3;
      const bool inside = y >= 0 && y < p.H && x >= 0 && x < p.W;
      const float* from = inside ? p.input + ((image * p.H + y) * p.W + x) * p.C + channel : nullptr;
      float* to = packed + (tap * count + m) * kPanel;
      store(to, inside ? load_upto(from, columns) : vf{});
      store(to + kLanes, inside && columns > kLanes ? load_upto(from + kLanes, columns - kLanes) : vf{});
    }
  }
}

// dweight of some output channels and a block of input channels: sums of kPixelsOfSum terms, then of these.
inline void strided_weight_gradient(const StridedConvGradient& p) {
  const int64_t pixels = p.B * p.out_H * p.out_W, parts = ceil_div(p.K, kOutputsOfTask);
  const int64_t cycles = 9 * pixels * min<int64_t>(p.K, kOutputsOfTask);
  parallel(panels(p.C) * parts, pieces_of(cycles), [&](int64_t begin, int64_t end) {
    float* packed = thread_scratch(kScratchV, 9 * kPixelsOfSum * kPanel);
    float* sums = thread_scratch(kScratchM, kOutputsOfTask * 9 * kPanel);  // (outputs, taps, kPanel)
    for (int64_t task = begin; task < end; ++task) {
      const int64_t output = task % parts * kOutputsOfTask, outputs = min<int64_t>(kOutputsOfTask, p.K - output);
      const int64_t channel = task / parts * kPanel, columns = min<int64_t>(kPanel, p.C - channel);
      for (int64_t first = 0; first < pixels; first += kPixelsOfSum) {
        const int64_t count = min<int64_t>(kPixelsOfSum, pixels - first);
        gather_panels(p, first, count, channel, packed);
        for (int64_t tap = 0; tap < 9; ++tap) {
          product_panel(p.grad + first * p.K + output, 1, p.K, packed + tap * count * kPanel, outputs, count,
                        sums + tap * kPanel, 9 * kPanel, panel_width(columns), first > 0);
        }
      }
      for (int64_t k = 0; k < outputs; ++k) {
        transpose(sums + k * 9 * kPanel, kPanel, 9, columns, p.dweight + ((output + k) * p.C + channel) * 9);
      }
    }
  });
}

// The weight of a block of input channels, K rows of kPanel for each tap.
inline void pack_for_inputs(const StridedConvGradient& p, int64_t channel, float* packed) {
  for (int64_t k = 0; k < p.K; ++k) {
    for (int64_t half = 0; half < kPanel; half += kLanes) {
      const float* from = p.weight + (k * p.C + channel + half) * 9;
      float* to = packed + k * kPanel + half;
      const int64_t plane = p.K * kPanel, columns = p.C - channel - half;
      if (columns >= kLanes) {  // as a mirrored weight's, in reverse order
        gather_taps(from, [&](int tap, vf value) DDPM_FAST_LAMBDA { store(to + (8 - tap) * plane, value); });
        continue;
      }
      for (int64_t tap = 0; tap < 9; ++tap) {
        for (int64_t c = 0; c < kLanes; ++c) to[tap * plane + c] = c < columns ? from[9 * c + tap] : 0;
      }
    }
  }
}

// Taps that read row or column `at` of the input, at most two, and the output's rows or columns that they make.
struct TapsOf {
  int64_t count = 0, taps[2], outputs[2];

  TapsOf(int64_t at, int64_t padding, int64_t output_size) {
    for (int64_t tap = (at + padding) % 2; tap < 3 && tap <= at + padding; tap += 2) {
      const int64_t output = (at + padding - tap) / 2;
      if (output < output_size) taps[count] = tap, outputs[count++] = output;
    }
  }
};

// A block's channels of one image of dinput: the sums of dA's rows, (out_H·out_W, 9, kPanel), that belong to a pixel.
inline void add_taps(const StridedConvGradient& p, const float* da, int64_t columns, float* dinput) {
  for (int64_t y = 0; y < p.H; ++y) {
    const TapsOf rows(y, p.padding, p.out_H);
    for (int64_t x = 0; x < p.W; ++x, dinput += p.C) {
      const TapsOf lines(x, p.padding, p.out_W);
      vf left = {}, right = {};
      for (int64_t i = 0; i < rows.count; ++i) {
        for (int64_t j = 0; j < lines.count; ++j) {
          const int64_t pixel = rows.outputs[i] * p.out_W + lines.outputs[j];
          const float* from = da + (pixel * 9 + rows.taps[i] * 3 + lines.taps[j]) * kPanel;
          left += load(from);
          right += load(from + kLanes);
        }
      }
      store_upto(dinput, left, min<int64_t>(kLanes, columns));
      if (columns > kLanes) store_upto(dinput + kLanes, right, columns - kLanes);
    }
  }
}

inline void strided_data_gradient(const StridedConvGradient& p) {
  const int64_t pixels = p.out_H * p.out_W, piece = piece_of(p.K, kForwardPiece);
  const int64_t groups = min<int64_t>(p.B, ceil_div(thread_count(), panels(p.C)));
  parallel(panels(p.C) * groups, pieces_of(9 * pixels * p.K * p.B / groups), [&](int64_t begin, int64_t end) {
    float* packed = thread_scratch(kScratchU, 9 * p.K * kPanel);
    float* da = thread_scratch(kScratchV, pixels * 9 * kPanel);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel = task / groups * kPanel, columns = min<int64_t>(kPanel, p.C - channel);
      const int64_t group = task % groups;
      pack_for_inputs(p, channel, packed);
      for (int64_t image = p.B * group / groups; image < p.B * (group + 1) / groups; ++image) {
        for (int64_t tap = 0; tap < 9; ++tap) {
          product_panel(p.grad + image * pixels * p.K, p.K, 1, packed + tap * p.K * kPanel, pixels, p.K,
                        da + tap * kPanel, 9 * kPanel, kPanel, false, piece);
        }
        add_taps(p, da, columns, p.dinput + image * p.H * p.W * p.C + channel);
      }
    }
  });
}

inline void strided_conv_gradient(const StridedConvGradient& p) {
  if (p.dinput) strided_data_gradient(p);
  if (p.dweight) strided_weight_gradient(p);
  if (p.dbias) {
    linear_weight_gradient({.grad = p.grad, .rows = p.B * p.out_H * p.out_W, .K = p.K, .dbias = p.dbias});
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
