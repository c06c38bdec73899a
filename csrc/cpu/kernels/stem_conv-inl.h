// Convolutions of few channels as products without a matrix of neighbours. With zeros written around it, a
// channels-last map has the side·C numbers that a row of the kernel sees of a pixel side by side, and those of the next
// pixel C further:
//
//   out[x] = Σ over i of padded[y + i][C·x … C·(x + side)] · W[i]       W[i] (side·C, K), packed panel by panel
//
// The gradient of W[i] is the transposed product, of a row of the map with one of the gradient.
#pragma once

#include "conv3x3_gradient-inl.h"
#include "pack-inl.h"
#include "stem_conv.h"

namespace ddpm_fast::DDPM_FAST_ISA {

struct PaddedMap {
  float* data;
  int64_t row, image, depth;  // floats of a row, of an image, and that a row of the kernel sees of a pixel

  DDPM_FAST_INLINE const float* at(int64_t b, int64_t y) const { return data + b * image + y * row; }
};

// The channels of a map's line y among the C channels of each pixel of `to`.
inline void copy_line(const StemConvMap& map, int64_t b, int64_t y, int64_t W, int64_t C, float* to) {
  const float* from = map.data + b * map.image + y * map.line;
  if (map.C == C && map.channel == 1 && map.pixel == C) {
    __builtin_memcpy(to, from, static_cast<unsigned long>(W * C) * 4);
    return;
  }
  for (int64_t c = 0; c < map.C; ++c) {
    for (int64_t x = 0; x < W; ++x) to[x * C + c] = from[c * map.channel + x * map.pixel];
  }
}

inline PaddedMap pad_map(const StemConvSizes& in, const StemConvMaps& maps) {
  const int64_t margin = in.side / 2, rows = in.H + 2 * margin, row = (in.W + 2 * margin) * in.C;
  PaddedMap map{thread_scratch(kScratchShared, in.B * rows * row), row, rows * row, in.side * in.C};
  parallel(in.B * rows, max<int64_t>(1, 32768 / row), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / rows, y = i % rows - margin, inner = in.W * in.C, left = margin * in.C;
      float* to = map.data + i * row;
      if (y < 0 || y >= in.H) {
        __builtin_memset(to, 0, static_cast<unsigned long>(row) * 4);
        continue;
      }
      __builtin_memset(to, 0, static_cast<unsigned long>(left) * 4);
      int64_t channel = 0;
      for (const StemConvMap& part : maps.map) {
        if (part.C > 0) copy_line(part, b, y, in.W, in.C, to + left + channel);
        channel += part.C;
      }
      __builtin_memset(to + left + inner, 0, static_cast<unsigned long>(left) * 4);
    }
  });
  return map;
}

// Where tap (i, j) of channel c of output channel n is in a torch weight; row r of a panel is (i, j, c).
DDPM_FAST_INLINE int64_t stem_conv_tap(const StemConvSizes& in, int64_t n, int64_t r) {
  return (n * in.C + r % in.C) * in.side * in.side + r / in.C;
}

template <int R>
DDPM_FAST_NOINLINE void stem_conv_tile(const PaddedMap& map, const StemConvSizes& in, const float* from,
                                       const float* panel, const float* bias, float* out, int64_t columns) {
  Sums<R> sums;
  sums.clear();
  for (int64_t i = 0; i < in.side; ++i) {
    const float* a = from + i * map.row;
    add_terms(sums, a, in.C, 1, panel, map.depth);
  }
  const vf left_bias = load(bias), right_bias = load(bias + kLanes);
  Store store_row{out, in.K, columns, false};
  const auto with_bias = [&](int m, vf left, vf right) { store_row(m, left + left_bias, right + right_bias); };
  sums.write(with_bias);
}

template <int R = kRows>
DDPM_FAST_INLINE void stem_conv_tile_of(int64_t rows, const PaddedMap& map, const StemConvSizes& in, const float* from,
                                        const float* panel, const float* bias, float* out, int64_t columns) {
  if constexpr (R > 0) {
    if (rows == R) return stem_conv_tile<R>(map, in, from, panel, bias, out, columns);
    stem_conv_tile_of<R - 1>(rows, map, in, from, panel, bias, out, columns);
  }
}

