// The block of group_attention_block-inl.h for one head of C channels, with its weights multiplied beforehand:
//
//   scores = q·kᵀ = y·(W_qᵀ·W_k)·yᵀ + …      out = P·v·Wᵀ = P·(y·W_vᵀ·Wᵀ)
//
// so that y itself is the keys, and what attention gives is the output: 13 products per position instead of 19 in
// forward and backward, for six of weights alone. The keys' bias adds the same to all scores of a
// query, which changes no softmax: its gradient is 0. The values' bias adds W·b_v to the output, since P sums to 1.
#pragma once

#include "group_attention_block-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA::attention {

struct FoldedScratch {
  float* affine;                          // (B, 3, C), as GroupScratch's
  float* columns;                         // (2, C, padded(C)): rows of W_q and W_v, to be read by columns
  float* folded;                          // (2, C, C): A = W_qᵀ·W_k and G = s·W_vᵀ·Wᵀ, where forward keeps them not
  float *queries_weight, *values_weight;  // A and G packed, in backward Aᵀ and Gᵀ
  float *queries_bias, *out_bias;         // (C): b_q·W_k, and s·(b + W·b_v)
  float* qkv;                             // of a group: (rows, 3, C), q·W_k, y and v·Wᵀ·s
  float *dqkv, *sums, *grad_sums;         // of a group; (B, 2, C), as GroupScratch's; (B, C): Σ grad
  float *dfolded, *dbias;                 // (2, C, C); (C): of queries_bias

  void place(const GroupPlan& plan, Arena& arena, bool backward, bool kept) {
    const int64_t C = plan.C, B = plan.block.in.B;
    affine = arena.take(B * 3 * C);
    queries_weight = arena.take(packed_size(C, C));
    values_weight = arena.take(packed_size(C, C));
    if (!backward) {
      columns = arena.take(2 * C * padded(C));
      queries_bias = arena.take(C);
      out_bias = arena.take(C);
      folded = arena.take(kept ? 0 : 2 * C * C);
      qkv = arena.take(kept ? 0 : plan.rows() * plan.heads.qkv_row);
      return;
    }
    dqkv = arena.take(plan.rows() * plan.heads.qkv_row);
    sums = arena.take(B * 2 * C);
    grad_sums = arena.take(B * C);
    dfolded = arena.take(2 * C * C);
    dbias = arena.take(C);
  }
};

// W_q, W_k or W_v.
DDPM_FAST_INLINE const float* part_of_weight(const GroupAttentionInputs& block, int64_t part) {
  return block.weight_qkv + part * block.C * block.C;
}

// A and G, by panels of columns.
inline void fold_weights(const GroupPlan& plan, float* columns, float* folded) {
  const GroupAttentionInputs& block = plan.block;
  const int64_t C = plan.C, stride = padded(C);
  parallel(2 * C, 64, [&](int64_t begin, int64_t end) {
    for (int64_t d = begin; d < end; ++d) {
      copy(columns + d * stride, part_of_weight(block, d < C ? 0 : 2) + d % C * C, C);
    }
  });
  parallel(2 * panels(C), 1, [&](int64_t begin, int64_t end) {
    float* panel = thread_scratch(kTileSlot, C * kPanel);
    for (int64_t i = begin; i < end; ++i) {
      const bool of_queries = i < panels(C);
      const int64_t first = i % panels(C) * kPanel, count = min<int64_t>(kPanel, C - first);
      float* to = folded + (of_queries ? 0 : C * C) + first;
      if (of_queries) {
        pack_rows(part_of_weight(block, 1) + first, C, C, count, panel);
      } else {
        pack_columns(block.weight + first * C, C, C, count, panel);
      }
      product_panel(columns + (of_queries ? 0 : C * stride), 1, stride, panel, C, C, to, C, count, false,
                    piece_of(C, kDeepest));
      if (!of_queries) {
        change_panel(to, C, C, count, [&](vf value, int64_t, int64_t, int64_t) DDPM_FAST_LAMBDA {
          return value * splat(block.output_scale);
        });
      }
    }
  });
}

// to (C) = Σ over d of by[d]·rows[d·C + c], or zeros where there is no `by`.
inline void sum_of_weighted_rows(const float* by, const float* rows, int64_t C, float* to) {
  over_channels(C, [&](int64_t c, auto lanes) {
    KahanSum sum;
    for (int64_t d = 0; by != nullptr && d < C; ++d) sum.add(splat(by[d]) * lanes.get(rows + d * C + c));
    lanes.put(to + c, sum.sum);
  });
}

