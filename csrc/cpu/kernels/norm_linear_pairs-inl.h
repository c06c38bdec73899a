// norm_linear-inl.h's kernels of bfloat16 maps, by bfloat16 pairs. A row of such a map is a row of pairs already, so x
// and grad are factors of the products as they are. Norms, sums and the gradient of the norm are float32.
#pragma once

#include "convert-inl.h"
#include "linear_pairs-inl.h"
#include "norm_linear-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

DDPM_FAST_INLINE const uint32_t* as_pairs(const uint16_t* row) { return reinterpret_cast<const uint32_t*>(row); }

// Rows of a product, each times its factor, rounded.
template <bool kWholePanel>
struct ScaledOut {
  uint16_t* out;  // of the first row, at the panel's first column
  const float* factors;
  int64_t stride, columns;

  DDPM_FAST_INLINE void operator()(int m, vf left, vf right) const {
    const vf factor = splat(factors[m]);
    const vu rounded = narrow(left * factor, right * factor);
    const unsigned long bytes = kWholePanel ? sizeof(rounded) : static_cast<unsigned long>(columns) * 2;
    __builtin_memcpy(out + m * stride, &rounded, bytes);
  }
};

inline void norm_linear_forward_by_pairs(const NormLinearForward<uint16_t>& p) {
  const int64_t C = p.C;
  if (p.rows * C == 0) return;
  float* factors = thread_scratch(kFactorsSlot, p.rows);
  parallel(p.rows, max<int64_t>(1, 16384 / C), [&](int64_t begin, int64_t end) {
    float* x = thread_scratch(kRowsSlot, C);
    for (int64_t row = begin; row < end; ++row) {
      convert::from_bfloat16(x, p.x + row * C, C);
      p.norms[row] = row_norm(x, nullptr, C);
      factors[row] = rms_factor(p.norms[row], C);
    }
  });
  float* packed = thread_scratch(kPackedSlot, packed_size(C, p.K));
  pack_columns_by_pairs(p.weight, p.gain, C, p.K, packed);
  const int64_t block = even_block_rows(p.rows, C), blocks = ceil_div(p.rows, block);
  over_blocks(blocks, panels(p.K), min(block, p.rows) * C * kPanel, [&](int64_t b, int64_t panel, bool, bool) {
    const int64_t last = min(p.rows, (b + 1) * block), groups = ceil_div(last - b * block, kRows);
    const int64_t column = panel * kPanel, columns = min<int64_t>(kPanel, p.K - column);
    const float* weights = packed + panel * C * kPanel;
    for (int64_t g = 0, row = b * block; g < groups; ++g) {
      const int64_t rows = (last - row + groups - g - 1) / (groups - g);
      const uint32_t* a = as_pairs(p.x + row * C);
      uint16_t* out = p.out + row * p.K + column;
      for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(out + r * p.K, 1, 2);
      if (columns == kPanel) {
        pair_tile_of(rows, a, C / 2, 1, weights, C / 2, ScaledOut<true>{out, factors + row, p.K, columns});
      } else {
        ScaledOut<false> part{out, factors + row, p.K, columns};
        pair_rows(rows, a, C / 2, 1, weights, C / 2, part);
      }
      row += rows;
    }
  });
}

inline void norm_linear_data_gradient_by_pairs(const NormLinearBackward<uint16_t>& p) {
  const int64_t C = p.C, block = norm_linear_block(p.rows, C), blocks = ceil_div(p.rows, block);
  float* packed = thread_scratch(kPackedSlot, packed_size(p.K, C));
  pack_weight_pairs(p.weight, p.K, C, 0, C, packed);
  float* sums = thread_scratch(kLinearSumsSlot, blocks * C);  // of dgain, per block
  parallel(blocks, task_grain(block * p.K * C), [&](int64_t begin, int64_t end) {
    float *dh = thread_scratch(kFactorsSlot, block * C), *x = thread_scratch(kRowsSlot, C);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block, rows = min(block, p.rows - first);
      for (int64_t panel = 0; panel < panels(C); ++panel) {
        pair_product_panel(as_pairs(p.grad + first * p.K), p.K / 2, 1, packed + panel * p.K * kPanel, rows, p.K / 2,
                           dh + panel * kPanel, C, min<int64_t>(kPanel, C - panel * kPanel), false);
      }
      float* dgain = sums + b * C;
      over_channels(C, [&](int64_t c, auto lanes) { lanes.put(dgain + c, vf{}); });
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = first + r;
        float* z = dh + r * C;
        convert::from_bfloat16(x, p.x + row * C, C);
        rms_row_backward(z, false, x, p.norms[row], nullptr, p.gain, nullptr, nullptr, z, z, {.products = dgain}, C);
        convert::to_bfloat16(p.dx + row * C, z, C);
      }
    }
  });
  add_partials(sums, blocks, C, C, p.dgain);
}

