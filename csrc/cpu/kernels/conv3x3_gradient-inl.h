// The weight's gradient of 3×3 convolutions by the transforms of F(4×4, 3×3), channels-last.
#pragma once

#include "conv3x3-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// The gradient of the weight is a convolution of inputs and output gradients with the same transforms, transposed:
//
//   V[point][tile][c] as in conv3x3-inl.h  D[point][tile][k] = transposed output transform of the gradient's 4×4 tile
//   S[point][c][k] = Σ over tiles of V·D   dweight = transposed transform of the taps of S
//
// Two orders of work, chosen by sizes and the machine's third-level cache, never by the number of threads:
// - by points: each thread takes a chunk of the tiles, and of that as many at a time as a partial sum has; V and D are
//   read once, from one piece of memory each. More threads than chunks share the points of some hundred tiles, with the
//   same sums. For many tiles.
// - by blocks: V and D of all tiles, then each thread takes blocks of the weight, whose sums stay in its second-level
//   cache. For few tiles with many channels: the sums are most of the memory traffic.

// Row i of a tile's four rows of the gradient, ahead of time.
inline void prefetch_gradient_row(const Conv3x3WeightGradient& p, const Tiles& tiles, const Tile& tile, int64_t i,
                                  PrefetchQueue& queue) {
  if (i >= tile.height) return;
  const int64_t step = p.grad_step, pixel = p.K * step;
  queue.add(p.grad + ((tile.b * tiles.H + tile.y + i) * tiles.W * step + tile.x) * pixel, tile.width * pixel);
}

// The tile's gradient of a panel, whose pixels lie apart.
inline void prefetch_gradient(const Conv3x3WeightGradient& p, const Tiles& tiles, int64_t index, int64_t panel) {
  const Tile tile(tiles, index);
  const int64_t step = p.grad_step, pixel = p.K * step, first = panel * kPanel,
                floats = min<int64_t>(p.K - first, kPanel);
  for (int64_t i = 0; i < tile.height; ++i) {
    const float* row = p.grad + ((tile.b * tiles.H + tile.y + i) * tiles.W * step + tile.x) * pixel + first;
    for (int64_t x = 0; x < tile.width; ++x) prefetch(row + x * pixel, floats);
  }
}

