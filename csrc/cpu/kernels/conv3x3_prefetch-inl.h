// Software prefetch for the transforms of a 3×3 convolution. Where a transform follows products, which are bound by
// arithmetic, those ask for its memory: without it the transforms stall for up to two thirds of their time. Else it
// goes two tiles ahead of the transform.
#pragma once

#include "conv3x3_points-inl.h"
#include "gemm-inl.h"
#include "tiles-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// Rows of the tiles [begin, end), `rows` of each, in shares for `steps` steps from `first` on. Finding each row's tile
// and each step's share by divisions took 1 to 3% of a residual block of 48 to 128 channels.
class RowsOfTiles {
 public:
  RowsOfTiles(const Tiles& tiles, int64_t begin, int64_t end, int64_t rows, int64_t steps, int64_t first = 0)
      : tiles_(tiles),
        index_(min(begin + (end - begin) * first / steps, tiles.total - 1)),
        tile_(tiles, index_),
        rows_(rows),
        left_((end - index_) * rows),
        share_((((end - begin) * rows << kPoint) + steps - 1) / steps) {}

  // body(tile, row) for those of the next step.
  template <typename Body>
  DDPM_FAST_INLINE void next(const Body& body) {
    for (due_ += share_; due_ >= kOne && left_ > 0; due_ -= kOne, --left_) {
      if (row_ == rows_) {
        row_ = 0;
        tile_ = Tile(tiles_, ++index_);
      }
      body(tile_, row_++);
    }
  }

 private:
  static constexpr int kPoint = 16;  // bits of a share behind its point
  static constexpr int64_t kOne = int64_t{1} << kPoint;
  const Tiles& tiles_;
  int64_t index_;
  Tile tile_;
  int64_t row_ = 0, rows_, left_, share_, due_ = 0;
};

// Row i of five rows of a tile's inputs: its own four, and the first below.
constexpr int64_t kRowsToPrefetch = 5;
inline void prefetch_input_row(const InputMaps& input, const Tiles& tiles, const Tile& tile, int64_t i,
                               PrefetchQueue& queue) {
  const int64_t up = input.upsampled ? 1 : 0, y = min(tile.y + i, tiles.H - 1) >> up, x = tile.x >> up;
  const int64_t width = (tile.width + up) >> up;
  const int64_t pixel = (tile.b * (tiles.H >> up) + y) * (tiles.W >> up) * input.step + x;
  for (int part = 0; part < 2 && input.channels[part] > 0; ++part) {
    const int64_t floats = input.channels[part] * input.step;
    queue.add(input.part[part] + pixel * floats, width * floats);
  }
}

constexpr int64_t kTilesAhead = 2;

// The same five rows of channels [c, c + count) of both parts, whose pixels lie apart.
inline void prefetch_inputs(const InputMaps& input, const Tiles& tiles, int64_t index, int64_t c, int64_t count) {
  const Tile tile(tiles, index);
  const int64_t up = input.upsampled ? 1 : 0, width = (tile.width + up) >> up;
  for (int part = 0; part < 2; ++part, c -= input.channels[0]) {
    const int64_t first = max<int64_t>(0, c), floats = min(c + count, input.channels[part]) - first;
    const int64_t apart = input.channels[part] * input.step;
    for (int64_t i = 0; floats > 0 && i < kRowsToPrefetch; ++i) {
      const int64_t y = min(tile.y + i, tiles.H - 1) >> up;
      const int64_t pixel = (tile.b * (tiles.H >> up) + y) * (tiles.W >> up) * input.step + (tile.x >> up);
      for (int64_t x = pixel; x < pixel + width; ++x) prefetch(input.part[part] + x * apart + first, floats);
    }
  }
}

// Prefetches row i of a tile's four output rows, and the norm's inputs and outputs for that row.
inline void prefetch_output_row(const Conv3x3Forward& p, const Tiles& tiles, const Tile& tile, int64_t i,
                                PrefetchQueue& queue) {
  if (i >= tile.height || p.pooled) return;  // a second part's outputs are left to come by themselves
  const int64_t step = p.output_step, K = p.output_channels[0] * step, floats = tile.width * K;
  const int64_t at = ((tile.b * tiles.H + tile.y + i) * tiles.W * step + tile.x) * K;
  queue.add_to_write(p.output[0] + at, floats);
  if (p.residual[0] != nullptr) queue.add(p.residual[0] + at, floats);
  if (p.norm == nullptr) return;
  if (p.norm->out != p.output[0]) queue.add_to_write(p.norm->out + at, floats);
  if (p.norm->residual != nullptr) queue.add(p.norm->residual + at, floats);
}

// The same of `columns` output channels from `first` on, which lie apart, without the norm's.
inline void prefetch_output_columns(const Conv3x3Forward& p, const Tiles& tiles, int64_t index, int64_t i,
                                    int64_t first, int64_t columns) {
  const Tile tile(tiles, index);
  if (i >= tile.height || p.pooled) return;
  const int part = first < p.output_channels[0] ? 0 : 1;
  const int64_t channel = first - (part == 0 ? 0 : p.output_channels[0]), step = p.output_step;
  const int64_t pixel = p.output_channels[part] * step, floats = min(columns, p.output_channels[part] - channel);
  const int64_t row = ((tile.b * tiles.H + tile.y + i) * tiles.W * step + tile.x) * pixel + channel;
  for (int64_t x = 0; x < tile.width; ++x) {
    prefetch_to_write(p.output[part] + row + x * pixel, floats);
    if (p.residual[part] != nullptr) prefetch(p.residual[part] + row + x * pixel, floats);
  }
}

// The weights of input channels [c, c + count) for a panel, in kPoints steps.
inline void prefetch_weights(const Conv3x3Weight& w, int64_t first, int64_t columns, int64_t c, int64_t count,
                             int64_t step, PrefetchQueue& queue) {
  const float* from = w.data + first * w.out_stride + c * w.in_stride;
  if (w.in_stride == 9) {
    spread(columns, step, kPoints, [&](int64_t k) { queue.add(from + k * w.out_stride, 9 * count); });
  } else {
    spread(count, step, kPoints, [&](int64_t n) { queue.add(from + n * w.in_stride, 9 * columns); });
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
