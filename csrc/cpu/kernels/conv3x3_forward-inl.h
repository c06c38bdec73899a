// The choice of a 3×3 convolution's algorithm, by its sizes and the machine's third-level cache, and the norm where the
// epilogue did not apply it.
#pragma once

#include "conv3x3_direct-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// Few pixels pay for no transform of the weights, nor do maps of one or two: Winograd's form saves too few products.
constexpr int64_t kMaxPixelsDirectly = 16, kPixelsPerTile = 6;

DDPM_FAST_INLINE bool directly(const Conv3x3Forward& p, const Tiles& tiles) {
  const int64_t pixels = p.B * p.H * p.W, most = has_rows(p.weight) ? kMaxDotRows : kMaxPixelsDirectly;
  return !p.pooled && (pixels <= most || pixels <= kPixelsPerTile * tiles.whole());
}

DDPM_FAST_INLINE bool by_tiles(const Tiles& tiles, int64_t C, int64_t K, int64_t most) {
  const int64_t u = kPoints * C * K;
  if (u > most) return false;
  const int64_t fewest = u <= second_level_floats() / 2 ? kMinTiles / 2 : kMinTiles;
  return tiles.total >= fewest || (panels(K) == 1 && tiles.total > kGroup);
}

// By panels, whether each thread takes tiles of its own and transforms all taps itself, rather than panels of its own
// and all inputs. The results are the same. Measured with two threads on a Zen 4: 64 to 256 channels lost 2 to 10% at
// 32 tiles and gained 5% at 128, 512 channels lost 2% at 64 tiles.
constexpr int64_t kTilesOfThread = 32, kChannelsPerTile = 24;

DDPM_FAST_INLINE bool apart(const Tiles& tiles, int64_t K) {
  return tiles.whole() >= kTilesOfThread * thread_count() && tiles.whole() * kChannelsPerTile >= K;
}

// Parts of the tiles that take their own, each in a thread.
DDPM_FAST_INLINE int64_t most_parts() { return min(thread_count(), Shares::kMostThreads); }

// The norm of tiles [begin, end) where the epilogue did not apply it.
inline void norm_tiles(const Conv3x3Forward& p, const Tiles& tiles, int64_t begin, int64_t end) {
  for (int64_t t = begin; p.norm != nullptr && t < end; ++t) norm_tile(p, tiles, Tile(tiles, t));
}
inline void norm_all_tiles(const Conv3x3Forward& p, const Tiles& tiles, int64_t K) {
  if (p.norm == nullptr) return;
  parallel(tiles.total, max<int64_t>(1, 1024 / K),
           [&](int64_t begin, int64_t end) { norm_tiles(p, tiles, begin, end); });
}

// Floats of V at a time, of all parts: a share of the third-level cache, 8 of 32 MB measured on a Zen 4 and a Zen 3;
// with AVX-512, 6 to 9 MB are alike on an Ice Lake with 48 MB. Of many threads each has what fits beside sums and a
// panel of U in its own second-level cache: 6 MB among sixteen are 10 tiles of 256 channels for each, whose taps take
// half as long again as their products.
DDPM_FAST_INLINE int64_t most_of_v(int64_t parts) {
  return max(third_level_floats() / 16 * (kInGroups ? 3 : 4), parts * (second_level_floats() / 4 * 3));
}

// Of `count` tiles those of a pass, as many as V has room for. To the nearest number of passes: another one transforms
// all taps again. Where a norm is read or its statistics are made, whole samples of `sample` tiles.
DDPM_FAST_INLINE int64_t tiles_of_pass(int64_t count, int64_t C, int64_t parts, int64_t sample = 1) {
  const int64_t most = max<int64_t>(kRows, most_of_v(parts) / (kPoints * C * parts));
  const int64_t size = ceil_div(count, max<int64_t>(1, (count + most / 2) / most));
  return max<int64_t>(1, (size + sample / 2) / sample) * sample;
}

// Tiles of a sample, or of all samples where tiles at edges are not in their order.
DDPM_FAST_INLINE int64_t tiles_of_sample(const Tiles& tiles) {
  return tiles.H % 4 == 0 && tiles.W % 4 == 0 ? tiles.total / tiles.B : tiles.total;
}

// Whether passes can be of whole samples: twice V has room for one, and those of a thread are next to each other.
DDPM_FAST_INLINE bool fits_samples(const Tiles& tiles, int64_t C, int64_t parts) {
  const int64_t sample = tiles_of_sample(tiles);
  const int64_t v = kPoints * C * parts * sample;
  return tiles.B % parts == 0 && sample <= tiles.total / parts && v <= 2 * most_of_v(parts);
}

