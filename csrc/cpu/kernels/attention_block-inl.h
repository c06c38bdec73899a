// The softmax attention block: out = attention(x̂·W_qkvᵀ)·Wᵀ + bias + residual, with x̂ the normed x.
//
// A weight is packed once and read once per group of samples; where there are few rows, it is read as it is. Backward
// computes x̂, qkv and attention's output again; a weight's gradient is one task per panel of columns, so no two threads
// add to the same sum.
#pragma once

#include "attention-inl.h"
#include "dot_products-inl.h"
#include "row_norm-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA::attention {

constexpr int64_t kRowsAtOnce = 1024;  // positions of a group of samples
constexpr int64_t kRowTile = 64;       // positions of a task
constexpr int64_t kDepth = 256;        // positions per partial sum of a weight's gradient

struct BlockPlan {
  AttentionBlockInputs block;
  Plan heads;
  int64_t C, HD, N, samples, x_row;

  explicit BlockPlan(const AttentionBlockInputs& inputs)
      : block(inputs),
        heads(inputs.in, padded(3 * inputs.in.heads * inputs.in.D), padded(inputs.in.heads * inputs.in.D)),
        C(inputs.C),
        HD(heads.HD),
        N(inputs.in.N),
        samples(min(inputs.in.B, max<int64_t>(1, kRowsAtOnce / inputs.in.N))),
        x_row(padded(inputs.C)) {}
  int64_t rows() const { return samples * N; }
  int64_t memory() const { return 2 * block.in.heads * block.in.M * block.in.D; }
};

struct BlockScratch {
  float *qkv_weight, *out_weight;  // packed: (C, 3HD) with the gain, (HD, C)
  float *qkv_back, *out_back;      // packed: (3HD, C) with the gain, (C, HD)
  float *qkv, *attended;           // (rows, 3HD), (rows, HD)
  float *normed, *norms, *dqkv, *dattended;
  float *dmemory, *dfolded, *dout_weight;  // (samples, 2, heads, M, D); of W_qkv·gain (3HD, C); of Wᵀ (HD, C)

  void place(const BlockPlan& plan, Arena& arena, bool backward) {
    const int64_t rows = plan.rows(), C = plan.C, HD = plan.HD;
    qkv_weight = arena.take(packed_size(C, 3 * HD));
    qkv = arena.take(rows * plan.heads.qkv_row);
    attended = arena.take(rows * plan.heads.out_row);
    if (!backward) {
      out_weight = arena.take(packed_size(HD, C));
      return;
    }
    qkv_back = arena.take(packed_size(3 * HD, C));
    out_back = arena.take(packed_size(C, HD));
    normed = arena.take(rows * plan.x_row);
    norms = arena.take(2 * rows);
    dqkv = arena.take(rows * plan.heads.qkv_row);
    dattended = arena.take(rows * plan.heads.out_row);
    dmemory = arena.take(plan.samples * plan.memory());
    dfolded = arena.take(3 * HD * C);
    dout_weight = arena.take(HD * C);
  }
};

inline void pack_block_weights(const BlockPlan& plan, const BlockScratch& shared, bool backward) {
  const int64_t C = plan.C, HD = plan.HD;
  const AttentionBlockInputs& block = plan.block;
  parallel(panels(3 * HD), 1, [&](int64_t begin, int64_t end) {
    pack_columns(block.weight_qkv, C, C, 3 * HD, begin, end, shared.qkv_weight);
    scale_packed_rows(shared.qkv_weight + begin * C * kPanel, C, end - begin, block.gain_in);
  });
  if (!backward) {
    parallel(panels(C), 1,
             [&](int64_t begin, int64_t end) { pack_columns(block.weight, HD, HD, C, begin, end, shared.out_weight); });
    return;
  }
  parallel(3 * HD, 64, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const float* row = block.weight_qkv + m * C;
      const auto scaled = [&](int64_t c, int64_t count) {
        return load_upto(row + c, count) * load_upto(block.gain_in + c, count);
      };
      pack_row(scaled, 3 * HD, C, shared.qkv_back + m * kPanel);
    }
  });
  pack_rows(block.weight, HD, C, HD, shared.out_back);
}

// Tiles of `rows` rows: body(first, count).
template <typename Body>
DDPM_FAST_INLINE void for_row_tiles(int64_t rows, const Body& body) {
  const int64_t tile = ceil_div(rows, ceil_div(rows, kRowTile));
  parallel_helped(ceil_div(rows, tile), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i * tile, min(tile, rows - i * tile));
  });
}

DDPM_FAST_INLINE RowNorm normalise(const float* x, int64_t C, float* to) {
  const RowNorm norm = row_norm(x, C);
  for (int64_t c = 0; c < C; c += kLanes) store_upto(to + c, load_upto(x + c, C - c) * splat(norm.factor), C - c);
  return norm;
}

