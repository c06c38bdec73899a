// RMSNorm and GroupNorm with bias, scale and shift, SiLU, dropout and residual, and their gradients.
//
//   v = x + bias;  x̂ = v·√C / max(‖v‖₂, 1e-12)  or  x̂ = (v − mean)·rstd;  y = (x̂·gain + offset)·(1 + scale) + shift
//   out = keep·SiLU(y) + residual
//
// Sums over pixels are sums of chunks, added in the order of chunks and samples, so they do not depend on the threads.
// norm_rows-inl.h has the functions of one row.
#pragma once

#include "convert-inl.h"
#include "dropout-inl.h"
#include "moments-inl.h"
#include "norm_rows-inl.h"
#include "norm_silu.h"
#include "parallel-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// Of thread_scratch.
constexpr int kNormRowSlot = 3, kNormSumsSlot = 5, kNormPieceSlot = 6;
constexpr int64_t kNormChunk = 4096;   // elements of a chunk, about; few, since a chunk's are summed plainly
constexpr int64_t kNormRows = 8;       // pixels that forward takes at once
constexpr int64_t kNormPiece = 16384;  // elements that are worth a thread

// A sample's pixels in chunks of `rows`, independent of the number of threads.
struct NormChunks {
  int64_t rows, per_sample, total, grain;

  NormChunks(int64_t B, int64_t N, int64_t C) {
    rows = max<int64_t>(1, min(N, kNormChunk / C));
    per_sample = ceil_div(N, rows);
    total = B * per_sample;
    grain = max<int64_t>(1, kNormPiece / (rows * C));
  }
};

// The rows of the affine map of one sample.
inline Affine affine_of(const NormSiluArgs& p, int64_t sample) {
  return {.gain = p.gain,
          .offset = p.offset,
          .scale = p.scale ? p.scale + sample * p.C : nullptr,
          .shift = p.shift ? p.shift + sample * p.C : nullptr};
}

// One chunk of one sample.
struct NormChunk {
  int64_t sample, first, rows, begin;  // begin: of the chunk's first element within the maps
  Affine affine;
  const float* keep;  // (rows, C) or null

  NormChunk(const NormSiluArgs& p, const NormChunks& chunks, int64_t index) {
    sample = index / chunks.per_sample;
    first = index % chunks.per_sample * chunks.rows;
    rows = min(chunks.rows, p.N - first);
    begin = (sample * p.N + first) * p.C;
    affine = affine_of(p, sample);
    keep = p.dropout.keep_threshold ? fill_keep(p.dropout, sample, first, rows, p.N, p.C) : nullptr;
  }

  DDPM_FAST_INLINE const float* keep_row(int64_t row, int64_t C) const { return keep ? keep + row * C : nullptr; }
};

// For passes that do not read the mask.
inline NormSiluArgs without_dropout(NormSiluArgs in) {
  in.dropout.keep_threshold = 0;
  return in;
}

// A chunk of a map of T; null if there is no map.
template <typename T>
DDPM_FAST_INLINE const T* chunk_of(const void* map, const NormChunk& chunk) {
  return map ? static_cast<const T*>(map) + chunk.begin : nullptr;
}
template <typename T>
DDPM_FAST_INLINE T* chunk_of(void* map, const NormChunk& chunk) {
  return static_cast<T*>(map) + chunk.begin;
}

template <typename Body>
inline void over_chunks(const NormSiluArgs& p, const NormChunks& chunks, const Body& body) {
  parallel(chunks.total, chunks.grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(NormChunk(p, chunks, i), i);
  });
}

// value(g) for every channel of group g.
template <typename Value>
DDPM_FAST_INLINE void spread_groups(int64_t groups, int64_t C, float* to, const Value& value) {
  const int64_t width = C / groups;
  for (int64_t g = 0; g < groups; ++g) {
    const float of_group = value(g);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) to[c] = of_group;
  }
}

// mean and 1/√(variance + eps) of the group of every channel: (2, C) from a sample's (groups, 2).
DDPM_FAST_NOINLINE void spread_statistics(const float* statistics, int64_t groups, int64_t C, float* spread) {
  spread_groups(groups, C, spread, [&](int64_t g) { return statistics[2 * g]; });
  spread_groups(groups, C, spread + C, [&](int64_t g) { return statistics[2 * g + 1]; });
}

// How many, as a constant.
template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

// body(first group, Count) for all groups, four at a time while there are four: their sums do not wait for each other.
template <typename Body>
DDPM_FAST_INLINE void over_groups(int64_t groups, const Body& body) {
  int64_t g = 0;
  for (; g + 4 <= groups; g += 4) body(g, Count<4>{});
  for (; g < groups; ++g) body(g, Count<1>{});
}

