// The norms of norm_silu-inl.h for maps (B, C, N), the pixels of a channel adjacent, as torch's contiguous images are:
// vectors lie along pixels, and y is linear in x̂ with one slope for a channel's.
//
// One thread computes a group of GroupNorm, or a block of pixels for RMSNorm, with what it keeps in the second-level
// cache. Half types are converted in runs of pixels, so that this code is compiled once for all types. Sums do not
// depend on the threads.
#pragma once

#include "norm_silu-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr int64_t kPlaneRun = kRowsOfPiece * kLanes;  // pixels of a run; its vectors are summed plainly

// Runs of a channel's pixels as float32 in the first-level cache.
struct PlaneRuns {
  float x[kPlaneRun], other[kPlaneRun], out[kPlaneRun];
};

// `count` pixels of a map from element `first` on: in place if they are float32, else in `buffer`; null for no map.
DDPM_FAST_NOINLINE const float* read_run(const void* map, MapType type, int64_t first, int64_t count, float* buffer) {
  if (!map) return nullptr;
  if (type == MapType::kFloat) return static_cast<const float*>(map) + first;
  const uint16_t* from = static_cast<const uint16_t*>(map) + first;
  type == MapType::kHalf ? convert::from_half(buffer, from, count) : convert::from_bfloat16(buffer, from, count);
  return buffer;
}

// Where such a run is computed, and then written by write_run.
DDPM_FAST_INLINE float* place_of_run(void* map, MapType type, int64_t first, float* buffer) {
  return type == MapType::kFloat ? static_cast<float*>(map) + first : buffer;
}
DDPM_FAST_NOINLINE void write_run(void* map, MapType type, int64_t first, int64_t count, const float* from) {
  if (type == MapType::kFloat) return;
  uint16_t* to = static_cast<uint16_t*>(map) + first;
  type == MapType::kHalf ? convert::to_half(to, from, count) : convert::to_bfloat16(to, from, count);
}

// body(first, count) for runs of N pixels.
template <typename Body>
DDPM_FAST_INLINE void over_runs(int64_t N, const Body& body) {
  for (int64_t first = 0; first < N; first += kPlaneRun) body(first, min(kPlaneRun, N - first));
}

// body(k, planes) for sets of adjacent channels [k, k + planes) whose pixels are read as one run: single ones where a
// channel is longer than half a run.
constexpr int64_t kPlanesOfRun = 16;
template <typename Body>
DDPM_FAST_INLINE void over_planes(int64_t channels, int64_t N, const Body& body) {
  const int64_t most = max<int64_t>(1, min(kPlanesOfRun, kPlaneRun / N));
  for (int64_t k = 0; k < channels; k += most) body(k, min(most, channels - k));
}

// Dropout's factors of pixels [first, first + count) of a channel.
DDPM_FAST_NOINLINE const float* make_keep_plane(const NormSiluArgs& p, int64_t sample, int64_t c, int64_t first,
                                                int64_t count) {
  float* mask = thread_scratch(kNormMaskSlot, count);
  fill_keep_run(p.dropout, sample, c * p.N + first, count, mask, 1);
  return mask;
}
// The same; null where there is no dropout.
DDPM_FAST_INLINE const float* fill_keep_plane(const NormSiluArgs& p, int64_t sample, int64_t c, int64_t first,
                                              int64_t count) {
  return p.dropout.keep_threshold ? make_keep_plane(p, sample, c, first, count) : nullptr;
}

// y = x̂·slope + added of a channel.
struct PlaneAffine {
  vf slope_of_channel, added;

  // How a channel's number is read for all its pixels.
  struct Same {
    DDPM_FAST_INLINE vf get(const float* from) const { return splat(*from); }
  };

  DDPM_FAST_INLINE PlaneAffine(const Affine& rows, int64_t c) {
    const AffineAt affine(rows, c, Same{});
    slope_of_channel = affine.slope();
    added = affine(vf{});
  }
  DDPM_FAST_INLINE vf operator()(vf normed) const { return normed * slope_of_channel + added; }
  DDPM_FAST_INLINE vf slope() const { return slope_of_channel; }
};

// The output of a channel's pixels from their x̂, which is at(n, lanes).
template <typename At>
DDPM_FAST_INLINE void finish_plane(const PlaneAffine& affine, bool activation, const float* keep, const float* residual,
                                   int64_t count, float* out, const At& at) {
  over_channels(count, [&](int64_t n, auto lanes) {
    lanes.put(out + n, after_norm(affine(at(n, lanes)), activation, keep, residual, n, lanes));
  });
}

