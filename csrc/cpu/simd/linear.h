// 1×1 convolutions of one or two maps side by side as matrix products, with the bias, a residual and a scale per row.
//
// The weight is packed on the way, which pays from some sixteen rows on. Sums over rows are made per segment of rows, which
// depends on the sizes alone, then over segments in order.
#pragma once

#include "../linear.h"
#include "gemm.h"
#include "norm_rows.h"
#include "parallel.h"

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr int kPackedSlot = 6, kLinearSumsSlot = 7;  // of thread_scratch
constexpr int64_t kTaskProducts = int64_t{1} << 18;  // fewer multiplications do not pay for waking a thread
constexpr int64_t kBlockFloats = 65536;              // of A in a block of rows: it stays in the second-level cache

// Packs panels [first, last) of (k, n) = gain[k]·w[n·stride + k], with k in [0, K) and n in [0, N); gain may be null.
inline void pack_transposed(
    const float* w, int64_t stride, const float* gain, int64_t K, int64_t N, int64_t first, int64_t last, float* packed) {
  for (int64_t p = first; p < last; ++p) {
    const int64_t columns = smaller<int64_t>(kPanel, N - p * kPanel);
    float* panel = packed + p * K * kPanel;
    over_channels(K, [&](int64_t k, auto lanes) {
      const vf factor = gain ? lanes.get(gain + k) : splat(1.0f);
      const int64_t count = smaller<int64_t>(kLanes, K - k);
      for (int64_t n = 0; n < columns; ++n) {
        float values[kLanes];
        store(values, lanes.get(w + (p * kPanel + n) * stride + k) * factor);
        for (int64_t i = 0; i < count; ++i) panel[(k + i) * kPanel + n] = values[i];
      }
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t n = columns; n < kPanel; ++n) panel[(k + i) * kPanel + n] = 0;
      }
    });
  }
}

// Packs one panel of (k, n) = row_scale[k]·b[k·stride + n]·gain[n], k in [0, K), of which `columns` exist; both may be null.
inline void pack_straight(
    const float* b, int64_t stride, const float* row_scale, const float* gain, int64_t K, int64_t columns, float* panel) {
  const vf gain_left = gain ? load_upto(gain, columns) : splat(1.0f);
  const vf gain_right = gain && columns > kLanes ? load_upto(gain + kLanes, columns - kLanes) : splat(1.0f);
  for (int64_t k = 0; k < K; ++k, b += stride, panel += kPanel) {
    const vf factor = splat(row_scale ? row_scale[k] : 1.0f);
    store(panel, load_upto(b, columns) * factor * gain_left);
    store(panel + kLanes, columns > kLanes ? load_upto(b + kLanes, columns - kLanes) * factor * gain_right : vf{});
  }
}

// Takes rows of a product to LinearForward's out, see there.
struct LinearOut {
  const LinearForward& p;
  int64_t row, column;

  DDPM_FAST_INLINE void operator()(int m, vf left, vf right) {
    const int64_t columns = p.N - column;
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
    float* to = p.out + r * p.N + n;
    if (p.row_scale) value *= splat(p.row_scale[r]);
    if (p.bias) value += lanes.get(p.bias + n);
    if (p.residual) value += lanes.get(p.residual + r * p.N + n);
    if (p.add) value += lanes.get(to);
    lanes.put(to, value);
  }
};

template <int R>
inline __attribute__((noinline)) void linear_tile(const LinearForward& p, int64_t row, int64_t column, const float* panel) {
  Sums<R> sums;
  sums.clear();
  for (int part = 0; part < 2; ++part) {
    const int64_t K = p.k[part];
    const float* a = p.a[part] + row * K;
    for (int64_t k = 0; k < K; ++k) {
      sums.add(a + k, K, load(panel), load(panel + kLanes));
      panel += kPanel;
    }
  }
  LinearOut out{p, row, column};
  sums.write(out);
}

template <int R = kRows>
DDPM_FAST_INLINE void linear_tile_of(
    int64_t rows, const LinearForward& p, int64_t row, int64_t column, const float* panel) {
  if constexpr (R > 0) {
    if (rows == R) return linear_tile<R>(p, row, column, panel);
    linear_tile_of<R - 1>(rows, p, row, column, panel);
  }
}

// Rows of a block for a matrix of K columns: whole tiles, the same whatever the threads.
DDPM_FAST_INLINE int64_t block_rows(int64_t K) { return larger<int64_t>(1, kBlockFloats / K / kRows) * kRows; }

// Tasks that make up enough work for a thread, each of so many multiplications.
DDPM_FAST_INLINE int64_t task_grain(int64_t products) {
  return larger<int64_t>(1, kTaskProducts / larger<int64_t>(1, products));
}

// body(block, panel) for all of them; a block's panels stay together.
template <typename Body>
inline void over_blocks(int64_t blocks, int64_t panel_count, int64_t products, const Body& body) {
  parallel(blocks * panel_count, task_grain(products), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i / panel_count, i % panel_count);
  });
}

inline void linear_forward(const LinearForward& p) {
  const int64_t K = p.k[0] + p.k[1];
  if (p.rows * p.N == 0) return;
  float* packed = thread_scratch(kPackedSlot, packed_size(K, p.N));
  parallel(panels(p.N), task_grain(K * kPanel * 16), [&](int64_t begin, int64_t end) {
    pack_transposed(p.weight, K, p.gain, K, p.N, begin, end, packed);
  });
  const int64_t block = block_rows(larger<int64_t>(K, 1)), blocks = ceil_div(p.rows, block);
  over_blocks(blocks, panels(p.N), smaller(block, p.rows) * K * kPanel, [&](int64_t b, int64_t panel) {
    const int64_t end = smaller(p.rows, (b + 1) * block), groups = ceil_div(end - b * block, kRows);
    for (int64_t g = 0, row = b * block; g < groups; ++g) {
      const int64_t rows = (end - row + groups - g - 1) / (groups - g);
      linear_tile_of(rows, p, row, panel * kPanel, packed + panel * K * kPanel);
      row += rows;
    }
  });
}

