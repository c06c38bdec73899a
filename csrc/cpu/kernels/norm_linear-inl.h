// A 1×1 convolution of an RMSNorm: the norm is a factor of the product's row, its gain a factor of the weight's column.
#pragma once

#include "linear-inl.h"
#include "norm_linear.h"
#include "norm_rows-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr int kFactorsSlot = 3;  // of thread_scratch, as is linear's

inline void norm_linear_forward(const NormLinearForward<float>& p) {
  if (p.rows * p.C == 0) return;
  float* factors = thread_scratch(kFactorsSlot, p.rows);
  parallel(p.rows, max<int64_t>(1, 16384 / p.C), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      p.norms[row] = row_norm(p.x + row * p.C, nullptr, p.C);
      factors[row] = rms_factor(p.norms[row], p.C);
    }
  });
  linear_forward({.input = {p.x},
                  .channels = {p.C},
                  .rows = p.rows,
                  .K = p.K,
                  .weight = p.weight,
                  .row_scale = factors,
                  .gain = p.gain,
                  .out = p.out});
}

// Rows per block of the gradient of x: 8 blocks of equal size or a multiple of that, so that threads get equal shares.
DDPM_FAST_INLINE int64_t norm_linear_block(int64_t rows, int64_t C) {
  return max<int64_t>(kRows, ceil_div(rows, round_up(ceil_div(rows, block_rows(2 * C)), 8)));
}

// A block's gradient of the normed rows is a product in scratch memory, which the norm's gradient then reads.
inline void norm_linear_data_gradient(const NormLinearBackward<float>& p) {
  const int64_t C = p.C, block = norm_linear_block(p.rows, C), blocks = ceil_div(p.rows, block);
  const auto pack = [&] {
    float* made = thread_scratch(kPackedSlot, packed_size(p.K, C));
    parallel(panels(C), task_grain(p.K * kPanel * 4),
             [&](int64_t begin, int64_t end) { pack_weight(p.weight, p.K, C, 0, C, begin, end, made); });
    return made;
  };
  const bool apart = packs_apart(p.rows);
  const float* shared = apart ? nullptr : pack();
  float* sums = thread_scratch(kLinearSumsSlot, blocks * C);  // of dgain, per block
  parallel(blocks, task_grain(block * p.K * C), [&](int64_t begin, int64_t end) {
    const float* packed = apart ? pack() : shared;
    float* dh = thread_scratch(kFactorsSlot, block * C);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block, rows = min(block, p.rows - first);
      product(p.grad + first * p.K, p.K, 1, packed, rows, p.K, C, dh, C, false);
      float* dgain = sums + b * C;
      over_channels(C, [&](int64_t c, auto lanes) { lanes.put(dgain + c, vf{}); });
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = first + r;
        rms_row_backward(dh + r * C, false, p.x + row * C, p.norms[row], nullptr, p.gain, nullptr, nullptr, dh + r * C,
                         p.dx + row * C, {.products = dgain}, C);
      }
    }
  });
  add_partials(sums, blocks, C, C, p.dgain);
}

inline void norm_linear_backward(const NormLinearBackward<float>& p) {
  if (p.rows * p.C == 0) return;
  if (p.dx) norm_linear_data_gradient(p);
  if (p.dweight == nullptr) return;
  float* factors = thread_scratch(kFactorsSlot, p.rows);
  for (int64_t row = 0; row < p.rows; ++row) factors[row] = rms_factor(p.norms[row], p.C);
  linear_weight_gradient({.grad = p.grad,
                          .input = {p.x},
                          .channels = {p.C},
                          .rows = p.rows,
                          .K = p.K,
                          .row_scale = factors,
                          .gain = p.gain,
                          .dweight = p.dweight});
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
