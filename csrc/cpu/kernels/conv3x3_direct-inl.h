// 3×3 convolutions of maps of a few pixels, as one matrix product. Of the fewest pixels with the weights as they are
// (dot_products-inl.h), and else, or of a gradient, with packed ones:
//
//   A[pixel][c][tap] = the pixel's 3×3 neighbours             output = A · Wᵀ, W[k][c][tap]
//   A[pixel][block][tap][c], the same                         output = A · W, W[block][tap][c][k] packed panel by panel
//
// with blocks of kLanes channels: a block of W is made in one piece of memory.
//
// A single tile, or maps of one or two pixels, pay for no transform of the weights: Winograd's saves at most three
// quarters of so few products, and costs four times the memory of the weights. Two whole tiles do where weights are
// packed.
#pragma once

#include "conv3x3-inl.h"
#include "dot_products-inl.h"
#include "pack-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// Rows of `row` floats, one per pixel.
inline void gather_neighbours(const Conv3x3Forward& p, int64_t C, float* a, int64_t row) {
  const int64_t up = p.upsampled ? 1 : 0, height = p.H >> up, width = p.W >> up;
  for (int64_t m = 0; m < p.B * p.H * p.W; ++m) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      const int64_t y = m / p.W % p.H + tap / 3 - 1, x = m % p.W + tap % 3 - 1;
      const bool inside = y >= 0 && y < p.H && x >= 0 && x < p.W;
      const int64_t pixel = (m / p.W / p.H * height + (y >> up)) * width + (x >> up);
      for (int64_t c = 0; c < C; c += kLanes) {
        const int64_t width = min<int64_t>(kLanes, C - c);
        float* to = a + m * row + 9 * c + tap * width;
        for (int64_t done = 0, count; done < width; done += count) {
          const int part = c + done < p.channels[0] ? 0 : 1;
          const int64_t channel = c + done - (part == 0 ? 0 : p.channels[0]);
          count = min(width - done, p.channels[part] - channel);
          const float* from = p.input[part] + pixel * p.channels[part] + channel;
          store_upto(to + done, inside ? load_upto(from, count) : vf{}, count);
        }
      }
    }
  }
}

// Output channels [first, first + columns) as a panel of 9·C rows. Weights of whole vectors are not copied in between,
// and the block that follows is on its way meanwhile.
inline void pack_taps(const Conv3x3Weight& w, int64_t first, int64_t columns, int64_t C, float* packed) {
  alignas(64) float taps[9 * kLanes][kLanes];
  for (int64_t c = 0; c < C; c += kLanes) {
    const int64_t count = min<int64_t>(kLanes, C - c), next = min<int64_t>(kLanes, C - c - count);
    for (int half = 0; half < kPanel; half += kLanes) {
      const float* from = w.data + (first + half) * w.out_stride + c * w.in_stride;
      float* to = packed + 9 * c * kPanel + half;
      const bool whole = columns - half >= kLanes;
      if (whole && count == kLanes && has_rows(w)) {
        for (int64_t k = 0; k < kLanes; ++k) prefetch(from + k * w.out_stride + 9 * kLanes, 9 * next);
        transpose_taps(w, from,
                       [&](int i, vf tap) DDPM_FAST_LAMBDA { store(to + (i % 9 * kLanes + i / 9) * kPanel, tap); });
      } else if (whole && has_mirrored_rows(w)) {
        for (int64_t n = 0; n < next; ++n) prefetch(from + (kLanes + n) * w.in_stride, 9 * kLanes);
        for (int64_t n = 0; n < count; ++n) {
          gather_taps(from + n * w.in_stride,
                      [&](int i, vf tap) DDPM_FAST_LAMBDA { store(to + (i * count + n) * kPanel, tap); });
        }
      } else {
        load_taps(w, first + half, min<int64_t>(kLanes, max<int64_t>(0, columns - half)), c, count, taps);
        for (int64_t n = 0; n < count; ++n) {
          for (int64_t tap = 0; tap < 9; ++tap) store(to + (tap * count + n) * kPanel, load(taps[9 * n + tap]));
        }
      }
    }
  }
}

