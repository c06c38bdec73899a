// GroupNorm, affine map, SiLU and dropout of one map or two side by side, and their gradients; norm_silu-inl.h has the
// formulas. With d = v − mean everything after the mean is one multiplication and one addition,
//
//   y = d·a + b     a = rstd·gain·(1 + scale)     b = offset·(1 + scale) + shift
//   dx = g·a − d·rstd²·mean(z·x̂) − rstd·mean(z)   g: the gradient at y, z = g·gain·(1 + scale)
//
// Sums over pixels are sums of chunks, added in the order of chunks and samples, so they do not depend on the threads.
#pragma once

#include "joined_norm.h"
#include "norm_silu-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr int64_t kJoinedChunk = 16384;  // elements of a chunk, about
constexpr int64_t kJoinedTask = 16384;   // elements that are worth a thread
constexpr int kJoinedRowsSlot = 7;       // of thread_scratch

struct JoinedChunks {
  int64_t C, rows, per_sample, total, grain;

  explicit JoinedChunks(const JoinedNormArgs& p) {
    C = p.channels[0] + p.channels[1];
    rows = max<int64_t>(1, min(p.N, max(kRowsOfPiece, kJoinedChunk / C / kRowsOfPiece * kRowsOfPiece)));
    per_sample = ceil_div(p.N, rows);
    total = p.B * per_sample;
    grain = max<int64_t>(1, kJoinedTask / (rows * C));
  }
};

struct JoinedChunk {
  int64_t sample, first, rows;

  JoinedChunk(const JoinedNormArgs& p, const JoinedChunks& chunks, int64_t index) {
    sample = index / chunks.per_sample;
    first = index % chunks.per_sample * chunks.rows;
    rows = min(chunks.rows, p.N - first);
  }
  int64_t pixel(const JoinedNormArgs& p, int64_t row) const { return sample * p.N + first + row; }
  const float* keep(const JoinedNormArgs& p, int64_t C) const {
    return p.dropout.keep_threshold ? fill_keep(p.dropout, sample, first, rows, p.N, C) : nullptr;
  }
};

template <typename Body>
inline void over_joined_chunks(const JoinedNormArgs& p, const JoinedChunks& chunks, const Body& body) {
  parallel(chunks.total, chunks.grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(JoinedChunk(p, chunks, i), i);
  });
}

// Runs steps 0 to steps - 1 in their order: of_sample(step, b) for every sample, then of_chunk(step, chunk, i) for
// every chunk. Where every thread gets as many samples, it takes whole ones through all steps: none waits for another,
// or reads what another wrote. The results are the same.
template <typename OfChunk, typename OfSample>
inline void over_joined_samples(const JoinedNormArgs& p, const JoinedChunks& chunks, int steps, const OfChunk& of_chunk,
                                const OfSample& of_sample) {
  if (p.B % thread_count() == 0) {
    return parallel(p.B, max<int64_t>(1, chunks.grain / chunks.per_sample), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        for (int step = 0; step < steps; ++step) {
          of_sample(step, b);
          for (int64_t i = b * chunks.per_sample; i < (b + 1) * chunks.per_sample; ++i) {
            of_chunk(step, JoinedChunk(p, chunks, i), i);
          }
        }
      }
    });
  }
  for (int step = 0; step < steps; ++step) {
    for (int64_t b = 0; b < p.B; ++b) of_sample(step, b);
    over_joined_chunks(p, chunks, [&](const JoinedChunk& chunk, int64_t i) { of_chunk(step, chunk, i); });
  }
}

