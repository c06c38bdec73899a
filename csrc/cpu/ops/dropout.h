// Checks of dropout's arguments.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <optional>

#include "cpu/kernels/norm_silu.h"

namespace ddpm_fast {

// `elements` is the number of elements of one sample.
inline Dropout check_dropout(const std::optional<at::Tensor>& seed, double dropout_p, int64_t elements) {
  TORCH_CHECK_VALUE(0 <= dropout_p && dropout_p <= 1, "dropout_p must be in [0, 1], got ", dropout_p);
  const auto keep_threshold = static_cast<uint64_t>(std::nearbyint(dropout_p * 0x1p32));
  if (keep_threshold == 0) return {.keep_threshold = 0, .keep_scale = 1, .seed = 0};
  TORCH_CHECK_VALUE(seed.has_value(), "seed must be given where dropout_p > 0");
  TORCH_CHECK_TYPE(seed->scalar_type() == at::kLong && seed->numel() == 1 && seed->device().is_cpu(),
                   "seed must be one int64 element on the CPU");
  TORCH_CHECK_VALUE(elements <= (int64_t{1} << 34), "at most 2^34 elements per sample are possible, got ", elements);
  return {.keep_threshold = keep_threshold,
          .keep_scale = static_cast<float>(dropout_p < 1 ? 1 / (1 - dropout_p) : 0.0),
          .seed = *seed->const_data_ptr<int64_t>()};
}

}  // namespace ddpm_fast