// sums[c] = Σ over rows of term(row, c, lanes), in the order of rows; four vectors at a time.
template <typename Term>
DDPM_FAST_INLINE void sum_rows(int64_t C, int64_t rows, float* sums, const Term& term) {
  constexpr int kVectors = 4;
  int64_t first = 0;
  for (; first + kVectors * kLanes <= C; first += kVectors * kLanes) {
    vf of[kVectors] = {};
    for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) of[i] += term(r, first + i * kLanes, Whole{});
    }
    for (int i = 0; i < kVectors; ++i) store(sums + first + i * kLanes, of[i]);
  }
  over_channels(C - first, [&](int64_t c, auto lanes) {
    vf of = {};
    for (int64_t r = 0; r < rows; ++r) of += term(r, first + c, lanes);
    lanes.put(sums + first + c, of);
  });
}

// moments[2·g] = Σ of the group's channels, in their order.
DDPM_FAST_NOINLINE void sum_groups(int64_t groups, int64_t width, const float* sums, float* moments) {
  over_groups(groups, [&](int64_t first, auto count) {
    float of[count.value] = {};
    for (int64_t c = 0; c < width; ++c) {
#pragma GCC unroll 4
      for (int i = 0; i < count.value; ++i) of[i] += sums[(first + i) * width + c];
    }
    for (int i = 0; i < count.value; ++i) moments[2 * (first + i)] = of[i];
  });
}

// The gradient of v from z, that of x̂, and the means over the group of z and z·x̂.
DDPM_FAST_INLINE vf group_gradient(vf z, vf normed, vf mean_z, vf mean_product, vf rstd) {
  return (z - mean_z - normed * mean_product) * rstd;
}

// x̂ of a vector of channels, for many pixels.
struct GroupNormed {
  bool has_bias;
  vf bias, mean, rstd;

  template <typename Lanes>
  DDPM_FAST_INLINE GroupNormed(const float* added, const float* spread, int64_t C, int64_t c, Lanes lanes)
      : has_bias(added),
        bias(has_bias ? lanes.get(added + c) : vf{}),
        mean(lanes.get(spread + c)),
        rstd(lanes.get(spread + C + c)) {}
  DDPM_FAST_INLINE vf operator()(vf v) const { return ((has_bias ? v + bias : v) - mean) * rstd; }
};

// body(first row, last row, channel, lanes) for every vector of every `kRows` rows of a chunk. What depends only on the
// channel stays in registers.
template <int64_t kRows, typename Body>
DDPM_FAST_INLINE void over_pieces(int64_t rows, int64_t C, const Body& body) {
  for (int64_t first = 0; first < rows; first += kRows) {
    over_channels(C, [&](int64_t c, auto lanes) { body(first, min(rows, first + kRows), c, lanes); });
  }
}
// Adds the sum of a piece to those of its chunk.
template <typename Lanes>
DDPM_FAST_INLINE void add_piece(float* sums, int64_t first, int64_t c, Lanes lanes, vf of_piece) {
  lanes.put(sums + c, first == 0 ? of_piece : lanes.get(sums + c) + of_piece);
}

// Mean and sum of squared deviations of every group in a chunk, moments (groups, 2); buffer: (2, C).
template <typename T>
inline void chunk_moments(const NormSiluArgs& p, const NormChunk& chunk, float* buffer, float* moments) {
  const T* x = chunk_of<T>(p.x, chunk);
  const int64_t C = p.C, G = p.groups, width = C / G;
  float *means = buffer, *sums = buffer + C;
  sum_rows(C, chunk.rows, sums,
           [&](int64_t r, int64_t c, auto lanes) { return get_biased(x + r * C, p.bias, c, lanes); });
  sum_groups(G, width, sums, moments);
  const float count = static_cast<float>(width * chunk.rows);
  for (int64_t g = 0; g < G; ++g) moments[2 * g] /= count;
  spread_groups(G, C, means, [&](int64_t g) { return moments[2 * g]; });
  sum_rows(C, chunk.rows, sums, [&](int64_t r, int64_t c, auto lanes) {
    const vf deviation = get_biased(x + r * C, p.bias, c, lanes) - lanes.get(means + c);
    return deviation * deviation;
  });
  sum_groups(G, width, sums, moments + 1);
}

