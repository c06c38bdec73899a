#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "core/checks.h"
#include "tile.h"

namespace ddpm_fast {

namespace {

constexpr int kChunk = 64;  // blocks; their four words stay in the first-level cache between rounds

// Rounds outside, blocks inside: the compiler finds the cheap widening multiplication only in so small a loop.
DDPM_FAST_VECTORISED void normal_chunk(float* z, const NoiseIndex& index, uint32_t first_block, int blocks) {
  alignas(64) uint32_t x0[kChunk], x1[kChunk], x2[kChunk], x3[kChunk];
  for (int i = 0; i < kChunk; ++i) {
    const PhiloxWords words = philox_counter(index, first_block + static_cast<uint32_t>(i));
    x0[i] = words.x0, x1[i] = words.x1, x2[i] = words.x2, x3[i] = words.x3;
  }
  PhiloxKey key = index.key;
  for (int round = 0; round < kPhiloxRounds; ++round, key = next_round_key(key)) {
    for (int i = 0; i < kChunk; ++i) {
      const PhiloxWords words = philox_round({x0[i], x1[i], x2[i], x3[i]}, key);
      x0[i] = words.x0, x1[i] = words.x1, x2[i] = words.x2, x3[i] = words.x3;
    }
  }
  for (int i = 0; i < blocks; ++i) {
    const Normal4 normals = normal4({x0[i], x1[i], x2[i], x3[i]});
    z[4 * i] = normals.z0, z[4 * i + 1] = normals.z1, z[4 * i + 2] = normals.z2, z[4 * i + 3] = normals.z3;
  }
}

}  // namespace

void normal_tile(float* z, const NoiseIndex& index, int64_t first, int64_t count) {
  const int64_t blocks = (count + 3) / 4;
  for (int64_t done = 0; done < blocks; done += kChunk) {
    const int chunk = static_cast<int>(std::min<int64_t>(kChunk, blocks - done));
    normal_chunk(z + 4 * done, index, static_cast<uint32_t>(first / 4 + done), chunk);
  }
}

void convert(float* to, const float* from, int64_t count) { std::copy(from, from + count, to); }

DDPM_FAST_VECTORISED void convert(float* to, const c10::Half* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = c10::detail::fp16_ieee_to_fp32_value(from[i].x);
}

DDPM_FAST_VECTORISED void convert(float* to, const c10::BFloat16* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = c10::detail::f32_from_bits(from[i].x);
}

DDPM_FAST_VECTORISED void convert(c10::Half* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i].x = c10::detail::fp16_ieee_from_fp32_value(from[i]);
}

DDPM_FAST_VECTORISED void convert(c10::BFloat16* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i].x = c10::detail::round_to_nearest_even(from[i]);
}

namespace {

template <typename T>
void fill(T* out, int64_t batch, int64_t elements, int64_t start_index, NoiseIndex index) {
  const Tiling tiling(batch, elements);
  at::parallel_for(0, tiling.total, tiling.grain, [&](int64_t begin, int64_t end) {
    alignas(64) float z[kTile];
    NoiseIndex mine = index;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t sample = tile / tiling.per_sample;
      const int64_t first = tile % tiling.per_sample * kTile;
      const int64_t count = std::min(kTile, elements - first);
      mine.sample = static_cast<uint32_t>(start_index + sample);
      normal_tile(z, mine, first, count);
      convert(out + sample * elements + first, z, count);
    }
  });
}

void fill_normal_(at::Tensor& out, const at::Tensor& seed, const at::Tensor& step, int64_t stream,
                  int64_t start_index) {
  check_counter_range(out, start_index, stream);
  check_one_int64(seed, "seed", out.device());
  check_one_int64(step, "step", out.device());
  TORCH_CHECK_VALUE(out.is_contiguous(), "out must be contiguous");
  if (out.numel() == 0) return;
  const int64_t batch = out.size(0), elements = out.numel() / batch;
  const NoiseIndex index{philox_key(*seed.const_data_ptr<int64_t>()), 0,
                         static_cast<uint32_t>(*step.const_data_ptr<int64_t>()), static_cast<uint32_t>(stream)};
  AT_DISPATCH_SWITCH(
      out.scalar_type(), "fill_normal_", AT_DISPATCH_CASE(at::kFloat, [&] {
        fill(out.data_ptr<scalar_t>(), batch, elements, start_index, index);
      }) AT_DISPATCH_CASE(at::kHalf, [&] {
        fill(out.data_ptr<scalar_t>(), batch, elements, start_index, index);
      }) AT_DISPATCH_CASE(at::kBFloat16, [&] { fill(out.data_ptr<scalar_t>(), batch, elements, start_index, index); }));
}

}  // namespace

TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) { m.impl("fill_normal_", &fill_normal_); }

}  // namespace ddpm_fast
