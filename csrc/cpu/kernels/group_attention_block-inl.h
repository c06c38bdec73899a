// The attention block of Ho et al. 2020 and its kin, with y = GroupNorm(x):
//
//   out = (attention(y·W_qkvᵀ + b_qkv)·Wᵀ + b + x)·s
//
// The norm is (x − mean)·factor + offset with numbers per sample and channel. Forward may keep qkv and attention's
// output; backward reads them, and makes y and the softmax again. Rows of qkv stay in the order that W_qkv gives them.
#pragma once

#include "attention_block-inl.h"
#include "linear-inl.h"
#include "norm_silu-inl.h"
#include "pairs-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA::attention {

constexpr int kGroupSlot = 2;        // of thread_scratch
constexpr int64_t kRowsApart = 256;  // positions that a thread takes at a time

struct GroupPlan {
  GroupAttentionInputs block;
  Plan heads;
  int64_t C, HD, N, samples, x_row;  // samples of a group; the distance between rows of y

  explicit GroupPlan(const GroupAttentionInputs& inputs)
      : block(inputs),
        heads(inputs.in, kept_row(3 * inputs.in.heads * inputs.in.D),
              inputs.folded ? inputs.C : kept_row(inputs.in.heads * inputs.in.D), inputs.by_head),
        C(inputs.C),
        HD(heads.HD),
        N(inputs.in.N),
        samples(min(inputs.in.B, max<int64_t>(1, kRowsAtOnce / inputs.in.N))),
        x_row(padded(inputs.C)) {}
  int64_t rows() const { return samples * N; }
};

struct GroupScratch {
  float* affine;                   // (B, 3, C): mean, factor and offset
  float *qkv_weight, *out_weight;  // packed: (C, 3HD), (HD, C)·s
  float* qkv;                      // of a group, with attention's output behind it, where forward keeps neither
  float *qkv_back, *out_back;      // packed: (3HD, C), (C, HD)·s
  float *dqkv, *dattended;         // of a group: (rows, 3HD), (rows, HD)
  float *sums, *bias_sums;         // (B, 2, C): Σ dy and Σ dy·x̂; (tiles of rows, 3HD): Σ dqkv
  float* dout_weight;              // of Wᵀ: (HD, C)

  void place(const GroupPlan& plan, Arena& arena, bool backward, bool kept) {
    const int64_t rows = plan.rows(), C = plan.C, HD = plan.HD, B = plan.block.in.B;
    affine = arena.take(B * 3 * C);
    if (!backward) {
      qkv_weight = arena.take(packed_size(C, 3 * HD));
      out_weight = arena.take(packed_size(HD, C));
      if (kept) return;
      qkv = arena.take(rows * (plan.heads.qkv_row + plan.heads.out_row));
      return;
    }
    qkv_back = arena.take(packed_size(3 * HD, C));
    out_back = arena.take(packed_size(C, HD));
    dqkv = arena.take(rows * plan.heads.qkv_row);
    dattended = arena.take(rows * plan.heads.out_row);
    sums = arena.take(B * 2 * C);
    bias_sums = arena.take((ceil_div(B * plan.N, kRowTile) + B) * 3 * HD);
    dout_weight = arena.take(HD * C);
  }
};

// Panels [first, last) of the columns of Bᵀ (N, K), as the products take them.
inline void pack_weight_columns(const GroupPlan& plan, const float* b, int64_t K, int64_t N, int64_t first,
                                int64_t last, float* packed) {
  if (!plan.block.narrow) return pack_columns(b, K, K, N, first, last, packed);
  float* rows = thread_scratch(kTileSlot, narrowed_size(kPanel, K));
  pack_narrowed_columns(b, K, K, N, first, last, reinterpret_cast<uint32_t*>(rows), packed);
}

// Memory for a first factor (M, K) by bfloat16 pairs, or null.
DDPM_FAST_INLINE uint32_t* take_narrowed(const GroupPlan& plan, Arena& arena, int64_t M, int64_t K) {
  return plan.block.narrow ? reinterpret_cast<uint32_t*>(arena.take(narrowed_size(M, K))) : nullptr;
}

// A tile of rows, in memory of the thread.
struct RowTile {
  float* y;            // (t, C)
  uint32_t* narrowed;  // rows of C or of 3·HD

  void place(const GroupPlan& plan, Arena& arena) {
    y = arena.take(kRowTile * plan.x_row);
    narrowed = take_narrowed(plan, arena, kRowTile, max(plan.C, 3 * plan.HD));
  }
};

