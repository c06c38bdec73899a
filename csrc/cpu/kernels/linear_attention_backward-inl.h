// Backward of linear attention, see linear_attention-inl.h. Three passes, each of which needs a sum over positions that
// the one before makes: over the queries' side, a sample's small matrices, the keys' side. With P for the gradient of
// `projection` and S for that of `sums`:
//
//   dy from the norm     dq̂ = dy·projectionᵀ     P = softmax(q)ᵀ·dy
//   dcontext = D^−½·P·weight     S = dcontext·Wᵥ     δ = Σ sums·S and the memory's share
//   dk = softmax(k)·(V·Sᵀ − δ)     dV = softmax(k)·S     with x: dx̂ = dq·W_q + dk·W_k + dV, then the norm's backward
#pragma once

#include "linear_attention-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA::linear_attention {

// Partial sums of the parameters' gradients, one per item (a group of positions of a sample) or per sample. The first
// run of samples writes the large ones and later runs add to them; the others begin as zeros.
struct ParameterSums {
  float *gain, *bias, *memory;  // of an item (C), (C); of a sample (2, M, channels)
  float *qk, *v, *weight;       // of an item (2HD, C) with x; of a sample (HD, C) with x, (C, HD)
  int64_t qk_size, weight_size, memory_size, row_size;

  void place(const Plan& plan, Arena& arena) {
    const int64_t C = plan.in.C, items = plan.samples * plan.groups;
    weight_size = round_up(plan.HD * C, 16);
    memory_size = 2 * plan.in.M * round_up(plan.HD, 16);
    qk_size = plan.block ? 2 * weight_size : 0;
    row_size = round_up(C, 16);
    gain = arena.take(items * row_size);
    bias = arena.take(items * row_size);
    memory = arena.take(plan.samples * memory_size);
    qk = arena.take(items * qk_size);
    v = arena.take(plan.block ? plan.samples * weight_size : 0);
    weight = arena.take(plan.samples * weight_size);
  }
  void clear() { __builtin_memset(gain, 0, static_cast<unsigned long>(qk - gain) * 4); }
  static constexpr int64_t kChunk = 4096;
};

struct BackwardScratch {
  Weights weights;
  ParameterSums sums;
  float *context, *memory;              // of each sample: (HD, D); softmax(k) of the memory (M, channels)
  float* rows;                          // of each sample: its projection (HD, C), later its dsums (HD, V)
  float *projection, *projection_back;  // of each sample: packed (HD, C) and (C, HD)
  float* dprojection;                   // of each item (HD, C)
  float *dsums, *dsums_back, *delta;    // of each sample: packed (width, V) and (V, width) by parts; (HD)
  float* dfolded;                       // (3HD, C)

  void place(const Plan& plan, Arena& arena) {
    const int64_t C = plan.in.C, HD = plan.HD, samples = plan.samples;
    weights.place(plan, arena, true);
    sums.place(plan, arena);
    context = arena.take(samples * HD * plan.in.D);
    memory = arena.take(samples * plan.in.M * weights.channels);
    rows = arena.take(samples * HD * max(C, plan.V));
    projection = arena.take(samples * packed_size(HD, C));
    projection_back = arena.take(samples * packed_size(C, HD));
    dprojection = arena.take(samples * plan.groups * sums.weight_size);
    dsums = arena.take(samples * plan.parts * packed_size(plan.width, plan.V));
    dsums_back = arena.take(samples * plan.parts * packed_size(plan.V, plan.width));
    delta = arena.take(samples * round_up(HD, 16));
    dfolded = arena.take(plan.block ? 3 * HD * C : 0);
  }
};

// Rows of a tile into part 0 (q) or 1 (k) of dqkv.
inline void write_part(const Plan& plan, const float* from, int64_t sample, int64_t n, int64_t t, int part,
                       float* dqkv) {
  float* to = dqkv + ((sample * plan.in.N + n) * 3 + part) * plan.HD;
  for (int64_t i = 0; i < t; ++i) {
    __builtin_memcpy(to + i * 3 * plan.HD, from + i * plan.stride, static_cast<unsigned long>(plan.HD) * 4);
  }
}

