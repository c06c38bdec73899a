// The weight's gradient of 3×3 convolutions by the transforms of F(4×4, 3×3), channels-last.
#pragma once

#include "conv3x3.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// The gradient of the weight is a convolution of inputs and output gradients with the same transforms, transposed:
//
//   V[point][tile][c] as above      D[panel][point][tile][k] = transposed output transform of the gradient's 4×4 tile
//   S[point][c][k] = Σ over tiles of V·D      dweight = transposed transform of the taps of S

// D of one tile: d + (panel·kPoints + point)·plane.
inline void transform_gradient(const float* grad, int64_t K, const Tiles& tiles, const Tile& tile, float* d, int64_t plane) {
  const int64_t height = tiles.H - tile.y, width = tiles.W - tile.x;
  const float* first = grad + ((tile.b * tiles.H + tile.y) * tiles.W + tile.x) * K;
  for (int64_t k = 0; k < round_up(K, kPanel); k += kLanes) {
    const int64_t count = smaller<int64_t>(kLanes, K - k);
    const auto read = [&](int i, int j) DDPM_FAST_LAMBDA {
      return i < height && j < width && count > 0 ? load_upto(first + (i * tiles.W + j) * K + k, count) : vf{};
    };
    const Six a = output_gradients({read(0, 0), read(1, 0), read(2, 0), read(3, 0)});
    const Six b = output_gradients({read(0, 1), read(1, 1), read(2, 1), read(3, 1)});
    const Six c = output_gradients({read(0, 2), read(1, 2), read(2, 2), read(3, 2)});
    const Six e = output_gradients({read(0, 3), read(1, 3), read(2, 3), read(3, 3)});
    float* to = d + k / kPanel * kPoints * plane + k % kPanel;
    const auto put = [&](int i, vf w, vf x, vf y, vf z) DDPM_FAST_LAMBDA {
      const Six points = output_gradients({w, x, y, z});
      float* at = to + i * 6 * plane;
      store(at, points.a0);
      store(at + plane, points.a1);
      store(at + 2 * plane, points.a2);
      store(at + 3 * plane, points.a3);
      store(at + 4 * plane, points.a4);
      store(at + 5 * plane, points.a5);
    };
    put(0, a.a0, b.a0, c.a0, e.a0);
    put(1, a.a1, b.a1, c.a1, e.a1);
    put(2, a.a2, b.a2, c.a2, e.a2);
    put(3, a.a3, b.a3, c.a3, e.a3);
    put(4, a.a4, b.a4, c.a4, e.a4);
    put(5, a.a5, b.a5, c.a5, e.a5);
  }
}

// dweight of input channels [c, c + count) and output channels [k, k + columns), at most kLanes each, from
// s + point·plane + row·kPanel.
inline void finish_taps(const float* s, int64_t plane, float* dweight, int64_t C, int64_t c, int64_t count, int64_t k, int64_t columns) {
  alignas(64) float taps[9 * kLanes][kLanes];
  for (int64_t n = 0; n < count; ++n) {
    const float* from = s + n * kPanel;
    const auto line = [&](int i) DDPM_FAST_LAMBDA {
      const float* at = from + i * 6 * plane;
      return tap_gradients({load(at), load(at + plane), load(at + 2 * plane), load(at + 3 * plane), load(at + 4 * plane), load(at + 5 * plane)});
    };
    const Three a = line(0), b = line(1), d = line(2), e = line(3), f = line(4), g = line(5);
    const Three left = tap_gradients({a.a0, b.a0, d.a0, e.a0, f.a0, g.a0});
    const Three middle = tap_gradients({a.a1, b.a1, d.a1, e.a1, f.a1, g.a1});
    const Three right = tap_gradients({a.a2, b.a2, d.a2, e.a2, f.a2, g.a2});
    float* t = taps[9 * n];
    store(t, left.a0);
    store(t + kLanes, middle.a0);
    store(t + 2 * kLanes, right.a0);
    store(t + 3 * kLanes, left.a1);
    store(t + 4 * kLanes, middle.a1);
    store(t + 5 * kLanes, right.a1);
    store(t + 6 * kLanes, left.a2);
    store(t + 7 * kLanes, middle.a2);
    store(t + 8 * kLanes, right.a2);
  }
  float* to = dweight + (k * C + c) * 9;
  if (count == kLanes && columns == kLanes) {
    for (int part = 0; part < 9; ++part) {
      vf rows[kLanes];
#pragma GCC unroll 16
      for (int n = 0; n < kLanes; ++n) rows[n] = load(taps[part * kLanes + n]);
      transpose(rows);
#pragma GCC unroll 16
      for (int n = 0; n < kLanes; ++n) store(to + n * 9 * C + part * kLanes, rows[n]);
    }
    return;
  }
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t i = 0; i < 9 * count; ++i) to[column * 9 * C + i] = taps[i][column];
  }
}

