// softmax(q·kᵀ / √D)·v per sample and head, with M keys and values of the memory before those of the map (Vaswani et
// al. 2017, eq. 1), and its backward, which makes the softmax again. A tile of queries has its scores for all keys.
#pragma once

#include "attention.h"
#include "head_softmax-inl.h"
#include "pack-inl.h"
#include "parallel-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA::attention {

constexpr int kSharedSlot = 0, kTileSlot = 1;           // of thread_scratch
constexpr int64_t kScores = 32768;                      // floats of a tile's scores, of which backward has two
constexpr int64_t kMinQueries = 28, kMaxQueries = 128;  // of a tile

template <typename Places, typename Plan, typename... Options>
inline void place_in_scratch(Places& places, int slot, const Plan& plan, Options... options) {
  Arena size{nullptr};
  places.place(plan, size, options...);
  Arena arena{thread_scratch(slot, size.used)};
  places.place(plan, arena, options...);
}

// Sizes, and the distance between rows of positions. A row of qkv is (3, heads, D), or (heads, 3, D) with `by_head`.
struct Plan {
  AttentionInputs in;
  int64_t HD, keys, tile, stride;  // keys of a head; queries of a tile; of its scores
  int64_t qkv_row, out_row;        // of qkv and dqkv; of out and its gradient
  int64_t part_step, head_step;    // within a row of qkv
  float scale;

  Plan(const AttentionInputs& inputs, int64_t qkv_stride, int64_t out_stride, bool by_head = false)
      : in(inputs),
        HD(inputs.heads * inputs.D),
        keys(inputs.M + inputs.N),
        stride(padded(keys)),
        qkv_row(qkv_stride),
        out_row(out_stride),
        part_step(by_head ? inputs.D : HD),
        head_step(by_head ? 3 * inputs.D : inputs.D),
        scale(1.0f / __builtin_sqrtf(static_cast<float>(inputs.D))) {
    const int64_t target = max(kMinQueries, min(kMaxQueries, kScores / stride));
    tile = ceil_div(in.N, ceil_div(in.N, target));
  }
  // q, k or v of a head within a row of qkv.
  int64_t place(int64_t part, int64_t h) const { return part * part_step + h * head_step; }
};

// A matrix (keys, D) with a distance between its rows.
template <typename Float>
struct Rows {
  Float* first;
  int64_t stride;
};

// One head of one sample, in memory of the thread.
struct Head {
  float *keys, *values;                 // (keys, D), the memory's first; unused without a memory
  float *keys_packed, *values_packed;   // as (D, keys) and as (keys, D)
  float *keys_back, *values_back;       // as (keys, D) and as (D, keys)
  float *scores, *dscores;              // (tile, keys)
  float *queries_packed, *grad_packed;  // (tile, D)
  float *dkeys, *dvalues;               // as keys and values

  void place(const Plan& plan, Arena& arena, bool backward) {
    const int64_t D = plan.in.D, with_memory = plan.in.M > 0 ? plan.keys * D : 0;
    keys = arena.take(with_memory);
    values = arena.take(with_memory);
    keys_packed = arena.take(packed_size(D, plan.keys));
    values_packed = arena.take(packed_size(plan.keys, D));
    scores = arena.take(plan.tile * plan.stride);
    if (!backward) return;
    keys_back = arena.take(packed_size(plan.keys, D));
    values_back = arena.take(packed_size(D, plan.keys));
    dscores = arena.take(plan.tile * plan.stride);
    queries_packed = arena.take(packed_size(plan.tile, D));
    grad_packed = arena.take(packed_size(plan.tile, D));
    dkeys = arena.take(with_memory);
    dvalues = arena.take(with_memory);
  }
};

DDPM_FAST_INLINE void copy(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store_upto(to + i, load_upto(from + i, count - i), count - i);
}