// body(part, the part's channel, channel of all, lanes) for every vector of both parts, or of channels [from, to) of
// all.
template <typename Body>
DDPM_FAST_INLINE void over_parts(const int64_t* channels, const Body& body) {
  over_channels(channels[0], [&](int64_t c, auto lanes) { body(0, c, c, lanes); });
  over_channels(channels[1], [&](int64_t c, auto lanes) { body(1, c, channels[0] + c, lanes); });
}
template <typename Body>
DDPM_FAST_INLINE void over_parts(const int64_t* channels, int64_t from, int64_t to, const Body& body) {
  int64_t before = 0;
  for (int part = 0; part < 2; before += channels[part++]) {
    const int64_t first = max<int64_t>(0, from - before), last = min(to - before, channels[part]);
    over_channels(last - first, [&](int64_t c, auto lanes) { body(part, first + c, before + first + c, lanes); });
  }
}

// What is added to the sums over a chunk's rows at once; 16 rows are a partial sum of their own.
constexpr int64_t kRowsAtOnce = 4;

// Rows of C floats that are asked for before they are read.
constexpr int64_t kFloatsAhead = 2048;
DDPM_FAST_INLINE int64_t rows_ahead(int64_t C) { return ceil_div(kFloatsAhead, C); }

// Mean and sum of squared deviations of every group of channels [begin, end) in a chunk, moments (groups, 2), by sums
// of v − (v of the chunk's first pixel); buffer: (4, end − begin).
DDPM_FAST_NOINLINE void joined_moments(const JoinedNormArgs& p, const JoinedChunk& chunk, int64_t begin, int64_t end,
                                       float* buffer, float* moments) {
  const int64_t C = end - begin;
  float *sums = buffer, *squares = buffer + C, *piece = buffer + 2 * C, *piece_squares = buffer + 3 * C;
  const float* x[2] = {p.x[0] + chunk.pixel(p, 0) * p.channels[0],
                       p.channels[1] ? p.x[1] + chunk.pixel(p, 0) * p.channels[1] : nullptr};
  clear(sums, 4 * C);
  const int64_t ahead = rows_ahead(C);
  const auto add = [&](int64_t from, int64_t rows) DDPM_FAST_LAMBDA {
    over_parts(p.channels, begin, end, [&](int part, int64_t c, int64_t k, auto lanes) DDPM_FAST_LAMBDA {
      const vf origin = lanes.get(x[part] + c);
      vf sum = {}, square = {};
      for (int64_t r = 0; r < rows; ++r) {
        const float* at = x[part] + (from + r) * p.channels[part] + c;
        prefetch(at + ahead * p.channels[part], 1);
        const vf d = lanes.get(at) - origin;
        sum += d;
        square = d * d + square;
      }
      accumulate(piece, k - begin, lanes, sum);
      accumulate(piece_squares, k - begin, lanes, square);
    });
  };
  for (int64_t r = 0; r < chunk.rows; r += kRowsAtOnce) {
    if (r + kRowsAtOnce <= chunk.rows) {
      add(r, kRowsAtOnce);
    } else {
      add(r, chunk.rows - r);
    }
    if ((r + kRowsAtOnce) % kRowsOfPiece != 0 && r + kRowsAtOnce < chunk.rows) continue;
    over_channels(2 * C, [&](int64_t c, auto lanes) {
      accumulate(sums, c, lanes, lanes.get(piece + c));
      lanes.put(piece + c, vf{});
    });
  }
  const int64_t width = (p.channels[0] + p.channels[1]) / p.groups;
  const float rows = static_cast<float>(chunk.rows);
  // Each channel's mean and sum of squared deviations, then those of a group from its channels'.
  over_parts(p.channels, begin, end, [&](int part, int64_t c, int64_t k, auto lanes) {
    const int64_t n = k - begin;
    const vf sum = lanes.get(sums + n), mean = sum / splat(rows);
    lanes.put(squares + n, vmax(lanes.get(squares + n) - sum * mean, vf{}));
    lanes.put(sums + n, lanes.get(x[part] + c) + mean);
  });
  moments += begin / width * 2;
  over_groups(C / width, [&](int64_t first, auto count) {
    float mean[count.value] = {}, apart[count.value] = {}, within[count.value] = {};
    const auto add = [&](const auto& term) DDPM_FAST_LAMBDA {
      for (int64_t c = 0; c < width; ++c) {
#pragma GCC unroll 4
        for (int i = 0; i < count.value; ++i) term(i, (first + i) * width + c);
      }
    };
    add([&](int i, int64_t c) DDPM_FAST_LAMBDA { mean[i] += sums[c]; });
    for (float& of_group : mean) of_group /= static_cast<float>(width);
    add([&](int i, int64_t c) DDPM_FAST_LAMBDA {
      apart[i] += (sums[c] - mean[i]) * (sums[c] - mean[i]);
      within[i] += squares[c];
    });
    for (int i = 0; i < count.value; ++i) {
      moments[2 * (first + i)] = mean[i];
      moments[2 * (first + i) + 1] = within[i] + apart[i] * rows;
    }
  });
}