// A panel of columns of kDepth rows, for the gradients of weights, in memory of the thread.
struct PanelTile {
  float* panel;        // (kDepth, kPanel), packed
  uint32_t* narrowed;  // HD columns

  void place(const GroupPlan& plan, Arena& arena) {
    panel = arena.take(kDepth * kPanel);
    narrowed = take_narrowed(plan, arena, plan.HD, kDepth);
  }
};

// Panels [first, last) of a packed second factor of K rows, to pairs where the products take those.
DDPM_FAST_INLINE void narrow_packed(const GroupPlan& plan, float* packed, int64_t K, int64_t first, int64_t last) {
  if (plan.block.narrow) narrow_panels(packed + first * K * kPanel, K, (last - first) * kPanel);
}

// Without a norm the factor is 1, and the others 0.
inline void fill_affine(const GroupPlan& plan, const float* statistics, float* affine) {
  const GroupAttentionInputs& block = plan.block;
  const int64_t C = plan.C;
  for (int64_t b = 0; b < block.in.B; ++b, affine += 3 * C) {
    for (int64_t c = 0; c < C; ++c) {
      const float* of_group = block.groups ? statistics + (b * block.groups + c / (C / block.groups)) * 2 : nullptr;
      affine[c] = of_group ? of_group[0] : 0;
      affine[C + c] = of_group ? of_group[1] * block.gain[c] : 1;
      affine[2 * C + c] = of_group ? block.offset[c] : 0;
    }
  }
}

// y of the channels from c on; the pointers are those of channel 0.
template <typename Lanes>
DDPM_FAST_INLINE vf normed_of(const float* x, const float* affine, int64_t C, int64_t c, Lanes lanes) {
  return (lanes.get(x + c) - lanes.get(affine + c)) * lanes.get(affine + C + c) + lanes.get(affine + 2 * C + c);
}

// c[i] += value(i, n, count) in `rows` rows of a panel, n the column within it.
template <typename Value>
DDPM_FAST_INLINE void change_panel(float* c, int64_t stride, int64_t rows, int64_t columns, const Value& value) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t n = 0; n < columns; n += kLanes) {
      const int64_t count = columns - n;
      float* to = c + i * stride + n;
      store_upto(to, value(load_upto(to, count), i, n, count), count);
    }
  }
}

inline void norm_statistics(const GroupAttentionForward& args) {
  const GroupAttentionInputs& block = args.block;
  if (block.groups == 0) return;
  const NormSiluArgs norm{
      .x = block.x, .B = block.in.B, .N = block.in.N, .C = block.C, .groups = block.groups, .eps = args.eps};
  group_statistics<float>({.in = norm, .statistics = args.statistics}, NormChunks(norm.B, norm.N, norm.C));
}

// y of `count` rows from `first` on, rows of the whole batch, to rows with a distance.
DDPM_FAST_INLINE void norm_rows(const GroupPlan& plan, const float* all_affine, int64_t first, int64_t count, float* to,
                                int64_t stride) {
  const int64_t C = plan.C;
  for (int64_t row = first; row < first + count; ++row, to += stride) {
    const float *from = plan.block.x + row * C, *affine = all_affine + row / plan.N * 3 * C;
    over_channels(C, [&](int64_t c, auto lanes) { lanes.put(to + c, normed_of(from, affine, C, c, lanes)); });
  }
}

// Between the rows of what is kept are zeros, so that equal calls return equal memory.
DDPM_FAST_INLINE void clear_between_rows(float* rows, int64_t count, int64_t width, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) clear(rows + i * stride + width, stride - width);
}

// body(prepared, first sample, samples, apart) for groups of samples, where prepare() makes what all groups read. Where
// every thread gets as many samples, each takes whole ones (`apart`), few enough that what a step leaves is in its own
// cache for the next. Of enough samples it prepares for itself, too: reading what other threads wrote takes longer.
// The results are the same. Of long samples all threads' qkv would be much memory.
template <typename Prepare, typename Body>
inline void over_sample_groups(const GroupPlan& plan, const Prepare& prepare, const Body& body) {
  const int64_t B = plan.block.in.B;
  if (B % thread_count() != 0 || plan.N > kRowsAtOnce) {
    const auto prepared = prepare();
    for (int64_t b = 0; b < B; b += plan.samples) body(prepared, b, min(plan.samples, B - b), false);
    return;
  }
  const int64_t together = max<int64_t>(1, kRowsApart / plan.N);
  const bool prepares = packs_apart(B * plan.N);
  const auto shared = prepares ? decltype(prepare()){} : prepare();
  parallel(B, 1, [&](int64_t begin, int64_t end) {
    const auto prepared = prepares ? prepare() : shared;
    for (int64_t b = begin; b < end; b += together) body(prepared, b, min(together, end - b), true);
  });
}