// D of one tile and of a panel: d + point·plane.
inline void transform_gradient(const Conv3x3WeightGradient& p, const Tiles& tiles, const Tile& tile, int64_t panel,
                               float* d, int64_t plane) {
  const int64_t K = p.K, pixel = K * p.grad_step, line = tiles.W * p.grad_step, first = panel * kPanel;
  const Axis &rows = kAxes[tile.height], &columns = kAxes[tile.width];
  const float* r0 = p.grad + ((tile.b * tiles.H + tile.y) * line + tile.x) * pixel;
  const float *r1 = r0 + line * pixel, *r2 = r1 + line * pixel, *r3 = r2 + line * pixel;
  for (int64_t k = first; k < min(K, first + kPanel); k += kLanes) {
    const int64_t count = min<int64_t>(kLanes, K - k);
    const auto read = [&](int i, int j) DDPM_FAST_LAMBDA {
      const float* row = i == 0 ? r0 : i == 1 ? r1 : i == 2 ? r2 : r3;
      return load_upto(row + j * pixel + k, count);
    };
    float* to = d + (k - first);
    if (!tile.whole()) {
      multiply_between(rows.gradients, columns.gradients, read, [&](int i, int j, vf value) DDPM_FAST_LAMBDA {
        store(to + (rows.point[i] * kAxisPoints + columns.point[j]) * plane, value);
      });
      continue;
    }
    const Six a = output_gradients({read(0, 0), read(1, 0), read(2, 0), read(3, 0)});
    const Six b = output_gradients({read(0, 1), read(1, 1), read(2, 1), read(3, 1)});
    const Six c = output_gradients({read(0, 2), read(1, 2), read(2, 2), read(3, 2)});
    const Six e = output_gradients({read(0, 3), read(1, 3), read(2, 3), read(3, 3)});
    const auto put = [&](int i, vf w, vf x, vf y, vf z) DDPM_FAST_LAMBDA {
      const Six points = output_gradients({w, x, y, z});
      float* at = fresh(to + i * 6 * plane);
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

// D of tiles [begin, end) and of panels [first, last), panel by panel: d + (panel - first)·apart + point·plane +
// (tile - begin)·kPanel. Each plane is written from its first line to its last; 36 for each panel at once took twice as
// long where they lie in the third-level cache (Ice Lake). `expected`: products before it asked for the gradients.
inline void transform_gradients(const Conv3x3WeightGradient& p, const Tiles& tiles, int64_t begin, int64_t end,
                                int64_t first, int64_t last, float* d, int64_t plane, int64_t apart,
                                bool expected = false) {
  for (int64_t panel = first; panel < last; ++panel, d += apart) {
    for (int64_t t = begin; t < end; ++t) {
      if (!expected && t + kTilesAhead < end) prefetch_gradient(p, tiles, t + kTilesAhead, panel);
      transform_gradient(p, tiles, Tile(tiles, t), panel, d + (t - begin) * kPanel, plane);
    }
  }
}

// Gradients of places to those of the taps that act there.
DDPM_FAST_INLINE void place_gradients(const Conv3x3WeightGradient& p, int64_t count, float (*taps)[kLanes]) {
  if (p.rows.plain() && p.columns.plain()) return;
  for (int64_t n = 0; n < count; ++n, taps += 9) {
    vf places[9];
    for (int i = 0; i < 9; ++i) places[i] = load(taps[i]);
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) {
        store(taps[3 * i + j], places[3 * p.rows.of[i] + p.columns.of[j]]);
      }
    }
  }
}

// dweight of input channels [c, c + count) and output channels [k, k + columns), at most kLanes each, from
// s + point·plane + row·kPanel.
inline void finish_taps(const Conv3x3WeightGradient& p, const float* s, int64_t plane, int64_t c, int64_t count,
                        int64_t k, int64_t columns) {
  alignas(64) float taps[9 * kLanes][kLanes];
  for (int64_t n = 0; n < count; ++n) {
    const float* from = s + n * kPanel;
    const auto line = [&](int i) DDPM_FAST_LAMBDA {
      const float* at = fresh(from + i * 6 * plane);
      return tap_gradients({load(at), load(at + plane), load(at + 2 * plane), load(at + 3 * plane),
                            load(at + 4 * plane), load(at + 5 * plane)});
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
  place_gradients(p, count, taps);
  const int64_t stride = 9 * (p.channels[0] + p.channels[1]);
  float* to = p.dweight + k * stride + c * 9;
  if (count == kLanes && columns == kLanes) {
    for (int part = 0; part < 9; ++part) {
      vf rows[kLanes];
#pragma GCC unroll 16
      for (int n = 0; n < kLanes; ++n) rows[n] = load(taps[part * kLanes + n]);
      transpose(rows);
#pragma GCC unroll 16
      for (int n = 0; n < kLanes; ++n) {
        float* at = to + n * stride + part * kLanes;
        store(at, p.add ? load(at) + rows[n] : rows[n]);
      }
    }
    return;
  }
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t i = 0; i < 9 * count; ++i) {
      float* at = to + column * stride + i;
      *at = p.add ? *at + taps[i][column] : taps[i][column];
    }
  }
}

// dbias (K) = Σ of rows of grad (rows, K), by chunks of rows that depend on the sizes alone.
inline void sum_rows(const float* grad, int64_t rows, int64_t K, float* dbias) {
  const int64_t size = max<int64_t>(16, 16384 / K), chunks = ceil_div(rows, size), stride = round_up(K, kLanes);
  float* sums = thread_scratch(kScratchSums, chunks * stride);
  parallel(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t last = min(rows, (chunk + 1) * size);
      for (int64_t k = 0; k < K; k += kLanes) {
        KahanSum sum;
        for (int64_t i = chunk * size; i < last; ++i) sum.add(load_upto(grad + i * K + k, K - k));
        store(sums + chunk * stride + k, sum.sum);
      }
    }
  });
  for (int64_t k = 0; k < K; k += kLanes) {
    KahanSum sum;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum.add(load(sums + chunk * stride + k));
    store_upto(dbias + k, sum.sum, K - k);
  }
}

// Tiles per partial sum: a sum of partial sums has a smaller rounding error. The GEMM kernel with fewer rows gets
// longer ones, since adding a partial sum costs it relatively more. Where that costs nothing, each is four.
constexpr int64_t kTilesOfPiece = kRegisters == 32 && !kInGroups ? 32 : 64,
                  kTilesOfSum = kInGroups ? 16 : kTilesOfPiece;

// Input channels of a block: with 64 for vectors of 16, its sums take a quarter of a second-level cache of 1 MB.
DDPM_FAST_INLINE int64_t gradient_block() {
  return kLanes == 16 && kPoints * kPanel * 64 * 3 <= second_level_floats() ? 64 : 32;
}

