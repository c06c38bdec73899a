// Images and their noise in tiles, for the operators of training: samples are cut into tiles of elements in C, H, W
// order, in which the noise is counted; images are in that order or channels-last.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <type_traits>
#include <vector>

#include "core/checks.h"
#include "cpu/runtime/memory.h"
#include "ops.h"
#include "tile.h"

namespace ddpm_fast::cpu {

constexpr uint32_t kStreamTraining = 2, kStreamOffset = 3;  // of ddpm_fast/noise.py

// The layout of a sample's elements, whose batch stride is `elements`.
struct Layout {
  int64_t elements, pixels, row;  // of a sample, of a channel, of a row of pixels
  int64_t channel_stride, pixel_stride;
  bool dense;
};

inline Layout layout_of(const Tensor& x, const char* name) {
  Layout layout{.elements = x.numel() / x.size(0),
                .pixels = 1,
                .row = x.size(-1),
                .channel_stride = 1,
                .pixel_stride = 1,
                .dense = true};
  for (int64_t dim = 2; dim < x.dim(); ++dim) layout.pixels *= x.size(dim);
  layout.channel_stride = layout.pixels;
  if (x.is_contiguous()) return layout;
  TORCH_CHECK_VALUE(x.is_contiguous(at::MemoryFormat::ChannelsLast), name,
                    " must be contiguous or channels-last, got strides ", x.strides());
  layout.channel_stride = 1;
  layout.pixel_stride = x.size(1);
  layout.dense = false;
  return layout;
}

// body(done, count, offset, step): elements [done, done + count) of those from `first` on are at offset + i·step; a
// mirrored image is read row by row from right to left.
template <typename Body>
void for_runs(const Layout& layout, int64_t first, int64_t count, bool mirrored, const Body& body) {
  const int64_t length = mirrored ? layout.row : layout.pixels;
  int64_t run = first / length, at = first % length;
  for (int64_t done = 0; done < count; ++run, at = 0) {
    const int64_t size = std::min(length - at, count - done);
    const int64_t begin = run * length + (mirrored ? length - 1 - at : at);  // in C, H, W order
    const int64_t offset = begin / layout.pixels * layout.channel_stride + begin % layout.pixels * layout.pixel_stride;
    body(done, size, offset, mirrored ? -layout.pixel_stride : layout.pixel_stride);
    done += size;
  }
}

// A tile of one sample as float32, 8-bit images divided by 255: in place where possible, else in `buffer`.
template <typename T>
const float* load_tile(float* buffer, const T* sample, const Layout& layout, int64_t first, int64_t count,
                       bool mirrored) {
  const bool in_order = layout.dense && !mirrored;
  if constexpr (std::is_same_v<T, float>) {
    if (in_order) return sample + first;
  }
  if (in_order) {
    convert(buffer, sample + first, count);
    return buffer;
  }
  T gathered[kTile];
  for_runs(layout, first, count, mirrored, [&](int64_t done, int64_t size, int64_t offset, int64_t step) {
    const T* from = sample + offset;
    for (int64_t i = 0; i < size; ++i) gathered[done + i] = from[i * step];
  });
  convert(buffer, gathered, count);
  return buffer;
}

// Where a tile is to be computed: in the result itself where that is possible, else in `buffer`.
template <typename T>
float* place_of_tile(float* buffer, T* sample, const Layout& layout, int64_t first) {
  if constexpr (std::is_same_v<T, float>) {
    if (layout.dense) return sample + first;
  }
  return buffer;
}

// Writes a tile that was computed at place_of_tile.
template <typename T>
void store_tile(T* sample, const float* from, const Layout& layout, int64_t first, int64_t count) {
  if (static_cast<const void*>(from) == static_cast<const void*>(sample + first)) return;
  if (layout.dense) return convert(sample + first, from, count);
  T converted[kTile];
  convert(converted, from, count);
  for_runs(layout, first, count, false, [&](int64_t done, int64_t size, int64_t offset, int64_t step) {
    T* to = sample + offset;
    for (int64_t i = 0; i < size; ++i) to[i * step] = converted[done + i];
  });
}

#define DDPM_FAST_FLOATS(TYPE, NAME, ...)                                                               \
  AT_DISPATCH_SWITCH(TYPE, NAME,                                                                        \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__) \
                         AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))

// The inputs of both operators: x0 and ε of a tile.
struct Images {
  const Tensor &x_start, &t, &table;
  int64_t batch, columns;
  Layout x_layout, noise_layout;
  const void* noise = nullptr;
  at::ScalarType noise_type = at::kFloat;
  const uint8_t* flip = nullptr;
  NoiseIndex index{};
  bool normalize;
  std::vector<float> offset;  // of ε, for every image and channel; empty for none

