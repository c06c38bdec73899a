// 3×3 convolutions by Winograd's F(4×4, 3×3), channels-last. The map is cut into tiles of 4×4 outputs:
//
//   V[point][tile][c]  = transform of the tile's 6×6 inputs
//   U[point][panel][c] = transform of the taps, kPanel output channels side by side
//   M[point][tile][k]  = V[point] · U[point]
//   output tile        = transform of M + bias + residual
//
// All transforms vectorise over channels. Two orders of work, chosen by sizes alone:
// - by tiles: each thread transforms all taps, then takes groups of tiles whose V and M stay in its second-level cache
//   through all steps. For large maps.
// - by panels: V of all tiles first, then panel by panel of output channels. Their taps are transformed on the way,
//   block by block: the weights are read once and their transform, four times their size, never leaves the cache. For
//   fewer tiles with more channels: the weights are most of the memory traffic. Each thread takes tiles, or of very few
//   tiles panels.
// No thread reads V or U of another. A transform takes 5 to 7 cycles for each line of cache that it writes, and a line
// that another core wrote, or writing one that another core read, 4 to 15 where both share a third-level cache and up
// to 100 where they do not (measured on two virtual cores of a Zen 4, which the host places either way).
// conv3x3_forward-inl.h chooses, or takes conv3x3_direct-inl.h for the smallest maps.
#pragma once

#include "conv3x3_input-inl.h"
#include "conv3x3_output-inl.h"
#include "conv3x3_prefetch-inl.h"
#include "conv3x3_taps-inl.h"
#include "gemm-inl.h"
#include "parallel-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// Measured on two cores of a Zen 4 and of a Zen 3 (1 MB and 512 KB of second-level cache each, 32 MB of third-level):
// - kGroup: tiles per group, a multiple of the GEMM kernel's rows;
// - kMaxSharedU: the largest U, in floats, that is computed at once, and kMinTiles: the fewest tiles for which that is
//   faster;
// - kMaxV: floats of V computed at a time.
constexpr int64_t kGroup = kRegisters == 32 ? kRows : 3 * kRows;
constexpr int64_t kMaxSharedU = 2 << 20, kMinTiles = 512, kMaxV = 2 << 20;

// Rough cycles on a Zen 4, per channel: transform of a panel's taps, a panel's product for one tile, transform of one
// tile's inputs.
constexpr int64_t kCyclesOfTaps = 360, kCyclesOfProducts = 80, kCyclesOfInputs = 16;
// Less is not worth another thread: waking one takes 2000 to 4000 cycles.
constexpr int64_t kCyclesOfPiece = 16000;

// Tasks of `cycles` cycles each that are worth another thread.
DDPM_FAST_INLINE int64_t pieces_of(int64_t cycles) { return max<int64_t>(1, kCyclesOfPiece / max<int64_t>(1, cycles)); }

// Channels per partial sum of M; the rounding of these sums is most of Winograd's error. Gradients use shorter partial
// sums, at a sixth of the product's time, because backward carries their error through every layer.
constexpr int64_t kForwardPiece = 64, kGradientPiece = 16;

DDPM_FAST_INLINE int64_t channels_of_piece(const Conv3x3Forward& p, int64_t C) {
  return piece_of(C, p.weight.mirrored ? kGradientPiece : kForwardPiece);
}