// Part 1 (k) or 2 (v) of a head, behind the memory's, which makes it a copy at `to`; `qkv` is the sample's.
inline Rows<const float> gather(const Plan& plan, const float* qkv, int64_t h, int part, float* to) {
  const int64_t D = plan.in.D, M = plan.in.M;
  const float* of_map = qkv + plan.place(part, h);
  if (M == 0) return {of_map, plan.qkv_row};
  copy(to, plan.in.mem_kv + ((part - 1) * plan.in.heads + h) * M * D, M * D);
  for (int64_t n = 0; n < plan.in.N; ++n) copy(to + (M + n) * D, of_map + n * plan.qkv_row, D);
  return {to, D};
}

inline void softmax_of_queries(const Plan& plan, const Head& head, const float* queries, int64_t t) {
  deep_product(queries, plan.qkv_row, 1, head.keys_packed, t, plan.in.D, plan.keys, head.scores, plan.stride, false);
  for (int64_t i = 0; i < t; ++i) row_softmax(head.scores + i * plan.stride, plan.keys, plan.scale);
}

// Tiles [first, last) of the queries of one head of one sample; `qkv` and `out` are the sample's rows.
inline void head_forward(const Plan& plan, const Head& head, const float* qkv, int64_t h, float* out, int64_t first,
                         int64_t last) {
  const int64_t D = plan.in.D;
  const Rows<const float> keys = gather(plan, qkv, h, 1, head.keys), values = gather(plan, qkv, h, 2, head.values);
  pack_columns(keys.first, keys.stride, D, plan.keys, head.keys_packed);
  pack_rows(values.first, values.stride, plan.keys, D, head.values_packed);
  for (int64_t n = first * plan.tile; n < min(last * plan.tile, plan.in.N); n += plan.tile) {
    const int64_t t = min(plan.tile, plan.in.N - n);
    softmax_of_queries(plan, head, qkv + n * plan.qkv_row + plan.place(0, h), t);
    deep_product(head.scores, plan.stride, 1, head.values_packed, t, plan.keys, D, out + n * plan.out_row + h * D,
                 plan.out_row, false);
  }
}

// Gradients of one head: dqkv of one sample, and the memory's gradient, added to `dmemory` (2, heads, M, D). If `out`
// is not null, the function recomputes forward's output into it.
inline void head_backward(const Plan& plan, const Head& head, const float* qkv, const float* grad, int64_t h,
                          float* dqkv, float* dmemory, float* out) {
  const int64_t D = plan.in.D, M = plan.in.M, keys = plan.keys, stride = plan.stride;
  const Rows<const float> k = gather(plan, qkv, h, 1, head.keys), v = gather(plan, qkv, h, 2, head.values);
  const auto gradient = [&](int part, float* copied) {
    return M == 0 ? Rows<float>{dqkv + plan.place(part, h), plan.qkv_row} : Rows<float>{copied, D};
  };
  const Rows<float> dk = gradient(1, head.dkeys), dv = gradient(2, head.dvalues);
  pack_columns(k.first, k.stride, D, keys, head.keys_packed);
  pack_rows(k.first, k.stride, keys, D, head.keys_back);
  pack_columns(v.first, v.stride, D, keys, head.values_back);
  if (out != nullptr) pack_rows(v.first, v.stride, keys, D, head.values_packed);
  for (int64_t n = 0; n < plan.in.N; n += plan.tile) {
    const int64_t t = min(plan.tile, plan.in.N - n);
    const float *queries = qkv + n * plan.qkv_row + plan.place(0, h), *dout = grad + n * plan.out_row + h * D;
    softmax_of_queries(plan, head, queries, t);
    if (out != nullptr) {
      deep_product(head.scores, stride, 1, head.values_packed, t, keys, D, out + n * plan.out_row + h * D, plan.out_row,
                   false);
    }
    deep_product(dout, plan.out_row, 1, head.values_back, t, D, keys, head.dscores, stride, false);
    pack_rows(dout, plan.out_row, t, D, head.grad_packed);
    product(head.scores, 1, stride, head.grad_packed, keys, t, D, dv.first, dv.stride, n > 0);
    for (int64_t i = 0; i < t; ++i) {
      row_softmax_backward(head.scores + i * stride, head.dscores + i * stride, keys, plan.scale);
    }
    deep_product(head.dscores, stride, 1, head.keys_back, t, keys, D, dqkv + n * plan.qkv_row + plan.place(0, h),
                 plan.qkv_row, false);
    pack_rows(queries, plan.qkv_row, t, D, head.queries_packed);
    product(head.dscores, 1, stride, head.queries_packed, keys, t, D, dk.first, dk.stride, n > 0);
  }
  if (M == 0) return;
  const float* gradients[2] = {head.dkeys, head.dvalues};
  for (int64_t part = 1; part <= 2; ++part) {
    const float* from = gradients[part - 1];
    float* memory = dmemory + ((part - 1) * plan.in.heads + h) * M * D;
    for (int64_t i = 0; i < M * D; ++i) memory[i] += from[i];
    float* to = dqkv + plan.place(part, h);
    for (int64_t n = 0; n < plan.in.N; ++n) copy(to + n * plan.qkv_row, from + (M + n) * D, D);
  }
}