  Images(const Tensor& x_start_in, const Tensor& t_in, const Tensor& table_in, const OptionalTensor& noise_in,
         const OptionalTensor& seed, const OptionalTensor& flip_in, bool normalize_in, double strength,
         int64_t columns_in)
      : x_start(x_start_in), t(t_in), table(table_in), columns(columns_in), normalize(normalize_in) {
    TORCH_CHECK_VALUE(x_start.dim() >= 2 && x_start.numel() > 0, "x_start must be (B, C, ...) and not empty, got ",
                      x_start.sizes());
    check_counter_range(x_start, 0, kStreamTraining);
    batch = x_start.size(0);
    x_layout = noise_layout = layout_of(x_start, "x_start");
    TORCH_CHECK_TYPE(t.scalar_type() == at::kLong, "t must be int64, got ", t.scalar_type());
    TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == batch && t.is_contiguous() && t.device() == x_start.device(),
                      "t must be contiguous, of shape (B,), got ", t.sizes());
    TORCH_CHECK_TYPE(table.scalar_type() == at::kFloat, "table must be float32, got ", table.scalar_type());
    TORCH_CHECK_VALUE(
        table.dim() == 2 && table.size(1) == columns && table.is_contiguous() && table.device() == x_start.device(),
        "table must be contiguous, of shape (T, ", columns, "), got ", table.sizes());
    if (noise_in.has_value()) {
      TORCH_CHECK_VALUE(noise_in->sizes() == x_start.sizes() && noise_in->device() == x_start.device(),
                        "noise must have x_start's shape, got ", noise_in->sizes());
      noise_layout = layout_of(*noise_in, "noise");
      noise = noise_in->const_data_ptr();
      noise_type = noise_in->scalar_type();
    }
    if (flip_in.has_value()) {
      TORCH_CHECK_TYPE(flip_in->scalar_type() == at::kBool || flip_in->scalar_type() == at::kByte,
                       "flip must be bool or uint8, got ", flip_in->scalar_type());
      TORCH_CHECK_VALUE(
          flip_in->sizes() == t.sizes() && flip_in->is_contiguous() && flip_in->device() == x_start.device(),
          "flip must be contiguous, of shape (B,), got ", flip_in->sizes());
      flip = static_cast<const uint8_t*>(flip_in->const_data_ptr());
    }
    if (noise == nullptr || strength > 0) {
      TORCH_CHECK_VALUE(seed.has_value(), "seed must be given where noise or its offset is generated");
      check_one_int64(*seed, "seed", x_start.device());
      index = {.key = philox_key(*seed->const_data_ptr<int64_t>()), .sample = 0, .step = 0, .stream = kStreamTraining};
    }
    if (strength > 0) make_offset(static_cast<float>(strength));
  }

  void make_offset(float strength) {
    const int64_t channels = x_start.size(1), padded = (channels + 3) / 4 * 4;
    offset.resize(batch * channels);
    std::vector<float> z(padded);
    NoiseIndex mine = index;
    mine.stream = kStreamOffset;
    for (int64_t sample = 0; sample < batch; ++sample) {
      mine.sample = static_cast<uint32_t>(sample);
      kernels().noise.normal(z.data(), mine, 0, channels);
      for (int64_t c = 0; c < channels; ++c) offset[sample * channels + c] = strength * z[c];
    }
  }

  // Row t of the table; NaN where there is none.
  void coefficients(float* row, int64_t sample) const {
    const int64_t time = t.const_data_ptr<int64_t>()[sample];
    const bool inside = 0 <= time && time < table.size(0);
    const float* from = table.const_data_ptr<float>() + (inside ? time : 0) * columns;
    for (int64_t i = 0; i < columns; ++i) row[i] = inside ? from[i] : NAN;
  }

  const float* load_x_start(float* buffer, int64_t sample, int64_t first, int64_t count) const {
    const bool mirrored = flip != nullptr && flip[sample] != 0;
    const float* x = nullptr;
    const auto load = [&](auto* from) {
      x = load_tile(buffer, from + sample * x_layout.elements, x_layout, first, count, mirrored);
    };
    AT_DISPATCH_SWITCH(
        x_start.scalar_type(), "x_start",
        AT_DISPATCH_CASE(at::kByte, [&] { load(static_cast<const scalar_t*>(x_start.const_data_ptr())); })
            AT_DISPATCH_CASE(at::kFloat, [&] { load(static_cast<const scalar_t*>(x_start.const_data_ptr())); })
                AT_DISPATCH_CASE(at::kHalf, [&] { load(static_cast<const scalar_t*>(x_start.const_data_ptr())); })
                    AT_DISPATCH_CASE(at::kBFloat16,
                                     [&] { load(static_cast<const scalar_t*>(x_start.const_data_ptr())); }));
    return x;
  }

  // `buffer` holds count rounded up to a multiple of 4.
  const float* load_noise(float* buffer, int64_t sample, int64_t first, int64_t count) const {
    const float* eps = buffer;
    if (noise != nullptr) {
      DDPM_FAST_FLOATS(noise_type, "noise", [&] {
        const scalar_t* from = static_cast<const scalar_t*>(noise) + sample * noise_layout.elements;
        eps = load_tile(buffer, from, noise_layout, first, count, false);
      });
    } else {
      NoiseIndex mine = index;
      mine.sample = static_cast<uint32_t>(sample);
      kernels().noise.normal(buffer, mine, first, count);
    }
    if (offset.empty()) return eps;
    const float* of_sample = offset.data() + sample * x_start.size(1);
    int64_t channel = first / x_layout.pixels, at = first % x_layout.pixels;
    for (int64_t done = 0; done < count; ++channel, at = 0) {
      const int64_t size = std::min(x_layout.pixels - at, count - done);
      for (int64_t i = done; i < done + size; ++i) buffer[i] = eps[i] + of_sample[channel];
      done += size;
    }
    return buffer;
  }
};

// body(tile, sample, first, count) over all tiles, on torch's threads.
template <typename Body>
void for_tiles(int64_t batch, int64_t elements, const Body& body) {
  const Tiling tiling(batch, elements);
  at::parallel_for(0, tiling.total, tiling.grain, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile % tiling.per_sample * kTile;
      body(tile, tile / tiling.per_sample, first, std::min(kTile, elements - first));
    }
  });
}

}  // namespace ddpm_fast::cpu
