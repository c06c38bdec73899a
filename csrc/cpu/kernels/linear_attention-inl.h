// Linear attention from x or qkv to the normed output (Shen et al. 2021, section 3.3).
//
// V is v; or, if the input is x, V is x̂, the normed rows of x, and v = V·Wᵥᵀ is never computed:
//
//   sums = softmax(k)ᵀ·V over the positions     context = D^−½·(sums·Wᵥᵀ + softmax(memory k)ᵀ·memory v)
//   y = softmax(q)·projection + bias            projection = context·weightᵀ
//
// Positions are split into groups, independent of the number of threads, and groups into tiles that stay in the cache.
// A sample's small matrices are made head by head. q and k are computed from x per tile, in forward and again in
// backward, and never stored.
#pragma once

#include "head_softmax-inl.h"
#include "linear_attention.h"
#include "pairs-inl.h"
#include "parallel-inl.h"
#include "row_norm-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA::linear_attention {

constexpr int64_t kGroup = 256;                   // positions; fewer do not pay for a group's own sums
constexpr int64_t kMaxGroups = 16;                // of a sample
constexpr int64_t kItems = 4;                     // groups of a small batch, at least, for threads to share
constexpr int64_t kLeastGroup = 32;               // positions of those
constexpr int64_t kHeadsTask = int64_t{1} << 17;  // multiplications that pay for waking a thread
constexpr int64_t kRuns = 32;  // of groups that are taken one after another; bounds the sums kept for parameters
constexpr int kSharedSlot = 0, kTileSlot = 1;  // of thread_scratch
constexpr float kMinFloat = -3.402823466e38f;

// Sizes, and how the work is cut up.
struct Plan {
  LinearAttentionInputs in;
  bool block;                         // the input is x, not qkv
  int64_t HD, V, parts, width;        // values (N, parts·V); `width` of the HD channels belong to one part
  int64_t groups, tile, stride, row;  // of a sample; positions; of tiles with HD columns and with max(C, V·parts)
  int64_t samples;                    // that are taken together

  explicit Plan(const LinearAttentionInputs& inputs)
      : in(inputs),
        block(inputs.x != nullptr),
        HD(inputs.heads * inputs.D),
        V(block ? inputs.C : inputs.D),
        parts(block ? 1 : inputs.heads),
        width(HD / parts),
        groups(max(min(kMaxGroups, ceil_div(inputs.N, kGroup)),
                   min(ceil_div(kItems, max<int64_t>(1, inputs.B)), inputs.N / kLeastGroup))),
        stride(padded(HD)),
        row(padded(inputs.C)) {
    const int64_t largest = ceil_div(inputs.N, groups), target = inputs.C <= 128 ? 128 : 64;
    tile = ceil_div(largest, ceil_div(largest, target));
    samples = min(inputs.B, max<int64_t>(1, kRuns / groups));
  }
  int64_t values_size() const { return parts * packed_size(tile, V); }
  int64_t sums_size() const { return round_up(HD * V, 16); }
  int64_t first_position(int64_t group) const { return group * in.N / groups; }
  // Heads that are worth a thread: each takes some products of (D, D) with (D, C).
  int64_t head_grain() const { return max<int64_t>(1, kHeadsTask / (2 * in.D * in.D * in.C)); }
};

// Weights as the products need them, made once a call and shared by all threads.
struct Weights {
  float *folded, *q, *k;               // W·gain (3HD, C); q's and k's part packed as (C, HD)
  float *q_back, *k_back;              // packed as (HD, C)
  float *v, *v_back, *out, *out_back;  // per head, packed: (C, D), (D, C); (D, C), (C, D)
  float* memory;                       // mem_kv with entries before channels, (2, M, `channels`)
  int64_t channels;