// Σ g·x̂ and Σ g of a run, whose x̂ is at(n, lanes); each(n, lanes, x̂, g·slope) for all vectors.
struct RunSums {
  vf products = {}, slopes = {};
};
template <typename At, typename Each>
DDPM_FAST_INLINE RunSums gradients_of_run(const NormSiluBackward& p, const PlaneAffine& affine, const float* keep,
                                          const float* grad, int64_t count, const At& at, const Each& each) {
  RunSums sums;
  const bool activation = p.in.activation;
  over_channels(count, [&](int64_t n, auto lanes) {
    const vf normed = at(n, lanes), g = before_activation(grad, activation, keep, affine, normed, n, lanes);
    sums.products += lanes.only(g * normed);
    sums.slopes += lanes.only(g);
    each(n, lanes, normed, g * affine.slope());
  });
  return sums;
}

// ---- GroupNorm ----

// A group of a sample: its planes are adjacent.
struct GroupPlanes {
  int64_t sample, group, first_channel, channels, begin;  // begin: of its first element within the maps
  Affine affine;

  GroupPlanes(const NormSiluArgs& p, int64_t index)
      : sample(index / p.groups),
        group(index % p.groups),
        first_channel(group * (p.C / p.groups)),
        channels(p.C / p.groups),
        begin((sample * p.C + first_channel) * p.N),
        affine(affine_of(p, sample)) {}
};

template <typename Body>
inline void over_group_planes(const NormSiluArgs& p, const Body& body) {
  const int64_t grain = max<int64_t>(1, kNormPiece / (p.C / p.groups * p.N));
  parallel(p.B * p.groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(GroupPlanes(p, i), i);
  });
}

// x̂ of a channel's pixels.
struct PlaneNormed {
  vf centre, rstd;

  // By (mean, rstd) of its group.
  DDPM_FAST_INLINE PlaneNormed(const NormSiluArgs& p, const float* statistics, int64_t c)
      : centre(splat(p.bias ? statistics[0] - p.bias[c] : statistics[0])), rstd(splat(statistics[1])) {}
  DDPM_FAST_INLINE vf operator()(vf x) const { return (x - centre) * rstd; }
};

// Σ of (x - centre), or of its square, of kRuns adjacent runs of `count` elements.
template <int kRuns, typename T>
DDPM_FAST_INLINE void sums_of_runs(const T* x, int64_t count, float centre, bool squared, float* sums) {
  vf of[kRuns] = {};
  over_channels(count, [&](int64_t n, auto lanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kRuns; ++i) {
      const vf difference = lanes.get(x + i * count + n) - splat(centre);
      of[i] += lanes.only(squared ? difference * difference : difference);
    }
  });
  reduce_add_many(of, kRuns, sums);
}

// The same of adjacent elements of a map, as the sum of the runs' sums.
template <typename T>
DDPM_FAST_NOINLINE double sum_of_plane(const T* x, int64_t elements, float centre, bool squared) {
  double total = 0;
  float sums[4];
  int64_t first = 0;
  // Four runs at a time: their sums do not wait for each other.
  for (; first + 4 * kPlaneRun <= elements; first += 4 * kPlaneRun) {
    sums_of_runs<4>(x + first, kPlaneRun, centre, squared, sums);
    for (const float sum : sums) total += static_cast<double>(sum);
  }
  over_runs(elements - first, [&](int64_t begin, int64_t count) {
    sums_of_runs<1>(x + first + begin, count, centre, squared, sums);
    total += static_cast<double>(sums[0]);
  });
  return total;
}

// (mean, 1/√(variance + eps)) of a group. Without a bias its planes are as one.
template <typename T>
inline void group_plane_statistics(const NormSiluArgs& p, const GroupPlanes& group, float* statistics) {
  const int64_t planes = p.bias ? group.channels : 1, elements = group.channels * p.N / planes;
  const double count = static_cast<double>(group.channels * p.N);
  const T* x = static_cast<const T*>(p.x) + group.begin;
  const auto sum = [&](float centre, bool squared) {
    double total = 0;
    for (int64_t k = 0; k < planes; ++k) {
      const float moved = p.bias ? centre - p.bias[group.first_channel + k] : centre;
      total += sum_of_plane(x + k * elements, elements, moved, squared);
    }
    return total;
  };
  statistics[0] = static_cast<float>(sum(0, false) / count);
  const double variance = sum(statistics[0], true) / count;
  statistics[1] = static_cast<float>(1 / __builtin_sqrt(variance + static_cast<double>(p.eps)));
}

