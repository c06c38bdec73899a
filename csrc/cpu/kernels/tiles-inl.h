// The tiles of 4×4 outputs that a 3×3 convolution cuts its maps into.
#pragma once

#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

struct Tiles {
  int64_t B, H, W, rows, columns, total;

  DDPM_FAST_INLINE Tiles(int64_t batch, int64_t height, int64_t width)
      : B(batch),
        H(height),
        W(width),
        rows(ceil_div(height, 4)),
        columns(ceil_div(width, 4)),
        total(batch * rows * columns) {}
};

struct Tile {
  int64_t b, y, x;  // of its first output

  DDPM_FAST_INLINE Tile(const Tiles& tiles, int64_t index) {
    const int64_t per_image = tiles.rows * tiles.columns, rest = index % per_image;
    b = index / per_image;
    y = rest / tiles.columns * 4;
    x = rest % tiles.columns * 4;
  }
};

}  // namespace ddpm_fast::DDPM_FAST_ISA