  void place(const Plan& plan, Arena& arena, bool backward) {
    const int64_t C = plan.in.C, D = plan.in.D, heads = plan.in.heads;
    if (plan.block) {
      folded = arena.take(3 * plan.HD * C);
      q = arena.take(packed_size(C, plan.HD));
      k = arena.take(packed_size(C, plan.HD));
      v = arena.take(heads * packed_size(C, D));
    }
    out = arena.take(heads * packed_size(D, C));
    channels = round_up(plan.HD, 16);
    memory = arena.take(2 * plan.in.M * channels);
    if (!backward) return;
    if (plan.block) {
      q_back = arena.take(packed_size(plan.HD, C));
      k_back = arena.take(packed_size(plan.HD, C));
      v_back = arena.take(heads * packed_size(D, C));
    }
    out_back = arena.take(heads * packed_size(C, D));
  }

  // Tasks of equal size: `heads` or as many as q has panels of each kind.
  void pack(const Plan& plan, bool backward) {
    const LinearAttentionInputs& in = plan.in;
    const int64_t C = in.C, D = in.D, HD = plan.HD, of_q = plan.block ? panels(HD) : 0;
    const int64_t grain = max<int64_t>(1, kPackGrain / (C * kPanel));
    if (plan.block) {
      parallel(3 * HD, max<int64_t>(1, kPackGrain / C), [&](int64_t begin, int64_t end) {
        scale_columns(in.weight_qkv + begin * C, in.gain_in, end - begin, C, folded + begin * C);
      });
    }
    parallel((backward ? 4 : 2) * of_q, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task / of_q % 2, i = task % of_q;
        const float* from = folded + part * HD * C;
        if (task / of_q < 2) {
          float* to = part ? k : q;
          pack_columns(from, C, C, HD, i, i + 1, to);
          if (in.narrow) narrow_panels(to + i * C * kPanel, C, kPanel);
          continue;
        }
        const int64_t first = i * panels(C) / of_q, last = (i + 1) * panels(C) / of_q;
        float* to = part ? k_back : q_back;
        pack_rows(from, C, HD, C, first, last, to);
        if (in.narrow) narrow_panels(to + first * HD * kPanel, HD, (last - first) * kPanel);
      }
    });
    parallel(in.heads, grain, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h) {
        if (plan.block) {
          const float* folded_v = folded + (2 * HD + h * D) * C;
          pack_columns(folded_v, C, C, D, v + h * packed_size(C, D));
          if (backward) pack_rows(folded_v, C, D, C, v_back + h * packed_size(D, C));
        }
        pack_columns(in.weight + h * D, HD, D, C, out + h * packed_size(D, C));
        if (backward) pack_rows(in.weight + h * D, HD, C, D, out_back + h * packed_size(C, D));
      }
    });
    for (int64_t m = 0; m < 2 * in.M; ++m) {
      const float* from = in.mem_kv + m / in.M * HD * in.M + m % in.M;
      for (int64_t c = 0; c < HD; ++c) memory[m * channels + c] = from[c * in.M];
      for (int64_t c = HD; c < channels; ++c) memory[m * channels + c] = 0;
    }
  }
  static constexpr int64_t kPackGrain = 16384;  // elements
};

// A tile of positions of one sample, in memory of the thread.
struct Tile {
  float *normed, *values, *norms;       // x̂ (t, C); values packed (parts, t, V); RowNorm of every position
  float *queries, *dqueries;            // (t, HD); the k side uses them for k and dk
  float *y, *dy, *dy_packed;            // (t, C) each
  float *largest, *total, *correction;  // (HD)
  float *dgain, *dbias;                 // (C)
  uint32_t* narrowed;                   // a product's first factor by bfloat16 pairs, or null

  void place(const Plan& plan, Arena& arena) {
    const int64_t t = plan.tile, C = plan.in.C;
    normed = plan.block ? arena.take(t * plan.row) : nullptr;
    values = arena.take(plan.values_size());
    norms = arena.take(2 * t);
    queries = arena.take(t * plan.stride);
    dqueries = arena.take(t * plan.stride);
    y = arena.take(t * plan.row);
    dy = arena.take(t * plan.row);
    dy_packed = arena.take(packed_size(t, C));
    largest = arena.take(plan.HD);
    total = arena.take(plan.HD);
    correction = arena.take(plan.HD);
    dgain = arena.take(C);
    dbias = arena.take(C);
    // Rows of t positions, or sums over them: (t, HD), (t, C), (HD, t).
    const int64_t floats = max(max(narrowed_size(t, plan.HD), narrowed_size(t, C)), narrowed_size(plan.HD, t));
    narrowed = plan.in.narrow ? reinterpret_cast<uint32_t*>(arena.take(floats)) : nullptr;
  }
  RowNorm* norm() const { return reinterpret_cast<RowNorm*>(norms); }
};