inline void group_planes_forward(const NormSiluForward& p) {
  const int64_t N = p.in.N;
  const MapType type = p.in.type;
  over_group_planes(p.in, [&](const GroupPlanes& group, int64_t i) {
    PlaneRuns runs;
    float* statistics = p.statistics + 2 * i;
    with_element(type, [&](auto element) { group_plane_statistics<decltype(element)>(p.in, group, statistics); });
    const Affine rows = group.affine;
    over_planes(group.channels, N, [&](int64_t k, int64_t planes) DDPM_FAST_LAMBDA {
      over_runs(N, [&](int64_t first, int64_t count) DDPM_FAST_LAMBDA {
        const int64_t begin = group.begin + k * N + first;
        const float* x = read_run(p.in.x, type, begin, planes * count, runs.x);
        const float* residual = read_run(p.residual, type, begin, planes * count, runs.other);
        float* const out = place_of_run(p.out, type, begin, runs.out);
        for (int64_t j = 0; j < planes; ++j, x += count) {
          const int64_t c = group.first_channel + k + j;
          const PlaneNormed normed(p.in, statistics, c);
          finish_plane(PlaneAffine(rows, c), p.in.activation, fill_keep_plane(p.in, group.sample, c, first, count),
                       residual ? residual + j * count : nullptr, count, out + j * count,
                       [&](int64_t n, auto lanes) { return normed(lanes.get(x + n)); });
        }
        write_run(p.out, type, begin, planes * count, out);
      });
    });
  });
}

// z = g·slope of a group, and Σ g·x̂ and Σ g of its channels.
inline void group_planes_z(const NormSiluBackward& p, const GroupPlanes& group, const float* statistics, float* z,
                           float* of_sample, PlaneRuns& runs) {
  const int64_t C = p.in.C, N = p.in.N;
  const MapType type = p.in.type;
  const Affine rows = group.affine;
  over_planes(group.channels, N, [&](int64_t k, int64_t planes) DDPM_FAST_LAMBDA {
    vf products[kPlanesOfRun], slopes[kPlanesOfRun];
    KahanSum all_products, all_slopes;  // of a channel of several runs
    over_runs(N, [&](int64_t first, int64_t count) DDPM_FAST_LAMBDA {
      const int64_t begin = group.begin + k * N + first;
      const float* x = read_run(p.in.x, type, begin, planes * count, runs.x);
      const float* grad = read_run(p.grad, type, begin, planes * count, runs.other);
      float* z_plane = z + k * N + first;
      for (int64_t j = 0; j < planes; ++j, x += count, grad += count, z_plane += count) {
        const int64_t c = group.first_channel + k + j;
        const PlaneNormed normed(p.in, statistics, c);
        const RunSums of_run = gradients_of_run(
            p, PlaneAffine(rows, c), fill_keep_plane(p.in, group.sample, c, first, count), grad, count,
            [&](int64_t n, auto lanes) { return normed(lanes.get(x + n)); },
            [&](int64_t n, auto lanes, vf, vf scaled) { lanes.put(z_plane + n, scaled); });
        products[j] = of_run.products;
        slopes[j] = of_run.slopes;
        if (planes > 1) continue;
        all_products.add(of_run.products);
        all_slopes.add(of_run.slopes);
        products[0] = all_products.sum;
        slopes[0] = all_slopes.sum;
      }
    });
    reduce_add_many(products, planes, of_sample + group.first_channel + k);
    reduce_add_many(slopes, planes, of_sample + C + group.first_channel + k);
  });
}

