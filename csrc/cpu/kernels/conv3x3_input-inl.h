// The Winograd transform of a 3×3 convolution's inputs, V in conv3x3-inl.h, vectorised over channels.
#pragma once

#include "conv3x3_edges-inl.h"
#include "conv3x3_points-inl.h"
#include "conv3x3_prefetch-inl.h"
#include "dispatch-inl.h"
#include "parallel-inl.h"
#include "tiles-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

enum ConvScratch { kScratchV, kScratchM, kScratchU, kScratchShared, kScratchZeros, kScratchGradients, kScratchSums };
constexpr int kScratchNormed = kScratchShared;  // gradients share, the forward norms
// Floats between planes, with 16 floats of padding: addresses a multiple of 4 KB apart share a set of the cache.
DDPM_FAST_INLINE constexpr int64_t plane_stride(int64_t floats) { return round_up(floats, 16) + 16; }
// The same for rows of V.
DDPM_FAST_INLINE constexpr int64_t row_stride(int64_t C) { return C % 128 == 0 ? C + 16 : round_up(C, 16); }
alignas(64) constexpr float kZeroVector[kLanes] = {};

// V of a tile for kLanes or fewer channels: read(i, j) gives input (i, j), write(to, value) stores.
// Three passes of two rows each: the 12 vectors between the two axes stay in registers. Loading the inputs again is
// cheaper than storing all 36 vectors.
template <bool kAll, typename Read, typename Write>
DDPM_FAST_INLINE void transform_tile(const Read& read, const Write& write, const Points& points, float* v,
                                     int64_t plane) {
  const auto put = [&](int i, vf c0, vf c1, vf c2, vf c3, vf c4, vf c5) DDPM_FAST_LAMBDA {
    const Six values = input_points({c0, c1, c2, c3, c4, c5});
    float* to = fresh(v + i * 6 * plane);
    if (kAll || points.first_column) write(to, values.a0);
    write(to + plane, values.a1);
    write(to + 2 * plane, values.a2);
    write(to + 3 * plane, values.a3);
    write(to + 4 * plane, values.a4);
    if (kAll || points.last_column) write(to + 5 * plane, values.a5);
  };
  const auto outer = [&](int j, int first) DDPM_FAST_LAMBDA {
    return outer_input_point(read(first, j), read(first + 2, j), read(first + 4, j));
  };
#pragma GCC unroll 2
  for (int first = 0; first < 2; ++first) {
    if (!kAll && !(first == 0 ? points.first_row : points.last_row)) continue;
    put(first * 5, outer(0, first), outer(1, first), outer(2, first), outer(3, first), outer(4, first),
        outer(5, first));
  }
  const auto inner = [&](float factor, float point, int i) DDPM_FAST_LAMBDA {
    const auto pair = [&](int j) DDPM_FAST_LAMBDA {
      return inner_input_points(read(1, j), read(2, j), read(3, j), read(4, j), factor, point);
    };
    const Two a = pair(0), b = pair(1), c = pair(2), d = pair(3), e = pair(4), f = pair(5);
    put(i, a.a0, b.a0, c.a0, d.a0, e.a0, f.a0);
    put(i + 1, a.a1, b.a1, c.a1, d.a1, e.a1, f.a1);
  };
  inner(-2.0f, kP, 1);
  inner(-0.5f, kQ, 3);
}

template <bool kUpsampled, bool kLeft, bool kRight, bool kAll>
DDPM_FAST_INLINE void transform_rows(const float* const* rows, int64_t pixel, int64_t channels, const Points& points,
                                     float* v, int64_t plane) {
  const float *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3], *r4 = rows[4], *r5 = rows[5];
  for (int64_t c = 0; c + kLanes <= channels; c += kLanes) {
    transform_tile<kAll>(
        [&](int i, int j) DDPM_FAST_LAMBDA {
          if ((kLeft && j == 0) || (kRight && j == 5)) return vf{};
          const float* row = i == 0 ? r0 : i == 1 ? r1 : i == 2 ? r2 : i == 3 ? r3 : i == 4 ? r4 : r5;
          return load(row + (kUpsampled ? (j + 1) / 2 : j) * pixel + c);
        },
        [](float* to, vf value) DDPM_FAST_LAMBDA { store(to, value); }, points, v + c, plane);
  }
}