// The first `count` elements of a bfloat16 row in float32, zeros behind them.
DDPM_FAST_INLINE vf widen(const uint16_t* row, int64_t count) {
  typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));
  vh half = {};
  if (count >= kLanes) {
    __builtin_memcpy(&half, row, sizeof(half));
  } else if (count > 0) {
    __builtin_memcpy(&half, row, static_cast<unsigned long>(count) * 2);
  }
  const vu bits = __builtin_convertvector(half, vu) << 16;
  vf value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// Pairs of rows (0, 1), (2, 3), … of `columns` columns of a bfloat16 map, each row times its factor, if there are any.
// Rows of pairs are `apart`; whole vectors are written, zeros behind the columns and behind an odd number of rows.
DDPM_FAST_INLINE void pair_rows_of_map(const uint16_t* map, int64_t stride, const float* factors, int64_t rows,
                                       int64_t columns, uint32_t* to, int64_t apart) {
  constexpr int64_t kAhead = 12;  // rows, of a map that is not in a cache
  for (int64_t r = 0; r < rows; r += 2, map += 2 * stride, to += apart) {
    const bool two = r + 1 < rows;
    const vf factor = splat(factors ? factors[r] : 1.0f), next = splat(factors && two ? factors[r + 1] : 1.0f);
    for (int64_t c = 0; c < columns; c += kLanes) {
      if (r + kAhead + 1 < rows) {
        __builtin_prefetch(map + kAhead * stride + c, 0, 2);
        __builtin_prefetch(map + (kAhead + 1) * stride + c, 0, 2);
      }
      const vf upper = widen(map + c, columns - c) * factor;
      const vf lower = two ? widen(map + stride + c, columns - c) * next : vf{};
      store_pairs(to + c, interleave(narrow(upper, lower)));
    }
  }
}

// gradᵀ·(factor·x)·gain of rows [first, last), for panels [begin, end) of the columns of dweight.
inline void norm_linear_weight_panels(const NormLinearBackward<uint16_t>& p, int64_t begin, int64_t end, int64_t first,
                                      int64_t last, float* dweight) {
  constexpr int64_t kChunk = 256;  // rows
  const int64_t C = p.C, K = p.K, apart = padded(round_up(K, kLanes));
  float factors[kChunk], panel[kChunk / 2 * kPanel] __attribute__((aligned(64)));
  uint32_t* grad = reinterpret_cast<uint32_t*>(thread_scratch(kRowsSlot, kChunk / 2 * apart));
  for (int64_t row = first; row < last; row += kChunk) {
    const int64_t rows = min(kChunk, last - row);
    for (int64_t r = 0; r < rows; ++r) factors[r] = rms_factor(p.norms[row + r], C);
    pair_rows_of_map(p.grad + row * K, K, nullptr, rows, K, grad, apart);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = i * kPanel, columns = min<int64_t>(kPanel, C - c);
      pair_rows_of_map(p.x + row * C + c, C, factors, rows, columns, reinterpret_cast<uint32_t*>(panel), kPanel);
      pair_product_panel(grad, 1, apart, panel, K, pairs_of(rows), dweight + c, C, columns, row > first);
    }
  }
  const int64_t c = begin * kPanel, columns = min(C, end * kPanel) - c;
  for (int64_t k = 0; k < K; ++k) {
    float* to = dweight + k * C + c;
    over_channels(columns,
                  [&](int64_t n, auto lanes) { lanes.put(to + n, lanes.get(to + n) * lanes.get(p.gain + c + n)); });
  }
}

inline void norm_linear_weight_gradient_by_pairs(const NormLinearBackward<uint16_t>& p) {
  const int64_t count = panels(p.C), segments = weight_gradient_segments(p.rows, count);
  const int64_t length = ceil_div(p.rows, segments), size = round_up(p.K * p.C, 16);
  float* partials = segments > 1 ? thread_scratch(kLinearSumsSlot, segments * size) : nullptr;
  parallel(segments * count, task_grain(length * p.K * kPanel), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end;) {
      const int64_t segment = task / count, panel = task % count, next = min(end, (segment + 1) * count);
      norm_linear_weight_panels(p, panel, panel + next - task, segment * length, min(p.rows, (segment + 1) * length),
                                partials ? partials + segment * size : p.dweight);
      task = next;
    }
  });
  if (partials) add_partials(partials, segments, size, p.K * p.C, p.dweight);
}

inline void norm_linear_backward_by_pairs(const NormLinearBackward<uint16_t>& p) {
  if (p.rows * p.C == 0) return;
  if (p.dx) norm_linear_data_gradient_by_pairs(p);
  if (p.dweight) norm_linear_weight_gradient_by_pairs(p);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