inline void add_to(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store_upto(to + i, load_upto(to + i, count - i) + load_upto(from + i, count - i), count - i);
  }
}

// Through the output's norm: from y without bias to dy, in rows and packed; adds to dgain and dbias (C).
inline void output_backward(const Plan& plan, const Tile& tile, const float* grad, int64_t t, float* dgain,
                            float* dbias) {
  const int64_t C = plan.in.C;
  for (int64_t i = 0; i < t; ++i, grad += C) {
    if (i % kRowsOfPiece == 0) {
      __builtin_memset(tile.dgain, 0, static_cast<unsigned long>(C) * 4);
      __builtin_memset(tile.dbias, 0, static_cast<unsigned long>(C) * 4);
    }
    float *y = tile.y + i * plan.row, *dy = tile.dy + i * plan.row;
    const RowNorm norm = add_bias(plan, y);
    const vf factor = splat(norm.factor);
    for (int64_t c = 0; c < C; c += kLanes) {
      const int64_t count = C - c;
      const vf normed = load_upto(y + c, count) * factor, g = load_upto(grad + c, count);
      store_upto(y + c, normed, count);
      store_upto(dy + c, g * load_upto(plan.in.gain + c, count), count);
      store_upto(tile.dgain + c, g * normed + load_upto(tile.dgain + c, count), count);
    }
    row_norm_backward(dy, y, norm, C, dy);
    add_to(tile.dbias, dy, C);
    pack_row([&](int64_t c, int64_t count) { return load_upto(dy + c, count); }, t, C, tile.dy_packed + i * kPanel);
    if (i % kRowsOfPiece == kRowsOfPiece - 1 || i == t - 1) {
      add_to(dgain, tile.dgain, C);
      add_to(dbias, tile.dbias, C);
    }
  }
  if (plan.in.narrow) narrow_panels(tile.dy_packed, t, C);
}

inline void queries_pass(const Plan& plan, const LinearAttentionBackward& args, const BackwardScratch& shared,
                         const Tile& tile, int64_t item, int64_t first_sample) {
  const int64_t C = args.in.C, HD = plan.HD, local = item / plan.groups, sample = first_sample + local;
  float* dprojection = shared.dprojection + item * shared.sums.weight_size;
  bool first = true;
  for_tiles(plan, item % plan.groups, [&](int64_t n, int64_t t) {
    const int64_t position = (sample * args.in.N + n) * C;
    make_values(plan, tile, sample, n, t, plan.block);
    make_projected(plan, tile, sample, n, t, 0, shared.weights.q, tile.queries);
    softmax_of_heads(plan, tile.queries, t);
    multiply(tile.narrowed, tile.queries, plan.stride, 1, shared.projection + local * packed_size(HD, C), t, HD, C,
             tile.y, plan.row, false);
    output_backward(plan, tile, args.grad + position, t, shared.sums.gain + item * shared.sums.row_size,
                    shared.sums.bias + item * shared.sums.row_size);
    multiply(tile.narrowed, tile.queries, 1, plan.stride, tile.dy_packed, HD, t, C, dprojection, C, !first);
    multiply(tile.narrowed, tile.dy, plan.row, 1, shared.projection_back + local * packed_size(C, HD), t, C, HD,
             tile.dqueries, plan.stride, false);
    for (int64_t i = 0; i < t; ++i) {
      for (int64_t at = i * plan.stride, h = 0; h < args.in.heads; ++h, at += args.in.D) {
        row_softmax_backward(tile.queries + at, tile.dqueries + at, args.in.D, 1.0f);
      }
    }
    if (plan.block) {
      multiply(tile.narrowed, tile.dqueries, plan.stride, 1, shared.weights.q_back, t, HD, C, args.dx + position, C,
               false);
      multiply(tile.narrowed, tile.dqueries, 1, plan.stride, tile.values, HD, t, C,
               shared.sums.qk + item * shared.sums.qk_size, C, !first || first_sample > 0);
    } else {
      write_part(plan, tile.dqueries, sample, n, t, 0, args.dqkv);
    }
    first = false;
  });
}