// sums: (B, 3, C), see finish_sums. means: (B, 2, C).
inline void group_planes_backward(const NormSiluBackward& p, float* sums, float* means) {
  const int64_t C = p.in.C, N = p.in.N;
  const MapType type = p.in.type;
  over_group_planes(p.in, [&](const GroupPlanes& group, int64_t i) {
    PlaneRuns runs;
    const float* statistics = p.statistics + 2 * i;
    float *of_sample = sums + group.sample * 3 * C, *mean = means + group.sample * 2 * C;
    float* z = type == MapType::kFloat ? static_cast<float*>(p.dx) + group.begin
                                       : thread_scratch(kNormRowSlot, group.channels * N);
    group_planes_z(p, group, statistics, z, of_sample, runs);
    group_means_from<1>(p.in, group.affine, of_sample, 1, group.group, mean);
    const vf mean_z = splat(mean[group.first_channel]), mean_product = splat(mean[C + group.first_channel]);
    // `count` elements of dx from the group's element `first` on; each(lanes, vector of dx).
    const auto write_dx = [&](const PlaneNormed& normed, int64_t first, int64_t count, const auto& each) {
      const int64_t begin = group.begin + first;
      const float *x = read_run(p.in.x, type, begin, count, runs.x), *z_run = z + first;
      float* dx = place_of_run(p.dx, type, begin, runs.out);
      over_channels(count, [&](int64_t n, auto lanes) {
        const vf d = group_gradient(lanes.get(z_run + n), normed(lanes.get(x + n)), mean_z, mean_product, normed.rstd);
        each(lanes, d);
        lanes.put(dx + n, d);
      });
      write_run(p.dx, type, begin, count, dx);
    };
    if (!p.in.bias) {  // the group's planes are as one
      const PlaneNormed normed(p.in, statistics, group.first_channel);
      over_runs(group.channels * N,
                [&](int64_t first, int64_t count) { write_dx(normed, first, count, [](auto, vf) {}); });
      clear(of_sample + 2 * C + group.first_channel, group.channels);
      return;
    }
    for (int64_t k = 0; k < group.channels; ++k) {
      const int64_t c = group.first_channel + k;
      const PlaneNormed normed(p.in, statistics, c);
      KahanSum inputs;
      over_runs(N, [&](int64_t first, int64_t count) {
        vf of_run = {};
        write_dx(normed, k * N + first, count, [&](auto lanes, vf d) { of_run += lanes.only(d); });
        inputs.add(of_run);
      });
      of_sample[2 * C + c] = reduce_add(inputs.sum);
    }
  });
}

// ---- RMSNorm ----

// A sample's pixels in blocks of one run, of which all channels stay in the second-level cache.
struct PlaneBlocks {
  int64_t pixels, per_sample, total, grain;

  PlaneBlocks(int64_t B, int64_t N, int64_t C) {
    pixels = min(N, max<int64_t>(4 * kLanes, min(kPlaneRun, kNormPiece / C / kLanes * kLanes)));
    per_sample = ceil_div(N, pixels);
    total = B * per_sample;
    grain = max<int64_t>(1, kNormPiece / (pixels * C));
  }
};

struct PlaneBlock {
  int64_t sample, first, count, begin;  // begin: of its pixels in the first channel
  Affine affine;

  PlaneBlock(const NormSiluArgs& p, const PlaneBlocks& blocks, int64_t index)
      : sample(index / blocks.per_sample),
        first(index % blocks.per_sample * blocks.pixels),
        count(min(blocks.pixels, p.N - first)),
        begin(sample * p.C * p.N + first),
        affine(affine_of(p, sample)) {}
};

template <typename Body>
inline void over_plane_blocks(const NormSiluArgs& p, const PlaneBlocks& blocks, const Body& body) {
  parallel(blocks.total, blocks.grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(PlaneBlock(p, blocks, i), i);
  });
}

// v = x + bias of a block, (C, count), and the sum of its squares for every pixel.
inline void widen_block(const NormSiluArgs& p, const PlaneBlock& block, float* v, float* squares, PlaneRuns& runs) {
  float* of_piece = runs.out;
  clear(squares, block.count);
  for (int64_t c = 0; c < p.C; ++c, v += block.count) {
    const float* x = read_run(p.x, p.type, block.begin + c * p.N, block.count, runs.x);
    const vf bias = p.bias ? splat(p.bias[c]) : vf{};
    if (c % kRowsOfPiece == 0) clear(of_piece, block.count);
    over_channels(block.count, [&](int64_t n, auto lanes) {
      const vf biased = lanes.get(x + n) + bias;
      lanes.put(v + n, biased);
      accumulate(of_piece, n, lanes, biased * biased);
    });
    if (c % kRowsOfPiece == kRowsOfPiece - 1 || c == p.C - 1) {
      for (int64_t n = 0; n < block.count; ++n) squares[n] += of_piece[n];
    }
  }
}

inline void rms_planes_forward(const NormSiluForward& p) {
  const int64_t C = p.in.C, N = p.in.N;
  const PlaneBlocks blocks(p.in.B, N, C);
  over_plane_blocks(p.in, blocks, [&](const PlaneBlock& block, int64_t) {
    PlaneRuns runs;
    float* v = thread_scratch(kNormRowSlot, C * blocks.pixels);
    float* factors = thread_scratch(kNormPieceSlot, blocks.pixels);
    float* norms = p.statistics + block.sample * N + block.first;
    widen_block(p.in, block, v, factors, runs);
    for (int64_t n = 0; n < block.count; ++n) {
      norms[n] = __builtin_sqrtf(factors[n]);
      factors[n] = rms_factor(norms[n], C);
    }
    for (int64_t c = 0; c < C; ++c, v += block.count) {
      const float* keep = fill_keep_plane(p.in, block.sample, c, block.first, block.count);
      const int64_t begin = block.begin + c * N;
      const float* residual = read_run(p.residual, p.in.type, begin, block.count, runs.other);
      float* out = place_of_run(p.out, p.in.type, begin, runs.out);
      finish_plane(PlaneAffine(block.affine, c), p.in.activation, keep, residual, block.count, out,
                   [&](int64_t n, auto lanes) { return lanes.get(v + n) * lanes.get(factors + n); });
      write_run(p.out, p.in.type, begin, block.count, out);
    }
  });
}

