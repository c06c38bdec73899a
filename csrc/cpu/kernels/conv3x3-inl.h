// 3×3 convolutions by Winograd's F(4×4, 3×3), channels-last. The map is cut into tiles of 4×4 outputs, smaller ones at
// its edges (conv3x3_edges-inl.h):
//
//   V[point][tile][c]  = transform of the tile's 6×6 inputs
//   U[point][panel][c] = transform of the taps, kPanel output channels side by side
//   M[point][tile][k]  = V[point] · U[point]
//   output tile        = transform of M + bias + residual
//
// All transforms vectorise over channels. Two orders of work, chosen by sizes and the machine's third-level cache,
// never by the number of threads:
// - by tiles: each thread transforms all taps, then takes groups of tiles whose V and M stay in its second-level cache
//   through all steps. For large maps.
// - by panels: V of all tiles first, then panel by panel of output channels. Their taps are transformed on the way,
//   block by block: the weights are read once and their transform, four times their size, never leaves the cache. For
//   fewer tiles with more channels: the weights are most of the memory traffic. Each thread takes tiles, or of very few
//   tiles panels.
// A thread that is done takes groups or panels of another (parallel-inl.h). Else none reads V or U of another. A
// transform takes 5 to 7 cycles for each line of cache that it writes. A line that another core wrote, or read before
// it is written, takes 4 to 15 where both share a third-level cache and up to 100 where they do not (measured on two
// virtual cores of a Zen 4, which the host places either way).
// By panels, the norm and SiLU in front of a convolution can be applied as V reads the map: normed_block.
// conv3x3_forward-inl.h chooses, or takes conv3x3_direct-inl.h for the smallest maps.
#pragma once

#include "conv3x3_input-inl.h"
#include "conv3x3_output-inl.h"
#include "conv3x3_prefetch-inl.h"
#include "conv3x3_taps-inl.h"
#include "gemm-inl.h"
#include "joined_norm-inl.h"
#include "parallel-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// kGroup: tiles per group, a multiple of the GEMM kernel's rows. kMinTiles: the fewest tiles for which a whole U is
// faster, measured on two cores of a Zen 4 and of a Zen 3; half as many where U takes at most half of the second-level
// cache, measured on an Ice Lake.
constexpr int64_t kGroup = kRegisters == 32 ? kRows : 3 * kRows, kMinTiles = 512;

// Floats of the largest U that is computed at once: 4 of 32 MB of third-level cache, measured on a Zen 4 and a Zen 3.
DDPM_FAST_INLINE int64_t most_of_u() { return third_level_floats() / 8; }

// Rough cycles on a Zen 4, per channel: transform of a panel's taps, a panel's product for one tile, transform of one
// tile's inputs.
constexpr int64_t kCyclesOfTaps = 360, kCyclesOfProducts = 80, kCyclesOfInputs = 16;
// Less is not worth another thread: waking one takes 2000 to 4000 cycles.
constexpr int64_t kCyclesOfPiece = 16000;

// Tasks of `cycles` cycles each that are worth another thread.
DDPM_FAST_INLINE int64_t pieces_of(int64_t cycles) { return max<int64_t>(1, kCyclesOfPiece / max<int64_t>(1, cycles)); }

// Channels per partial sum of M, at most; the rounding of these sums is most of Winograd's error. Gradients use shorter
// partial sums because backward carries their error through every layer. With 16 registers, storing those takes a sixth
// of the product's time.
constexpr int64_t kForwardPiece = 64, kGradientPiece = 16;

DDPM_FAST_INLINE int64_t channels_of_piece(const Conv3x3Forward& p, int64_t C) {
  return piece_of(C, p.weight.mirrored ? kGradientPiece : kForwardPiece);
}