template <typename T>
inline void group_statistics(const NormSiluForward& p, const NormChunks& chunks) {
  const int64_t G = p.in.groups, width = p.in.C / G;
  float* moments = thread_scratch(kNormSumsSlot, chunks.total * G * 2);
  over_chunks(without_dropout(p.in), chunks, [&](const NormChunk& chunk, int64_t i) {
    chunk_moments<T>(p.in, chunk, thread_scratch(kNormMaskSlot, 2 * p.in.C), moments + i * G * 2);
  });
  for (int64_t b = 0; b < p.in.B; ++b) {
    merge_moments(moments + b * chunks.per_sample * G * 2, G, width, chunks.rows, p.in.N, p.in.eps,
                  p.statistics + b * G * 2);
  }
}

// Means over groups [first, first + kCount) of a sample of z and z·x̂, z = g·slope, spread over their channels: (2, C).
template <int kCount>
DDPM_FAST_INLINE void group_means_from(const NormSiluArgs& p, const Affine& affine, const float* sums, int64_t chunks,
                                       int64_t first, float* means) {
  const int64_t C = p.C, width = C / p.groups;
  const double elements = static_cast<double>(width * p.N);
  double of_z[kCount] = {}, of_products[kCount] = {};
  for (int64_t k = 0; k < chunks; ++k) {
    for (int64_t from = first * width; from < (first + 1) * width; ++from) {
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        const int64_t c = from + i * width;
        const double slope = affine.scale ? affine.gain[c] * (1.0 + affine.scale[c]) : affine.gain[c];
        of_products[i] += slope * sums[k * 3 * C + c];
        of_z[i] += slope * sums[(k * 3 + 1) * C + c];
      }
    }
  }
  for (int i = 0; i < kCount; ++i) {
    float* to = means + (first + i) * width;
    spread_groups(1, width, to, [&](int64_t) { return static_cast<float>(of_z[i] / elements); });
    spread_groups(1, width, to + C, [&](int64_t) { return static_cast<float>(of_products[i] / elements); });
  }
}

// The means of all groups of a sample.
DDPM_FAST_NOINLINE void group_means(const NormSiluArgs& p, const Affine& affine, const float* sums, int64_t chunks,
                                    float* means) {
  over_groups(p.groups,
              [&](int64_t first, auto count) { group_means_from<count.value>(p, affine, sums, chunks, first, means); });
}

template <typename T>
void rms_forward(const NormSiluForward& p, const NormChunks& chunks) {
  const int64_t C = p.in.C;
  over_chunks(p.in, chunks, [&](const NormChunk& chunk, int64_t) {
    const T *x = chunk_of<T>(p.in.x, chunk), *residual = chunk_of<T>(p.residual, chunk);
    T* out = chunk_of<T>(p.out, chunk);
    float* norms = p.statistics + chunk.sample * p.in.N + chunk.first;
    // Up to 8 rows at a time: their norms are independent, and the rows stay in the first-level cache.
    const int64_t group = max<int64_t>(1, min<int64_t>(8, 1024 / C));
    for (int64_t first = 0; first < chunk.rows; first += group) {
      const int64_t last = min(chunk.rows, first + group);
      for (int64_t r = first; r < last; ++r) norms[r] = row_norm(x + r * C, p.in.bias, C);
      for (int64_t r = first; r < last; ++r) {
        rms_apply(x + r * C, norms[r], p.in.bias, chunk.affine, p.in.activation, residual ? residual + r * C : nullptr,
                  out + r * C, C, chunk.keep_row(r, C));
      }
    }
  });
}

template <typename T>
void group_forward(const NormSiluForward& p, const NormChunks& chunks) {
  const int64_t C = p.in.C;
  const bool activation = p.in.activation;
  group_statistics<T>(p, chunks);
  float* spread = thread_scratch(kNormSumsSlot, p.in.B * 2 * C);
  for (int64_t b = 0; b < p.in.B; ++b)
    spread_statistics(p.statistics + b * p.in.groups * 2, p.in.groups, C, spread + b * 2 * C);
  over_chunks(p.in, chunks, [&](const NormChunk& chunk, int64_t) {
    const T *x = chunk_of<T>(p.in.x, chunk), *residual = chunk_of<T>(p.residual, chunk);
    const float* mine = spread + chunk.sample * 2 * C;
    T* out = chunk_of<T>(p.out, chunk);
    over_pieces<kNormRows>(chunk.rows, C, [&](int64_t first, int64_t last, int64_t c, auto lanes) {
      const GroupNormed normed(p.in.bias, mine, C, c, lanes);
      const AffineAt affine(chunk.affine, c, lanes);
      for (int64_t r = first; r < last; ++r) {
        const vf y = affine(normed(lanes.get(x + r * C + c)));
        const T* added = residual ? residual + r * C : nullptr;
        lanes.put(out + r * C + c, after_norm(y, activation, chunk.keep_row(r, C), added, c, lanes));
      }
    });
  });
}

