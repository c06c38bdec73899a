// RMSNorm and GroupNorm with bias, scale and shift, SiLU, dropout and residual, and their gradients.
//
//   v = x + bias;  x̂ = v·√C / max(‖v‖₂, 1e-12)  or  x̂ = (v − mean)·rstd;  y = (x̂·gain + offset)·(1 + scale) + shift
//   out = keep·SiLU(y) + residual
//
// Sums over pixels are sums of chunks, added in the order of chunks and samples, so they do not depend on the threads.
// norm_rows-inl.h has the functions of one row.
#pragma once

#include "convert-inl.h"
#include "core/philox.h"
#include "norm_rows-inl.h"
#include "norm_silu.h"
#include "parallel-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// Of thread_scratch; the maps' are for a chunk in float32 of maps that are not.
constexpr int kNormMaskSlot = 4, kNormSumsSlot = 5, kNormPieceSlot = 6, kNormXSlot = 1, kNormOtherSlot = 2,
              kNormOutSlot = 3;
constexpr int64_t kNormChunk = 4096;    // elements of a chunk, about; few, since a chunk's are summed plainly
constexpr int64_t kNormPiece = 16384;   // elements that are worth a thread
constexpr uint32_t kStreamDropout = 6;  // STREAM_DROPOUT of ddpm_fast/noise.py

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

// Dropout's factors of pixels [first, first + rows) of a sample, (rows, C): keep_scale where an element is kept and 0
// where not. Elements are counted in C, H, W order, four to a Philox block.
inline const float* fill_keep(const Dropout& dropout, int64_t sample, int64_t first, int64_t rows, int64_t N,
                              int64_t C) {
  float* mask = thread_scratch(kNormMaskSlot, rows * C);
  const NoiseIndex index{
      .key = philox_key(dropout.seed), .sample = static_cast<uint32_t>(sample), .step = 0, .stream = kStreamDropout};
  for (int64_t c = 0; c < C; ++c) {
    const int64_t begin = c * N + first, end = begin + rows;
    for (int64_t block = begin / 4; 4 * block < end; ++block) {
      const PhiloxWords four = philox4x32(philox_counter(index, static_cast<uint32_t>(block)), index.key);
      const uint32_t words[4] = {four.x0, four.x1, four.x2, four.x3};
      for (int i = 0; i < 4; ++i) {
        const int64_t element = 4 * block + i;
        if (element < begin || element >= end) continue;
        mask[(element - begin) * C + c] = words[i] >= dropout.keep_threshold ? dropout.keep_scale : 0.0f;
      }
    }
  }
  return mask;
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
    affine = {.gain = p.gain,
              .offset = p.offset,
              .scale = p.scale ? p.scale + sample * p.C : nullptr,
              .shift = p.shift ? p.shift + sample * p.C : nullptr};
    keep = p.dropout.keep_threshold ? fill_keep(p.dropout, sample, first, rows, p.N, p.C) : nullptr;
  }

  DDPM_FAST_INLINE const float* keep_row(int64_t row, int64_t C) const { return keep ? keep + row * C : nullptr; }
};

// For passes that do not read the mask.
inline NormSiluArgs without_dropout(NormSiluArgs in) {
  in.dropout.keep_threshold = 0;
  return in;
}

// A chunk of a map in float32: the map's own memory, or a copy in a slot of the thread.
inline const float* widened(const NormSiluArgs& p, const void* map, const NormChunk& chunk, int slot) {
  if (p.type == MapType::kFloat || map == nullptr) {
    return map == nullptr ? nullptr : static_cast<const float*>(map) + chunk.begin;
  }
  const uint16_t* from = static_cast<const uint16_t*>(map) + chunk.begin;
  float* to = thread_scratch(slot, chunk.rows * p.C);
  (p.type == MapType::kHalf ? convert::from_half : convert::from_bfloat16)(to, from, chunk.rows * p.C);
  return to;
}

// Where a chunk of a map is written in float32, before `narrow` rounds it into the map if that is of another type.
inline float* place_of(const NormSiluArgs& p, void* map, const NormChunk& chunk) {
  return p.type == MapType::kFloat ? static_cast<float*>(map) + chunk.begin
                                   : thread_scratch(kNormOutSlot, chunk.rows * p.C);
}
inline void narrow(const NormSiluArgs& p, const float* from, void* map, const NormChunk& chunk) {
  if (p.type == MapType::kFloat) return;
  uint16_t* to = static_cast<uint16_t*>(map) + chunk.begin;
  (p.type == MapType::kHalf ? convert::to_half : convert::to_bfloat16)(to, from, chunk.rows * p.C);
}

