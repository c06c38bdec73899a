#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include "core/checks.h"
#include "ops.h"
#include "tile.h"

namespace ddpm_fast::cpu {

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
      kernels().noise.normal(z, mine, first, count);
      convert(out + sample * elements + first, z, count);
    }
  });
}

}  // namespace

void fill_normal_(Tensor& out, const Tensor& seed, const Tensor& step, int64_t stream, int64_t start_index) {
  check_counter_range(out, start_index, stream);
  check_one_int64(seed, "seed", out.device());
  check_one_int64(step, "step", out.device());
  TORCH_CHECK_VALUE(out.is_contiguous(), "out must be contiguous");
  if (out.numel() == 0) return;
  const int64_t batch = out.size(0), elements = out.numel() / batch;
  const NoiseIndex index{.key = philox_key(*seed.const_data_ptr<int64_t>()),
                         .sample = 0,
                         .step = static_cast<uint32_t>(*step.const_data_ptr<int64_t>()),
                         .stream = static_cast<uint32_t>(stream)};
  AT_DISPATCH_SWITCH(
      out.scalar_type(), "fill_normal_", AT_DISPATCH_CASE(at::kFloat, [&] {
        fill(out.data_ptr<scalar_t>(), batch, elements, start_index, index);
      }) AT_DISPATCH_CASE(at::kHalf, [&] {
        fill(out.data_ptr<scalar_t>(), batch, elements, start_index, index);
      }) AT_DISPATCH_CASE(at::kBFloat16, [&] { fill(out.data_ptr<scalar_t>(), batch, elements, start_index, index); }));
}

}  // namespace ddpm_fast::cpu