// The sums of a chunk, as sums of pieces of kRowsOfPiece rows; a chunk of one piece needs no second sums.
class ChunkSums {
 public:
  // Sums of chunk i of `count` rows.
  ChunkSums(const NormSiluBackward& p, float* sums, int64_t i, int64_t count)
      : chunk_(sums + i * 3 * p.in.C),
        piece_(count > kRowsOfPiece ? thread_scratch(kNormPieceSlot, 3 * p.in.C) : chunk_),
        C_(p.in.C) {
    const bool slopes = p.doffset || p.dshift || p.dscale;
    rows = {
        .products = piece_, .slopes = slopes ? piece_ + C_ : nullptr, .inputs = p.dbias ? piece_ + 2 * C_ : nullptr};
    clear(chunk_, 3 * C_);
    if (piece_ != chunk_) clear(piece_, 3 * C_);
  }

  // To be called after every row, by its number within the chunk.
  DDPM_FAST_INLINE void end_row(int64_t row) {
    if (row % kRowsOfPiece == kRowsOfPiece - 1) finish();
  }

  // To be called after the last row; adding a piece of zeros changes nothing.
  void finish() {
    if (piece_ == chunk_) return;
    over_channels(3 * C_, [&](int64_t c, auto lanes) {
      accumulate(chunk_, c, lanes, lanes.get(piece_ + c));
      lanes.put(piece_ + c, vf{});
    });
  }

  NormSums rows;  // where the rows of a piece add

 private:
  float *chunk_, *piece_;
  int64_t C_;
};

template <typename T>
void rms_backward(const NormSiluBackward& p, const NormChunks& chunks, float* sums) {
  const int64_t C = p.in.C;
  over_chunks(p.in, chunks, [&](const NormChunk& chunk, int64_t i) {
    ChunkSums mine(p, sums, i, chunk.rows);
    const T *x = chunk_of<T>(p.in.x, chunk), *grad = chunk_of<T>(p.grad, chunk);
    const float* norms = p.statistics + chunk.sample * p.in.N + chunk.first;
    T* dx = chunk_of<T>(p.dx, chunk);
    float* z = thread_scratch(kNormRowSlot, C);
    for (int64_t r = 0; r < chunk.rows; ++r) {
      rms_row_backward(grad + r * C, p.in.activation, x + r * C, norms[r], p.in.bias, chunk.affine.gain,
                       chunk.affine.scale, chunk.affine.shift, z, dx + r * C, mine.rows, C, chunk.keep_row(r, C));
      mine.end_row(r);
    }
    mine.finish();
  });
}

template <typename T>
void group_backward(const NormSiluBackward& p, const NormChunks& chunks, float* sums, float* spread) {
  const int64_t C = p.in.C;
  const bool activation = p.in.activation;
  float* means = spread + p.in.B * 2 * C;
  for (int64_t b = 0; b < p.in.B; ++b)
    spread_statistics(p.statistics + b * p.in.groups * 2, p.in.groups, C, spread + b * 2 * C);
  float* const all_z = p.in.type == MapType::kFloat ? static_cast<float*>(p.dx) : p.z;
  over_chunks(p.in, chunks, [&](const NormChunk& chunk, int64_t i) {
    const T *x = chunk_of<T>(p.in.x, chunk), *grad = chunk_of<T>(p.grad, chunk);
    float *z = all_z + chunk.begin, *mine = sums + i * 3 * C;
    clear(mine + 2 * C, C);
    over_pieces<kRowsOfPiece>(chunk.rows, C, [&](int64_t first, int64_t last, int64_t c, auto lanes) {
      const GroupNormed normed(p.in.bias, spread + chunk.sample * 2 * C, C, c, lanes);
      const AffineAt affine(chunk.affine, c, lanes);
      const vf slope = affine.slope();
      vf products = {}, slopes = {};
      for (int64_t r = first; r < last; ++r) {
        const vf n = normed(lanes.get(x + r * C + c));
        const vf g = before_activation(grad + r * C, activation, chunk.keep_row(r, C), affine, n, c, lanes);
        products += g * n;
        slopes += g;
        lanes.put(z + r * C + c, g * slope);  // which is read again below
      }
      add_piece(mine, first, c, lanes, products);
      add_piece(mine + C, first, c, lanes, slopes);
    });
  });
  for (int64_t b = 0; b < p.in.B; ++b) {
    const Affine affine{
        .gain = p.in.gain, .offset = p.in.offset, .scale = p.in.scale ? p.in.scale + b * C : nullptr, .shift = nullptr};
    group_means(p.in, affine, sums + b * chunks.per_sample * 3 * C, chunks.per_sample, means + b * 2 * C);
  }
  over_chunks(without_dropout(p.in), chunks, [&](const NormChunk& chunk, int64_t i) {
    const T* x = chunk_of<T>(p.in.x, chunk);
    T* dx = chunk_of<T>(p.dx, chunk);
    const float *z = all_z + chunk.begin, *mean = means + chunk.sample * 2 * C;
    float* inputs = sums + (i * 3 + 2) * C;
    over_pieces<kRowsOfPiece>(chunk.rows, C, [&](int64_t first, int64_t last, int64_t c, auto lanes) {
      const GroupNormed normed(p.in.bias, spread + chunk.sample * 2 * C, C, c, lanes);
      const vf mean_z = lanes.get(mean + c), mean_product = lanes.get(mean + C + c);
      vf sum = {};
      for (int64_t r = first; r < last; ++r) {
        const vf n = normed(lanes.get(x + r * C + c));
        const vf d = group_gradient(lanes.get(z + r * C + c), n, mean_z, mean_product, normed.rstd);
        sum += d;
        lanes.put(dx + r * C + c, d);
      }
      if (p.dbias) add_piece(inputs, first, c, lanes, sum);
    });
  });
}