inline void unfolded_block_forward(const GroupAttentionForward& args) {
  const GroupPlan plan(args.block);
  const GroupAttentionInputs& block = args.block;
  const int64_t C = plan.C, HD = plan.HD, N = plan.N, qkv_row = plan.heads.qkv_row, out_row = plan.heads.out_row;
  const bool kept = args.qkv != nullptr;
  norm_statistics(args);
  const auto prepare = [&]() __attribute__((noinline)) {
    GroupScratch made{};
    place_in_scratch(made, kSharedSlot, plan, false, kept);
    fill_affine(plan, args.statistics, made.affine);
    parallel(panels(3 * HD), 1, [&](int64_t begin, int64_t end) {
      pack_weight_columns(plan, block.weight_qkv, C, 3 * HD, begin, end, made.qkv_weight);
    });
    parallel(panels(C), 1, [&](int64_t begin, int64_t end) {
      pack_weight_columns(plan, block.weight, HD, C, begin, end, made.out_weight);
    });
    return made;
  };
  const vf scale = splat(block.output_scale);
  over_sample_groups(plan, prepare, [&](const GroupScratch& shared, int64_t first, int64_t samples, bool apart) {
    const int64_t rows = samples * N, row = first * N;
    float* scratch = kept ? nullptr : apart ? thread_scratch(kGroupSlot, rows * (qkv_row + out_row)) : shared.qkv;
    float* qkv = kept ? args.qkv + row * qkv_row : scratch;
    float* attended = kept ? args.attended + row * out_row : scratch + rows * qkv_row;
    for_row_tiles(rows, [&](int64_t r, int64_t t) {
      RowTile tile;
      place_in_scratch(tile, kTileSlot, plan);
      norm_rows(plan, shared.affine, row + r, t, tile.y, plan.x_row);
      float* to = qkv + r * qkv_row;
      if (kept) {
        clear_between_rows(to, t, 3 * HD, qkv_row);
        clear_between_rows(attended + r * out_row, t, HD, out_row);
      }
      const auto add_bias = [&](int64_t n, int64_t columns) {
        if (block.bias_qkv == nullptr) return;
        change_panel(to + n, qkv_row, t, columns, [&](vf sum, int64_t, int64_t at, int64_t count) DDPM_FAST_LAMBDA {
          return sum + load_upto(block.bias_qkv + n + at, count);
        });
      };
      multiply(tile.narrowed, tile.y, plan.x_row, 1, shared.qkv_weight, t, C, 3 * HD, to, qkv_row, false, add_bias);
    });
    heads_forward(plan.heads, samples, qkv, attended);
    for_row_tiles(rows, [&](int64_t r, int64_t t) {
      const float* x = block.x + (row + r) * C;
      float* to = args.out + (row + r) * C;
      RowTile tile;
      place_in_scratch(tile, kTileSlot, plan);
      const auto add_residual = [&](int64_t n, int64_t columns) {
        change_panel(to + n, C, t, columns, [&](vf sum, int64_t i, int64_t at, int64_t count) DDPM_FAST_LAMBDA {
          if (args.bias != nullptr) sum += load_upto(args.bias + n + at, count);
          if (block.residual) sum += load_upto(x + i * C + n + at, count);
          return sum * scale;
        });
      };
      multiply(tile.narrowed, attended + r * out_row, out_row, 1, shared.out_weight, t, HD, C, to, C, false,
               add_residual);
    });
  });
}

// Σ of dy and of dy·x̂ over the positions of one sample, by pieces of rows: sums (2, C).
inline void norm_sums(const GroupPlan& plan, const float* x, const float* dy, const float* spread, float* sums) {
  const int64_t C = plan.C;
  over_channels(C, [&](int64_t c, auto lanes) {
    KahanSum plain, products;
    const vf mean = lanes.get(spread + c), rstd = lanes.get(spread + C + c);
    for (int64_t r = 0; r < plan.N; r += kRowsOfPiece) {
      vf of_piece = {}, of_products = {};
      for (int64_t n = r; n < min(r + kRowsOfPiece, plan.N); ++n) {
        const vf d = lanes.get(dy + n * C + c);
        of_piece += d;
        of_products = d * ((lanes.get(x + n * C + c) - mean) * rstd) + of_products;
      }
      plain.add(of_piece);
      products.add(of_products);
    }
    lanes.put(sums + c, plain.sum);
    lanes.put(sums + C + c, products.sum);
  });
}

