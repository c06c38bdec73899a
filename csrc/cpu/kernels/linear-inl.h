// 1×1 convolutions of one or two maps side by side as matrix products, with the bias, a residual and a scale per row.
//
// Each call packs the weight; packing is faster than strided reads from about 16 rows on. Of many rows each thread
// packs all of it for itself: reading what another packed takes longer (conv3x3-inl.h has the times). Sums over rows
// are sums of segments in order, and the segments depend on the sizes alone, so no result depends on the number of
// threads.
#pragma once

#include "gemm-inl.h"
#include "linear.h"
#include "norm_rows-inl.h"
#include "pack-inl.h"
#include "parallel-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr int kRowsSlot = 2, kPackedSlot = 6, kLinearSumsSlot = 7;  // of thread_scratch
constexpr int64_t kTaskProducts = int64_t{1} << 18;  // fewer multiplications do not pay for waking a thread
constexpr int64_t kBlockRows = 96;                   // at most, of a block of rows of A
// Terms per partial sum. The rounding error of n terms added in a row grows with √n; that of torch's products does not.
constexpr int64_t kSumLength = 256;

// Packs one panel of (k, n) = row_scale[k]·b[k·stride + n]·gain[n], k in [0, K), of which `columns` exist; row_scale
// and gain may be null.
inline void pack_straight(const float* b, int64_t stride, const float* row_scale, const float* gain, int64_t K,
                          int64_t columns, float* panel) {
  const vf gain_left = gain ? load_upto(gain, columns) : splat(1.0f);
  const vf gain_right = gain && columns > kLanes ? load_upto(gain + kLanes, columns - kLanes) : splat(1.0f);
  for (int64_t k = 0; k < K; ++k, b += stride, panel += kPanel) {
    const vf factor = splat(row_scale ? row_scale[k] : 1.0f);
    store(panel, load_upto(b, columns) * factor * gain_left);
    store(panel + kLanes, columns > kLanes ? load_upto(b + kLanes, columns - kLanes) * factor * gain_right : vf{});
  }
}

// The partial sums of the terms so far, (rows, kPanel): writes or adds a row of registers.
struct Pile {
  float* sums;
  bool empty;

  DDPM_FAST_INLINE void operator()(int m, vf left, vf right) {
    float* to = sums + m * kPanel;
    if (!empty) left += load(to), right += load(to + kLanes);
    store(to, left);
    store(to + kLanes, right);
  }
};

// The epilogue: stores rows of a product to `out` with row_scale, bias, residual and add (LinearForward).
struct LinearOut {
  const LinearForward& p;
  int64_t row, column;

  DDPM_FAST_INLINE void operator()(int m, vf left, vf right) {
    const int64_t columns = p.K - column;
    take(row + m, column, columns, left);
    if (columns > kLanes) take(row + m, column + kLanes, columns - kLanes, right);
  }
  DDPM_FAST_INLINE void take(int64_t r, int64_t n, int64_t count, vf value) const {
    if (count >= kLanes) {
      finish(r, n, value, Whole{});
    } else {
      finish(r, n, value, Part{count});
    }
  }
  template <typename Lanes>
  DDPM_FAST_INLINE void finish(int64_t r, int64_t n, vf value, Lanes lanes) const {
    float* to = p.out + r * p.K + n;
    if (p.row_scale) value *= splat(p.row_scale[r]);
    if (p.bias) value += lanes.get(p.bias + n);
    if (p.residual) value += lanes.get(p.residual + r * p.K + n);
    if (p.add) value += lanes.get(to);
    lanes.put(to, value);
  }
};

// The same of whole panels, with a residual or without and with nothing added to `out`.
template <bool kResidual>
struct WholeLinearOut {
  const LinearForward& p;
  int64_t row, column;
  vf left_bias, right_bias;