// sums: (blocks, 3, C), see finish_sums.
inline void rms_planes_backward(const NormSiluBackward& p, const PlaneBlocks& blocks, float* sums) {
  const int64_t C = p.in.C, N = p.in.N, size = C * blocks.pixels;
  const MapType type = p.in.type;
  over_plane_blocks(p.in, blocks, [&](const PlaneBlock& block, int64_t i) {
    PlaneRuns runs;
    float *normed = thread_scratch(kNormRowSlot, 2 * size), *z = normed + size;  // (C, count) each
    float* factors = thread_scratch(kNormPieceSlot, 3 * blocks.pixels);
    float *of_piece = factors + blocks.pixels, *means = of_piece + blocks.pixels;  // of z·x̂ over the channels
    const float* norms = p.statistics + block.sample * N + block.first;
    float* mine = sums + i * 3 * C;
    for (int64_t n = 0; n < block.count; ++n) factors[n] = rms_factor(norms[n], C);
    clear(of_piece, 2 * blocks.pixels);
    for (int64_t c = 0; c < C; ++c) {
      const int64_t begin = block.begin + c * N;
      const vf bias = p.in.bias ? splat(p.in.bias[c]) : vf{};
      const float* keep = fill_keep_plane(p.in, block.sample, c, block.first, block.count);
      const float* x = read_run(p.in.x, type, begin, block.count, runs.x);
      float *normed_run = normed + c * block.count, *z_run = z + c * block.count;
      const RunSums of_run = gradients_of_run(
          p, PlaneAffine(block.affine, c), keep, read_run(p.grad, type, begin, block.count, runs.other), block.count,
          [&](int64_t n, auto lanes) { return (lanes.get(x + n) + bias) * lanes.get(factors + n); },
          [&](int64_t n, auto lanes, vf x_hat, vf scaled) {
            accumulate(of_piece, n, lanes, scaled * x_hat);
            lanes.put(normed_run + n, x_hat);
            lanes.put(z_run + n, scaled);
          });
      mine[c] = reduce_add(of_run.products);
      mine[C + c] = reduce_add(of_run.slopes);
      if (c % kRowsOfPiece == kRowsOfPiece - 1 || c == C - 1) {
        for (int64_t n = 0; n < block.count; ++n) means[n] += of_piece[n];
        clear(of_piece, block.count);
      }
    }
    for (int64_t n = 0; n < block.count; ++n) means[n] = rms_mean(norms[n], means[n], C);
    for (int64_t c = 0; c < C; ++c) {
      const int64_t begin = block.begin + c * N;
      float* dx = place_of_run(p.dx, type, begin, runs.out);
      const float *normed_run = normed + c * block.count, *z_run = z + c * block.count;
      vf inputs = {};
      over_channels(block.count, [&](int64_t n, auto lanes) {
        const vf d =
            rms_gradient(lanes.get(z_run + n), lanes.get(normed_run + n), lanes.get(means + n), lanes.get(factors + n));
        inputs += lanes.only(d);
        lanes.put(dx + n, d);
      });
      write_run(p.dx, type, begin, block.count, dx);
      mine[2 * C + c] = reduce_add(inputs);
    }
  });
}

inline void norm_planes_forward(const NormSiluForward& p) {
  if (p.in.B * p.in.N * p.in.C == 0) return;
  p.in.groups ? group_planes_forward(p) : rms_planes_forward(p);
}

inline void norm_planes_backward(const NormSiluBackward& p) {
  if (p.in.B * p.in.N * p.in.C == 0) return;
  const PlaneBlocks blocks(p.in.B, p.in.N, p.in.C);
  const int64_t per_sample = p.in.groups ? 1 : blocks.per_sample, of_sums = p.in.B * per_sample * 3 * p.in.C;
  float* sums = thread_scratch(kNormSumsSlot, of_sums + p.in.B * 2 * p.in.C);
  if (p.in.groups) {
    group_planes_backward(p, sums, sums + of_sums);
  } else {
    rms_planes_backward(p, blocks, sums);
  }
  finish_sums(p, per_sample, sums);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