// The gradients of the rows from the chunks' sums, see NormSums.
inline void finish_sums(const NormSiluBackward& p, int64_t chunks, const float* sums) {
  const int64_t C = p.in.C;
  const auto of_channels = [&](int64_t c, auto lanes) {
    KahanSum gain, offset, bias;
    for (int64_t b = 0; b < p.in.B; ++b) {
      KahanSum all_products, all_slopes, all_inputs;
      for (int64_t k = b * chunks; k < (b + 1) * chunks; ++k) {
        all_products.add(lanes.get(sums + k * 3 * C + c));
        all_slopes.add(lanes.get(sums + (k * 3 + 1) * C + c));
        all_inputs.add(lanes.get(sums + (k * 3 + 2) * C + c));
      }
      const vf products = all_products.sum, slopes = all_slopes.sum, inputs = all_inputs.sum;
      if (p.dshift) lanes.put(p.dshift + b * C + c, slopes);
      if (p.dscale) {
        const vf added = p.in.offset ? lanes.get(p.in.offset + c) : vf{};
        lanes.put(p.dscale + b * C + c, products * lanes.get(p.in.gain + c) + slopes * added);
      }
      const vf factor = p.in.scale ? splat(1.0f) + lanes.get(p.in.scale + b * C + c) : splat(1.0f);
      gain.add(products * factor);
      offset.add(slopes * factor);
      bias.add(inputs);
    }
    if (p.dgain) lanes.put(p.dgain + c, gain.sum);
    if (p.doffset) lanes.put(p.doffset + c, offset.sum);
    if (p.dbias) lanes.put(p.dbias + c, bias.sum);
  };
  const int64_t grain = max<int64_t>(1, kNormPiece / (p.in.B * chunks * 3 * kLanes));
  parallel(ceil_div(C, kLanes), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = i * kLanes;
      if (c + kLanes <= C) {
        of_channels(c, Whole{});
      } else {
        of_channels(c, Part{C - c});
      }
    }
  });
}

// body(an element of the type).
template <typename Body>
inline void with_element(MapType type, const Body& body) {
  if (type == MapType::kFloat) {
    body(float{});
  } else if (type == MapType::kHalf) {
    body(Half{});
  } else {
    body(Bfloat16{});
  }
}

inline void norm_silu_forward(const NormSiluForward& p) {
  if (p.in.B * p.in.N * p.in.C == 0) return;
  const NormChunks chunks(p.in.B, p.in.N, p.in.C);
  with_element(p.in.type, [&](auto element) {
    using T = decltype(element);
    p.in.groups ? group_forward<T>(p, chunks) : rms_forward<T>(p, chunks);
  });
}

inline void norm_silu_backward(const NormSiluBackward& p) {
  if (p.in.B * p.in.N * p.in.C == 0) return;
  const NormChunks chunks(p.in.B, p.in.N, p.in.C);
  const int64_t of_chunks = chunks.total * 3 * p.in.C;
  float* sums = thread_scratch(kNormSumsSlot, of_chunks + p.in.B * 4 * p.in.C);
  with_element(p.in.type, [&](auto element) {
    using T = decltype(element);
    if (p.in.groups) {
      group_backward<T>(p, chunks, sums, sums + of_chunks);
    } else {
      rms_backward<T>(p, chunks, sums);
    }
  });
  finish_sums(p, chunks.per_sample, sums);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