inline void forward_by_tiles(const Conv3x3Forward& p, const Tiles& tiles, int64_t C, int64_t K) {
  const int64_t num_panels = panels(K), point = C * kPanel, piece = channels_of_piece(p, C);
  const auto transform_taps = [&](int64_t begin, int64_t end, float* u) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i % num_panels, c = i / num_panels * 16;
      transform_weight(p.weight, panel * kPanel, min<int64_t>(kPanel, K - panel * kPanel), c, min<int64_t>(C, c + 16),
                       u + panel * point + c * kPanel, num_panels * point);
    }
  };
  const int64_t taps = num_panels * ceil_div(C, 16);
  // As many groups for each thread; a tile's result does not depend on its group.
  const int64_t groups = round_up(ceil_div(tiles.total, kGroup), thread_count());
  const int64_t size = ceil_div(tiles.total, groups), v_row = row_stride(C), m_row = row_stride(num_panels * kPanel);
  const int64_t v_plane = plane_stride(size * v_row), m_plane = plane_stride(size * m_row);
  parallel(ceil_div(tiles.total, size), pieces_of(size * C * num_panels * kCyclesOfProducts),
           [&](int64_t first, int64_t last) {
             float* u = thread_scratch(kScratchU, kPoints * packed_size(C, K));
             transform_taps(0, taps, u);
             float* v = thread_scratch(kScratchV, kPoints * v_plane);
             float* m = thread_scratch(kScratchM, kPoints * m_plane);
             for (int64_t g = first; g < last; ++g) {
               const int64_t begin = g * size, end = min(tiles.total, begin + size);
               const int64_t next = g + 1 < last ? min(tiles.total, end + size) : end;
               transform_inputs(p.input, p.channels, p.upsampled, tiles, begin, end, 0, C, v, v_row, v_plane);
               // All panels of a point, one after another: the point's V stays in the first-level cache.
               for (int64_t i = 0; i < kPoints; ++i) {
                 for (int64_t panel = 0; panel < num_panels; ++panel) {
                   const int64_t step = i * num_panels + panel, steps = kPoints * num_panels;
                   share((next - end) * kRowsToPrefetch, step, steps, [&](int64_t n) {
                     prefetch_input_row(p.input, p.channels, p.upsampled, tiles, end + n / kRowsToPrefetch,
                                        n % kRowsToPrefetch);
                   });
                   share((end - begin) * 4, step, steps,
                         [&](int64_t n) { prefetch_output_row(p, tiles, begin + n / 4, n % 4); });
                   product_panel(v + i * v_plane, v_row, 1, u + step * point, end - begin, C,
                                 m + i * m_plane + panel * kPanel, m_row, panel_width(K - panel * kPanel), false,
                                 piece);
                 }
               }
               finish_columns(p, tiles, begin, end, 0, K, m, m_row, m_plane);
               for (int64_t t = begin; p.norm != nullptr && t < end; ++t) norm_tile(p, tiles, Tile(tiles, t));
             }
           });
}

constexpr int64_t kChannelBlock = 64;  // input channels whose taps are transformed at a time

// V is stored block by block of channels: one product reads contiguous memory.
inline void forward_by_panels(const Conv3x3Forward& p, const Tiles& tiles, int64_t C, int64_t K, int64_t first_tile,
                              int64_t last_tile) {
  const int64_t T = last_tile - first_tile, blocks = ceil_div(C, kChannelBlock),
                row = round_up(min(C, kChannelBlock), 16), piece = channels_of_piece(p, min(C, kChannelBlock));
  const int64_t v_plane = plane_stride(T * row), v_block = kPoints * v_plane, m_plane = plane_stride(T * kPanel);
  parallel(panels(K), pieces_of(C * (T * kCyclesOfProducts + kCyclesOfTaps)), [&](int64_t first, int64_t last) {
    const int64_t u_plane = plane_stride(kChannelBlock * kPanel);
    float* v = thread_scratch(kScratchV, blocks * v_block);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t c = block * kChannelBlock;
      transform_inputs(p.input, p.channels, p.upsampled, tiles, first_tile, last_tile, c, min(kChannelBlock, C - c),
                       v + block * v_block, row, v_plane);
    }
    float* u = thread_scratch(kScratchU, kPoints * u_plane);
    float* m = thread_scratch(kScratchM, kPoints * m_plane);
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t columns = min<int64_t>(kPanel, K - panel * kPanel);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t c = block * kChannelBlock, count = min<int64_t>(kChannelBlock, C - c);
        transform_weight(p.weight, panel * kPanel, columns, c, c + count, u, u_plane);
        const int64_t c_next = c + count < C ? c + count : 0, panel_next = c_next > 0 ? panel : panel + 1;
        for (int64_t i = 0; i < kPoints; ++i) {
          if (panel_next < last) {
            prefetch_weights(p.weight, panel_next * kPanel, min<int64_t>(kPanel, K - panel_next * kPanel), c_next,
                             min<int64_t>(kChannelBlock, C - c_next), i);
          }
          product_panel(v + block * v_block + i * v_plane, row, 1, u + i * u_plane, T, count, m + i * m_plane, kPanel,
                        panel_width(columns), block > 0, piece);
        }
      }
      finish_columns(p, tiles, first_tile, last_tile, panel * kPanel, columns, m, kPanel, m_plane);
    }
  });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