// Rows of `row` floats, one per pixel, in the order of weights: [c][tap].
inline void gather_neighbours_as_weights(const Conv3x3Forward& p, float* a, int64_t row) {
  const int64_t up = p.upsampled ? 1 : 0, height = p.H >> up, width = p.W >> up;
  for (int64_t m = 0; m < p.B * p.H * p.W; ++m) {
    float* to = a + m * row;
    for (int part = 0; part < 2; to += 9 * p.channels[part++]) {
      const float* from[9];
      int64_t step[9];  // 1, or 0 outside of the map, which reads zeros
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t y = m / p.W % p.H + tap / 3 - 1, x = m % p.W + tap % 3 - 1;
        const bool inside = y >= 0 && y < p.H && x >= 0 && x < p.W;
        const int64_t pixel = (m / p.W / p.H * height + (y >> up)) * width + (x >> up);
        from[tap] = inside ? p.input[part] + pixel * p.channels[part] : kZeroVector;
        step[tap] = inside ? 1 : 0;
      }
      int64_t c = 0;
      for (; c + kLanes <= p.channels[part]; c += kLanes) {
        put_taps([&](int tap) DDPM_FAST_LAMBDA { return load(from[tap] + c * step[tap]); }, to + 9 * c);
      }
      for (; c < p.channels[part]; ++c) {
        for (int tap = 0; tap < 9; ++tap) to[9 * c + tap] = from[tap][c * step[tap]];
      }
    }
  }
}

// Outputs of channels [first, last) from their sums, m[pixel·row + channel - first].
inline void finish_directly(const Conv3x3Forward& p, int64_t first, int64_t last, const float* m, int64_t row) {
  for (int64_t k = first, count; k < last; k += count) {
    const OutputSlice slice(p, 0, k, last);
    count = slice.count;
    for (int64_t i = 0; i < p.B * p.H * p.W; ++i) {
      const int64_t at = i * slice.pixel, image = i / (p.H * p.W);
      const vf bias = slice.bias == nullptr ? vf{} : load_upto(slice.bias + image * p.bias_stride, count);
      vf value = load_upto(m + i * row + (k - first), count) + bias;
      if (slice.residual != nullptr) value += load_upto(slice.residual + at, count);
      store_upto(slice.output + at, value * splat(slice.factor), count);
    }
  }
}

inline void forward_directly(const Conv3x3Forward& p, int64_t C, int64_t K) {
  const int64_t pixels = p.B * p.H * p.W, depth = 9 * C, row = padded(depth);
  const bool in_rows = has_rows(p.weight) && pixels <= kMaxDotRows;
  parallel(panels(K), pieces_of(C * (9 * pixels + (in_rows ? 0 : kCyclesOfTaps / 2))),
           [&](int64_t first, int64_t last) {
             float* a = thread_scratch(kScratchV, pixels * row);
             if (in_rows) {
               const int64_t begin = first * kPanel, end = min(K, last * kPanel), count = end - begin;
               float* m = thread_scratch(kScratchM, pixels * padded(count));
               gather_neighbours_as_weights(p, a, row);
               dot_products(a, row, pixels, p.weight.data + begin * p.weight.out_stride, p.weight.out_stride, count,
                            depth, m, padded(count));
               return finish_directly(p, begin, end, m, padded(count));
             }
             float* packed = thread_scratch(kScratchU, depth * kPanel);
             float* m = thread_scratch(kScratchM, pixels * kPanel);
             gather_neighbours(p, C, a, row);
             for (int64_t panel = first; panel < last; ++panel) {
               const int64_t column = panel * kPanel, columns = min<int64_t>(kPanel, K - column);
               pack_taps(p.weight, column, columns, C, packed);
               deep_product(a, row, 1, packed, pixels, depth, kPanel, m, kPanel, false);
               finish_directly(p, column, column + columns, m, kPanel);
             }
           });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