inline void forward_by_tiles(const Conv3x3Forward& p, const Tiles& tiles, int64_t C, int64_t K) {
  const int64_t num_panels = panels(K), point = C * kPanel, piece = channels_of_piece(p, C);
  const InputMaps input(p);
  const auto transform_taps = [&](int64_t begin, int64_t end, float* u) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i % num_panels, c = i / num_panels * 16;
      transform_weight(p.weight, panel * kPanel, min<int64_t>(kPanel, K - panel * kPanel), c, min<int64_t>(C, c + 16),
                       u + panel * point + c * kPanel, num_panels * point);
    }
  };
  const int64_t taps = num_panels * ceil_div(C, 16);
  // As many groups for each thread, all alike; a tile's result does not depend on its group.
  const int64_t groups = min(tiles.total, round_up(ceil_div(tiles.total, kGroup), thread_count()));
  const auto group = [&](int64_t g) { return tiles.total * g / groups; };
  const int64_t size = ceil_div(tiles.total, groups), v_row = row_stride(C), m_row = row_stride(num_panels * kPanel);
  const int64_t v_plane = plane_stride(size * v_row), m_plane = plane_stride(size * m_row);
  // Of few channels products take too few steps for the lines of a group's inputs and outputs: 64 to 64 took 3% longer.
  const int64_t lines = size * (kRowsToPrefetch * 4 * C + 16 * K) / kCacheLine;
  const bool twice = 2 * lines > 3 * PrefetchQueue::kAtATime * kPoints * num_panels * (C / kTermsAtATime);
  parallel_shares(groups, pieces_of(size * C * num_panels * kCyclesOfProducts), [&] {
    float* u = thread_scratch(kScratchU, kPoints * packed_size(C, K));
    transform_taps(0, taps, u);
    float* v = thread_scratch(kScratchV, kPoints * v_plane);
    float* m = thread_scratch(kScratchM, kPoints * m_plane);
    return [&, u, v, m, expected = int64_t{-1}](int64_t g) mutable {
      const int64_t begin = group(g), end = group(g + 1), next = group(min(g + 2, groups));
      transform_inputs(input, Points({}, {}), tiles, begin, end, 0, C, v, v_row, v_plane, g == expected);
      expected = g + 1;
      PrefetchQueue queue;
      queue.twice = twice;
      RowsOfTiles rows_in(tiles, end, next, kRowsToPrefetch, kPoints * num_panels);
      RowsOfTiles rows_out(tiles, begin, end, 4, kPoints * num_panels);
      // All panels of a point, one after another: the point's V stays in the first-level cache.
      for (int64_t i = 0; i < kPoints; ++i) {
        const TileRange some = tiles.using_point(i).within(begin, end);
        for (int64_t panel = 0; panel < num_panels; ++panel) {
          rows_in.next([&](const Tile& tile, int64_t row) { prefetch_input_row(input, tiles, tile, row, queue); });
          rows_out.next([&](const Tile& tile, int64_t row) { prefetch_output_row(p, tiles, tile, row, queue); });
          product_panel(v + i * v_plane + some.begin * v_row, v_row, 1, u + (i * num_panels + panel) * point,
                        some.count(), C, m + i * m_plane + some.begin * m_row + panel * kPanel, m_row,
                        panel_width(K - panel * kPanel), false, piece, &queue);
        }
      }
      finish_columns(p, tiles, begin, end, 0, K, m, m_row, m_plane);
      for (int64_t t = begin; p.norm != nullptr && t < end; ++t) norm_tile(p, tiles, Tile(tiles, t));
    };
  });
}

constexpr int64_t kChannelBlock = 64;  // input channels whose taps are transformed at a time

// One convolution, or those of phases (conv3x3_phases-inl.h): of the output, which share an input, or of the input,
// whose sums share an output.
struct Convolutions {
  const Conv3x3Forward* of;
  int64_t outputs, inputs;  // phases; one of them is 1

  const Conv3x3Forward& at(int64_t output, int64_t input) const { return of[output + input]; }
};

// The rows of the norm's samples, joined_norm-inl.h, to which tiles [begin, end) belong.
inline const float* normed_rows(const JoinedNormForward& norm, const Tiles& tiles, int64_t begin, int64_t end,
                                int64_t C) {
  const int64_t first = Tile(tiles, begin).b, last = Tile(tiles, end - 1).b + 1;
  float* rows = thread_scratch(kJoinedRowsSlot, (last - first) * kJoinedRows * C);
  for (int64_t b = first; b < last; ++b) {
    fill_joined_rows(norm.in, norm.statistics, C, b, rows + (b - first) * kJoinedRows * C);
  }
  return rows;
}

// Channels [c, c + count) of a norm's output, for the samples of tiles [begin, end), as a map of `row` channels in
// memory of the thread. Returns where sample 0 would be.
DDPM_FAST_NOINLINE const float* normed_block(const JoinedNormForward& norm, const Tiles& tiles, int64_t begin,
                                             int64_t end, int64_t c, int64_t count, const float* rows, int64_t row) {
  const JoinedNormArgs& in = norm.in;
  const int64_t first = Tile(tiles, begin).b, last = Tile(tiles, end - 1).b + 1, sample = in.N * row;
  float* to = thread_scratch(kScratchNormed, (last - first) * sample);
  for (int64_t b = first; b < last; ++b) {
    joined_normalise_channels(in, b, c, c + count, rows + (b - first) * kJoinedRows * (in.channels[0] + in.channels[1]),
                              to + (b - first) * sample, row);
  }
  return to - first * sample;
}

// By panels, tiles [first_tile, last_tile): a thread makes their V, and each task is a panel of a phase.
struct PanelPass {
  const Convolutions& all;
  const Tiles& tiles;
  int64_t C, K, first_tile, last_tile;
  float* moments;  // of the output's norm, or null; the pass is of whole samples
  int64_t T, blocks, row, piece, v_plane, v_block, tasks, terms;