  WholeLinearOut(const LinearForward& of, int64_t first_row, int64_t first_column)
      : p(of), row(first_row), column(first_column), left_bias{}, right_bias{} {
    if (p.bias) left_bias = load(p.bias + column), right_bias = load(p.bias + column + kLanes);
  }
  DDPM_FAST_INLINE void operator()(int m, vf left, vf right) {
    const int64_t r = row + m, at = r * p.K + column;
    if (p.row_scale) left *= splat(p.row_scale[r]), right *= splat(p.row_scale[r]);
    left += left_bias, right += right_bias;
    if constexpr (kResidual) left += load(p.residual + at), right += load(p.residual + at + kLanes);
    store(p.out + at, left);
    store(p.out + at + kLanes, right);
  }
};

// The epilogue of sums in memory, (count, kPanel).
DDPM_FAST_NOINLINE void finish_linear_rows(const LinearForward& p, const float* sums, int64_t count, int64_t row,
                                           int64_t column) {
  LinearOut out{p, row, column};
  for (int64_t m = 0; m < count; ++m) out(m, load(sums + m * kPanel), load(sums + m * kPanel + kLanes));
}

// Addresses and row strides of a block's rows, for each of the two maps.
struct BlockRows {
  const float* a[2];
  int64_t stride[2];
};

// Rows whose addresses differ by a multiple of 4 KB share a set of the first-level cache, so this function copies them
// to rows with 16 floats of padding. `fresh`: the thread has not copied this block yet.
inline BlockRows rows_of_block(const float* const* input, const int64_t* channels, int64_t first, int64_t rows,
                               bool fresh) {
  BlockRows block;
  for (int part = 0; part < 2; ++part) {
    const int64_t C = channels[part];
    block.a[part] = input[part] + first * C;
    block.stride[part] = C;
    if (C == 0 || C % 1024 != 0) continue;
    const int64_t before = part ? rows * (channels[0] + 16) : 0, stride = C + 16;
    float* to = thread_scratch(kRowsSlot, rows * (channels[0] + channels[1] + 32)) + before;
    for (int64_t r = 0; fresh && r < rows; ++r) __builtin_memcpy(to + r * stride, block.a[part] + r * C, C * 4);
    block.a[part] = to;
    block.stride[part] = stride;
  }
  return block;
}

// R rows of out from row `row` on, one panel of columns; `local` is the first row's index in the block.
template <int R>
DDPM_FAST_NOINLINE void linear_tile(const LinearForward& p, const BlockRows& block, int64_t local, int64_t row,
                                    int64_t column, const float* panel) {
  const int64_t columns = min<int64_t>(kPanel, p.K - column);
  for (int64_t r = 0; r < R; ++r) {
    const int64_t at = (row + r) * p.K + column;
    prefetch_to_write(p.out + at, columns);
    if (p.residual != nullptr) prefetch(p.residual + at, columns);
  }
  float before[R * kPanel];
  Pile pile{before, true};
  Sums<R> sums;
  sums.clear();
  int64_t until_flush = kSumLength, left = p.channels[0] + p.channels[1];
  for (int part = 0; part < 2; ++part) {
    const int64_t stride = block.stride[part];
    const float* a = block.a[part] + local * stride;
    for (int64_t remaining = p.channels[part]; remaining > 0;) {
      const int64_t steps = min(remaining, until_flush);
      add_terms(sums, a, stride, 1, panel, steps);
      remaining -= steps;
      until_flush -= steps;
      left -= steps;
      if (until_flush == 0 && left > 0) {
        sums.write(pile);
        pile.empty = false;
        sums.clear();
        until_flush = kSumLength;
      }
    }
  }
  if (!pile.empty || columns < kPanel || p.add) {
    sums.write(pile);
    finish_linear_rows(p, pile.sums, R, row, column);
  } else if (p.residual != nullptr) {
    WholeLinearOut<true> out(p, row, column);
    sums.write(out);
  } else {
    WholeLinearOut<false> out(p, row, column);
    sums.write(out);
  }
}