// Rows of a sample, (kJoinedRows, C): mean, a and b of the formulas above, and rstd, rstd·mean(z), rstd²·mean(z·x̂).
enum JoinedRow { kRowMean, kRowA, kRowB, kRowRstd, kRowMeanZ, kRowMeanZx, kJoinedRows };

// Those of sample b from its statistics.
inline void fill_joined_rows(const JoinedNormArgs& p, const float* statistics, int64_t C, int64_t b, float* rows) {
  statistics += 2 * b * p.groups;
  spread_groups(p.groups, C, rows + kRowMean * C, [&](int64_t g) { return statistics[2 * g]; });
  spread_groups(p.groups, C, rows + kRowRstd * C, [&](int64_t g) { return statistics[2 * g + 1]; });
  over_channels(C, [&](int64_t c, auto lanes) {
    const vf factor = p.scale ? splat(1.0f) + lanes.get(p.scale + b * C + c) : splat(1.0f);
    const vf shift = p.shift ? lanes.get(p.shift + b * C + c) : vf{};
    lanes.put(rows + kRowA * C + c, lanes.get(rows + kRowRstd * C + c) * (lanes.get(p.gain + c) * factor));
    lanes.put(rows + kRowB * C + c, lanes.get(p.offset + c) * factor + shift);
  });
}

// y of a vector of channels from k on; `at`: its inputs.
template <typename Lanes>
DDPM_FAST_INLINE vf joined_affine(const float* at, const float* rows, int64_t C, int64_t k, Lanes lanes) {
  const vf d = lanes.get(at) - lanes.get(rows + k);
  return d * lanes.get(rows + kRowA * C + k) + lanes.get(rows + kRowB * C + k);
}

// One chunk of the output.
inline void joined_normalise(const JoinedNormForward& p, const JoinedChunk& chunk, int64_t C, const float* rows) {
  const float *keep = chunk.keep(p.in, C), *no_residual = nullptr;
  const int64_t ahead = rows_ahead(C);
  for (int64_t r = 0; r < chunk.rows; ++r) {
    const int64_t pixel = chunk.pixel(p.in, r);
    over_parts(p.in.channels, [&](int part, int64_t c, int64_t k, auto lanes) DDPM_FAST_LAMBDA {
      const float* at = p.in.x[part] + pixel * p.in.channels[part] + c;
      prefetch(at + ahead * p.in.channels[part], 1);
      prefetch_to_write(p.out + (pixel + ahead) * C + k, 1);
      const vf y = joined_affine(at, rows, C, k, lanes);
      lanes.put(p.out + pixel * C + k, after_norm(y, true, keep ? keep + r * C : nullptr, no_residual, k, lanes));
    });
  }
}