// Floats, as shares of the third-level cache: the largest S computed by points, V and D together per pass, by points
// where threads share a chunk and by blocks, and S of all chunks. Of 32 MB, 8, 3, 8 and 16 MB, measured on two cores of
// a Zen 3; with AVX-512, 16 to 24 MB by blocks are alike on an Ice Lake with 48 MB.
DDPM_FAST_INLINE int64_t most_sums() { return third_level_floats() / 4; }
DDPM_FAST_INLINE int64_t most_of_points() { return third_level_floats() / 32 * 3; }
DDPM_FAST_INLINE int64_t most_of_blocks() { return third_level_floats() / (kInGroups ? 2 : 4); }
DDPM_FAST_INLINE int64_t most_of_chunks() { return third_level_floats() / 2; }

// By points: how many chunks of tiles have an S of their own, and their fewest tiles.
constexpr int64_t kMostChunks = 4, kMinOfChunk = 72;

// S (count × `columns` of a panel, or more than a panel has) from some of T tiles; v: (tile, channel), v_row floats
// from tile to tile; d: (tile, kPanel).
inline void add_products(const float* v, int64_t v_row, const float* d, int64_t T, const TileRange& some, int64_t count,
                         int64_t columns, float* s, bool add, PrefetchQueue& queue) {
  for (int64_t t = 0; t < T; t += kTilesOfPiece) {
    const int64_t begin = max(t, some.begin), terms = min(min(t + kTilesOfPiece, T), some.end) - begin;
    if (terms <= 0) continue;
    product_panel(v + begin * v_row, 1, v_row, d + begin * kPanel, count, terms, s, kPanel, panel_width(columns), add,
                  kTilesOfSum, &queue);
    add = true;
  }
  if (!add) clear(s, count * kPanel);
}

// dweight of a panel's output channels and of kLanes or fewer input channels from c on; s: (channel, kPanel).
inline void finish_panel_taps(const Conv3x3WeightGradient& p, const float* s, int64_t plane, int64_t panel, int64_t c,
                              int64_t count) {
  for (int half = 0; half < kPanel; half += kLanes) {
    const int64_t k = panel * kPanel + half;
    if (k >= p.K) return;
    finish_taps(p, s + half, plane, c, count, k, min<int64_t>(kLanes, p.K - k));
  }
}

// Tiles that a piece of `most` floats of V and D holds, all pieces alike; per_tile: of one point.
DDPM_FAST_INLINE int64_t tiles_at_a_time(const Tiles& tiles, int64_t most, int64_t per_tile) {
  return ceil_div(tiles.total, ceil_div(tiles.total, max<int64_t>(kLanes, most / (kPoints * per_tile))));
}

// S of tiles [begin, end), `size` at a time: s + point·s_plane + panel·C·kPanel.
inline void add_points(const Conv3x3WeightGradient& p, const Tiles& tiles, int64_t C, int64_t begin, int64_t end,
                       int64_t size, float* s, int64_t s_plane) {
  const int64_t num_panels = panels(p.K), row = row_stride(C), steps = kPoints * num_panels;
  const int64_t d_panel = round_up(size, 4) * kPanel, s_panel = C * kPanel;
  const int64_t v_plane = plane_stride(size * row), d_plane = plane_stride(num_panels * d_panel);
  float* v = thread_scratch(kScratchShared, kPoints * v_plane);
  float* d = thread_scratch(kScratchGradients, kPoints * d_plane);
  const InputMaps input(p);
  const Points points(p.rows, p.columns);
  clear_unused(points, s, num_panels * s_panel, s_plane);
  for (int64_t first = begin; first < end; first += size) {
    const int64_t T = min(size, end - first), next = first + T, after = min(size, end - next);
    parallel(T, 1, [&](int64_t from, int64_t to) {
      transform_inputs(input, points, tiles, first + from, first + to, 0, C, v + from * row, row, v_plane,
                       first > begin);
      transform_gradients(p, tiles, first + from, first + to, 0, num_panels, d + from * kPanel, d_plane, d_panel,
                          first > begin);
    });
    parallel(steps, 1, [&](int64_t from, int64_t to) {
      PrefetchQueue queue;
      RowsOfTiles inputs(tiles, next, next + after, kRowsToPrefetch, steps, from);
      RowsOfTiles gradients(tiles, next, next + after, 4, steps, from);
      for (int64_t i = from; i < to; ++i) {
        const int64_t point = i / num_panels, panel = i % num_panels;
        inputs.next([&](const Tile& tile, int64_t row) { prefetch_input_row(input, tiles, tile, row, queue); });
        gradients.next([&](const Tile& tile, int64_t row) { prefetch_gradient_row(p, tiles, tile, row, queue); });
        if (!points.has(point)) continue;
        add_products(v + point * v_plane, row, d + point * d_plane + panel * d_panel, T,
                     tiles.using_point(point).within(first, next), C, p.K - panel * kPanel,
                     s + point * s_plane + panel * s_panel, first > begin, queue);
      }
    });
  }
}

