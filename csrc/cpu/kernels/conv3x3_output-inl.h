// The transform of a 3×3 convolution's sums, M in conv3x3-inl.h, to outputs with bias and residual, and their norm.
#pragma once

#include "conv3x3.h"
#include "conv3x3_edges-inl.h"
#include "dispatch-inl.h"
#include "norm_rows-inl.h"
#include "tiles-inl.h"
#include "winograd-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// Output channels of image b from k on, at most kLanes and below `last`, that belong to one part.
struct OutputSlice {
  float* output;
  const float* residual;
  const float* bias;
  int64_t pixel, width;  // of the part: floats from pixel to pixel, pixels from row to row
  int64_t count;
  float factor;

  DDPM_FAST_INLINE OutputSlice(const Conv3x3Forward& p, int64_t b, int64_t k, int64_t last) {
    const int part = k < p.output_channels[0] ? 0 : 1;
    const int64_t channel = k - (part == 0 ? 0 : p.output_channels[0]);
    output = p.output[part] + channel;
    residual = p.residual[part] == nullptr ? nullptr : p.residual[part] + channel;
    bias = p.bias == nullptr ? nullptr : p.bias + b * p.bias_stride + k;
    factor = p.factor;
    pixel = p.output_channels[part] * p.output_step;
    width = (p.pooled ? p.W / 2 : p.W) * p.output_step;
    count = min(min<int64_t>(kLanes, last - k), p.output_channels[part] - channel);
  }
};

// Output `pixel` of a slice: a tile's sum, with bias and residual. kAll: of kLanes channels.
template <bool kAll, bool kResidual>
DDPM_FAST_INLINE void put_output(const OutputSlice& slice, int64_t pixel, vf value, vf bias) {
  const int64_t at = pixel * slice.pixel;
  value += bias;
  if constexpr (kAll) {
    if constexpr (kResidual) value += load(slice.residual + at);
    store(slice.output + at, value * splat(slice.factor));
  } else {
    if constexpr (kResidual) value += load_upto(slice.residual + at, slice.count);
    store_upto(slice.output + at, value * splat(slice.factor), slice.count);
  }
}

// The 4×4 outputs of a tile for up to kLanes channels from m + point·plane; with kPooled the sums of 2×2 of them. The
// outer two and the inner two of an axis' four rows are two passes that both load the values, so that no register
// spills.
template <bool kPooled, bool kAll, bool kResidual>
DDPM_FAST_INLINE void transform_output(const float* m, int64_t plane, const OutputSlice& slice, int64_t first,
                                       vf bias) {
  const auto put = [&](int64_t pixel, vf value)
                       DDPM_FAST_LAMBDA { put_output<kAll, kResidual>(slice, pixel, value, bias); };
  const auto at = [&](int i, int j) DDPM_FAST_LAMBDA { return load(m + (i * 6 + j) * plane); };
  if constexpr (kPooled) {
    const auto column = [&](int j) DDPM_FAST_LAMBDA {
      return outputs({at(0, j), at(1, j), at(2, j), at(3, j), at(4, j), at(5, j)});
    };
    const Four a = column(0), b = column(1), c = column(2), d = column(3), e = column(4), f = column(5);
    const auto row = [&](int64_t pixel, const Four& upper, const Four& lower) DDPM_FAST_LAMBDA {
      put(pixel, (upper.a0 + upper.a1) + (lower.a0 + lower.a1));
      put(pixel + 1, (upper.a2 + upper.a3) + (lower.a2 + lower.a3));
    };
    row(first, outputs({a.a0, b.a0, c.a0, d.a0, e.a0, f.a0}), outputs({a.a1, b.a1, c.a1, d.a1, e.a1, f.a1}));
    row(first + slice.width, outputs({a.a2, b.a2, c.a2, d.a2, e.a2, f.a2}),
        outputs({a.a3, b.a3, c.a3, d.a3, e.a3, f.a3}));
  } else {
    const auto row = [&](int i, const Four& y) DDPM_FAST_LAMBDA {
      const int64_t pixel = first + i * slice.width;
      put(pixel, y.a0);
      put(pixel + 1, y.a1);
      put(pixel + 2, y.a2);
      put(pixel + 3, y.a3);
    };
    const auto even = [&](int j)
                          DDPM_FAST_LAMBDA { return even_outputs(at(0, j), at(1, j), at(2, j), at(3, j), at(4, j)); };
    const auto odd = [&](int j)
                         DDPM_FAST_LAMBDA { return odd_outputs(at(1, j), at(2, j), at(3, j), at(4, j), at(5, j)); };
    const auto rows = [&](int i, Two a, Two b, Two c, Two d, Two e, Two f) DDPM_FAST_LAMBDA {
      row(i, outputs({a.a0, b.a0, c.a0, d.a0, e.a0, f.a0}));
      row(i + 2, outputs({a.a1, b.a1, c.a1, d.a1, e.a1, f.a1}));
    };
    rows(0, even(0), even(1), even(2), even(3), even(4), even(5));
    rows(1, odd(0), odd(1), odd(2), odd(3), odd(4), odd(5));
  }
}