// dbias (K) = Σ of rows of grad (rows, K), by chunks of rows that depend on the sizes alone.
inline void sum_rows(const float* grad, int64_t rows, int64_t K, float* dbias) {
  const int64_t size = larger<int64_t>(16, 16384 / K), chunks = ceil_div(rows, size), stride = round_up(K, kLanes);
  float* sums = thread_scratch(kScratchSums, chunks * stride);
  parallel(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t last = smaller(rows, (chunk + 1) * size);
      for (int64_t k = 0; k < K; k += kLanes) {
        CarefulSum sum;
        for (int64_t i = chunk * size; i < last; ++i) sum.add(load_upto(grad + i * K + k, K - k));
        store(sums + chunk * stride + k, sum.sum);
      }
    }
  });
  for (int64_t k = 0; k < K; k += kLanes) {
    CarefulSum sum;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum.add(load(sums + chunk * stride + k));
    store_upto(dbias + k, sum.sum, K - k);
  }
}

constexpr int64_t kTilesOfPiece = 32;
constexpr int64_t kGradientBlock = 32;  // input channels of a task, whose sums stay in the second-level cache

inline void conv3x3_weight_gradient(const Conv3x3WeightGradient& p) {
  if (p.dbias != nullptr) sum_rows(p.grad, p.B * p.H * p.W, p.K, p.dbias);
  if (p.dweight == nullptr) return;
  const Tiles tiles(p.B, p.H, p.W);
  const int64_t C = p.channels[0] + p.channels[1], K = p.K, num_panels = panels(K), blocks = ceil_div(C, kGradientBlock);
  const int64_t row = row_stride(C), per_tile = kPoints * (row + num_panels * kPanel);
  const int64_t chunks = ceil_div(tiles.total, larger<int64_t>(kLanes, kLargestVAndD / per_tile));
  const int64_t size = ceil_div(tiles.total, chunks), s_plane = plane_stride(kGradientBlock * kPanel), sums = kPoints * s_plane;
  const int64_t v_plane = plane_stride(size * row), d_plane = plane_stride(size * kPanel);
  float* v = thread_scratch(kScratchShared, kPoints * v_plane);
  float* d = thread_scratch(kScratchGradients, num_panels * kPoints * d_plane);
  float* kept = chunks == 1 ? nullptr : thread_scratch(kScratchSums, num_panels * blocks * sums);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = chunk * size, T = smaller(size, tiles.total - first);
    parallel(T, 1, [&](int64_t begin, int64_t end) {
      transform_inputs(p.input, p.channels, p.upsampled, tiles, first + begin, first + end, v + begin * row, row, v_plane);
      for (int64_t t = begin; t < end; ++t) {
        transform_gradient(p.grad, K, tiles, Tile(tiles, first + t), d + t * kPanel, d_plane);
      }
    });
    parallel(num_panels * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t panel = task / blocks, c = task % blocks * kGradientBlock, count = smaller(kGradientBlock, C - c);
        float* s = kept == nullptr ? thread_scratch(kScratchM, sums) : kept + task * sums;
        for (int64_t i = 0; i < kPoints; ++i) {
          // In pieces: a sum of many terms rounds less as a sum of sums.
          for (int64_t t = 0; t < T; t += kTilesOfPiece) {
            product_panel(v + i * v_plane + t * row + c, 1, row, d + (panel * kPoints + i) * d_plane + t * kPanel, count,
                          smaller(kTilesOfPiece, T - t), s + i * s_plane, kPanel, kPanel, chunk > 0 || t > 0);
          }
        }
        if (chunk + 1 < chunks) continue;
        for (int64_t n = 0; n < count; n += kLanes) {
          for (int half = 0; half < kPanel; half += kLanes) {
            const int64_t k = panel * kPanel + half;
            if (k >= K) break;
            finish_taps(s + n * kPanel + half, s_plane, p.dweight, C, c + n, smaller<int64_t>(kLanes, count - n), k, smaller<int64_t>(kLanes, K - k));
          }
        }
      }
    });
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
