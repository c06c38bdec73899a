// x_t = a·x0 + b·ε and w · mean((out − (c·ε + d·x0))²), see ddpm_fast/ops/forward_diffusion/op.py. Samples are cut into
// tiles of elements in C, H, W order, in which the noise is counted; images are in that order or channels-last.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <tuple>
#include <type_traits>
#include <vector>

#include "core/checks.h"
#include "cpu/runtime/memory.h"
#include "ops.h"
#include "tile.h"

namespace ddpm_fast::cpu {

namespace {

constexpr uint32_t kStreamTraining = 2, kStreamOffset = 3;  // of ddpm_fast/noise.py

// The layout of a sample's elements, whose batch stride is `elements`.
struct Layout {
  int64_t elements, pixels, row;  // of a sample, of a channel, of a row of pixels
  int64_t channel_stride, pixel_stride;
  bool dense;
};

Layout layout_of(const Tensor& x, const char* name) {
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

}  // namespace

Tensor q_sample(const Tensor& x_start, const Tensor& t, const Tensor& table, const OptionalTensor& noise,
                const OptionalTensor& seed, const OptionalTensor& flip, bool normalize, double offset_noise_strength,
                at::ScalarType dtype, bool channels_last) {
  const Images images(x_start, t, table, noise, seed, flip, normalize, offset_noise_strength, 2);
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  TORCH_CHECK_VALUE(!channels_last || x_start.dim() == 4, "only (B, C, H, W) can be channels-last, got ",
                    x_start.sizes());
  const Tensor x_t = unpooled_tensor(x_start.sizes(), dtype, format);
  const Layout layout = layout_of(x_t, "x_t");
  DDPM_FAST_FLOATS(dtype, "q_sample", [&] {
    scalar_t* out = x_t.data_ptr<scalar_t>();
    for_tiles(images.batch, layout.elements, [&](int64_t, int64_t sample, int64_t first, int64_t count) {
      alignas(64) float x_buffer[kTile], eps_buffer[kTile], buffer[kTile];
      scalar_t* of_sample = out + sample * layout.elements;
      float ab[2];
      images.coefficients(ab, sample);
      const float* x = images.load_x_start(x_buffer, sample, first, count);
      const float* eps = images.load_noise(eps_buffer, sample, first, count);
      float* result = place_of_tile(buffer, of_sample, layout, first);
      kernels().forward_diffusion.combine(result, x, eps, ab[1], ab[0], images.normalize, count);
      store_tile(of_sample, result, layout, first, count);
    });
  });
  return x_t;
}

std::tuple<Tensor, Tensor, Tensor> diffusion_loss(const Tensor& model_output, const Tensor& x_start, const Tensor& t,
                                                  const Tensor& table, const OptionalTensor& noise,
                                                  const OptionalTensor& seed, const OptionalTensor& flip,
                                                  bool normalize, double offset_noise_strength, bool with_gradient) {
  const Images images(x_start, t, table, noise, seed, flip, normalize, offset_noise_strength, 3);
  TORCH_CHECK_VALUE(model_output.sizes() == x_start.sizes() && model_output.device() == x_start.device(),
                    "model_output must have x_start's shape ", x_start.sizes(), ", got ", model_output.sizes());
  const Layout layout = layout_of(model_output, "model_output");
  const Tensor loss = unpooled_tensor({images.batch});
  const Tensor factor = unpooled_tensor_like(loss);
  const Tensor error = with_gradient ? unpooled_tensor_like(model_output) : no_tensor(model_output.scalar_type());
  const Tiling tiling(images.batch, layout.elements);
  std::vector<float> sums(tiling.total);
  DDPM_FAST_FLOATS(model_output.scalar_type(), "diffusion_loss", [&] {
    const scalar_t* out = model_output.const_data_ptr<scalar_t>();
    scalar_t* errors = with_gradient ? error.data_ptr<scalar_t>() : nullptr;
    for_tiles(images.batch, layout.elements, [&](int64_t tile, int64_t sample, int64_t first, int64_t count) {
      alignas(64) float x_buffer[kTile], eps_buffer[kTile], target[kTile];
      const int64_t offset = sample * layout.elements;
      float cdw[3];
      images.coefficients(cdw, sample);
      const float* x = images.load_x_start(x_buffer, sample, first, count);
      const float* eps = images.load_noise(eps_buffer, sample, first, count);
      kernels().forward_diffusion.combine(target, x, eps, cdw[0], cdw[1], images.normalize, count);
      // The target is made, and x0 and ε may go.
      const float* output = load_tile(x_buffer, out + offset, layout, first, count, false);
      float* difference = with_gradient ? place_of_tile(eps_buffer, errors + offset, layout, first) : eps_buffer;
      sums[tile] = kernels().forward_diffusion.subtract(difference, output, target, count);
      if (with_gradient) store_tile(errors + offset, difference, layout, first, count);
    });
  });
  for (int64_t sample = 0; sample < images.batch; ++sample) {
    double sum = 0;
    for (int64_t i = 0; i < tiling.per_sample; ++i) sum += sums[sample * tiling.per_sample + i];
    float cdw[3];
    images.coefficients(cdw, sample);
    const double weight = cdw[2], elements = static_cast<double>(layout.elements);
    loss.data_ptr<float>()[sample] = static_cast<float>(weight * (sum / elements));
    factor.data_ptr<float>()[sample] = static_cast<float>(weight * (2 / elements));
  }
  return {loss, factor, error};
}

// error · factor · dloss of each sample.
Tensor diffusion_loss_backward(const Tensor& error, const Tensor& factor, const Tensor& dloss) {
  TORCH_CHECK_VALUE(error.dim() >= 2 && error.numel() > 0, "error must be (B, C, ...) and not empty, got ",
                    error.sizes());
  Layout in_memory = layout_of(error, "error");
  in_memory.dense = true;  // the gradient has the error's layout, so one loop serves both
  for (const Tensor* tensor : {&factor, &dloss}) {
    TORCH_CHECK_TYPE(tensor->scalar_type() == at::kFloat, "factor and dloss must be float32, got ",
                     tensor->scalar_type());
    TORCH_CHECK_VALUE(tensor->dim() == 1 && tensor->size(0) == error.size(0) && tensor->is_contiguous() &&
                          tensor->device() == error.device(),
                      "factor and dloss must be contiguous, of shape (B,), got ", tensor->sizes());
  }
  const Tensor doutput = unpooled_tensor_like(error);
  const int64_t batch = error.size(0), elements = error.numel() / batch;
  const float *of_sample = factor.const_data_ptr<float>(), *above = dloss.const_data_ptr<float>();
  DDPM_FAST_FLOATS(error.scalar_type(), "diffusion_loss_backward", [&] {
    const scalar_t* from = error.const_data_ptr<scalar_t>();
    scalar_t* to = doutput.data_ptr<scalar_t>();
    for_tiles(batch, elements, [&](int64_t, int64_t sample, int64_t first, int64_t count) {
      alignas(64) float error_buffer[kTile], buffer[kTile];
      const int64_t offset = sample * elements;
      const float* errors = load_tile(error_buffer, from + offset, in_memory, first, count, false);
      float* result = place_of_tile(buffer, to + offset, in_memory, first);
      kernels().forward_diffusion.scale(result, errors, of_sample[sample] * above[sample], count);
      store_tile(to + offset, result, in_memory, first, count);
    });
  });
  return doutput;
}

}  // namespace ddpm_fast::cpu
