// The points of a 3×3 convolution's transforms that take part, and its input's maps.
#pragma once

#include "conv3x3.h"
#include "winograd-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// u0 of an axis is the tap on the pixel before, and u5 that on the pixel after: without such a tap there is no product.
struct Points {
  bool first_row, last_row, first_column, last_column;

  DDPM_FAST_INLINE Points(const TapPlaces& rows, const TapPlaces& columns)
      : first_row(rows.used(0)), last_row(rows.used(2)), first_column(columns.used(0)), last_column(columns.used(2)) {}
  DDPM_FAST_INLINE bool all() const { return first_row && last_row && first_column && last_column; }
  DDPM_FAST_INLINE bool has(int64_t point) const {
    const int64_t i = point / 6, j = point % 6;
    return (i > 0 || first_row) && (i < 5 || last_row) && (j > 0 || first_column) && (j < 5 || last_column);
  }
};

// Zeros in `floats` of each of the planes that no product writes.
DDPM_FAST_INLINE void clear_unused(const Points& points, float* to, int64_t floats, int64_t plane) {
  for (int64_t i = 0; i < kPoints; ++i) {
    if (!points.has(i)) clear(to + i * plane, floats);
  }
}

// One map or two side by side, as Conv3x3Forward and Conv3x3WeightGradient have them.
struct InputMaps {
  const float* const* part;
  const int64_t* channels;
  bool upsampled;
  int64_t step;

  // One map of a whole convolution.
  DDPM_FAST_INLINE InputMaps(const float* const* map, const int64_t* of_map)
      : part(map), channels(of_map), upsampled(false), step(1) {}
  DDPM_FAST_INLINE explicit InputMaps(const Conv3x3Forward& p)
      : part(p.input), channels(p.channels), upsampled(p.upsampled), step(p.input_step) {}
  DDPM_FAST_INLINE explicit InputMaps(const Conv3x3WeightGradient& p)
      : part(p.input), channels(p.channels), upsampled(p.upsampled), step(1) {}
};

}  // namespace ddpm_fast::DDPM_FAST_ISA