template <int R = kRows>
DDPM_FAST_INLINE void linear_tile_of(int64_t rows, const LinearForward& p, const BlockRows& block, int64_t local,
                                     int64_t row, int64_t column, const float* panel) {
  if constexpr (R > 0) {
    if (rows == R) return linear_tile<R>(p, block, local, row, column, panel);
    linear_tile_of<R - 1>(rows, p, block, local, row, column, panel);
  }
}

// Rows per block of a matrix of C columns: whole tiles that take at most half of the second-level cache, independent of
// the number of threads. Few, since a block's panels write the same rows one after another, a line of each: of 1000
// rows those are more pages than a processor's table of them holds, which cost a fifth of the time of 64 → 384
// channels.
DDPM_FAST_INLINE int64_t block_rows(int64_t C) {
  return max<int64_t>(1, min<int64_t>(kBlockRows, second_level_floats() / 2 / C) / kRows) * kRows;
}
// Rows per block with equally many blocks for each thread. Only for sums along rows: they do not depend on the blocks.
DDPM_FAST_INLINE int64_t even_block_rows(int64_t rows, int64_t C) {
  const int64_t blocks = round_up(max<int64_t>(1, ceil_div(rows, block_rows(C))), thread_count());
  return max<int64_t>(1, ceil_div(rows, blocks));
}

// Tasks of `products` multiplications each that are worth waking a thread for.
DDPM_FAST_INLINE int64_t task_grain(int64_t products) {
  return max<int64_t>(1, kTaskProducts / max<int64_t>(1, products));
}

// body(row, rows, i, groups) for `count` rows in groups of as many as the product takes.
template <typename Body>
DDPM_FAST_INLINE void over_row_groups(int64_t count, const Body& body) {
  const int64_t groups = ceil_div(count, kRows);
  for (int64_t g = 0, row = 0; g < groups; ++g) {
    const int64_t rows = (count - row + groups - g - 1) / (groups - g);
    body(row, rows, g, groups);
    row += rows;
  }
}

// Step i of `steps` in which `count` rows of C floats from row `first` on come ahead of time. Without it the products
// of the first panel of a block wait for memory, which costs an eighth of the time of 384 → 128 channels.
DDPM_FAST_INLINE void prefetch_rows(const float* map, int64_t C, int64_t first, int64_t count, int64_t i,
                                    int64_t steps) {
  spread(ceil_div(count * C, kCacheLine), i, steps,
         [&](int64_t line) { prefetch(map + first * C + line * kCacheLine, kCacheLine); });
}

// Calls body(block, panel, fresh, next) for every panel of every block, the panels of a block one after another.
// `fresh` is true where a thread's task before was no panel of this block, `next` where it mostly goes on with the
// block after this one.
template <typename Body>
inline void over_blocks(int64_t blocks, int64_t panel_count, int64_t products, const Body& body) {
  parallel_shares(blocks * panel_count, task_grain(products), [&] {
    return [&, expected = int64_t{-1}](int64_t i) mutable {
      const int64_t block = i / panel_count, panel = i % panel_count;
      body(block, panel, i != expected || panel == 0, block + 1 < blocks);
      expected = i + 1;
    };
  });
}

// Whether each thread packs the factor of products of so many rows for itself.
constexpr int64_t kRowsToPackApart = 64;  // of each thread
DDPM_FAST_INLINE bool packs_apart(int64_t rows) { return rows >= kRowsToPackApart * thread_count(); }