// Packs a weight (N, K) for products of `grad` (rows, N) with it: columns [first, first + k) as panels, on all threads.
inline void pack_weight(const float* weight, int64_t N, int64_t K, int64_t first, int64_t k, float* packed) {
  parallel(panels(k), task_grain(N * kPanel * 4), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      pack_straight(weight + first + p * kPanel, K, nullptr, nullptr, N, smaller<int64_t>(kPanel, k - p * kPanel),
                    packed + p * N * kPanel);
    }
  });
}

inline void linear_data_gradient(const LinearDataGradient& p) {
  const int64_t K = p.k[0] + p.k[1], block = block_rows(larger<int64_t>(p.N, 1)), blocks = ceil_div(p.rows, block);
  for (int part = 0; part < 2; ++part) {
    const int64_t k = p.k[part];
    if (p.dx[part] == nullptr || k == 0) continue;
    float* packed = thread_scratch(kPackedSlot, packed_size(p.N, k));
    pack_weight(p.weight, p.N, K, part ? p.k[0] : 0, k, packed);
    over_blocks(blocks, panels(k), smaller(block, p.rows) * p.N * kPanel, [&](int64_t b, int64_t panel) {
      const int64_t row = b * block;
      product_panel(p.grad + row * p.N, p.N, 1, packed + panel * p.N * kPanel, smaller(block, p.rows - row), p.N,
                    p.dx[part] + row * k + panel * kPanel, k, smaller<int64_t>(kPanel, k - panel * kPanel), p.add);
    });
  }
}

// sums (count) = Σ over parts of partials (parts, stride).
inline void add_partials(const float* partials, int64_t parts, int64_t stride, int64_t count, float* sums) {
  parallel(ceil_div(count, kLanes), larger<int64_t>(1, 16384 / (kLanes * parts)), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kLanes, last = smaller(count, end * kLanes);
    over_channels(last - first, [&](int64_t c, auto lanes) {
      vf sum = lanes.get(partials + first + c);
      for (int64_t i = 1; i < parts; ++i) sum += lanes.get(partials + i * stride + first + c);
      lanes.put(sums + first + c, sum);
    });
  });
}

// dweight of one segment of rows for one panel of one part: c (N, columns of the panel) with row stride K.
inline void weight_gradient_panel(
    const LinearWeightGradient& p, int part, int64_t panel, int64_t first, int64_t last, float* c, int64_t K) {
  constexpr int64_t kChunk = 128;
  float packed[kChunk * kPanel] __attribute__((aligned(64)));
  const int64_t k = p.k[part], columns = smaller<int64_t>(kPanel, k - panel * kPanel);
  const float* gain = p.gain ? p.gain + (part ? p.k[0] : 0) + panel * kPanel : nullptr;
  for (int64_t row = first; row < last; row += kChunk) {
    const int64_t rows = smaller(kChunk, last - row);
    pack_straight(p.a[part] + row * k + panel * kPanel, k, p.row_scale ? p.row_scale + row : nullptr, gain, rows, columns,
                  packed);
    product_panel(p.grad + row * p.N, 1, p.N, packed, p.N, rows, c, K, columns, row > first);
  }
}

inline void linear_weight_gradient(const LinearWeightGradient& p) {
  const int64_t K = p.k[0] + p.k[1], first_panels = panels(p.k[0]), all_panels = first_panels + panels(p.k[1]);
  const int64_t tasks = (p.dweight ? all_panels : 0) + (p.dbias ? 1 : 0);
  if (tasks == 0 || p.N == 0) return;
  const int64_t segments = larger<int64_t>(1, smaller<int64_t>(p.rows / 1024, ceil_div(64, tasks)));
  const int64_t length = ceil_div(p.rows, segments), stride = round_up(p.N * K + p.N, 16);
  float* partials = segments > 1 ? thread_scratch(kLinearSumsSlot, segments * stride) : nullptr;
  const int64_t products = smaller(length, p.rows) * p.N * kPanel;
  over_blocks(segments, tasks, products, [&](int64_t segment, int64_t task) {
    const int64_t first = segment * length, last = smaller(p.rows, first + length);
    if (p.dweight == nullptr || task == all_panels) {
      float* sums = partials ? partials + segment * stride + p.N * K : p.dbias;
      over_channels(p.N, [&](int64_t n, auto lanes) { lanes.put(sums + n, vf{}); });
      for (int64_t row = first; row < last; ++row) {
        over_channels(p.N, [&](int64_t n, auto lanes) { accumulate(sums, n, lanes, lanes.get(p.grad + row * p.N + n)); });
      }
      return;
    }
    const int part = task >= first_panels;
    const int64_t panel = task - (part ? first_panels : 0);
    float* c = partials ? partials + segment * stride : p.dweight;
    weight_gradient_panel(p, part, panel, first, last, c + (part ? p.k[0] : 0) + panel * kPanel, K);
  });
  if (partials && p.dweight) add_partials(partials, segments, stride, p.N * K, p.dweight);
  if (partials && p.dbias) add_partials(partials + p.N * K, segments, stride, p.N, p.dbias);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
