// The tiles of 4×4 outputs that a 3×3 convolution cuts its maps into, and the smaller ones at their edges.
//
// Where the height or width of a map is no multiple of 4, its last tiles have 1, 2 or 3 outputs along that axis, and
// fewer points (conv3x3_edges-inl.h).
#pragma once

#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// The points of an axis, and those that 0 to 4 outputs take: of all choices nearly those with the smallest errors.
constexpr int kAxisPoints = 6, kPoints = kAxisPoints * kAxisPoints;
constexpr bool kUsesPoint[5][kAxisPoints] = {
    {}, {0, 1, 1, 0, 0, 1}, {1, 1, 0, 0, 1, 1}, {0, 1, 1, 1, 1, 1}, {1, 1, 1, 1, 1, 1}};

struct TileRange {
  int64_t begin, end;
  // Those of [first, last), counted from `first`.
  DDPM_FAST_INLINE TileRange within(int64_t first, int64_t last) const {
    return {max(begin, first) - first, min(end, last) - first};
  }
  DDPM_FAST_INLINE int64_t count() const { return max<int64_t>(0, end - begin); }
};

// The tiles of all images, one kind after another, in an order in which those that use a point lie side by side.
struct Tiles {
  enum Kind { kRight, kInside, kBelow, kCorner, kKinds };
  int64_t B, H, W;
  int64_t high, wide;  // tiles inside of an image
  int64_t count[kKinds], points[kKinds], total;

  DDPM_FAST_INLINE Tiles(int64_t batch, int64_t height, int64_t width)
      : B(batch), H(height), W(width), high(height / 4), wide(width / 4), total(0) {
    const int64_t below = H % 4, right = W % 4, of_row = right > 0 ? B : 0, of_column = below > 0 ? B : 0;
    count[kRight] = high * of_row, points[kRight] = kAxisPoints * (right + 2);
    count[kInside] = B * high * wide, points[kInside] = kPoints;
    count[kBelow] = wide * of_column, points[kBelow] = kAxisPoints * (below + 2);
    count[kCorner] = below > 0 ? of_row : 0, points[kCorner] = (below + 2) * (right + 2);
    for (int kind = 0; kind < kKinds; ++kind) total += count[kind];
  }

  // Products per pair of channels.
  DDPM_FAST_INLINE int64_t products() const {
    int64_t sum = 0;
    for (int kind = 0; kind < kKinds; ++kind) sum += count[kind] * points[kind];
    return sum;
  }
  // As many tiles of 4×4 outputs have as many products.
  DDPM_FAST_INLINE int64_t whole() const { return ceil_div(products(), kPoints); }

  // The first tile of part i of `parts` with equal products.
  DDPM_FAST_INLINE int64_t split(int64_t i, int64_t parts) const {
    int64_t left = products() * i / parts, first = 0;
    for (int kind = 0; kind < kKinds; ++kind) {
      if (left <= count[kind] * points[kind]) return first + ceil_div(left, points[kind]);
      left -= count[kind] * points[kind];
      first += count[kind];
    }
    return total;
  }

  // The tiles that use a point.
  DDPM_FAST_INLINE TileRange using_point(int64_t point) const {
    const bool below = kUsesPoint[H % 4][point / kAxisPoints], right = kUsesPoint[W % 4][point % kAxisPoints];
    const int64_t inside = count[kRight] + count[kInside];
    return {right ? 0 : count[kRight], inside + (below ? count[kBelow] + (right ? count[kCorner] : 0) : 0)};
  }
};

struct Tile {
  int64_t b, y, x;        // of its first output
  int64_t height, width;  // its outputs

  DDPM_FAST_INLINE Tile(const Tiles& tiles, int64_t index) {
    int kind = 0;
    while (kind < Tiles::kCorner && index >= tiles.count[kind]) index -= tiles.count[kind++];
    const bool right = kind == Tiles::kRight || kind == Tiles::kCorner, below = kind >= Tiles::kBelow;
    const int64_t wide = right ? 1 : tiles.wide, per_image = wide * (below ? 1 : tiles.high), rest = index % per_image;
    b = index / per_image;
    y = (below ? tiles.high : rest / wide) * 4;
    x = (right ? tiles.wide : rest % wide) * 4;
    height = min<int64_t>(4, tiles.H - y);
    width = min<int64_t>(4, tiles.W - x);
  }
  DDPM_FAST_INLINE bool whole() const { return height == 4 && width == 4; }
};

}  // namespace ddpm_fast::DDPM_FAST_ISA