// over_blocks with a packed factor of `floats`: body(packed, block, panel, fresh, next). pack(first, last, to) packs
// panels [first, last).
template <typename Pack, typename Body>
inline void over_packed_blocks(int64_t rows, int64_t blocks, int64_t panel_count, int64_t products, int64_t floats,
                               int64_t pack_grain, const Pack& pack, const Body& body) {
  const bool apart = packs_apart(rows);
  float* shared = apart ? nullptr : thread_scratch(kPackedSlot, floats);
  if (!apart) parallel(panel_count, pack_grain, [&](int64_t begin, int64_t end) { pack(begin, end, shared); });
  parallel_shares(blocks * panel_count, task_grain(products), [&] {
    float* packed = apart ? thread_scratch(kPackedSlot, floats) : shared;
    // Of tasks one after another, up to the last: with as many as there are panels, all are packed.
    int64_t run = apart ? 0 : panel_count;
    return [&, packed, run, expected = int64_t{-1}](int64_t i) mutable {
      const int64_t block = i / panel_count, panel = i % panel_count;
      if (run < panel_count) {
        pack(panel, panel + 1, packed);
        run = i == expected ? run + 1 : 1;
      }
      body(packed, block, panel, i != expected || panel == 0, block + 1 < blocks);
      expected = i + 1;
    };
  });
}

inline void linear_forward(const LinearForward& p) {
  const int64_t C = p.channels[0] + p.channels[1];
  if (p.rows * p.K == 0) return;
  const int64_t block = even_block_rows(p.rows, max<int64_t>(C, 1)), blocks = ceil_div(p.rows, block);
  const auto pack = [&](int64_t begin, int64_t end, float* packed) {
    pack_columns(p.weight, C, p.gain, C, p.K, begin, end, packed);
  };
  over_packed_blocks(p.rows, blocks, panels(p.K), min(block, p.rows) * C * kPanel, packed_size(C, p.K),
                     task_grain(C * kPanel * 16), pack,
                     [&](const float* packed, int64_t b, int64_t panel, bool fresh, bool next) {
                       const int64_t first = b * block, count = min(block, p.rows - first);
                       const int64_t after = next ? min(block, p.rows - first - count) : 0;
                       const BlockRows from = rows_of_block(p.input, p.channels, first, count, fresh);
                       over_row_groups(count, [&](int64_t row, int64_t rows, int64_t g, int64_t groups) {
                         for (int part = 0; part < 2; ++part) {
                           prefetch_rows(p.input[part], p.channels[part], first + count, after, panel * groups + g,
                                         panels(p.K) * groups);
                         }
                         linear_tile_of(rows, p, from, row, first + row, panel * kPanel, packed + panel * C * kPanel);
                       });
                     });
}

// to[n] = Σ over c of x[c]·w[n·C + c] + bias[n] for one row of x and n in [0, count). It packs nothing: for one row,
// packing takes longer than the product.
inline void dot_outputs(const float* x, const float* w, const float* bias, int64_t C, int64_t count, float* to) {
  for (int64_t n = 0; n < count; ++n, w += C) {
    vf even = {}, odd = {};
    int64_t k = 0;
    for (; k + 2 * kLanes <= C; k += 2 * kLanes) {
      even = load(x + k) * load(w + k) + even;
      odd = load(x + k + kLanes) * load(w + k + kLanes) + odd;
    }
    for (; k < C; k += kLanes) even = load_upto(x + k, C - k) * load_upto(w + k, C - k) + even;
    to[n] = reduce_add(even + odd) + bias[n];
  }
}