// Channels [from, to) of one sample's output, without dropout, to rows of `stride` floats.
inline void joined_normalise_channels(const JoinedNormArgs& p, int64_t sample, int64_t from, int64_t to,
                                      const float* rows, float* out, int64_t stride) {
  const int64_t C = p.channels[0] + p.channels[1], ahead = rows_ahead(to - from);
  const float* none = nullptr;
  for (int64_t n = 0; n < p.N; ++n, out += stride) {
    over_parts(p.channels, from, to, [&](int part, int64_t c, int64_t k, auto lanes) DDPM_FAST_LAMBDA {
      const float* at = p.x[part] + (sample * p.N + n) * p.channels[part] + c;
      prefetch(at + ahead * p.channels[part], 1);
      lanes.put(out + k - from, after_norm(joined_affine(at, rows, C, k, lanes), true, none, none, k, lanes));
    });
  }
}

// The statistics of samples [first, last), on the calling thread.
inline void joined_statistics(const JoinedNormForward& p, int64_t first, int64_t last) {
  const JoinedChunks chunks(p.in);
  const int64_t C = chunks.C, G = p.in.groups;
  float *buffer = thread_scratch(kNormSumsSlot, 4 * C + chunks.per_sample * G * 2), *moments = buffer + 4 * C;
  for (int64_t b = first; b < last; ++b) {
    for (int64_t i = 0; i < chunks.per_sample; ++i) {
      joined_moments(p.in, JoinedChunk(p.in, chunks, b * chunks.per_sample + i), 0, C, buffer, moments + i * G * 2);
    }
    merge_moments(moments, G, C / G, chunks.rows, p.in.N, p.eps, p.statistics + b * G * 2);
  }
}

// The same in two steps: moments, (B, chunks, groups, 2), of channels [begin, end), whole groups, of samples [first,
// last), and then, of all channels, the statistics.
inline void joined_moments_of(const JoinedNormForward& p, int64_t first, int64_t last, int64_t begin, int64_t end,
                              float* moments) {
  const JoinedChunks chunks(p.in);
  float buffer[4 * 2 * kLanes];
  for (int64_t i = first * chunks.per_sample; i < last * chunks.per_sample; ++i) {
    joined_moments(p.in, JoinedChunk(p.in, chunks, i), begin, end, buffer, moments + i * p.in.groups * 2);
  }
}
inline void merge_joined_moments(const JoinedNormForward& p, int64_t first, int64_t last, const float* moments) {
  const JoinedChunks chunks(p.in);
  const int64_t G = p.in.groups;
  for (int64_t b = first; b < last; ++b) {
    merge_moments(moments + b * chunks.per_sample * G * 2, G, chunks.C / G, chunks.rows, p.in.N, p.eps,
                  p.statistics + b * G * 2);
  }
}

inline void joined_norm_forward(const JoinedNormForward& p) {
  const JoinedChunks chunks(p.in);
  const int64_t C = chunks.C, G = p.in.groups, steps = p.known ? 1 : 2;
  float* moments = thread_scratch(kNormSumsSlot, chunks.total * G * 2);
  float* rows = thread_scratch(kJoinedRowsSlot, p.in.B * kJoinedRows * C);
  const auto of_sample = [&](int step, int64_t b) {
    if (step < steps - 1) return;
    if (!p.known) {
      merge_moments(moments + b * chunks.per_sample * G * 2, G, C / G, chunks.rows, p.in.N, p.eps,
                    p.statistics + b * G * 2);
    }
    fill_joined_rows(p.in, p.statistics, C, b, rows + b * kJoinedRows * C);
  };
  over_joined_samples(
      p.in, chunks, steps,
      [&](int step, const JoinedChunk& chunk, int64_t i) {
        if (step < steps - 1) {
          joined_moments(p.in, chunk, 0, C, thread_scratch(kNormPieceSlot, 4 * C), moments + i * G * 2);
        } else {
          joined_normalise(p, chunk, C, rows + chunk.sample * kJoinedRows * C);
        }
      },
      of_sample);
}

