// linear-inl.h's products of bfloat16 pairs. A block's rows are rounded by the first of its panels that a thread takes.
#pragma once

#include "linear-inl.h"
#include "pairs-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// `pack_columns` of all panels, by pairs.
inline void pack_columns_by_pairs(const float* weight, const float* gain, int64_t C, int64_t K, float* packed) {
  parallel(panels(K), task_grain(C * kPanel * 16), [&](int64_t begin, int64_t end) {
    pack_columns(weight, C, gain, C, K, begin, end, packed);
    narrow_panels(packed + begin * C * kPanel, C, (end - begin) * kPanel);
  });
}

// The second map's terms follow the first map's, so these are whole pairs.
inline void linear_forward_by_pairs(const LinearForward& p) {
  const int64_t C = p.channels[0] + p.channels[1];
  if (p.rows * p.K == 0) return;
  float* packed = thread_scratch(kPackedSlot, packed_size(C, p.K));
  pack_columns_by_pairs(p.weight, p.gain, C, p.K, packed);
  const int64_t block = even_block_rows(p.rows, max<int64_t>(C, 1)), blocks = ceil_div(p.rows, block);
  const int64_t stride = padded(narrowed_row(p.channels[0]) + narrowed_row(p.channels[1]));
  over_blocks(blocks, panels(p.K), min(block, p.rows) * C * kPanel,
              [&](int64_t b, int64_t panel, bool fresh, bool next) {
                const int64_t first = b * block, count = min(block, p.rows - first);
                const int64_t after = next ? min(block, p.rows - first - count) : 0;
                uint32_t* a = reinterpret_cast<uint32_t*>(thread_scratch(kRowsSlot, block * stride));
                for (int part = 0; fresh && part < 2; ++part) {
                  const int64_t channels = p.channels[part];
                  narrow_rows(p.input[part] + first * channels, channels, count, channels,
                              a + (part ? p.channels[0] / 2 : 0), stride);
                }
                over_row_groups(count, [&](int64_t row, int64_t rows, int64_t g, int64_t groups) {
                  for (int part = 0; part < 2; ++part) {
                    prefetch_rows(p.input[part], p.channels[part], first + count, after, panel * groups + g,
                                  panels(p.K) * groups);
                  }
                  const int64_t columns = min<int64_t>(kPanel, p.K - panel * kPanel);
                  for (int64_t r = first + row; r < first + row + rows; ++r) {
                    const int64_t at = r * p.K + panel * kPanel;
                    prefetch_to_write(p.out + at, columns);
                    if (p.residual != nullptr) prefetch(p.residual + at, columns);
                  }
                  LinearOut out{p, first + row, panel * kPanel};
                  pair_rows(rows, a + row * stride, stride, 1, packed + panel * C * kPanel, pairs_of(C), out);
                });
              });
}

// `pack_weight`, by pairs.
inline void pack_weight_pairs(const float* weight, int64_t K, int64_t C, int64_t first, int64_t k, float* packed) {
  parallel(panels(k), task_grain(K * kPanel * 4), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t columns = min<int64_t>(kPanel, k - p * kPanel);
      pack_straight(weight + first + p * kPanel, C, nullptr, nullptr, K, columns, packed + p * K * kPanel);
      narrow_panels(packed + p * K * kPanel, K, columns);
    }
  });
}

inline void linear_data_gradient_by_pairs(const LinearDataGradient& p) {
  const int64_t C = p.channels[0] + p.channels[1], block = even_block_rows(p.rows, max<int64_t>(p.K, 1)),
                blocks = ceil_div(p.rows, block), stride = padded(narrowed_row(p.K));
  for (int part = 0; part < 2; ++part) {
    const int64_t k = p.channels[part];
    if (p.dinput[part] == nullptr || k == 0) continue;
    float* packed = thread_scratch(kPackedSlot, packed_size(p.K, k));
    pack_weight_pairs(p.weight, p.K, C, part ? p.channels[0] : 0, k, packed);
    over_blocks(blocks, panels(k), min(block, p.rows) * p.K * kPanel, [&](int64_t b, int64_t panel, bool fresh, bool) {
      const int64_t row = b * block, rows = min(block, p.rows - row);
      uint32_t* a = reinterpret_cast<uint32_t*>(thread_scratch(kRowsSlot, block * stride));
      if (fresh) narrow_rows(p.grad + row * p.K, p.K, rows, p.K, a, stride);
      pair_product_panel(a, stride, 1, packed + panel * p.K * kPanel, rows, pairs_of(p.K),
                         p.dinput[part] + row * k + panel * kPanel, k, min<int64_t>(kPanel, k - panel * kPanel), p.add);
    });
  }
}

inline void any_linear_forward(const LinearForward& p) {
  if constexpr (kHasPairs) {
    if (p.narrow && p.channels[0] % 2 == 0) return linear_forward_by_pairs(p);
  }
  linear_forward(p);
}

inline void any_linear_data_gradient(const LinearDataGradient& p) {
  if constexpr (kHasPairs) {
    if (p.narrow) return linear_data_gradient_by_pairs(p);
  }
  linear_data_gradient(p);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