template <typename Places, typename... Options>
inline void place_in_scratch(Places& places, int slot, const Plan& plan, Options... options) {
  Arena size{nullptr};
  places.place(plan, size, options...);
  Arena arena{thread_scratch(slot, size.used)};
  places.place(plan, arena, options...);
}

// body(first position, positions) for the tiles of one group.
template <typename Body>
DDPM_FAST_INLINE void for_tiles(const Plan& plan, int64_t group, const Body& body) {
  const int64_t end = plan.first_position(group + 1);
  for (int64_t n = plan.first_position(group); n < end; n += plan.tile) body(n, min(plan.tile, end - n));
}

// Normed rows of x and the values in panels, or the values of qkv in panels.
inline void make_values(const Plan& plan, const Tile& tile, int64_t sample, int64_t n, int64_t t, bool packed) {
  const LinearAttentionInputs& in = plan.in;
  if (!plan.block) {
    const float* v = in.qkv + (sample * in.N + n) * 3 * plan.HD + 2 * plan.HD;
    for (int64_t h = 0; packed && h < in.heads; ++h) {
      pack_rows(v + h * in.D, 3 * plan.HD, t, in.D, tile.values + h * packed_size(t, in.D));
      if (in.narrow) narrow_panels(tile.values + h * packed_size(t, in.D), t, in.D);
    }
    return;
  }
  for (int64_t i = 0; i < t; ++i) {
    const float* x = in.x + (sample * in.N + n + i) * in.C;
    float* to = tile.normed + i * plan.row;
    const RowNorm norm = tile.norm()[i] = row_norm(x, in.C);
    const vf factor = splat(norm.factor);
    for (int64_t c = 0; c < in.C; c += kLanes) store_upto(to + c, load_upto(x + c, in.C - c) * factor, in.C - c);
    if (packed) {
      pack_row([&](int64_t c, int64_t count) { return load_upto(to + c, count); }, t, in.C, tile.values + i * kPanel);
    }
  }
  if (packed && in.narrow) narrow_panels(tile.values, t, in.C);
}

// Part 0 (q) or 1 (k) of qkv: a product of the normed rows with `weight`, or read.
inline void make_projected(const Plan& plan, const Tile& tile, int64_t sample, int64_t n, int64_t t, int part,
                           const float* weight, float* to) {
  if (plan.block) {
    return multiply(tile.narrowed, tile.normed, plan.row, 1, weight, t, plan.in.C, plan.HD, to, plan.stride, false);
  }
  const float* from = plan.in.qkv + ((sample * plan.in.N + n) * 3 + part) * plan.HD;
  for (int64_t i = 0; i < t; ++i) {
    __builtin_memcpy(to + i * plan.stride, from + i * 3 * plan.HD, static_cast<unsigned long>(plan.HD) * 4);
  }
}

inline void softmax_of_heads(const Plan& plan, float* q, int64_t t) {
  for (int64_t i = 0; i < t; ++i) {
    for (int64_t h = 0; h < plan.in.heads; ++h) row_softmax(q + i * plan.stride + h * plan.in.D, plan.in.D, 1.0f);
  }
}

// The online softmax: k ← exp(k − running maximum) in place, and the factors that rescale the earlier sums. Columns
// from HD on hold undefined numbers that nobody reads.
inline void exponentials(const Plan& plan, const Tile& tile, int64_t t) {
  for (int64_t c = 0; c < plan.HD; c += kLanes) {
    float* k = tile.queries + c;
    const vf before = load(tile.largest + c);
    vf largest = before;
    for (int64_t i = 0; i < t; ++i) largest = vmax(load(k + i * plan.stride), largest);
    vf sum = {};
    for (int64_t i = 0; i < t; ++i) {
      const vf e = exp(load(k + i * plan.stride) - largest);
      store(k + i * plan.stride, e);
      sum += e;
    }
    const vf correction = exp(before - largest);
    store(tile.correction + c, correction);
    store(tile.total + c, load(tile.total + c) * correction + sum);
    store(tile.largest + c, largest);
  }
}