// Columns [begin, end) of `rows` rows of the output from `first` on, which hold the last product: bias and residual.
DDPM_FAST_INLINE void finish_rows(const AttentionBlockForward& args, int64_t first, int64_t rows, int64_t begin,
                                  int64_t end) {
  const int64_t C = args.block.C;
  for (int64_t row = first; row < first + rows; ++row) {
    float* out = args.out + row * C;
    const float* residual = args.residual == nullptr ? nullptr : args.residual + row * C;
    for (int64_t c = begin; c < end; c += kLanes) {
      vf value = load_upto(out + c, end - c) + load_upto(args.bias + c, end - c);
      if (residual != nullptr) value += load_upto(residual + c, end - c);
      store_upto(out + c, value, end - c);
    }
  }
}

struct FewRows {
  float *normed, *qkv, *attended;  // (rows, C) with the gain, (rows, 3HD), (rows, HD)

  void place(const BlockPlan& plan, Arena& arena) {
    normed = arena.take(plan.rows() * plan.x_row);
    qkv = arena.take(plan.rows() * plan.heads.qkv_row);
    attended = arena.take(plan.rows() * plan.heads.out_row);
  }
};

// Of all samples in one group. Threads share columns, since there are too few rows to share.
inline void few_rows_forward(const AttentionBlockForward& args, const BlockPlan& plan) {
  const AttentionBlockInputs& block = args.block;
  const int64_t rows = plan.rows(), C = plan.C, HD = plan.HD;
  FewRows shared{};
  place_in_scratch(shared, kSharedSlot, plan);
  for (int64_t r = 0; r < rows; ++r) {
    float* const to = shared.normed + r * plan.x_row;
    normalise(block.x + r * C, C, to);
    for (int64_t c = 0; c < C; c += kLanes) {
      store_upto(to + c, load_upto(to + c, C - c) * load_upto(block.gain_in + c, C - c), C - c);
    }
  }
  // body(first, last) for shares of the columns.
  const auto over_columns = [&](int64_t columns, int64_t depth, const auto& body) {
    parallel(ceil_div(columns, kDotColumns), max<int64_t>(1, kDotTask / (rows * depth * kDotColumns)),
             [&](int64_t begin, int64_t end) { body(begin * kDotColumns, min(columns, end * kDotColumns)); });
  };
  over_columns(3 * HD, C, [&](int64_t begin, int64_t end) {
    dot_products(shared.normed, plan.x_row, rows, block.weight_qkv + begin * C, C, end - begin, C, shared.qkv + begin,
                 plan.heads.qkv_row);
  });
  heads_forward(plan.heads, plan.samples, shared.qkv, shared.attended);
  over_columns(C, HD, [&](int64_t begin, int64_t end) {
    dot_products(shared.attended, plan.heads.out_row, rows, block.weight + begin * HD, HD, end - begin, HD,
                 args.out + begin, C);
    finish_rows(args, 0, rows, begin, end);
  });
}

inline void block_forward(const AttentionBlockForward& args) {
  const BlockPlan plan(args.block);
  if (args.block.in.B * plan.N <= kMaxDotRows) return few_rows_forward(args, plan);
  const int64_t C = plan.C, HD = plan.HD, qkv_row = plan.heads.qkv_row, out_row = plan.heads.out_row;
  BlockScratch shared{};
  place_in_scratch(shared, kSharedSlot, plan, false);
  pack_block_weights(plan, shared, false);
  for (int64_t first = 0; first < args.block.in.B; first += plan.samples) {
    const int64_t samples = min(plan.samples, args.block.in.B - first), rows = samples * plan.N;
    const int64_t at = first * plan.N;
    for_row_tiles(rows, [&](int64_t r, int64_t t) {
      float* normed = thread_scratch(kTileSlot, t * plan.x_row);
      for (int64_t i = 0; i < t; ++i) normalise(args.block.x + (at + r + i) * C, C, normed + i * plan.x_row);
      deep_product(normed, plan.x_row, 1, shared.qkv_weight, t, C, 3 * HD, shared.qkv + r * qkv_row, qkv_row, false);
    });
    heads_forward(plan.heads, samples, shared.qkv, shared.attended);
    for_row_tiles(rows, [&](int64_t r, int64_t t) {
      float* out = args.out + (at + r) * C;
      deep_product(shared.attended + r * out_row, out_row, 1, shared.out_weight, t, HD, C, out, C, false);
      finish_rows(args, at + r, t, 0, C);
    });
  }
}