// Sums over a chunk's rows of `count` quantities per channel: (count, C), in pieces of kRowsOfPiece rows.
class JoinedSums {
 public:
  JoinedSums(float* chunk, int64_t count, int64_t C)
      : piece(thread_scratch(kNormPieceSlot, count * C)), chunk_(chunk), floats_(count * C) {
    clear(chunk_, floats_);
    clear(piece, floats_);
  }
  DDPM_FAST_INLINE void end_row(int64_t row) {
    if (row % kRowsOfPiece == kRowsOfPiece - 1) finish();
  }
  void finish() {
    over_channels(floats_, [&](int64_t c, auto lanes) {
      accumulate(chunk_, c, lanes, lanes.get(piece + c));
      lanes.put(piece + c, vf{});
    });
  }

  float* piece;  // where the rows of a piece add

 private:
  float* chunk_;
  int64_t floats_;
};

// Sums of a sample, (floats), from those of its chunks.
inline void sum_chunks(const float* sums, int64_t chunks, int64_t floats, float* totals) {
  over_channels(floats, [&](int64_t c, auto lanes) {
    KahanSum sum;
    for (int64_t k = 0; k < chunks; ++k) sum.add(lanes.get(sums + k * floats + c));
    lanes.put(totals + c, sum.sum);
  });
}

// rstd·mean(z) and rstd²·mean(z·x̂) of a sample's groups, from its Σ g and Σ g·d.
inline void fill_joined_means(const JoinedNormArgs& p, const float* totals, int64_t C, float* rows) {
  const int64_t width = C / p.groups;
  const double count = static_cast<double>(width * p.N);
  for (int64_t g = 0; g < p.groups; ++g) {
    double of_z = 0, of_products = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      of_z += static_cast<double>(rows[kRowA * C + c]) * totals[c];
      of_products += static_cast<double>(rows[kRowA * C + c]) * totals[C + c];
    }
    const double rstd = rows[kRowRstd * C + g * width];
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      rows[kRowMeanZ * C + c] = static_cast<float>(of_z / count);
      rows[kRowMeanZx * C + c] = static_cast<float>(of_products * rstd * rstd / count);
    }
  }
}

// The gradients of the parameters from the samples' Σ g and Σ g·d.
inline void finish_joined(const JoinedNormBackward& p, const float* totals, int64_t C, const float* rows) {
  over_channels(C, [&](int64_t c, auto lanes) {
    KahanSum gain, offset;
    for (int64_t b = 0; b < p.in.B; ++b) {
      const vf slopes = lanes.get(totals + b * 2 * C + c);
      const vf products =
          lanes.get(totals + (b * 2 + 1) * C + c) * lanes.get(rows + (b * kJoinedRows + kRowRstd) * C + c);
      if (p.dshift) lanes.put(p.dshift + b * C + c, slopes);
      if (p.dscale) {
        lanes.put(p.dscale + b * C + c, products * lanes.get(p.in.gain + c) + slopes * lanes.get(p.in.offset + c));
      }
      const vf factor = p.in.scale ? splat(1.0f) + lanes.get(p.in.scale + b * C + c) : splat(1.0f);
      gain.add(products * factor);
      offset.add(slopes * factor);
    }
    lanes.put(p.dgain + c, gain.sum);
    lanes.put(p.doffset + c, offset.sum);
  });
}

// The gradient at y of one chunk, in place, and the chunk's Σ g and Σ g·d.
inline void joined_gate(const JoinedNormBackward& p, const JoinedChunk& chunk, int64_t C, const float* rows,
                        float* sums) {
  const float* keep = chunk.keep(p.in, C);
  JoinedSums mine(sums, 2, C);
  for (int64_t r = 0; r < chunk.rows; ++r) {
    const int64_t pixel = chunk.pixel(p.in, r);
    float* grad = p.grad + pixel * C;
    over_parts(p.in.channels, [&](int part, int64_t c, int64_t k, auto lanes) DDPM_FAST_LAMBDA {
      const vf d = lanes.get(p.in.x[part] + pixel * p.in.channels[part] + c) - lanes.get(rows + k);
      const vf y = d * lanes.get(rows + kRowA * C + k) + lanes.get(rows + kRowB * C + k), gate = silu_gate(y);
      vf g = lanes.get(grad + k);
      if (keep) {
        const vf factor = lanes.get(keep + r * C + k);
        g = select(factor == vf{}, vf{}, g * factor);
      }
      g *= gate * (y * (splat(1.0f) - gate) + splat(1.0f));
      accumulate(mine.piece, k, lanes, g);
      accumulate(mine.piece + C, k, lanes, g * d);
      lanes.put(grad + k, g);
    });
    mine.end_row(r);
  }
  mine.finish();
}