// Heads of `samples` samples; qkv and out are those samples' rows. Where there are fewer heads than threads, a head's
// tiles of queries are shared out.
inline void heads_forward(const Plan& plan, int64_t samples, const float* qkv, float* out) {
  const int64_t heads = plan.in.heads, N = plan.in.N, tiles = ceil_div(N, plan.tile);
  const int64_t tasks = samples * heads, cuts = min(tiles, ceil_div(thread_count(), tasks));
  parallel_helped(tasks * cuts, 1, [&](int64_t begin, int64_t end) {
    Head head;
    place_in_scratch(head, kTileSlot, plan, false);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / (heads * cuts), cut = i % cuts;
      head_forward(plan, head, qkv + sample * N * plan.qkv_row, i / cuts % heads, out + sample * N * plan.out_row,
                   cut * tiles / cuts, (cut + 1) * tiles / cuts);
    }
  });
}

// dmemory: (samples, 2, heads, M, D), added to.
inline void heads_backward(const Plan& plan, int64_t samples, const float* qkv, const float* grad, float* dqkv,
                           float* dmemory, float* out) {
  const int64_t heads = plan.in.heads, N = plan.in.N, memory = 2 * heads * plan.in.M * plan.in.D;
  parallel_helped(samples * heads, 1, [&](int64_t begin, int64_t end) {
    Head head;
    place_in_scratch(head, kTileSlot, plan, true);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / heads;
      head_backward(plan, head, qkv + sample * N * plan.qkv_row, grad + sample * N * plan.out_row, i % heads,
                    dqkv + sample * N * plan.qkv_row, dmemory + sample * memory,
                    out == nullptr ? nullptr : out + sample * N * plan.out_row);
    }
  });
}

inline void sum_memory(const float* samples, int64_t count, int64_t floats, float* to) {
  for (int64_t i = 0; i < floats; ++i) {
    float sum = samples[i];
    for (int64_t s = 1; s < count; ++s) sum += samples[s * floats + i];
    to[i] = sum;
  }
}

inline void forward(const AttentionForward& args) {
  const int64_t HD = args.in.heads * args.in.D;
  heads_forward(Plan(args.in, 3 * HD, HD), args.in.B, args.qkv, args.out);
}

inline void backward(const AttentionBackward& args) {
  const int64_t HD = args.in.heads * args.in.D, memory = 2 * args.in.M * HD;
  float* dmemory = thread_scratch(kSharedSlot, args.in.B * memory + 1);
  __builtin_memset(dmemory, 0, static_cast<unsigned long>(args.in.B * memory) * 4);
  heads_backward(Plan(args.in, 3 * HD, HD), args.in.B, args.qkv, args.grad, args.dqkv, dmemory, nullptr);
  sum_memory(dmemory, args.in.B, memory, args.dmem_kv);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA::attention