template <typename Body>
inline void over_chunks(const NormSiluArgs& p, const NormChunks& chunks, const Body& body) {
  parallel(chunks.total, chunks.grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(NormChunk(p, chunks, i), i);
  });
}

// ---- GroupNorm ----

// mean and 1/√(variance + eps) of the group of every channel: (2, C) from a sample's (groups, 2).
inline void spread_statistics(const float* statistics, int64_t groups, int64_t C, float* spread) {
  const int64_t width = C / groups;
  for (int64_t c = 0; c < C; ++c) {
    spread[c] = statistics[c / width * 2];
    spread[C + c] = statistics[c / width * 2 + 1];
  }
}

template <typename Lanes>
DDPM_FAST_INLINE vf group_normed(const float* v, const float* bias, const float* spread, int64_t C, int64_t c,
                                 Lanes lanes) {
  return (get_biased(v, bias, c, lanes) - lanes.get(spread + c)) * lanes.get(spread + C + c);
}

// Mean and sum of squared deviations of every group in a chunk, moments (groups, 2); buffer: (2, C).
inline void chunk_moments(const NormSiluArgs& p, const NormChunk& chunk, float* buffer, float* moments) {
  const float* x = widened(p, p.x, chunk, kNormXSlot);
  const int64_t C = p.C, width = C / p.groups;
  float *means = buffer, *sums = buffer + C;
  clear(sums, C);
  for (int64_t r = 0; r < chunk.rows; ++r) {
    over_channels(C,
                  [&](int64_t c, auto lanes) { accumulate(sums, c, lanes, get_biased(x + r * C, p.bias, c, lanes)); });
  }
  const float count = static_cast<float>(width * chunk.rows);
  for (int64_t g = 0; g < p.groups; ++g) {
    float sum = 0;
    for (int64_t c = 0; c < width; ++c) sum += sums[g * width + c];
    moments[2 * g] = sum / count;
    for (int64_t c = 0; c < width; ++c) means[g * width + c] = moments[2 * g];
  }
  clear(sums, C);
  for (int64_t r = 0; r < chunk.rows; ++r) {
    over_channels(C, [&](int64_t c, auto lanes) {
      const vf deviation = get_biased(x + r * C, p.bias, c, lanes) - lanes.get(means + c);
      accumulate(sums, c, lanes, deviation * deviation);
    });
  }
  for (int64_t g = 0; g < p.groups; ++g) {
    float sum = 0;
    for (int64_t c = 0; c < width; ++c) sum += sums[g * width + c];
    moments[2 * g + 1] = sum;
  }
}

// Moments of chunks put together (Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance").
inline void group_statistics(const NormSiluForward& p, const NormChunks& chunks) {
  const int64_t G = p.in.groups, width = p.in.C / G;
  float* moments = thread_scratch(kNormSumsSlot, chunks.total * G * 2);
  over_chunks(without_dropout(p.in), chunks, [&](const NormChunk& chunk, int64_t i) {
    chunk_moments(p.in, chunk, thread_scratch(kNormMaskSlot, 2 * p.in.C), moments + i * G * 2);
  });
  for (int64_t b = 0; b < p.in.B; ++b) {
    for (int64_t g = 0; g < G; ++g) {
      double count = 0, mean = 0, squares = 0;
      for (int64_t k = 0; k < chunks.per_sample; ++k) {
        const float* of_chunk = moments + ((b * chunks.per_sample + k) * G + g) * 2;
        const double added = static_cast<double>(width * min(chunks.rows, p.in.N - k * chunks.rows));
        const double difference = of_chunk[0] - mean;
        mean += difference * (added / (count + added));
        squares += of_chunk[1] + difference * difference * (count * added / (count + added));
        count += added;
      }
      float* to = p.statistics + (b * G + g) * 2;
      to[0] = static_cast<float>(mean);
      to[1] = static_cast<float>(1 / __builtin_sqrt(squares / count + static_cast<double>(p.in.eps)));
    }
  }
}

// Means over a sample's groups of z and z·x̂, z = g·slope, spread over the channels: (2, C).
inline void group_means(const NormSiluArgs& p, const Affine& affine, const float* sums, int64_t chunks, float* means) {
  const int64_t C = p.C, width = C / p.groups;
  const double count = static_cast<double>(width * p.N);
  for (int64_t g = 0; g < p.groups; ++g) {
    double of_z = 0, of_products = 0;
    for (int64_t k = 0; k < chunks; ++k) {
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        const double slope = affine.scale ? affine.gain[c] * (1.0 + affine.scale[c]) : affine.gain[c];
        of_products += slope * sums[k * 3 * C + c];
        of_z += slope * sums[(k * 3 + 1) * C + c];
      }
    }
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      means[c] = static_cast<float>(of_z / count);
      means[C + c] = static_cast<float>(of_products / count);
    }
  }
}