// Each chunk of tiles has an S of its own. A thread that takes a whole chunk reads no V, D or S of another, whose cache
// may be slow to give them: for 64 channels two threads were 1.9 times as fast as one on a Zen 4, and 1.2 times where
// they shared points of all tiles.
inline void weight_gradient_by_points(const Conv3x3WeightGradient& p, const Tiles& tiles, int64_t C) {
  const int64_t num_panels = panels(p.K), s_panel = C * kPanel, s_plane = plane_stride(num_panels * s_panel),
                sums = kPoints * s_plane;
  int64_t chunks = kMostChunks;
  while (chunks > 1 && (tiles.total < chunks * kMinOfChunk || sums * chunks > most_of_chunks())) chunks /= 2;
  const int64_t length = ceil_div(tiles.total, chunks);
  const int64_t together = round_up(tiles_at_a_time(tiles, most_of_points(), row_stride(C) + num_panels * kPanel),
                                    kTilesOfPiece);  // where all threads share a chunk
  float* s = thread_scratch(kScratchSums, chunks * sums);
  const auto add = [&](int64_t chunk, int64_t size) {
    add_points(p, tiles, C, chunk * length, min(tiles.total, (chunk + 1) * length), size, s + chunk * sums, s_plane);
  };
  if (thread_count() <= chunks) {
    parallel(chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) add(chunk, kTilesOfPiece);
    });
  } else {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) add(chunk, min(length, together));
  }
  const int64_t steps = ceil_div(C, kLanes);
  parallel(num_panels * steps, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / steps, c = i % steps * kLanes, count = min<int64_t>(kLanes, C - c);
      float* to = s + panel * s_panel + c * kPanel;
      for (int64_t point = 0; point < kPoints && chunks > 1; ++point) {
        float* sum = to + point * s_plane;
        for (int64_t n = 0; n < count * kPanel; n += kLanes) {
          vf value = load(sum + n);
          for (int64_t chunk = 1; chunk < chunks; ++chunk) value += load(sum + chunk * sums + n);
          store(sum + n, value);
        }
      }
      finish_panel_taps(p, to, s_plane, panel, c, count);
    }
  });
}

// By blocks: tasks [begin, end) of a thread, one for every panel of output channels and block of `width` input
// channels, the blocks of a panel one after another; `size` tiles at a time. The thread transforms all inputs and
// gradients that they read.
struct BlockTasks {
  const Conv3x3WeightGradient& p;
  const Tiles& tiles;
  const Points points;
  int64_t C, width, begin, end, size;
  int64_t blocks, row, first_panel, last_panel, first_block, last_block;
  int64_t v_plane, v_block, d_plane, d_panel, s_plane, sums;
  float *v, *d;

  BlockTasks(const Conv3x3WeightGradient& gradient, const Tiles& of, int64_t inputs, int64_t of_block, int64_t first,
             int64_t last, int64_t at_a_time)
      : p(gradient),
        tiles(of),
        points(p.rows, p.columns),
        C(inputs),
        width(of_block),
        begin(first),
        end(last),
        size(at_a_time) {
    blocks = ceil_div(C, width);
    row = round_up(min(C, width), 16);
    first_panel = begin / blocks;
    last_panel = ceil_div(end, blocks);
    const bool all = last_panel - first_panel > 1;  // blocks of channels
    first_block = all ? 0 : begin % blocks;
    last_block = all ? blocks : (end - 1) % blocks + 1;
    v_plane = plane_stride(size * row);
    v_block = kPoints * v_plane;
    d_plane = plane_stride(size * kPanel);
    d_panel = kPoints * d_plane;
    s_plane = plane_stride(width * kPanel);
    sums = kPoints * s_plane;
    v = thread_scratch(kScratchV, (last_block - first_block) * v_block);
    d = thread_scratch(kScratchGradients, (last_panel - first_panel) * d_panel);
  }