// dx of one sample, in which dy is: the norm's gradient and that of the residual. buffer: (4, C).
inline void norm_backward(const GroupPlan& plan, const float* x, const float* grad, const float* statistics, float* dx,
                          float* sums, float* buffer) {
  const GroupAttentionInputs& block = plan.block;
  const int64_t C = plan.C, N = plan.N;
  const vf scale = splat(block.residual ? block.output_scale : 0.0f);
  float *spread = buffer, *means = buffer + 2 * C;
  if (block.groups > 0) {
    spread_statistics(statistics, block.groups, C, spread);
    norm_sums(plan, x, dx, spread, sums);
    const int64_t width = C / block.groups;
    const double count = static_cast<double>(width * N);
    for (int64_t g = 0; g < block.groups; ++g) {
      double of_z = 0, of_products = 0;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        of_z += static_cast<double>(block.gain[c]) * sums[c];
        of_products += static_cast<double>(block.gain[c]) * sums[C + c];
      }
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        means[c] = static_cast<float>(of_z / count);
        means[C + c] = static_cast<float>(of_products / count);
      }
    }
  }
  for (int64_t n = 0; n < N; ++n, x += C, grad += C, dx += C) {
    over_channels(C, [&](int64_t c, auto lanes) {
      vf d = lanes.get(dx + c);
      if (block.groups > 0) {
        const vf rstd = lanes.get(spread + C + c), normed = (lanes.get(x + c) - lanes.get(spread + c)) * rstd;
        d = (d * lanes.get(block.gain + c) - lanes.get(means + c) - normed * lanes.get(means + C + c)) * rstd;
      }
      lanes.put(dx + c, block.residual ? lanes.get(grad + c) * scale + d : d);
    });
  }
}

// sums: (B, 2, C), of norm_sums.
inline void norm_parameters_backward(const GroupAttentionBackward& args, const float* sums) {
  const int64_t B = args.block.in.B, C = args.block.C;
  if (args.block.groups == 0) return;
  add_partials(sums, B, 2 * C, C, args.doffset);
  add_partials(sums + C, B, 2 * C, C, args.dgain);
}

// Packs columns [first, first + columns) of y of the rows [row, row + t) of the batch.
inline void pack_normed(const GroupPlan& plan, const float* affine, int64_t row, int64_t t, int64_t first,
                        int64_t columns, float* panel) {
  const int64_t C = plan.C;
  for (int64_t k = 0; k < t; ++k) {
    const float *from = plan.block.x + (row + k) * C + first, *of_sample = affine + (row + k) / plan.N * 3 * C + first;
    const auto y = [&](int64_t n, int64_t count) {
      return count < kLanes ? normed_of(from, of_sample, C, n, Part{count}) : normed_of(from, of_sample, C, n, Whole{});
    };
    pack_row(y, t, columns, panel + k * kPanel);
  }
}

// Adds a group's rows to the gradients of both weights and of the output's bias. A task is a panel of columns of q's,
// k's or v's rows, or of the output's: all alike.
inline void group_weights_backward(const GroupAttentionBackward& args, const GroupPlan& plan,
                                   const GroupScratch& shared, int64_t row, int64_t rows) {
  const int64_t C = plan.C, HD = plan.HD, qkv_row = plan.heads.qkv_row, out_row = plan.heads.out_row;
  const float* attended = args.attended + row * out_row;
  parallel(4 * panels(C), 1, [&](int64_t begin, int64_t end) {
    PanelTile tile;
    place_in_scratch(tile, kTileSlot, plan);
    for (int64_t r = 0; r < rows; r += kDepth) {
      const int64_t t = min(kDepth, rows - r);
      Factor factor{};
      for (int64_t i = begin; i < end; ++i) {
        const int64_t part = i / panels(C), panel = i % panels(C), first = panel * kPanel,
                      columns = min<int64_t>(kPanel, C - first);
        const bool of_qkv = part < 3;
        if (i == begin || panel == 0) {
          factor = of_qkv ? factor_of(tile.narrowed, shared.dqkv + r * qkv_row + part * HD, 1, qkv_row, HD, t)
                          : factor_of(tile.narrowed, attended + r * out_row, 1, out_row, HD, t);
        }
        if (of_qkv) {
          pack_normed(plan, shared.affine, row + r, t, first, columns, tile.panel);
        } else {
          pack_rows(args.grad + (row + r) * C + first, C, t, columns, tile.panel);
          add_column_sums(tile.panel, t, args.dbias + first, columns);
        }
        narrow_packed(plan, tile.panel, t, 0, 1);
        float* to = of_qkv ? args.dweight_qkv + part * HD * C : shared.dout_weight;
        multiply_panel(factor, tile.panel, HD, t, to + first, C, columns, row + r > 0);
      }
    }
  });
}