// The same of a tile at an edge.
template <bool kResidual>
inline void transform_edge_output(const float* m, int64_t plane, const OutputSlice& slice, int64_t first, vf bias,
                                  const Tile& tile, bool pooled) {
  const Axis &rows = kAxes[tile.height], &columns = kAxes[tile.width];
  multiply_between(
      pooled ? rows.pooled : rows.outputs, pooled ? columns.pooled : columns.outputs,
      [&](int i, int j) DDPM_FAST_LAMBDA { return load(m + (rows.point[i] * kAxisPoints + columns.point[j]) * plane); },
      [&](int i, int j, vf value)
          DDPM_FAST_LAMBDA { put_output<false, kResidual>(slice, first + i * slice.width + j, value, bias); });
}

// Columns [first, first + columns) of the outputs of tiles [begin, end); m holds their sums, `row` floats from tile to
// tile.
inline void finish_columns(const Conv3x3Forward& p, const Tiles& tiles, int64_t begin, int64_t end, int64_t first,
                           int64_t columns, const float* m, int64_t row, int64_t plane) {
  const int64_t last = min(first + columns, p.output_channels[0] + p.output_channels[1]);
  const int64_t halves = p.pooled ? 1 : 0;
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile(tiles, t);
    for (int64_t k = first, count; k < last; k += count) {
      const OutputSlice slice(p, tile.b, k, last);
      count = slice.count;
      const float* sums = m + (t - begin) * row + (k - first);
      const vf bias = slice.bias == nullptr ? vf{} : load_upto(slice.bias, count);
      const int64_t pixel = (tile.b * (tiles.H >> halves) + (tile.y >> halves)) * slice.width + (tile.x >> halves);
      const auto edge = [&](auto residual) {
        transform_edge_output<decltype(residual)::value>(sums, plane, slice, pixel, bias, tile, p.pooled);
      };
      const auto whole = [&](auto pooled, auto all, auto residual) {
        transform_output<decltype(pooled)::value, decltype(all)::value, decltype(residual)::value>(sums, plane, slice,
                                                                                                   pixel, bias);
      };
      if (tile.whole()) {
        dispatch(whole, p.pooled, count == kLanes, slice.residual != nullptr);
      } else {
        dispatch(edge, slice.residual != nullptr);
      }
    }
  }
}

// The norm of `count` pixels from `first` on, at most four and all of one image. First the norms of all, each of which
// is a chain of additions, a division and a square root: one by one they would be waited for.
inline void norm_pixels(const Conv3x3Forward& p, int64_t b, int64_t first, int64_t count) {
  const PixelNorm& norm = *p.norm;
  const int64_t K = p.output_channels[0];
  const Affine affine{.gain = norm.gain,
                      .offset = nullptr,
                      .scale = norm.scale == nullptr ? nullptr : norm.scale + b * K,
                      .shift = norm.shift == nullptr ? nullptr : norm.shift + b * K};
  float norms[4];
  for (int64_t i = 0; i < count; ++i) norms[i] = row_norm(p.output[0] + (first + i) * K, nullptr, K);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t pixel = first + i;
    if (norm.norms != nullptr) norm.norms[pixel] = norms[i];
    rms_apply(p.output[0] + pixel * K, norms[i], nullptr, affine, true,
              norm.residual == nullptr ? nullptr : norm.residual + pixel * K, norm.out + pixel * K, K, nullptr);
  }
}

inline void norm_tile(const Conv3x3Forward& p, const Tiles& tiles, const Tile& tile) {
  for (int64_t i = 0; i < tile.height; ++i) {
    norm_pixels(p, tile.b, (tile.b * tiles.H + tile.y + i) * tiles.W + tile.x, tile.width);
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