inline void folded_block_forward(const GroupAttentionForward& args) {
  const GroupPlan plan(args.block);
  const GroupAttentionInputs& block = args.block;
  const int64_t C = plan.C, N = plan.N, qkv_row = plan.heads.qkv_row;
  const bool kept = args.qkv != nullptr;
  norm_statistics(args);
  FoldedScratch shared{};
  place_in_scratch(shared, kSharedSlot, plan, false, kept);
  fill_affine(plan, args.statistics, shared.affine);
  float* folded = kept ? args.attended : shared.folded;
  fold_weights(plan, shared.columns, folded);
  pack_rows(folded, C, C, C, shared.queries_weight);
  pack_rows(folded + C * C, C, C, C, shared.values_weight);
  narrow_packed(plan, shared.queries_weight, C, 0, panels(C));
  narrow_packed(plan, shared.values_weight, C, 0, panels(C));
  sum_of_weighted_rows(block.bias_qkv, part_of_weight(block, 1), C, shared.queries_bias);
  for (int64_t c = 0; c < C; ++c) {
    const float of_values = block.bias_qkv ? row_dot(block.bias_qkv + 2 * C, block.weight + c * C, C) : 0.0f;
    shared.out_bias[c] = block.output_scale * (of_values + (args.bias ? args.bias[c] : 0.0f));
  }
  const vf scale = splat(block.residual ? block.output_scale : 0.0f);
  for (int64_t first = 0; first < block.in.B; first += plan.samples) {
    const int64_t samples = min(plan.samples, block.in.B - first), rows = samples * N, row = first * N;
    float* qkv = kept ? args.qkv + row * qkv_row : shared.qkv;
    for_row_tiles(rows, [&](int64_t r, int64_t t) {
      float* to = qkv + r * qkv_row;
      if (kept) clear_between_rows(to, t, 3 * C, qkv_row);
      norm_rows(plan, shared.affine, row + r, t, to + C, qkv_row);
      RowTile tile;
      place_in_scratch(tile, kTileSlot, plan);
      const auto add_bias = [&](int64_t n, int64_t columns) {
        change_panel(to + n, qkv_row, t, columns, [&](vf sum, int64_t, int64_t at, int64_t count) DDPM_FAST_LAMBDA {
          return sum + load_upto(shared.queries_bias + n + at, count);
        });
      };
      multiply(tile.narrowed, to + C, qkv_row, 1, shared.queries_weight, t, C, C, to, qkv_row, false, add_bias);
      multiply(tile.narrowed, to + C, qkv_row, 1, shared.values_weight, t, C, C, to + 2 * C, qkv_row, false);
    });
    heads_forward(plan.heads, samples, qkv, args.out + row * C);
    for_row_tiles(rows, [&](int64_t r, int64_t t) {
      for (int64_t i = (row + r) * C; i < (row + r + t) * C; i += C) {
        over_channels(C, [&](int64_t c, auto lanes) {
          const vf out = lanes.get(args.out + i + c) + lanes.get(shared.out_bias + c);
          lanes.put(args.out + i + c, block.residual ? lanes.get(block.x + i + c) * scale + out : out);
        });
      }
    });
  }
}

// Adds a group's rows to dA and dG, and to the gradient of the queries' bias; each panel of columns is one task.
inline void add_to_folded(const GroupAttentionBackward& args, const GroupPlan& plan, const FoldedScratch& shared,
                          int64_t row, int64_t rows) {
  const int64_t C = plan.C, qkv_row = plan.heads.qkv_row;
  const float* y = args.qkv + row * qkv_row + C;
  parallel(2 * panels(C), 1, [&](int64_t begin, int64_t end) {
    PanelTile tile;
    place_in_scratch(tile, kTileSlot, plan);
    for (int64_t r = 0; r < rows; r += kDepth) {
      const int64_t t = min(kDepth, rows - r);
      const Factor factor = factor_of(tile.narrowed, y + r * qkv_row, 1, qkv_row, C, t);
      for (int64_t i = begin; i < end; ++i) {
        const bool of_queries = i < panels(C);
        const int64_t first = i % panels(C) * kPanel, columns = min<int64_t>(kPanel, C - first);
        const float* from = shared.dqkv + (of_queries ? 0 : 2 * C) + first;
        pack_rows(from + r * qkv_row, qkv_row, t, columns, tile.panel);
        if (of_queries) add_column_sums(tile.panel, t, shared.dbias + first, columns);
        narrow_packed(plan, tile.panel, t, 0, 1);
        multiply_panel(factor, tile.panel, C, t, shared.dfolded + (of_queries ? 0 : C * C) + first, C, columns,
                       row + r > 0);
      }
    }
  });
}