// Σ exp(k − largest)·values, the largest and Σ exp(k − largest) of one group.
inline void sum_group(const Plan& plan, const Tile& tile, const float* weight_k, int64_t sample, int64_t group,
                      float* sums, float* largest, float* total) {
  const int64_t HD = plan.HD, V = plan.V;
  for (int64_t c = 0; c < HD; c += kLanes) store(tile.largest + c, splat(kMinFloat)), store(tile.total + c, vf{});
  bool first = true;
  for_tiles(plan, group, [&](int64_t n, int64_t t) {
    make_values(plan, tile, sample, n, t, true);
    make_projected(plan, tile, sample, n, t, 1, weight_k, tile.queries);
    exponentials(plan, tile, t);
    for (int64_t c = 0; !first && c < HD; ++c) {
      const vf correction = splat(tile.correction[c]);
      float* row = sums + c * V;
      for (int64_t i = 0; i < V; i += kLanes) store_upto(row + i, load_upto(row + i, V - i) * correction, V - i);
    }
    for (int64_t p = 0; p < plan.parts; ++p) {
      multiply(tile.narrowed, tile.queries + p * plan.width, 1, plan.stride, tile.values + p * packed_size(t, V),
               plan.width, t, V, sums + p * plan.width * V, V, !first);
    }
    first = false;
  });
  for (int64_t c = 0; c < HD; c += kLanes) {
    store(largest + c, load(tile.largest + c));
    store(total + c, load(tile.total + c));
  }
}

// Softmax over positions and memory from its groups: statistics (2, HD) of one sample. The groups' statistics (groups,
// 2, `channels`) become the factors of their sums.
inline void merge_statistics(const Plan& plan, const Weights& weights, float* group_statistics, float* statistics) {
  const int64_t HD = plan.HD, M = plan.in.M, channels = weights.channels;
  for (int64_t c = 0; c < HD; c += kLanes) {
    vf largest = splat(kMinFloat), total = {};
    for (int64_t m = 0; m < M; ++m) largest = vmax(load(weights.memory + m * channels + c), largest);
    for (int64_t g = 0; g < plan.groups; ++g) largest = vmax(load(group_statistics + 2 * g * channels + c), largest);
    for (int64_t m = 0; m < M; ++m) total += exp(load(weights.memory + m * channels + c) - largest);
    for (int64_t g = 0; g < plan.groups; ++g) {
      float* group = group_statistics + 2 * g * channels + c;
      const vf factor = exp(load(group) - largest);
      total += load(group + channels) * factor;
      store(group, factor);
    }
    // Nothing but -inf: 0/0, as a softmax has it.
    const vf inverse = select(largest > splat(kMinFloat), splat(1.0f) / total, splat(__builtin_nanf("")));
    for (int64_t g = 0; g < plan.groups; ++g) {
      float* group = group_statistics + 2 * g * channels + c;
      store(group, load(group) * inverse);
    }
    store_upto(statistics + c, largest, HD - c);
    store_upto(statistics + HD + c, inverse, HD - c);
  }
}

// The sums (D, V) of head h of one sample from its groups'.
inline void merge_sums(const Plan& plan, const float* group_sums, const float* factors, int64_t channels, int64_t h,
                       float* sums) {
  const int64_t D = plan.in.D, V = plan.V;
  for (int64_t c = h * D; c < (h + 1) * D; ++c) {
    for (int64_t i = 0; i < V; i += kLanes) {
      vf sum = {};
      for (int64_t g = 0; g < plan.groups; ++g) {
        const vf factor = splat(factors[2 * g * channels + c]);
        sum = load_upto(group_sums + g * plan.sums_size() + c * V + i, V - i) * factor + sum;
      }
      store_upto(sums + c * V + i, sum, V - i);
    }
  }
}