  PanelPass(const Convolutions& convolutions, const Tiles& of, int64_t inputs, int64_t outputs, int64_t first,
            int64_t last, float* moments_of)
      : all(convolutions),
        tiles(of),
        C(inputs),
        K(outputs),
        first_tile(first),
        last_tile(last),
        moments(moments_of),
        T(last - first) {
    blocks = ceil_div(C, kChannelBlock);
    row = round_up(min(C, kChannelBlock), 16);
    piece = channels_of_piece(*all.of, min(C, kChannelBlock));
    v_plane = plane_stride(T * row);
    v_block = kPoints * v_plane;
    tasks = panels(K) * all.outputs;
    terms = blocks * all.inputs;
  }

  // V, stored block by block of channels: one product reads contiguous memory.
  DDPM_FAST_NOINLINE const float* transformed() const {
    float* v = thread_scratch(kScratchV, terms * v_block);
    const JoinedNormForward* norm = all.of->input_norm;
    const float* rows = norm == nullptr ? nullptr : normed_rows(*norm, tiles, first_tile, last_tile, C);
    for (int64_t term = 0; term < terms; ++term) {
      const int64_t c = term % blocks * kChannelBlock, count = min(kChannelBlock, C - c);
      const Conv3x3Forward& p = all.at(0, term / blocks);
      const float* normed =
          norm == nullptr ? nullptr : normed_block(*norm, tiles, first_tile, last_tile, c, count, rows, row);
      const int64_t channels[2] = {row, 0};
      const Points points = all.outputs > 1 ? Points({}, {}) : Points(p.weight.rows, p.weight.columns);
      transform_inputs(normed == nullptr ? InputMaps(p) : InputMaps(&normed, channels), points, tiles, first_tile,
                       last_tile, normed == nullptr ? c : 0, count, v + term * v_block, row, v_plane);
    }
    return v;
  }

  DDPM_FAST_NOINLINE void run(const float* v, int64_t task) const {
    const int64_t u_plane = plane_stride(kChannelBlock * kPanel), m_plane = plane_stride(T * kPanel);
    float* u = thread_scratch(kScratchU, kPoints * u_plane);
    float* m = thread_scratch(kScratchM, kPoints * m_plane);
    const int64_t column = task / all.outputs * kPanel, columns = min<int64_t>(kPanel, K - column);
    const Conv3x3Forward& output = all.at(task % all.outputs, 0);
    bool begun[kPoints] = {};
    PrefetchQueue queue;
    for (int64_t term = 0; term < terms; ++term) {
      const int64_t c = term % blocks * kChannelBlock, count = min<int64_t>(kChannelBlock, C - c);
      const Conv3x3Weight& weight = all.at(task % all.outputs, term / blocks).weight;
      const Points points(weight.rows, weight.columns);
      transform_weight(weight, column, columns, c, c + count, u, u_plane);
      const int64_t c_next = (term + 1) % blocks * kChannelBlock;
      const int64_t column_next = (term + 1 < terms ? task : task + 1) / all.outputs * kPanel;
      for (int64_t i = 0; i < kPoints; ++i) {
        if (column_next < K) {
          prefetch_weights(weight, column_next, min<int64_t>(kPanel, K - column_next), c_next,
                           min<int64_t>(kChannelBlock, C - c_next), i, queue);
        }
        if (term + 1 == terms) {
          spread(T * 4, i, kPoints, [&](int64_t n) {
            prefetch_output_columns(output, tiles, first_tile + n / 4, n % 4, column, columns);
          });
        }
        if (!points.has(i)) continue;
        const TileRange some = tiles.using_point(i).within(first_tile, last_tile);
        product_panel(v + term * v_block + i * v_plane + some.begin * row, row, 1, u + i * u_plane, some.count(), count,
                      m + i * m_plane + some.begin * kPanel, kPanel, panel_width(columns), begun[i], piece, &queue);
        begun[i] = true;
      }
    }
    for (int64_t i = 0; i < kPoints; ++i) {
      if (!begun[i]) clear(m + i * m_plane, T * kPanel);
    }
    finish_columns(output, tiles, first_tile, last_tile, column, columns, m, kPanel, m_plane);
    if (moments == nullptr) return;
    joined_moments_of(*output.output_norm, first_sample(), end_sample(), column, column + columns, moments);
  }

  int64_t first_sample() const { return Tile(tiles, first_tile).b; }
  int64_t end_sample() const { return Tile(tiles, last_tile - 1).b + 1; }
  // Once all panels are done.
  void finish_statistics() const {
    if (moments != nullptr) merge_joined_moments(*all.of->output_norm, first_sample(), end_sample(), moments);
  }
};

}  // namespace ddpm_fast::DDPM_FAST_ISA