// ---- the kernels ----

template <bool kActivation>
void rms_forward(const NormSiluForward& p, const NormChunks& chunks) {
  const int64_t C = p.in.C;
  over_chunks(p.in, chunks, [&](const NormChunk& chunk, int64_t) {
    const float *x = widened(p.in, p.in.x, chunk, kNormXSlot),
                *residual = widened(p.in, p.residual, chunk, kNormOtherSlot);
    float *out = place_of(p.in, p.out, chunk), *norms = p.statistics + chunk.sample * p.in.N + chunk.first;
    // Up to 8 rows at a time: their norms are independent, and the rows stay in the first-level cache.
    const int64_t group = max<int64_t>(1, min<int64_t>(8, 1024 / C));
    for (int64_t first = 0; first < chunk.rows; first += group) {
      const int64_t last = min(chunk.rows, first + group);
      for (int64_t r = first; r < last; ++r) norms[r] = row_norm(x + r * C, p.in.bias, C);
      for (int64_t r = first; r < last; ++r) {
        rms_apply<kActivation>(x + r * C, norms[r], p.in.bias, chunk.affine, residual ? residual + r * C : nullptr,
                               out + r * C, C, chunk.keep_row(r, C));
      }
    }
    narrow(p.in, out, p.out, chunk);
  });
}

template <bool kActivation>
void group_forward(const NormSiluForward& p, const NormChunks& chunks) {
  const int64_t C = p.in.C;
  group_statistics(p, chunks);
  float* spread = thread_scratch(kNormSumsSlot, p.in.B * 2 * C);
  for (int64_t b = 0; b < p.in.B; ++b)
    spread_statistics(p.statistics + b * p.in.groups * 2, p.in.groups, C, spread + b * 2 * C);
  over_chunks(p.in, chunks, [&](const NormChunk& chunk, int64_t) {
    const float *mine = spread + chunk.sample * 2 * C, *x = widened(p.in, p.in.x, chunk, kNormXSlot),
                *residual = widened(p.in, p.residual, chunk, kNormOtherSlot);
    float* out = place_of(p.in, p.out, chunk);
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const float* added = residual ? residual + r * C : nullptr;
      over_channels(C, [&](int64_t c, auto lanes) {
        const vf y = chunk.affine(group_normed(x + r * C, p.in.bias, mine, C, c, lanes), c, lanes);
        lanes.put(out + r * C + c, after_norm<kActivation>(y, chunk.keep_row(r, C), added, c, lanes));
      });
    }
    narrow(p.in, out, p.out, chunk);
  });
}