  // V and D of `size` tiles from `first` on.
  DDPM_FAST_NOINLINE void transform(int64_t first) const {
    const int64_t T = min(size, tiles.total - first);
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t c = block * width;
      transform_inputs(InputMaps(p), points, tiles, first, first + T, c, min(width, C - c),
                       v + (block - first_block) * v_block, row, v_plane);
    }
    transform_gradients(p, tiles, first, first + T, first_panel, last_panel, d, d_plane, d_panel);
  }

  // Adds these tiles to a task's S; with the last ones, dweight is made of it.
  DDPM_FAST_NOINLINE void add(int64_t task, int64_t first, float* s) const {
    const int64_t T = min(size, tiles.total - first);
    const int64_t panel = task / blocks, block = task % blocks, c = block * width, count = min(width, C - c);
    if (first == 0) clear_unused(points, s, width * kPanel, s_plane);
    PrefetchQueue queue;
    for (int64_t i = 0; i < kPoints; ++i) {
      if (first + T == tiles.total) {  // what finish_panel_taps writes
        spread(min<int64_t>(kPanel, p.K - panel * kPanel), i, kPoints,
               [&](int64_t n) { queue.add_to_write(p.dweight + ((panel * kPanel + n) * C + c) * 9, count * 9); });
      }
      if (!points.has(i)) continue;
      add_products(v + (block - first_block) * v_block + i * v_plane, row,
                   d + (panel - first_panel) * d_panel + i * d_plane, T, tiles.using_point(i).within(first, first + T),
                   count, p.K - panel * kPanel, s + i * s_plane, first > 0, queue);
    }
    if (first + T < tiles.total) return;
    for (int64_t n = 0; n < count; n += kLanes) {
      finish_panel_taps(p, s + n * kPanel, s_plane, panel, c + n, min<int64_t>(kLanes, count - n));
    }
  }
};

inline void weight_gradient_by_blocks(const Conv3x3WeightGradient& p, const Tiles& tiles, int64_t C) {
  const int64_t num_panels = panels(p.K), widest = gradient_block();
  const int64_t size = tiles_at_a_time(tiles, most_of_blocks(),
                                       ceil_div(C, widest) * round_up(min(C, widest), 16) + num_panels * kPanel);
  // Blocks alike, and narrower ones where there are not as many tasks as threads; the sums are the same.
  int64_t width = round_up(ceil_div(C, ceil_div(C, widest)), kLanes);
  while (width > kLanes && num_panels * ceil_div(C, width) < thread_count()) width = round_up(width / 2, kLanes);
  const int64_t tasks = num_panels * ceil_div(C, width), grain = pieces_of(width * tiles.total * kCyclesOfProducts);
  if (size < tiles.total) {  // the sums of all tasks are kept from tiles to tiles
    return parallel(tasks, grain, [&](int64_t begin, int64_t end) {
      const BlockTasks own(p, tiles, C, width, begin, end, size);
      float* s = thread_scratch(kScratchSums, (end - begin) * own.sums);
      for (int64_t first = 0; first < tiles.total; first += size) {
        own.transform(first);
        for (int64_t task = begin; task < end; ++task) own.add(task, first, s + (task - begin) * own.sums);
      }
    });
  }
  const auto add = [](const BlockTasks& of, int64_t task) { of.add(task, 0, thread_scratch(kScratchSums, of.sums)); };
  const int64_t threads = min(min(thread_count(), Shares::kMostThreads), ceil_div(tasks, grain));
  Helpers<BlockTasks, decltype(add)> helpers(threads, add);
  parallel(threads, 1, [&](int64_t first_thread, int64_t last_thread) {
    for (int64_t i = first_thread; i < last_thread; ++i) {
      const BlockTasks own(p, tiles, C, width, tasks * i / threads, tasks * (i + 1) / threads, size);
      own.transform(0);
      helpers.work(i, own, own.begin, own.end);
      helpers.help(i);
    }
  });
}

inline void plain_weight_gradient(const Conv3x3WeightGradient& p) {
  const Tiles tiles(p.B, p.H, p.W);
  const int64_t C = p.channels[0] + p.channels[1];
  if (kPoints * C * p.K <= most_sums() && tiles.total >= kMinTiles) {
    weight_gradient_by_points(p, tiles, C);
  } else {
    weight_gradient_by_blocks(p, tiles, C);
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