// The gradients of one chunk's inputs, and of their sum over its pixels where `sums` is not null.
inline void joined_input_gradients(const JoinedNormBackward& p, const JoinedChunk& chunk, int64_t C, const float* rows,
                                   float* sums) {
  const auto pass = [&](float* of_inputs, const auto& end_row) DDPM_FAST_LAMBDA {
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const int64_t pixel = chunk.pixel(p.in, r);
      over_parts(p.in.channels, [&](int part, int64_t c, int64_t k, auto lanes) DDPM_FAST_LAMBDA {
        const int64_t at = pixel * p.in.channels[part] + c;
        const vf d = lanes.get(p.in.x[part] + at) - lanes.get(rows + k);
        vf dx = lanes.get(p.grad + pixel * C + k) * lanes.get(rows + kRowA * C + k);
        dx -= lanes.get(rows + kRowMeanZ * C + k) + d * lanes.get(rows + kRowMeanZx * C + k);
        if (of_inputs) accumulate(of_inputs, k, lanes, dx);
        if (p.added[part]) dx += lanes.get(p.added[part] + at);
        if (p.dx[part]) lanes.put(p.dx[part] + at, dx);
      });
      end_row(r);
    }
  };
  if (sums == nullptr) return pass(nullptr, [](int64_t) {});
  JoinedSums mine(sums, 1, C);
  pass(mine.piece, [&](int64_t r) { mine.end_row(r); });
  mine.finish();
}

inline void joined_norm_backward(const JoinedNormBackward& p) {
  const JoinedChunks chunks(p.in);
  const int64_t C = chunks.C, B = p.in.B, of_chunks = chunks.total * 2 * C;
  float* all_rows = thread_scratch(kJoinedRowsSlot, B * kJoinedRows * C);
  float* sums = thread_scratch(kNormSumsSlot, of_chunks + B * 2 * C);
  float* totals = sums + of_chunks;
  const bool of_inputs = p.dx[0] != nullptr || p.dx[1] != nullptr || p.sums != nullptr;
  enum { kGate, kInputs, kSums, kSteps };
  over_joined_samples(
      p.in, chunks, kSteps,
      [&](int step, const JoinedChunk& chunk, int64_t i) {
        const float* rows = all_rows + chunk.sample * kJoinedRows * C;
        if (step == kGate) joined_gate(p, chunk, C, rows, sums + i * 2 * C);
        if (step == kInputs && of_inputs) {
          // a sample's side by side
          float* to = sums + (i + chunk.sample * chunks.per_sample) * C;
          joined_input_gradients(p, chunk, C, rows, p.sums == nullptr ? nullptr : to);
        }
      },
      [&](int step, int64_t b) {
        float* rows = all_rows + b * kJoinedRows * C;
        const float* of_sample = sums + b * chunks.per_sample * 2 * C;
        if (step == kGate) fill_joined_rows(p.in, p.statistics, C, b, rows);
        if (step == kInputs) {
          sum_chunks(of_sample, chunks.per_sample, 2 * C, totals + b * 2 * C);
          fill_joined_means(p.in, totals + b * 2 * C, C, rows);
        }
        if (step == kSums && p.sums != nullptr) {
          sum_chunks(of_sample, chunks.per_sample, C, p.sums + b * C);
        }
      });
  finish_joined(p, totals, C, all_rows);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