// V of one tile and some of a part's channels: v + point·plane gets `channels` floats. Pixels are `pixel` floats apart,
// rows `width` pixels. `zeros` are 6·pixel of them.
inline void transform_input(const float* input, int64_t pixel, int64_t width, int64_t channels, bool upsampled,
                            const Tiles& tiles, const Tile& tile, const float* zeros, const Points& points, float* v,
                            int64_t plane) {
  const int64_t height = upsampled ? tiles.H / 2 : tiles.H;
  int64_t done = 0;
  if (tile.whole()) {
    const float* rows[6];
    const int64_t column = upsampled ? (tile.x >> 1) - 1 : tile.x - 1;
    for (int i = 0; i < 6; ++i) {
      const int64_t y = tile.y - 1 + i;
      const int64_t row = upsampled ? y >> 1 : y;
      rows[i] = y < 0 || y >= tiles.H ? zeros : input + ((tile.b * height + row) * width + column) * pixel;
    }
    const auto transform = [&](auto up, auto left, auto right, auto all) {
      transform_rows<decltype(up)::value, decltype(left)::value, decltype(right)::value, decltype(all)::value>(
          rows, pixel, channels, points, v, plane);
    };
    dispatch(transform, upsampled, tile.x == 0, tile.x + 4 == tiles.W, points.all());
    done = channels / kLanes * kLanes;
  }
  if (done == channels) return;
  const float* from[36];
  int64_t step[36];  // 1, or 0 at pixels outside, which read zeros
  for (int i = 0; i < 36; ++i) {
    const int64_t y = tile.y - 1 + i / 6, x = tile.x - 1 + i % 6;
    const bool inside = y >= 0 && y < tiles.H && x >= 0 && x < tiles.W;
    const int64_t row = upsampled ? y >> 1 : y, column = upsampled ? x >> 1 : x;
    from[i] = inside ? input + ((tile.b * height + row) * width + column) * pixel : kZeroVector;
    step[i] = inside ? 1 : 0;
  }
  const Axis &rows = kAxes[tile.height], &columns = kAxes[tile.width];
  const auto transform = [&](auto whole, auto all) {
    for (int64_t c = done; c < channels; c += kLanes) {
      const int64_t count = min<int64_t>(kLanes, channels - c);
      const auto read = [&](int i, int j)
                            DDPM_FAST_LAMBDA { return load_upto(from[6 * i + j] + c * step[6 * i + j], count); };
      const auto write = [=](float* to, vf value) DDPM_FAST_LAMBDA { store_upto(to, value, count); };
      if constexpr (decltype(whole)::value) {
        transform_tile<decltype(all)::value>(read, write, points, v + c, plane);
      } else {
        multiply_between(rows.inputs, columns.inputs, read, [&](int i, int j, vf value) DDPM_FAST_LAMBDA {
          write(v + (rows.point[i] * kAxisPoints + columns.point[j]) * plane + c, value);
        });
      }
    }
  };
  dispatch(transform, tile.whole(), points.all());
}

// V of tiles [begin, end) and channels [c, c + count) of both parts: v + point·plane + tile·row. `expected`: products
// before it asked for the inputs.
inline void transform_inputs(const InputMaps& input, const Points& points, const Tiles& tiles, int64_t begin,
                             int64_t end, int64_t c, int64_t count, float* v, int64_t row, int64_t plane,
                             bool expected = false) {
  const int64_t *channels = input.channels, step = input.step, width = (input.upsampled ? tiles.W / 2 : tiles.W) * step;
  const int64_t floats = 6 * max(channels[0], channels[1]) * step;
  float* zeros = thread_scratch(kScratchZeros, floats);
  for (int64_t i = 0; i < floats; ++i) zeros[i] = 0;
  const int64_t left = max<int64_t>(0, min(c + count, channels[0]) - c), skipped = max<int64_t>(0, c - channels[0]);
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile(tiles, t);
    float* to = v + (t - begin) * row;
    if (!expected && t + kTilesAhead < end) prefetch_inputs(input, tiles, t + kTilesAhead, c, count);
    const auto transform = [&](int part, int64_t first, int64_t some, float* at) {
      transform_input(input.part[part] + first, channels[part] * step, width, some, input.upsampled, tiles, tile, zeros,
                      points, at, plane);
    };
    if (left > 0) transform(0, c, left, to);
    if (left < count) transform(1, skipped, count - left, to + left);
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