// softmax(k) of a tile in place, and dk from its gradient.
inline void keys_backward(const Plan& plan, const Tile& tile, const float* statistics, const float* delta, int64_t t) {
  for (int64_t c = 0; c < plan.HD; c += kLanes) {
    const int64_t count = plan.HD - c;
    const vf largest = load_upto(statistics + c, count), inverse = load_upto(statistics + plan.HD + c, count);
    const vf mean = load(delta + c);
    for (int64_t i = 0; i < t; ++i) {
      float *k = tile.queries + i * plan.stride + c, *dk = tile.dqueries + i * plan.stride + c;
      const vf p = exp(load(k) - largest) * inverse;
      store(k, p);
      store(dk, (load(dk) - mean) * p);
    }
  }
}

inline void keys_pass(const Plan& plan, const LinearAttentionBackward& args, const BackwardScratch& shared,
                      const Tile& tile, int64_t item, int64_t first_sample) {
  const int64_t C = args.in.C, D = args.in.D, HD = plan.HD, V = plan.V, width = plan.width;
  const int64_t local = item / plan.groups, sample = first_sample + local;
  const float* dsums = shared.dsums + local * plan.parts * packed_size(width, V);
  const float* dsums_back = shared.dsums_back + local * plan.parts * packed_size(V, width);
  bool first = true;
  for_tiles(plan, item % plan.groups, [&](int64_t n, int64_t t) {
    const int64_t position = sample * args.in.N + n;
    make_values(plan, tile, sample, n, t, plan.block);
    make_projected(plan, tile, sample, n, t, 1, shared.weights.k, tile.queries);
    for (int64_t p = 0; p < plan.parts; ++p) {
      const float* values = plan.block ? tile.normed : args.in.qkv + position * 3 * HD + 2 * HD + p * D;
      multiply(tile.narrowed, values, plan.block ? plan.row : 3 * HD, 1, dsums_back + p * packed_size(V, width), t, V,
               width, tile.dqueries + p * width, plan.stride, false);
    }
    keys_backward(plan, tile, args.statistics + sample * 2 * HD, shared.delta + local * round_up(HD, 16), t);
    if (!plan.block) {
      write_part(plan, tile.dqueries, sample, n, t, 1, args.dqkv);
      for (int64_t p = 0; p < plan.parts; ++p) {
        multiply(tile.narrowed, tile.queries + p * width, plan.stride, 1, dsums + p * packed_size(width, V), t, width,
                 V, args.dqkv + position * 3 * HD + 2 * HD + p * D, 3 * HD, false);
      }
      return;
    }
    float* dx = args.dx + position * C;
    multiply(tile.narrowed, tile.queries, plan.stride, 1, dsums, t, HD, C, dx, C, true);
    multiply(tile.narrowed, tile.dqueries, plan.stride, 1, shared.weights.k_back, t, HD, C, dx, C, true);
    multiply(tile.narrowed, tile.dqueries, 1, plan.stride, tile.values, HD, t, C,
             shared.sums.qk + item * shared.sums.qk_size + HD * C, C, !first || first_sample > 0);
    first = false;
    for (int64_t i = 0; i < t; ++i) {
      row_norm_backward(dx + i * C, tile.normed + i * plan.row, tile.norm()[i], C, dx + i * C);
    }
  });
}

// Matrices of one head, in memory of the thread.
struct HeadScratch {
  float *dcontext, *packed_context, *packed_sums;

  void place(const Plan& plan, Arena& arena) {
    const int64_t D = plan.in.D;
    dcontext = arena.take(D * D);
    packed_context = arena.take(packed_size(D, D));
    packed_sums = arena.take(packed_size(D, plan.V));
  }
};