// Lines of the map that make up enough work for a thread.
DDPM_FAST_INLINE int64_t stem_conv_lines(const StemConvSizes& in) {
  return pieces_of(in.W * in.side * in.side * in.C * panels(in.K) * 2);
}

inline void stem_conv_forward(const StemConvForward& p) {
  const StemConvSizes& in = p.in;
  const PaddedMap map = pad_map(in, p.x);
  const int64_t depth = in.side * map.depth, num_panels = panels(in.K);
  float* packed = thread_scratch(kScratchU, num_panels * (depth + 1) * kPanel);
  float* biases = packed + num_panels * depth * kPanel;
  for (int64_t n = 0; n < num_panels * kPanel; ++n) {
    const bool there = n < in.K;
    float* to = packed + n / kPanel * depth * kPanel + n % kPanel;
    for (int64_t r = 0; r < depth; ++r) to[r * kPanel] = there ? p.weight[stem_conv_tap(in, n, r)] : 0.0f;
    biases[n] = there && p.bias != nullptr ? p.bias[n] : 0.0f;
  }
  parallel(in.B * in.H, stem_conv_lines(in), [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const float* from = map.at(line / in.H, line % in.H);
      for (int64_t panel = 0; panel < num_panels; ++panel) {
        const int64_t groups = ceil_div(in.W, kRows), column = panel * kPanel;
        for (int64_t g = 0, x = 0; g < groups; ++g) {
          const int64_t rows = (in.W - x + groups - g - 1) / (groups - g);
          stem_conv_tile_of(rows, map, in, from + x * in.C, packed + panel * depth * kPanel, biases + column,
                            p.out + (line * in.W + x) * in.K + column, min<int64_t>(kPanel, in.K - column));
          x += rows;
        }
      }
    }
  });
}

constexpr int64_t kStemConvChunks = 32;  // chunks of lines, each with its partial sums; independent of the threads

inline void stem_conv_weight_gradient(const StemConvWeightGradient& p) {
  const StemConvSizes& in = p.in;
  if (p.dbias != nullptr) sum_rows(p.grad, in.B * in.H * in.W, in.K, p.dbias);
  const PaddedMap map = pad_map(in, p.x);
  const int64_t lines = in.B * in.H, chunks = min(kStemConvChunks, lines), num_panels = panels(in.K);
  const int64_t depth = in.side * map.depth, sums_size = num_panels * depth * kPanel;
  float* sums = thread_scratch(kScratchSums, chunks * sums_size);
  parallel(chunks * num_panels, pieces_of(lines / chunks * in.W * depth * 2), [&](int64_t begin, int64_t end) {
    float* packed = thread_scratch(kScratchM, in.W * kPanel);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / num_panels, panel = task % num_panels, column = panel * kPanel;
      const int64_t first = chunk * lines / chunks, last = (chunk + 1) * lines / chunks, count = in.K - column;
      float* s = sums + chunk * sums_size + panel * depth * kPanel;
      for (int64_t line = first; line < last; ++line) {
        for (int64_t x = 0; x < in.W; ++x) {
          const float* from = p.grad + (line * in.W + x) * in.K + column;
          store(packed + x * kPanel, load_upto(from, count));
          store(packed + x * kPanel + kLanes, count > kLanes ? load_upto(from + kLanes, count - kLanes) : vf{});
        }
        for (int64_t i = 0; i < in.side; ++i) {
          product_panel(map.at(line / in.H, line % in.H + i), 1, in.C, packed, map.depth, in.W,
                        s + i * map.depth * kPanel, kPanel, kPanel, line > first);
        }
      }
    }
  });
  for (int64_t n = 0; n < in.K; ++n) {
    const float* from = sums + n / kPanel * depth * kPanel + n % kPanel;
    for (int64_t r = 0; r < depth; ++r) {
      float sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += from[chunk * sums_size + r * kPanel];
      p.dweight[stem_conv_tap(in, n, r)] = sum;
    }
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