inline void linears_forward(const LinearsForward& p) {
  int64_t tasks = 0;
  for (int64_t i = 0; i < p.count; ++i) tasks += panels(p.widths[i]);
  parallel(tasks, task_grain(p.C * kPanel * max<int64_t>(p.rows, 4)), [&](int64_t begin, int64_t end) {
    float* packed = thread_scratch(kRowsSlot, p.C * kPanel);
    int64_t i = 0, column = 0, panel = begin;  // `panel` of layer i, whose outputs begin at `column`
    for (; i < p.count && panel >= panels(p.widths[i]); ++i) panel -= panels(p.widths[i]), column += p.widths[i];
    for (int64_t task = begin; task < end; ++task, ++panel) {
      while (panel == panels(p.widths[i])) panel = 0, column += p.widths[i++];
      const int64_t first = panel * kPanel, columns = min<int64_t>(kPanel, p.widths[i] - first);
      const float *weight = p.weights[i] + first * p.C, *bias = p.biases[i] + first;
      float* out = p.out + column + first;
      if (p.rows <= 3) {
        for (int64_t r = 0; r < p.rows; ++r) dot_outputs(p.x + r * p.C, weight, bias, p.C, columns, out + r * p.K);
        continue;
      }
      pack_columns(weight, p.C, p.C, columns, packed);
      product_panel(p.x, p.C, 1, packed, p.rows, p.C, out, p.K, columns, false, kSumLength);
      for (int64_t r = 0; r < p.rows; ++r) {
        for (int64_t n = 0; n < columns; ++n) out[r * p.K + n] += bias[n];
      }
    }
  });
}

// Packs columns [first, first + k) of a weight (K, C) for products of `grad` (rows, K) with it: panels [begin, end).
inline void pack_weight(const float* weight, int64_t K, int64_t C, int64_t first, int64_t k, int64_t begin, int64_t end,
                        float* packed) {
  for (int64_t p = begin; p < end; ++p) {
    pack_straight(weight + first + p * kPanel, C, nullptr, nullptr, K, min<int64_t>(kPanel, k - p * kPanel),
                  packed + p * K * kPanel);
  }
}

inline void linear_data_gradient(const LinearDataGradient& p) {
  const int64_t C = p.channels[0] + p.channels[1], block = even_block_rows(p.rows, max<int64_t>(p.K, 1)),
                blocks = ceil_div(p.rows, block);
  for (int part = 0; part < 2; ++part) {
    const int64_t k = p.channels[part];
    if (p.dinput[part] == nullptr || k == 0) continue;
    const auto pack = [&](int64_t begin, int64_t end, float* packed) {
      pack_weight(p.weight, p.K, C, part ? p.channels[0] : 0, k, begin, end, packed);
    };
    over_packed_blocks(p.rows, blocks, panels(k), min(block, p.rows) * p.K * kPanel, packed_size(p.K, k),
                       task_grain(p.K * kPanel * 4), pack,
                       [&](const float* packed, int64_t b, int64_t panel, bool fresh, bool next) {
                         const int64_t first = b * block, count = min(block, p.rows - first), of_grad[2] = {p.K, 0};
                         const int64_t after = next ? min(block, p.rows - first - count) : 0;
                         const float* grad[2] = {p.grad, p.grad};
                         const BlockRows from = rows_of_block(grad, of_grad, first, count, fresh);
                         const int64_t columns = min<int64_t>(kPanel, k - panel * kPanel);
                         over_row_groups(count, [&](int64_t row, int64_t rows, int64_t g, int64_t groups) {
                           prefetch_rows(p.grad, p.K, first + count, after, panel * groups + g, panels(k) * groups);
                           float* to = p.dinput[part] + (first + row) * k + panel * kPanel;
                           for (int64_t r = 0; r < rows; ++r) prefetch_to_write(to + r * k, columns);
                           product_panel(from.a[0] + row * from.stride[0], from.stride[0], 1,
                                         packed + panel * p.K * kPanel, rows, p.K, to, k, columns, p.add, kSumLength);
                         });
                       });
  }
}

// Σ over rows [first, last) of rows `stride` apart.
template <typename Lanes>
DDPM_FAST_INLINE vf sum_of_rows(const float* values, int64_t stride, int64_t first, int64_t last, Lanes lanes) {
  KahanSum sum;
  for (int64_t row = first; row < last; ++row) sum.add(lanes.get(values + row * stride));
  return sum.sum;
}