// softmax(k) of the memory, (M, `channels`).
inline void memory_softmax(const Plan& plan, const Weights& weights, const float* statistics, float* to) {
  for (int64_t m = 0; m < plan.in.M; ++m) {
    for (int64_t c = 0; c < plan.HD; c += kLanes) {
      const int64_t count = plan.HD - c, at = m * weights.channels + c;
      const vf largest = load_upto(statistics + c, count), inverse = load_upto(statistics + plan.HD + c, count);
      store(to + at, exp(load(weights.memory + at) - largest) * inverse);
    }
  }
}

// The context (D, D) of head h without its scale, with the share of the memory.
inline void make_context(const Plan& plan, const Weights& weights, const float* sums, const float* memory_weights,
                         int64_t h, float* context) {
  const int64_t D = plan.in.D, V = plan.V, M = plan.in.M;
  float* to = context + h * D * D;
  if (plan.block) {
    deep_product(sums + h * D * V, V, 1, weights.v + h * packed_size(V, D), D, V, D, to, D, false);
  } else {
    __builtin_memcpy(to, sums + h * D * D, static_cast<unsigned long>(D * D) * 4);
  }
  const float* memory_v = weights.memory + M * weights.channels + h * D;
  for (int64_t d = 0; d < D; ++d) {
    for (int64_t e = 0; e < D; e += kLanes) {
      vf sum = load_upto(to + d * D + e, D - e);
      for (int64_t m = 0; m < M; ++m) {
        const vf weight = splat(memory_weights[m * weights.channels + h * D + d]);
        sum = load_upto(memory_v + m * weights.channels + e, D - e) * weight + sum;
      }
      store_upto(to + d * D + e, sum, D - e);
    }
  }
}

// D^−½·context·weightᵀ of head h: its rows of (HD, C).
inline void make_projection(const Plan& plan, const Weights& weights, const float* context, int64_t h,
                            float* projection) {
  const int64_t D = plan.in.D, C = plan.in.C;
  const vf scale = splat(1.0f / __builtin_sqrtf(static_cast<float>(D)));
  float* to = projection + h * D * C;
  product(context + h * D * D, D, 1, weights.out + h * packed_size(D, C), D, D, C, to, C, false);
  for (int64_t i = 0; i < D * C; i += kLanes) {
    store_upto(to + i, load_upto(to + i, D * C - i) * scale, D * C - i);
  }
}

// Matrices (K, N) of `count` samples or parts, from rows without gaps to panels, or from those of the transpose.
inline void pack_matrices(const float* from, int64_t count, int64_t K, int64_t N, bool transposed, bool narrow,
                          float* packed) {
  const int64_t of_one = panels(N), grain = max<int64_t>(1, Weights::kPackGrain / (K * kPanel));
  parallel(count * of_one, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i % of_one;
      const float* matrix = from + i / of_one * K * N;
      float* to = packed + i / of_one * packed_size(K, N);
      if (transposed) {
        pack_columns(matrix, K, K, N, p, p + 1, to);
      } else {
        pack_rows(matrix, N, K, N, p, p + 1, to);
      }
      if (narrow) narrow_panels(to + p * K * kPanel, K, kPanel);
    }
  });
}

// body(sample, head) for the heads of samples.
template <typename Body>
DDPM_FAST_INLINE void for_heads(const Plan& plan, int64_t samples, const Body& body) {
  parallel(samples * plan.in.heads, plan.head_grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i / plan.in.heads, i % plan.in.heads);
  });
}

// y + bias in place; returns its norm.
DDPM_FAST_INLINE RowNorm add_bias(const Plan& plan, float* y) {
  const int64_t C = plan.in.C;
  vf squares = {};
  for (int64_t c = 0; c < C; c += kLanes) {
    const vf value = load_upto(y + c, C - c) + load_upto(plan.in.bias + c, C - c);
    store_upto(y + c, value, C - c);
    squares = value * value + squares;  // zeros behind C
  }
  return row_norm_of(reduce_add(squares), C);
}