inline void unfolded_block_backward(const GroupAttentionBackward& args) {
  const GroupPlan plan(args.block);
  const GroupAttentionInputs& block = args.block;
  const int64_t C = plan.C, HD = plan.HD, N = plan.N, qkv_row = plan.heads.qkv_row, out_row = plan.heads.out_row;
  GroupScratch shared{};
  place_in_scratch(shared, kSharedSlot, plan, true, true);
  fill_affine(plan, args.statistics, shared.affine);
  parallel(panels(C), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      pack_rows(block.weight_qkv + p * kPanel, C, 3 * HD, min<int64_t>(kPanel, C - p * kPanel),
                shared.qkv_back + p * 3 * HD * kPanel);
    }
    narrow_packed(plan, shared.qkv_back, 3 * HD, begin, end);
  });
  parallel(panels(HD), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      float* panel = shared.out_back + p * C * kPanel;
      pack_rows(block.weight + p * kPanel, HD, C, min<int64_t>(kPanel, HD - p * kPanel), panel);
      for (int64_t i = 0; i < C * kPanel; i += kLanes) store(panel + i, load(panel + i) * splat(block.output_scale));
    }
    narrow_packed(plan, shared.out_back, C, begin, end);
  });
  if (args.dweight != nullptr) clear(args.dbias, C);
  int64_t tiles = 0;  // of rows, whose sums of dqkv are made
  for (int64_t first = 0; first < block.in.B; first += plan.samples) {
    const int64_t samples = min(plan.samples, block.in.B - first), rows = samples * N, row = first * N;
    for_row_tiles(rows, [&](int64_t r, int64_t t) {
      RowTile tile;
      place_in_scratch(tile, kTileSlot, plan);
      multiply(tile.narrowed, args.grad + (row + r) * C, C, 1, shared.out_back, t, C, HD,
               shared.dattended + r * out_row, out_row, false);
    });
    heads_backward(plan.heads, samples, args.qkv + row * qkv_row, shared.dattended, shared.dqkv, nullptr, nullptr);
    const int64_t height = ceil_div(rows, ceil_div(rows, kRowTile));
    for_row_tiles(rows, [&](int64_t r, int64_t t) {
      RowTile tile;
      place_in_scratch(tile, kTileSlot, plan);
      const float* dqkv = shared.dqkv + r * qkv_row;
      multiply(tile.narrowed, dqkv, qkv_row, 1, shared.qkv_back, t, 3 * HD, C, args.dx + (row + r) * C, C, false);
      if (args.dweight == nullptr) return;
      float* sums = shared.bias_sums + (tiles + r / height) * 3 * HD;
      over_channels(3 * HD,
                    [&](int64_t n, auto lanes) { lanes.put(sums + n, sum_of_rows(dqkv + n, qkv_row, 0, t, lanes)); });
    });
    tiles += ceil_div(rows, height);
    parallel(samples, 1, [&](int64_t begin, int64_t end) {
      float* buffer = thread_scratch(kTileSlot, 4 * C);
      for (int64_t b = first + begin; b < first + end; ++b) {
        norm_backward(plan, block.x + b * N * C, args.grad + b * N * C, args.statistics + b * 2 * block.groups,
                      args.dx + b * N * C, shared.sums + b * 2 * C, buffer);
      }
    });
    if (args.dweight != nullptr) group_weights_backward(args, plan, shared, row, rows);
  }
  norm_parameters_backward(args, shared.sums);
  if (args.dweight == nullptr) return;
  add_partials(shared.bias_sums, tiles, 3 * HD, 3 * HD, args.dbias_qkv);
  transpose(shared.dout_weight, C, HD, C, args.dweight);
  for (int64_t i = 0; i < C * HD; ++i) args.dweight[i] *= block.output_scale;
  for (int64_t c = 0; c < C; ++c) args.dbias[c] *= block.output_scale;
}

}  // namespace ddpm_fast::DDPM_FAST_ISA::attention