inline void projections_again(const Plan& plan, const LinearAttentionBackward& args, const BackwardScratch& shared,
                              int64_t first, int64_t samples) {
  const int64_t C = plan.in.C, HD = plan.HD, of_memory = plan.in.M * shared.weights.channels;
  for (int64_t s = 0; s < samples; ++s) {
    memory_softmax(plan, shared.weights, args.statistics + (first + s) * 2 * HD, shared.memory + s * of_memory);
  }
  for_heads(plan, samples, [&](int64_t s, int64_t h) {
    float* context = shared.context + s * HD * plan.in.D;
    make_context(plan, shared.weights, args.sums + (first + s) * HD * plan.V, shared.memory + s * of_memory, h,
                 context);
    make_projection(plan, shared.weights, context, h, shared.rows + s * HD * C);
  });
  pack_matrices(shared.rows, samples, HD, C, false, plan.in.narrow, shared.projection);
  pack_matrices(shared.rows, samples, C, HD, true, plan.in.narrow, shared.projection_back);
}

// The memory's part of δ of one head, and the gradient of its keys and values, added to (2, M, channels).
inline void memory_backward(const Plan& plan, const Weights& weights, const float* memory_weights, const float* context,
                            const float* dcontext, int64_t h, float* delta, float* dmemory) {
  const int64_t D = plan.in.D, M = plan.in.M, channels = weights.channels;
  for (int64_t m = 0; m < M; ++m) {
    const int64_t key = m * channels + h * D, value = (M + m) * channels + h * D;
    for (int64_t d = 0; d < D; ++d) {
      const vf weight = splat(memory_weights[key + d]);
      vf sum = {}, centred = {};
      for (int64_t e = 0; e < D; e += kLanes) {
        const int64_t count = D - e;
        const vf dc = load_upto(dcontext + d * D + e, count), v = load_upto(weights.memory + value + e, count);
        sum = dc * v + sum;
        centred = dc * (v - load_upto(context + d * D + e, count)) + centred;  // δ is taken off before the sum
        store_upto(dmemory + value + e, weight * dc + load_upto(dmemory + value + e, count), count);
      }
      delta[d] += memory_weights[key + d] * reduce_add(sum);
      dmemory[key + d] += memory_weights[key + d] * reduce_add(centred);
    }
  }
}

inline void head_backward(const Plan& plan, const LinearAttentionBackward& args, const BackwardScratch& shared,
                          int64_t local, int64_t first_sample, int64_t h) {
  const int64_t C = plan.in.C, D = plan.in.D, HD = plan.HD, V = plan.V, sample = first_sample + local;
  HeadScratch scratch;
  place_in_scratch(scratch, kTileSlot, plan);
  const float* sums = args.sums + (sample * HD + h * D) * V;
  float* dprojection = shared.dprojection + local * plan.groups * shared.sums.weight_size + h * D * C;
  for (int64_t g = 1; g < plan.groups; ++g) add_to(dprojection, dprojection + g * shared.sums.weight_size, D * C);
  const vf scale = splat(1.0f / __builtin_sqrtf(static_cast<float>(D)));
  for (int64_t i = 0; i < D * C; i += kLanes) {
    store_upto(dprojection + i, load_upto(dprojection + i, D * C - i) * scale, D * C - i);
  }
  const float* context = shared.context + (local * HD + h * D) * D;
  deep_product(dprojection, C, 1, shared.weights.out_back + h * packed_size(C, D), D, C, D, scratch.dcontext, D, false);
  pack_rows(context, D, D, D, scratch.packed_context);
  product(dprojection, 1, C, scratch.packed_context, C, D, D,
          shared.sums.weight + local * shared.sums.weight_size + h * D, HD, first_sample > 0);
  float* dsums = shared.rows + (local * HD + h * D) * V;
  if (plan.block) {
    product(scratch.dcontext, D, 1, shared.weights.v_back + h * packed_size(D, V), D, D, V, dsums, V, false);
    pack_rows(sums, V, D, V, scratch.packed_sums);
    product(scratch.dcontext, 1, D, scratch.packed_sums, D, D, V,
            shared.sums.v + local * shared.sums.weight_size + h * D * V, V, first_sample > 0);
  } else {
    __builtin_memcpy(dsums, scratch.dcontext, static_cast<unsigned long>(D * D) * 4);
  }
  // From sums and their gradient, as dk̂ is: where a position has nearly all the weight the two cancel.
  float* delta = shared.delta + local * round_up(HD, 16) + h * D;
  for (int64_t d = 0; d < D; ++d) delta[d] = row_dot(sums + d * V, dsums + d * V, V);
  memory_backward(plan, shared.weights, shared.memory + local * plan.in.M * shared.weights.channels, context,
                  scratch.dcontext, h, delta, shared.sums.memory + local * shared.sums.memory_size);
}