inline void write_output(const Plan& plan, float* y, const float* residual, float* out) {
  const int64_t C = plan.in.C;
  const vf factor = splat(add_bias(plan, y).factor);
  for (int64_t c = 0; c < C; c += kLanes) {
    vf value = load_upto(y + c, C - c) * factor * load_upto(plan.in.gain + c, C - c);
    if (residual != nullptr) value += load_upto(residual + c, C - c);
    store_upto(out + c, value, C - c);
  }
}

struct ForwardScratch {
  Weights weights;
  float *sums, *statistics;     // (samples·groups, HD, V), (…, 2, channels)
  float *context, *memory;      // (samples, HD, D), softmax(k) of the memory (samples, M, channels)
  float *projections, *packed;  // (samples, HD, C) in rows and packed

  void place(const Plan& plan, Arena& arena) {
    weights.place(plan, arena, false);
    sums = arena.take(plan.samples * plan.groups * plan.sums_size());
    statistics = arena.take(plan.samples * plan.groups * 2 * weights.channels);
    context = arena.take(plan.samples * plan.HD * plan.in.D);
    memory = arena.take(plan.samples * plan.in.M * weights.channels);
    projections = arena.take(plan.samples * plan.HD * plan.in.C);
    packed = arena.take(plan.samples * packed_size(plan.HD, plan.in.C));
  }
};

inline void forward(const LinearAttentionForward& args) {
  const Plan plan(args.in);
  const int64_t N = args.in.N, C = args.in.C, HD = plan.HD, groups = plan.groups;
  const int64_t packed = packed_size(HD, C), channels = round_up(HD, 16);
  ForwardScratch shared{};
  place_in_scratch(shared, kSharedSlot, plan);
  shared.weights.pack(plan, false);
  for (int64_t first = 0; first < args.in.B; first += plan.samples) {
    const int64_t samples = min(plan.samples, args.in.B - first);
    parallel_helped(samples * groups, 1, [&](int64_t begin, int64_t end) {
      Tile tile;
      place_in_scratch(tile, kTileSlot, plan);
      for (int64_t item = begin; item < end; ++item) {
        float* statistics = shared.statistics + item * 2 * channels;
        sum_group(plan, tile, shared.weights.k, first + item / groups, item % groups,
                  shared.sums + item * plan.sums_size(), statistics, statistics + channels);
      }
    });
    for (int64_t s = 0; s < samples; ++s) {
      float* statistics = args.statistics + (first + s) * 2 * HD;
      merge_statistics(plan, shared.weights, shared.statistics + s * groups * 2 * channels, statistics);
      memory_softmax(plan, shared.weights, statistics, shared.memory + s * plan.in.M * channels);
    }
    for_heads(plan, samples, [&](int64_t s, int64_t h) {
      float *sums = args.sums + (first + s) * HD * plan.V, *context = shared.context + s * HD * plan.in.D;
      merge_sums(plan, shared.sums + s * groups * plan.sums_size(), shared.statistics + s * groups * 2 * channels,
                 channels, h, sums);
      make_context(plan, shared.weights, sums, shared.memory + s * plan.in.M * channels, h, context);
      make_projection(plan, shared.weights, context, h, shared.projections + s * HD * C);
    });
    pack_matrices(shared.projections, samples, HD, C, false, plan.in.narrow, shared.packed);
    parallel_helped(samples * groups, 1, [&](int64_t begin, int64_t end) {
      Tile tile;
      place_in_scratch(tile, kTileSlot, plan);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t sample = first + item / groups;
        for_tiles(plan, item % groups, [&](int64_t n, int64_t t) {
          make_values(plan, tile, sample, n, t, false);
          make_projected(plan, tile, sample, n, t, 0, shared.weights.q, tile.queries);
          softmax_of_heads(plan, tile.queries, t);
          multiply(tile.narrowed, tile.queries, plan.stride, 1, shared.packed + item / groups * packed, t, HD, C,
                   tile.y, plan.row, false);
          for (int64_t i = 0; i < t; ++i) {
            const int64_t position = (sample * N + n + i) * C;
            write_output(plan, tile.y + i * plan.row, args.residual == nullptr ? nullptr : args.residual + position,
                         args.out + position);
          }
        });
      }
    });
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA::linear_attention