// The gradients of the weights and biases from those of the folded ones.
inline void unfold_gradients(const GroupAttentionBackward& args, const GroupPlan& plan, const FoldedScratch& shared) {
  const GroupAttentionInputs& block = plan.block;
  const int64_t C = plan.C;
  const float *weight_q = part_of_weight(block, 0), *weight_k = part_of_weight(block, 1),
              *weight_v = part_of_weight(block, 2), *dA = shared.dfolded, *dG = dA + C * C;
  const float* bias_v = block.bias_qkv ? block.bias_qkv + 2 * C : nullptr;
  const float s = block.output_scale;
  for (int64_t c = 0; c < C; ++c) args.dbias[c] *= s;
  // Part i of the four: dW_q = W_k·dAᵀ, dW_k = W_q·dA + b_q·dbias, dW_v = s·(dG·W)ᵀ, dW = s·(W_v·dG)ᵀ + dbias·b_v.
  parallel(4 * panels(C), 1, [&](int64_t begin, int64_t end) {
    float* panel = thread_scratch(kTileSlot, C * kPanel);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i / panels(C), first = i % panels(C) * kPanel, count = min<int64_t>(kPanel, C - first);
      float* to = (part < 3 ? args.dweight_qkv + part * C * C : args.dweight) + first;
      if (part == 1) {
        pack_rows(dA + first, C, C, count, panel);
      } else {
        pack_columns((part == 0 ? dA : part == 2 ? dG : weight_v) + first * C, C, C, count, panel);
      }
      const float* rows = part == 0 ? weight_k : part == 1 ? weight_q : part == 2 ? block.weight : dG;
      product_panel(rows, part < 2 ? C : 1, part < 2 ? 1 : C, panel, C, C, to, C, count, false, piece_of(C, kDeepest));
      change_panel(to, C, C, count, [&](vf value, int64_t row, int64_t at, int64_t lanes) DDPM_FAST_LAMBDA {
        if (part >= 2) value *= splat(s);
        if (part == 1 && block.bias_qkv)
          value += splat(block.bias_qkv[row]) * load_upto(shared.dbias + first + at, lanes);
        if (part == 3 && bias_v) value += splat(args.dbias[row]) * load_upto(bias_v + first + at, lanes);
        return value;
      });
    }
  });
  for (int64_t d = 0; d < C; ++d) args.dbias_qkv[d] = row_dot(weight_k + d * C, shared.dbias, C);
  clear(args.dbias_qkv + C, C);
  sum_of_weighted_rows(args.dbias, block.weight, C, args.dbias_qkv + 2 * C);
}

inline void folded_block_backward(const GroupAttentionBackward& args) {
  const GroupPlan plan(args.block);
  const GroupAttentionInputs& block = args.block;
  const int64_t C = plan.C, N = plan.N, qkv_row = plan.heads.qkv_row;
  const bool weights = args.dweight != nullptr;
  FoldedScratch shared{};
  place_in_scratch(shared, kSharedSlot, plan, true, true);
  parallel(2 * panels(C), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i % panels(C);
      pack_weight_columns(plan, args.attended + (i < panels(C) ? 0 : C * C), C, C, p, p + 1,
                          i < panels(C) ? shared.queries_weight : shared.values_weight);
    }
  });
  clear(shared.dbias, C);
  for (int64_t first = 0; first < block.in.B; first += plan.samples) {
    const int64_t samples = min(plan.samples, block.in.B - first), rows = samples * N, row = first * N;
    heads_backward(plan.heads, samples, args.qkv + row * qkv_row, args.grad + row * C, shared.dqkv, nullptr, nullptr);
    for_row_tiles(rows, [&](int64_t r, int64_t t) {
      const float* dqkv = shared.dqkv + r * qkv_row;
      float* dx = args.dx + (row + r) * C;
      for (int64_t i = 0; i < t; ++i) copy(dx + i * C, dqkv + i * qkv_row + C, C);
      RowTile tile;
      place_in_scratch(tile, kTileSlot, plan);
      multiply(tile.narrowed, dqkv, qkv_row, 1, shared.queries_weight, t, C, C, dx, C, true);
      multiply(tile.narrowed, dqkv + 2 * C, qkv_row, 1, shared.values_weight, t, C, C, dx, C, true);
    });
    parallel(samples, 1, [&](int64_t begin, int64_t end) {
      float* buffer = thread_scratch(kTileSlot, 4 * C);
      for (int64_t b = first + begin; b < first + end; ++b) {
        const float* grad = args.grad + b * N * C;
        norm_backward(plan, block.x + b * N * C, grad, args.statistics + b * 2 * block.groups, args.dx + b * N * C,
                      shared.sums + b * 2 * C, buffer);
        if (!weights) continue;
        over_channels(C, [&](int64_t c, auto lanes) {
          lanes.put(shared.grad_sums + b * C + c, sum_of_rows(grad + c, C, 0, N, lanes));
        });
      }
    });
    if (weights) add_to_folded(args, plan, shared, row, rows);
  }
  norm_parameters_backward(args, shared.sums);
  if (!weights) return;
  add_partials(shared.grad_sums, block.in.B, C, C, args.dbias);
  unfold_gradients(args, plan, shared);
}

inline void group_block_forward(const GroupAttentionForward& args) {
  args.block.folded ? folded_block_forward(args) : unfolded_block_forward(args);
}

inline void group_block_backward(const GroupAttentionBackward& args) {
  args.block.folded ? folded_block_backward(args) : unfolded_block_backward(args);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA::attention