// dbias[n] += Σ over rows of panel[row·kPanel + n] for the columns of one packed panel of t rows.
DDPM_FAST_INLINE void add_column_sums(const float* panel, int64_t t, float* dbias, int64_t columns) {
  vf left = {}, right = {};
  for (int64_t i = 0; i < t; i += 16) {  // sums of sums: 256 terms in a row would lose three digits
    vf left16 = {}, right16 = {};
    for (int64_t j = i; j < min(i + 16, t); ++j) {
      left16 += load(panel + j * kPanel);
      right16 += load(panel + j * kPanel + kLanes);
    }
    left += left16;
    right += right16;
  }
  store_upto(dbias, load_upto(dbias, columns) + left, columns);
  const int64_t second = columns - kLanes;
  if (second > 0) store_upto(dbias + kLanes, load_upto(dbias + kLanes, second) + right, second);
}

// Adds the rows' share to dfolded, dout_weight and dbias. A task is a panel of columns of q's, k's or v's rows, or of
// the output's: all alike.
inline void weights_backward(const BlockPlan& plan, const BlockScratch& shared, const float* grad, int64_t rows,
                             bool add, float* dbias) {
  const int64_t C = plan.C, HD = plan.HD, qkv_row = plan.heads.qkv_row, out_row = plan.heads.out_row;
  parallel(4 * panels(C), 1, [&](int64_t begin, int64_t end) {
    float* panel = thread_scratch(kTileSlot, kDepth * kPanel);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i / panels(C), first = i % panels(C) * kPanel, columns = min<int64_t>(kPanel, C - first);
      for (int64_t r = 0; r < rows; r += kDepth) {
        const int64_t t = min(kDepth, rows - r);
        const bool more = add || r > 0;
        if (part < 3) {
          pack_rows(shared.normed + r * plan.x_row + first, plan.x_row, t, columns, panel);
          product_panel(shared.dqkv + r * qkv_row + part * HD, 1, qkv_row, panel, HD, t,
                        shared.dfolded + part * HD * C + first, C, columns, more);
          continue;
        }
        pack_rows(grad + r * C + first, C, t, columns, panel);
        product_panel(shared.attended + r * out_row, 1, out_row, panel, HD, t, shared.dout_weight + first, C, columns,
                      more);
        add_column_sums(panel, t, dbias + first, columns);
      }
    }
  });
}

inline void block_backward(const AttentionBlockBackward& args) {
  const BlockPlan plan(args.block);
  const int64_t C = plan.C, HD = plan.HD, qkv_row = plan.heads.qkv_row, out_row = plan.heads.out_row;
  BlockScratch shared{};
  place_in_scratch(shared, kSharedSlot, plan, true);
  pack_block_weights(plan, shared, true);
  RowNorm* norms = reinterpret_cast<RowNorm*>(shared.norms);
  __builtin_memset(shared.dmemory, 0, static_cast<unsigned long>(plan.samples * plan.memory()) * 4);
  __builtin_memset(args.dbias, 0, static_cast<unsigned long>(C) * 4);
  for (int64_t first = 0; first < args.block.in.B; first += plan.samples) {
    const int64_t samples = min(plan.samples, args.block.in.B - first), rows = samples * plan.N;
    const int64_t at = first * plan.N * C;
    for_row_tiles(rows, [&](int64_t r, int64_t t) {
      float* normed = shared.normed + r * plan.x_row;
      for (int64_t i = 0; i < t; ++i) {
        norms[r + i] = normalise(args.block.x + at + (r + i) * C, C, normed + i * plan.x_row);
      }
      deep_product(normed, plan.x_row, 1, shared.qkv_weight, t, C, 3 * HD, shared.qkv + r * qkv_row, qkv_row, false);
      deep_product(args.grad + at + r * C, C, 1, shared.out_back, t, C, HD, shared.dattended + r * out_row, out_row,
                   false);
    });
    heads_backward(plan.heads, samples, shared.qkv, shared.dattended, shared.dqkv, shared.dmemory, shared.attended);
    for_row_tiles(rows, [&](int64_t r, int64_t t) {
      float* dx = args.dx + at + r * C;
      deep_product(shared.dqkv + r * qkv_row, qkv_row, 1, shared.qkv_back, t, 3 * HD, C, dx, C, false);
      for (int64_t i = 0; i < t; ++i) {
        row_norm_backward(dx + i * C, shared.normed + (r + i) * plan.x_row, norms[r + i], C, dx + i * C);
      }
    });
    weights_backward(plan, shared, args.grad + at, rows, first > 0, args.dbias);
  }
  scale_columns_backward(shared.dfolded, args.block.weight_qkv, args.block.gain_in, 3 * HD, C, args.dweight_qkv,
                         args.dgain_in);
  transpose(shared.dout_weight, C, HD, C, args.dweight);
  sum_memory(shared.dmemory, plan.samples, plan.memory(), args.dmem_kv);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA::attention