// The sums of a chunk, as sums of pieces of kRowsOfPiece rows; a chunk of one piece needs no second sums.
class ChunkSums {
 public:
  // Sums of chunk i of `count` rows, which go on from `sums` if they are `begun`, else from 0.
  ChunkSums(const NormSiluBackward& p, float* sums, int64_t i, int64_t count, bool begun = false)
      : chunk_(sums + i * 3 * p.in.C),
        piece_(count > kRowsOfPiece ? thread_scratch(kNormPieceSlot, 3 * p.in.C) : chunk_),
        C_(p.in.C) {
    const bool slopes = p.doffset || p.dshift || p.dscale || p.in.groups;
    rows = {
        .products = piece_, .slopes = slopes ? piece_ + C_ : nullptr, .inputs = p.dbias ? piece_ + 2 * C_ : nullptr};
    if (!begun) clear(chunk_, 3 * C_);
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

template <bool kActivation>
void rms_backward(const NormSiluBackward& p, const NormChunks& chunks, float* sums) {
  const int64_t C = p.in.C;
  over_chunks(p.in, chunks, [&](const NormChunk& chunk, int64_t i) {
    ChunkSums mine(p, sums, i, chunk.rows);
    const float *norms = p.statistics + chunk.sample * p.in.N + chunk.first,
                *x = widened(p.in, p.in.x, chunk, kNormXSlot), *grad = widened(p.in, p.grad, chunk, kNormOtherSlot);
    float* dx = place_of(p.in, p.dx, chunk);
    for (int64_t r = 0; r < chunk.rows; ++r) {
      rms_row_backward<kActivation>(grad + r * C, x + r * C, norms[r], p.in.bias, chunk.affine.gain, chunk.affine.scale,
                                    chunk.affine.shift, dx + r * C, mine.rows, C, chunk.keep_row(r, C));
      mine.end_row(r);
    }
    mine.finish();
    narrow(p.in, dx, p.dx, chunk);
  });
}

template <bool kActivation>
void group_backward(const NormSiluBackward& p, const NormChunks& chunks, float* sums, float* spread) {
  const int64_t C = p.in.C;
  float* means = spread + p.in.B * 2 * C;
  for (int64_t b = 0; b < p.in.B; ++b)
    spread_statistics(p.statistics + b * p.in.groups * 2, p.in.groups, C, spread + b * 2 * C);
  float* const all_z = p.in.type == MapType::kFloat ? static_cast<float*>(p.dx) : p.z;
  // body(row of the chunk, channel, lanes, x̂) for every vector.
  const auto over_rows = [&](const NormChunk& chunk, ChunkSums& mine, const auto& body) {
    const float* x = widened(p.in, p.in.x, chunk, kNormXSlot);
    for (int64_t r = 0; r < chunk.rows; ++r) {
      over_channels(C, [&](int64_t c, auto lanes) {
        body(r, c, lanes, group_normed(x + r * C, p.in.bias, spread + chunk.sample * 2 * C, C, c, lanes));
      });
      mine.end_row(r);
    }
    mine.finish();
  };
  over_chunks(p.in, chunks, [&](const NormChunk& chunk, int64_t i) {
    ChunkSums mine(p, sums, i, chunk.rows);
    const float* grad = widened(p.in, p.grad, chunk, kNormOtherSlot);
    float* z = all_z + chunk.begin;
    over_rows(chunk, mine, [&](int64_t r, int64_t c, auto lanes, vf normed) {
      const vf g = before_activation<kActivation>(grad + r * C, chunk.keep_row(r, C), chunk.affine, normed, c, lanes);
      accumulate(mine.rows.products, c, lanes, g * normed);
      accumulate(mine.rows.slopes, c, lanes, g);
      lanes.put(z + r * C + c, g * chunk.affine.slope(c, lanes));  // which is read again below
    });
  });
  for (int64_t b = 0; b < p.in.B; ++b) {
    const Affine affine{
        .gain = p.in.gain, .offset = p.in.offset, .scale = p.in.scale ? p.in.scale + b * C : nullptr, .shift = nullptr};
    group_means(p.in, affine, sums + b * chunks.per_sample * 3 * C, chunks.per_sample, means + b * 2 * C);
  }
  over_chunks(without_dropout(p.in), chunks, [&](const NormChunk& chunk, int64_t i) {
    ChunkSums mine(p, sums, i, chunk.rows, true);
    const float *rstd = spread + (chunk.sample * 2 + 1) * C, *mean = means + chunk.sample * 2 * C,
                *z = all_z + chunk.begin;
    float* dx = place_of(p.in, p.dx, chunk);
    over_rows(chunk, mine, [&](int64_t r, int64_t c, auto lanes, vf normed) {
      const vf centred = lanes.get(z + r * C + c) - lanes.get(mean + c) - normed * lanes.get(mean + C + c);
      const vf d = centred * lanes.get(rstd + c);
      if (mine.rows.inputs) accumulate(mine.rows.inputs, c, lanes, d);
      lanes.put(dx + r * C + c, d);
    });
    narrow(p.in, dx, p.dx, chunk);
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

inline void norm_silu_forward(const NormSiluForward& p) {
  if (p.in.B * p.in.N * p.in.C == 0) return;
  const NormChunks chunks(p.in.B, p.in.N, p.in.C);
  if (p.in.groups) {
    p.in.activation ? group_forward<true>(p, chunks) : group_forward<false>(p, chunks);
  } else {
    p.in.activation ? rms_forward<true>(p, chunks) : rms_forward<false>(p, chunks);
  }
}

inline void norm_silu_backward(const NormSiluBackward& p) {
  if (p.in.B * p.in.N * p.in.C == 0) return;
  const NormChunks chunks(p.in.B, p.in.N, p.in.C);
  const int64_t of_chunks = chunks.total * 3 * p.in.C;
  float* sums = thread_scratch(kNormSumsSlot, of_chunks + p.in.B * 4 * p.in.C);
  if (p.in.groups) {
    float* spread = sums + of_chunks;
    p.in.activation ? group_backward<true>(p, chunks, sums, spread) : group_backward<false>(p, chunks, sums, spread);
  } else {
    p.in.activation ? rms_backward<true>(p, chunks, sums) : rms_backward<false>(p, chunks, sums);
  }
  finish_sums(p, chunks.per_sample, sums);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