// sums (count) = Σ over parts of partials (parts, stride).
inline void add_partials(const float* partials, int64_t parts, int64_t stride, int64_t count, float* sums) {
  parallel(ceil_div(count, kLanes), max<int64_t>(1, 16384 / (kLanes * parts)), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kLanes, last = min(count, end * kLanes);
    over_channels(last - first, [&](int64_t c, auto lanes) {
      KahanSum sum;
      for (int64_t i = 0; i < parts; ++i) sum.add(lanes.get(partials + i * stride + first + c));
      lanes.put(sums + first + c, sum.sum);
    });
  });
}

// dweight of one segment of rows for one panel of one part: c (K, columns of the panel) with row stride C.
inline void weight_gradient_panel(const LinearWeightGradient& p, int part, int64_t panel, int64_t first, int64_t last,
                                  float* c, int64_t C) {
  constexpr int64_t kChunk = 64, kShortRow = 128;  // the processor sees longer rows coming
  float packed[kChunk * kPanel] __attribute__((aligned(64)));
  const int64_t k = p.channels[part], columns = min<int64_t>(kPanel, k - panel * kPanel);
  const float* gain = p.gain ? p.gain + (part ? p.channels[0] : 0) + panel * kPanel : nullptr;
  const float* input = p.input[part] + panel * kPanel;
  for (int64_t row = first; row < last; row += kChunk) {
    const int64_t rows = min(kChunk, last - row);
    const float* row_scale = p.row_scale ? p.row_scale + row : nullptr;
    pack_straight(input + row * k, k, row_scale, gain, rows, columns, packed);
    const int64_t after = min(kChunk, last - row - rows);
    over_row_groups(p.K, [&](int64_t m, int64_t count, int64_t g, int64_t groups) {
      if (p.K <= kShortRow) prefetch_rows(p.grad, p.K, row + rows, after, g, groups);
      spread(after, g, groups, [&](int64_t n) { prefetch(input + (row + rows + n) * k, columns); });
      product_panel(p.grad + row * p.K + m, 1, p.K, packed, count, rows, c + m * C, C, columns, row > first);
    });
  }
}

// Of the rows of a sum of `tasks` parts, by sizes alone.
DDPM_FAST_INLINE int64_t weight_gradient_segments(int64_t rows, int64_t tasks) {
  return max<int64_t>(1, min<int64_t>(rows / 1024, ceil_div(64, tasks)));
}

inline void linear_weight_gradient(const LinearWeightGradient& p) {
  const int64_t C = p.channels[0] + p.channels[1], first_panels = panels(p.channels[0]),
                all_panels = first_panels + panels(p.channels[1]);
  const int64_t tasks = (p.dweight ? all_panels : 0) + (p.dbias ? 1 : 0);
  if (tasks == 0 || p.K == 0) return;
  const int64_t segments = weight_gradient_segments(p.rows, tasks);
  const int64_t length = ceil_div(p.rows, segments), stride = round_up(p.K * C + p.K, 16);
  float* partials = segments > 1 ? thread_scratch(kLinearSumsSlot, segments * stride) : nullptr;
  const int64_t products = min(length, p.rows) * p.K * kPanel;
  over_blocks(segments, tasks, products, [&](int64_t segment, int64_t task, bool, bool) {
    const int64_t first = segment * length, last = min(p.rows, first + length);
    if (p.dweight == nullptr || task == all_panels) {
      float* sums = partials ? partials + segment * stride + p.K * C : p.dbias;
      over_channels(
          p.K, [&](int64_t n, auto lanes) { lanes.put(sums + n, sum_of_rows(p.grad + n, p.K, first, last, lanes)); });
      return;
    }
    const int part = task >= first_panels;
    const int64_t panel = task - (part ? first_panels : 0);
    float* c = partials ? partials + segment * stride : p.dweight;
    weight_gradient_panel(p, part, panel, first, last, c + (part ? p.channels[0] : 0) + panel * kPanel, C);
  });
  if (partials && p.dweight) add_partials(partials, segments, stride, p.K * C, p.dweight);
  if (partials && p.dbias) add_partials(partials + p.K * C, segments, stride, p.K, p.dbias);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