// Whether the statistics of the output's norm are made panel by panel, of whole groups that the thread has just
// written.
DDPM_FAST_INLINE bool makes_moments(const Convolutions& all, const Tiles& tiles, int64_t C, int64_t parts) {
  const JoinedNormForward* norm = all.of->output_norm;
  if (norm == nullptr || all.inputs * all.outputs > 1) return false;
  return kPanel % (norm->in.channels[0] / norm->in.groups) == 0 && fits_samples(tiles, C, parts);
}

// V of a pass.
struct PassInputs {
  const PanelPass& pass;
  const float* v;
};

// By panels, pass by pass, and the norm of them.
inline void forward_in_passes(const Convolutions& all, const Tiles& tiles, int64_t C, int64_t K) {
  const int64_t parts = apart(tiles, K) ? most_parts() : 1;
  const JoinedNormForward* const input_norm = all.of->input_norm;
  const auto statistics = [&](int64_t begin, int64_t end) {
    if (input_norm != nullptr && !input_norm->known) joined_statistics(*input_norm, begin, end);
  };
  float* moments = nullptr;
  if (makes_moments(all, tiles, C, parts)) {
    JoinedNormForward& norm = *all.of->output_norm;
    moments = thread_scratch(kScratchSums, JoinedChunks(norm.in).total * norm.in.groups * 2);
    norm.known = true;
  }
  const bool of_samples = input_norm != nullptr || moments != nullptr;
  const auto passes = [&](int64_t begin, int64_t end, const auto& body) {
    const int64_t size = tiles_of_pass(end - begin, C * all.inputs, parts, of_samples ? tiles_of_sample(tiles) : 1);
    for (int64_t first = begin; first < end; first += size) {
      body(PanelPass(all, tiles, C, K, first, min(end, first + size), moments));
    }
  };
  if (parts == 1) {
    if (input_norm != nullptr) parallel(tiles.B, 1, statistics);
    passes(0, tiles.total, [&](const PanelPass& pass) {
      parallel_shares(pass.tasks, pieces_of(pass.C * all.inputs * (pass.T * kCyclesOfProducts + kCyclesOfTaps)),
                      [&] { return [&pass, v = pass.transformed()](int64_t task) { pass.run(v, task); }; });
      pass.finish_statistics();
    });
    return norm_all_tiles(*all.of, tiles, K);
  }
  const auto run = [](const PassInputs& inputs, int64_t task) { inputs.pass.run(inputs.v, task); };
  Helpers<PassInputs, decltype(run)> helpers(parts, run);
  parallel(parts, 1, [&](int64_t begin, int64_t end) {
    statistics(tiles.B * begin / parts, tiles.B * end / parts);
    for (int64_t i = begin; i < end; ++i) {
      passes(tiles.split(i, parts), tiles.split(i + 1, parts), [&](const PanelPass& pass) {
        helpers.work(i, {pass, pass.transformed()}, 0, pass.tasks);
        pass.finish_statistics();
        norm_tiles(*all.of, tiles, pass.first_tile, pass.last_tile);
      });
      helpers.help(i);
    }
  });
}

// Whether the norm of the input is made block by block of channels as the transforms read it, rather than as a map
// beforehand: by panels, where a thread takes whole samples at once. Two threads that share tiles both make all of it,
// which takes as long as reading what the other made where they share a third-level cache (1 to 3% of a convolution of
// 8×8 more), and less where they do not (2 to 3%); more threads would make it too often.
DDPM_FAST_INLINE bool norms_as_read(const Conv3x3Forward& p, const Tiles& tiles, int64_t C, int64_t K) {
  if (p.input_norm->in.dropout.keep_threshold != 0 || directly(p, tiles)) return false;
  if (by_tiles(tiles, C, K, most_of_u() / 2)) return false;  // by tiles the norm is not read, so it pays off less
  const int64_t threads = most_parts();
  if (tiles.B % threads != 0) return false;
  if (!apart(tiles, K)) return threads <= 2 && tiles_of_pass(tiles.total, C, 1) == tiles.total;
  return fits_samples(tiles, C, threads);
}

inline void plain_forward(const Conv3x3Forward& p) {
  const Tiles tiles(p.B, p.H, p.W);
  const int64_t C = p.channels[0] + p.channels[1], K = p.output_channels[0] + p.output_channels[1];
  if (p.input_norm != nullptr && !norms_as_read(p, tiles, C, K)) {
    joined_norm_forward(*p.input_norm);
    Conv3x3Forward rest = p;
    rest.input_norm = nullptr;
    return plain_forward(rest);
  }
  const bool direct = directly(p, tiles);
  if (!direct && p.input_norm == nullptr && by_tiles(tiles, C, K, most_of_u())) return forward_by_tiles(p, tiles, C, K);
  if (!direct) return forward_in_passes({&p, 1, 1}, tiles, C, K);
  forward_directly(p, C, K);
  norm_all_tiles(p, tiles, K);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