// Sums in order over `slots` of `stride` floats, of which the first `count` count.
inline void sum_slots(const float* from, int64_t slots, int64_t stride, int64_t count, float* to) {
  parallel(ceil_div(count, ParameterSums::kChunk), 4, [&](int64_t begin, int64_t end) {
    const int64_t last = min(end * ParameterSums::kChunk, count);
    for (int64_t i = begin * ParameterSums::kChunk; i < last; i += kLanes) {
      vf sum = load_upto(from + i, last - i);
      for (int64_t s = 1; s < slots; ++s) sum += load_upto(from + s * stride + i, last - i);
      store_upto(to + i, sum, last - i);
    }
  });
}

inline void parameters_backward(const Plan& plan, const LinearAttentionBackward& args, const BackwardScratch& shared) {
  const ParameterSums& sums = shared.sums;
  const int64_t C = plan.in.C, HD = plan.HD, samples = plan.samples, items = samples * plan.groups;
  sum_slots(sums.gain, items, sums.row_size, C, args.dgain);
  sum_slots(sums.bias, items, sums.row_size, C, args.dbias);
  sum_slots(sums.weight, samples, sums.weight_size, HD * C, args.dweight);
  sum_slots(sums.memory, samples, sums.memory_size, sums.memory_size, sums.memory);
  const int64_t M = plan.in.M, channels = shared.weights.channels;
  for (int64_t i = 0; i < 2 * HD * M; ++i) {
    args.dmem_kv[i] = sums.memory[(i / (HD * M) * M + i % M) * channels + i / M % HD];
  }
  if (!plan.block) return;
  sum_slots(sums.qk, items, sums.qk_size, 2 * HD * C, shared.dfolded);
  sum_slots(sums.v, samples, sums.weight_size, HD * C, shared.dfolded + 2 * HD * C);
  scale_columns_backward(shared.dfolded, args.in.weight_qkv, args.in.gain_in, 3 * HD, C, args.dweight_qkv,
                         args.dgain_in);
}

inline void backward(const LinearAttentionBackward& args) {
  const Plan plan(args.in);
  BackwardScratch shared{};
  place_in_scratch(shared, kSharedSlot, plan);
  shared.weights.pack(plan, true);
  shared.sums.clear();
  for (int64_t first = 0; first < args.in.B; first += plan.samples) {
    const int64_t samples = min(plan.samples, args.in.B - first);
    const auto pass_over_items = [&](const auto& pass) {
      parallel_helped(samples * plan.groups, 1, [&](int64_t begin, int64_t end) {
        Tile tile;
        place_in_scratch(tile, kTileSlot, plan);
        for (int64_t item = begin; item < end; ++item) pass(plan, args, shared, tile, item, first);
      });
    };
    projections_again(plan, args, shared, first, samples);
    pass_over_items(queries_pass);
    for_heads(plan, samples, [&](int64_t s, int64_t h) { head_backward(plan, args, shared, s, first, h); });
    pack_matrices(shared.rows, samples * plan.parts, plan.width, plan.V, false, plan.in.narrow, shared.dsums);
    pack_matrices(shared.rows, samples * plan.parts, plan.V, plan.width, true, plan.in.narrow, shared.dsums_back);
    pass_over_items(keys_pass);
  }
  parameters_backward(plan, args, shared);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA::linear_attention
