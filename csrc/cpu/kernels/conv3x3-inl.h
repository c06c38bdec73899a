// 3×3 convolutions by Winograd's F(4×4, 3×3), channels-last. The map is cut into tiles of 4×4 outputs:
//
//   V[point][tile][c]  = transform of the tile's 6×6 inputs
//   U[point][panel][c] = transform of the taps, kPanel output channels side by side
//   M[point][tile][k]  = V[point] · U[point]
//   output tile        = transform of M + bias + residual
//
// All transforms vectorise over channels. Two orders of work, chosen by sizes alone:
// - by tiles: the taps are transformed once; each thread takes groups of tiles whose V and M stay in its second-level
//   cache through all steps. For large maps.
// - by panels: V of all tiles first; then each thread takes panels of output channels, transforming their taps on the
//   way, block by block: the weights are read once and their transform, four times their size, never leaves the cache.
//   For few tiles with many channels, where the weights are what has to be moved.
// conv3x3_forward-inl.h chooses, or takes conv3x3_direct-inl.h for the smallest maps.
#pragma once

#include "conv3x3.h"
#include "conv3x3_prefetch-inl.h"
#include "gemm-inl.h"
#include "norm_rows-inl.h"
#include "parallel-inl.h"
#include "shuffle-inl.h"
#include "winograd-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

enum ConvScratch { kScratchV, kScratchM, kScratchU, kScratchShared, kScratchZeros, kScratchGradients, kScratchSums };

// A bool as a constant, for template arguments.
template <bool kValue>
struct Bool {
  static constexpr bool value = kValue;
};

// body(Bool...) with each of the flags as a constant.
template <typename Body>
DDPM_FAST_INLINE void dispatch(const Body& body) {
  body();
}
template <typename Body, typename... Flags>
DDPM_FAST_INLINE void dispatch(const Body& body, bool flag, Flags... flags) {
  if (flag) {
    dispatch([&](auto... others) DDPM_FAST_LAMBDA { body(Bool<true>{}, others...); }, flags...);
  } else {
    dispatch([&](auto... others) DDPM_FAST_LAMBDA { body(Bool<false>{}, others...); }, flags...);
  }
}

// Planes that are a multiple of 4 KB apart share cache lines: 16 floats more between them.
DDPM_FAST_INLINE constexpr int64_t plane_stride(int64_t floats) { return round_up(floats, 16) + 16; }
// The same for rows of V.
DDPM_FAST_INLINE constexpr int64_t row_stride(int64_t C) { return C % 128 == 0 ? C + 16 : round_up(C, 16); }

alignas(64) constexpr float kZeroVector[kLanes] = {};

// V of a tile for kLanes or fewer channels: read(i, j) gives input (i, j), write(to, value) stores.
// Points are made in three passes of two rows, so that what is between the two axes stays in registers; its twelve
// vectors are cheaper to make from inputs loaded again than all thirty-six are to keep in memory.
template <typename Read, typename Write>
DDPM_FAST_INLINE void transform_tile(const Read& read, const Write& write, float* v, int64_t plane) {
  const auto put = [&](int i, vf c0, vf c1, vf c2, vf c3, vf c4, vf c5) DDPM_FAST_LAMBDA {
    const Six points = input_points({c0, c1, c2, c3, c4, c5});
    float* to = v + i * 6 * plane;
    write(to, points.a0);
    write(to + plane, points.a1);
    write(to + 2 * plane, points.a2);
    write(to + 3 * plane, points.a3);
    write(to + 4 * plane, points.a4);
    write(to + 5 * plane, points.a5);
  };
  const auto outer = [&](int j, int first) DDPM_FAST_LAMBDA {
    return outer_input_point(read(first, j), read(first + 2, j), read(first + 4, j));
  };
#pragma GCC unroll 2
  for (int first = 0; first < 2; ++first) {
    put(first * 5, outer(0, first), outer(1, first), outer(2, first), outer(3, first), outer(4, first),
        outer(5, first));
  }
  const auto inner = [&](float factor, float point, int i) DDPM_FAST_LAMBDA {
    const auto pair = [&](int j) DDPM_FAST_LAMBDA {
      return inner_input_points(read(1, j), read(2, j), read(3, j), read(4, j), factor, point);
    };
    const Two a = pair(0), b = pair(1), c = pair(2), d = pair(3), e = pair(4), f = pair(5);
    put(i, a.a0, b.a0, c.a0, d.a0, e.a0, f.a0);
    put(i + 1, a.a1, b.a1, c.a1, d.a1, e.a1, f.a1);
  };
  inner(-2.0f, kP, 1);
  inner(-0.5f, kQ, 3);
}

template <bool kUpsampled, bool kLeft, bool kRight>
DDPM_FAST_INLINE void transform_rows(const float* const* rows, int64_t pixel, int64_t channels, float* v,
                                     int64_t plane) {
  const float *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3], *r4 = rows[4], *r5 = rows[5];
  for (int64_t c = 0; c + kLanes <= channels; c += kLanes) {
    transform_tile(
        [&](int i, int j) DDPM_FAST_LAMBDA {
          if ((kLeft && j == 0) || (kRight && j == 5)) return vf{};
          const float* row = i == 0 ? r0 : i == 1 ? r1 : i == 2 ? r2 : i == 3 ? r3 : i == 4 ? r4 : r5;
          return load(row + (kUpsampled ? (j + 1) / 2 : j) * pixel + c);
        },
        [](float* to, vf value) DDPM_FAST_LAMBDA { store(to, value); }, v + c, plane);
  }
}

// V of one tile and some of a part's channels, which lie `pixel` floats apart: v + point·plane gets `channels` floats.
// `zeros` are 6·pixel of them.
inline void transform_input(const float* input, int64_t pixel, int64_t channels, bool upsampled, const Tiles& tiles,
                            const Tile& tile, const float* zeros, float* v, int64_t plane) {
  const int64_t height = upsampled ? tiles.H / 2 : tiles.H, width = upsampled ? tiles.W / 2 : tiles.W;
  int64_t done = 0;
  if (tile.x + 4 <= tiles.W) {
    const float* rows[6];
    const int64_t column = upsampled ? (tile.x >> 1) - 1 : tile.x - 1;
    for (int i = 0; i < 6; ++i) {
      const int64_t y = tile.y - 1 + i;
      const int64_t row = upsampled ? y >> 1 : y;
      rows[i] = y < 0 || y >= tiles.H ? zeros : input + ((tile.b * height + row) * width + column) * pixel;
    }
    const auto transform = [&](auto up, auto left, auto right) {
      transform_rows<decltype(up)::value, decltype(left)::value, decltype(right)::value>(rows, pixel, channels, v,
                                                                                         plane);
    };
    dispatch(transform, upsampled, tile.x == 0, tile.x + 4 == tiles.W);
    done = channels / kLanes * kLanes;
  }
  if (done == channels) return;
  const float* from[36];
  int64_t step[36];  // 1, or 0 at pixels outside, which read zeros
  for (int i = 0; i < 36; ++i) {
    const int64_t y = tile.y - 1 + i / 6, x = tile.x - 1 + i % 6;
    const bool inside = y >= 0 && y < tiles.H && x >= 0 && x < tiles.W;
    const int64_t row = upsampled ? y >> 1 : y, column = upsampled ? x >> 1 : x;
    from[i] = inside ? input + ((tile.b * height + row) * width + column) * pixel : kZeroVector;
    step[i] = inside ? 1 : 0;
  }
  for (int64_t c = done; c < channels; c += kLanes) {
    const int64_t count = min<int64_t>(kLanes, channels - c);
    transform_tile([&](int i, int j)
                       DDPM_FAST_LAMBDA { return load_upto(from[6 * i + j] + c * step[6 * i + j], count); },
                   [=](float* to, vf value) DDPM_FAST_LAMBDA { store_upto(to, value, count); }, v + c, plane);
  }
}

// to[8 - tap] lane l = from[9·l + tap].
template <int kTap>
DDPM_FAST_INLINE void gather_tap(const vf (&parts)[9], float (*to)[kLanes]) {
  vf mixed = parts[0];
#pragma GCC unroll 9
  for (int part = 1; part < 9; ++part) {
    // Lane 9·l + tap - kLanes·part of this part, where that is a lane.
    const auto here = [&](int place) {
      return ((place - kTap + kLanes * part) % 9 == 0 && place - kTap + kLanes * part >= 0 &&
              (place - kTap + kLanes * part) / 9 < kLanes)
                 ? -1
                 : 0;
    };
    mixed = lanes_of(here) ? parts[part] : mixed;
  }
  constexpr auto place = [](int l) constexpr { return (9 * l + kTap) % kLanes; };
  store(to[8 - kTap], shuffle(mixed, mixed, lanes_of(place)));
}

DDPM_FAST_INLINE void deinterleave(const float* from, float (*to)[kLanes]) {
  const vf parts[9] = {load(from),
                       load(from + kLanes),
                       load(from + 2 * kLanes),
                       load(from + 3 * kLanes),
                       load(from + 4 * kLanes),
                       load(from + 5 * kLanes),
                       load(from + 6 * kLanes),
                       load(from + 7 * kLanes),
                       load(from + 8 * kLanes)};
  gather_tap<0>(parts, to);
  gather_tap<1>(parts, to);
  gather_tap<2>(parts, to);
  gather_tap<3>(parts, to);
  gather_tap<4>(parts, to);
  gather_tap<5>(parts, to);
  gather_tap<6>(parts, to);
  gather_tap<7>(parts, to);
  gather_tap<8>(parts, to);
}

// The taps of input channels [c, c + count) for the output channels [first, first + columns) of one vector, count and
// columns at most kLanes: tap (i, j) of channel c + n as taps[n·9 + 3i + j], output channels side by side, 0 past
// `columns`.
DDPM_FAST_INLINE void load_taps(const Conv3x3Weight& w, int64_t first, int64_t columns, int64_t c, int64_t count,
                                float (*taps)[kLanes]) {
  const float* from = w.data + first * w.out_stride + c * w.in_stride;
  if (columns == kLanes && count == kLanes && !w.mirrored && w.in_stride == 9) {
    // Every output channel has 9·kLanes floats in a row: nine transpositions.
    for (int part = 0; part < 9; ++part) {
      vf rows[kLanes];
#pragma GCC unroll 16
      for (int n = 0; n < kLanes; ++n) rows[n] = load(from + n * w.out_stride + part * kLanes);
      transpose(rows);
#pragma GCC unroll 16
      for (int n = 0; n < kLanes; ++n) store(taps[part * kLanes + n], rows[n]);
    }
    return;
  }
  if (columns == kLanes && w.mirrored && w.out_stride == 9) {
    // Every input channel has 9·kLanes floats in a row, output channels 9 apart. Since 9 is odd, the places modulo
    // kLanes of one tap's floats are all different: it takes each lane from one of nine vectors, then orders the lanes.
    for (int64_t n = 0; n < count; ++n) {
      deinterleave(from + n * w.in_stride, taps + n * 9);
    }
    return;
  }
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t k = 0; k < kLanes; ++k) {
      for (int tap = 0; tap < 9; ++tap) {
        taps[n * 9 + (w.mirrored ? 8 - tap : tap)][k] =
            k < columns ? from[n * w.in_stride + k * w.out_stride + tap] : 0;
      }
    }
  }
}

// U of output channels [first, first + columns) and input channels [begin, end): u + point·plane gets (end - begin)
// rows of kPanel floats, of which those past `columns` are 0.
inline void transform_weight(const Conv3x3Weight& w, int64_t first, int64_t columns, int64_t begin, int64_t end,
                             float* u, int64_t plane) {
  alignas(64) float taps[9 * kLanes][kLanes];
  for (int64_t c = begin; c < end; c += kLanes) {
    const int64_t count = min<int64_t>(kLanes, end - c);
    for (int half = 0; half < kPanel; half += kLanes) {
      const int64_t left = columns - half;
      load_taps(w, first + half, left < 0 ? 0 : min<int64_t>(kLanes, left), c, count, taps);
      for (int64_t n = 0; n < count; ++n) {
        const float* t = taps[9 * n];
        const Six a = tap_points({load(t), load(t + 3 * kLanes), load(t + 6 * kLanes)});
        const Six b = tap_points({load(t + kLanes), load(t + 4 * kLanes), load(t + 7 * kLanes)});
        const Six d = tap_points({load(t + 2 * kLanes), load(t + 5 * kLanes), load(t + 8 * kLanes)});
        float* to = u + (c - begin + n) * kPanel + half;
        const auto put = [&](int i, vf x, vf y, vf z) DDPM_FAST_LAMBDA {
          const Six points = tap_points({x, y, z});
          float* at = to + i * 6 * plane;
          store(at, points.a0);
          store(at + plane, points.a1);
          store(at + 2 * plane, points.a2);
          store(at + 3 * plane, points.a3);
          store(at + 4 * plane, points.a4);
          store(at + 5 * plane, points.a5);
        };
        put(0, a.a0, b.a0, d.a0);
        put(1, a.a1, b.a1, d.a1);
        put(2, a.a2, b.a2, d.a2);
        put(3, a.a3, b.a3, d.a3);
        put(4, a.a4, b.a4, d.a4);
        put(5, a.a5, b.a5, d.a5);
      }
    }
  }
}

// Output channels from k on, at most kLanes and below `last`, that lie in one part.
struct OutputSlice {
  float* output;
  const float* residual;
  const float* bias;
  int64_t channels;  // of the part, its pixels' stride
  int64_t count;

  DDPM_FAST_INLINE OutputSlice(const Conv3x3Forward& p, int64_t k, int64_t last) {
    const int part = k < p.output_channels[0] ? 0 : 1;
    const int64_t channel = k - (part == 0 ? 0 : p.output_channels[0]);
    output = p.output[part] + channel;
    residual = p.residual[part] == nullptr ? nullptr : p.residual[part] + channel;
    bias = p.bias == nullptr ? nullptr : p.bias + k;
    channels = p.output_channels[part];
    count = min(min<int64_t>(kLanes, last - k), channels - channel);
  }
};

// The 4×4 outputs of a tile for up to kLanes channels from m + point·plane; with kPooled the sums of 2×2 of them.
// kWhole: the tile lies inside the map, and there are kLanes channels. The two outer rows of each axis' four are made
// apart from the inner two, from values loaded again, so that all stays in registers.
template <bool kPooled, bool kWhole, bool kResidual>
DDPM_FAST_INLINE void transform_output(const float* m, int64_t plane, const Tiles& tiles, const Tile& tile,
                                       const OutputSlice& slice) {
  const int64_t count = slice.count;
  const vf bias = slice.bias == nullptr ? vf{} : kWhole ? load(slice.bias) : load_upto(slice.bias, count);
  const auto put = [&](int64_t pixel, vf value) DDPM_FAST_LAMBDA {
    const int64_t at = pixel * slice.channels;
    value += bias;
    if constexpr (kWhole) {
      if constexpr (kResidual) value += load(slice.residual + at);
      store(slice.output + at, value);
    } else {
      if constexpr (kResidual) value += load_upto(slice.residual + at, count);
      store_upto(slice.output + at, value, count);
    }
  };
  const int64_t height = kWhole ? 4 : tiles.H - tile.y, width = kWhole ? 4 : tiles.W - tile.x;
  const auto at = [&](int i, int j) DDPM_FAST_LAMBDA { return load(m + (i * 6 + j) * plane); };
  if constexpr (kPooled) {
    const int64_t half = tiles.W / 2, first = (tile.b * (tiles.H / 2) + tile.y / 2) * half + tile.x / 2;
    const auto column = [&](int j) DDPM_FAST_LAMBDA {
      return outputs({at(0, j), at(1, j), at(2, j), at(3, j), at(4, j), at(5, j)});
    };
    const Four a = column(0), b = column(1), c = column(2), d = column(3), e = column(4), f = column(5);
    const auto row = [&](int64_t pixel, const Four& upper, const Four& lower) DDPM_FAST_LAMBDA {
      put(pixel, (upper.a0 + upper.a1) + (lower.a0 + lower.a1));
      if (width > 2) put(pixel + 1, (upper.a2 + upper.a3) + (lower.a2 + lower.a3));
    };
    row(first, outputs({a.a0, b.a0, c.a0, d.a0, e.a0, f.a0}), outputs({a.a1, b.a1, c.a1, d.a1, e.a1, f.a1}));
    if (height > 2) {
      row(first + half, outputs({a.a2, b.a2, c.a2, d.a2, e.a2, f.a2}), outputs({a.a3, b.a3, c.a3, d.a3, e.a3, f.a3}));
    }
  } else {
    const int64_t first = (tile.b * tiles.H + tile.y) * tiles.W + tile.x;
    const auto row = [&](int i, const Four& y) DDPM_FAST_LAMBDA {
      if (i >= height) return;
      const int64_t pixel = first + i * tiles.W;
      put(pixel, y.a0);
      if (width > 1) put(pixel + 1, y.a1);
      if (width > 2) put(pixel + 2, y.a2);
      if (width > 3) put(pixel + 3, y.a3);
    };
    const auto even = [&](int j)
                          DDPM_FAST_LAMBDA { return even_outputs(at(0, j), at(1, j), at(2, j), at(3, j), at(4, j)); };
    const auto odd = [&](int j)
                         DDPM_FAST_LAMBDA { return odd_outputs(at(1, j), at(2, j), at(3, j), at(4, j), at(5, j)); };
    const auto rows = [&](int i, Two a, Two b, Two c, Two d, Two e, Two f) DDPM_FAST_LAMBDA {
      row(i, outputs({a.a0, b.a0, c.a0, d.a0, e.a0, f.a0}));
      row(i + 2, outputs({a.a1, b.a1, c.a1, d.a1, e.a1, f.a1}));
    };
    rows(0, even(0), even(1), even(2), even(3), even(4), even(5));
    rows(1, odd(0), odd(1), odd(2), odd(3), odd(4), odd(5));
  }
}

// Columns [first, first + columns) of the outputs of tiles [begin, end); m holds their sums, `row` floats from tile to
// tile.
inline void finish_columns(const Conv3x3Forward& p, const Tiles& tiles, int64_t begin, int64_t end, int64_t first,
                           int64_t columns, const float* m, int64_t row, int64_t plane) {
  const int64_t last = min(first + columns, p.output_channels[0] + p.output_channels[1]);
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile(tiles, t);
    const bool inside = tile.y + 4 <= tiles.H && tile.x + 4 <= tiles.W;
    for (int64_t k = first, count; k < last; k += count) {
      const OutputSlice slice(p, k, last);
      count = slice.count;
      const float* sums = m + (t - begin) * row + (k - first);
      const auto pool = [&](auto residual) {
        transform_output<true, false, decltype(residual)::value>(sums, plane, tiles, tile, slice);
      };
      const auto transform = [&](auto whole, auto residual) {
        transform_output<false, decltype(whole)::value, decltype(residual)::value>(sums, plane, tiles, tile, slice);
      };
      if (p.pooled) {
        dispatch(pool, slice.residual != nullptr);
      } else {
        dispatch(transform, inside && count == kLanes, slice.residual != nullptr);
      }
    }
  }
}

// The norm of `count` pixels from `first` on, at most four and all of one image. First the norms of all, each of which
// is a chain of additions, a division and a square root: one by one they would be waited for.
inline void norm_pixels(const Conv3x3Forward& p, int64_t b, int64_t first, int64_t count) {
  const PixelNorm& norm = *p.norm;
  const int64_t K = p.output_channels[0];
  const Affine affine{.gain = norm.gain,
                      .offset = nullptr,
                      .scale = norm.scale == nullptr ? nullptr : norm.scale + b * K,
                      .shift = norm.shift == nullptr ? nullptr : norm.shift + b * K};
  float norms[4];
  for (int64_t i = 0; i < count; ++i) norms[i] = row_norm(p.output[0] + (first + i) * K, nullptr, K);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t pixel = first + i;
    if (norm.norms != nullptr) norm.norms[pixel] = norms[i];
    rms_apply<true>(p.output[0] + pixel * K, norms[i], nullptr, affine,
                    norm.residual == nullptr ? nullptr : norm.residual + pixel * K, norm.out + pixel * K, K, nullptr);
  }
}

inline void norm_tile(const Conv3x3Forward& p, const Tiles& tiles, const Tile& tile) {
  const int64_t height = min<int64_t>(4, tiles.H - tile.y), width = min<int64_t>(4, tiles.W - tile.x);
  for (int64_t i = 0; i < height; ++i) {
    norm_pixels(p, tile.b, (tile.b * tiles.H + tile.y + i) * tiles.W + tile.x, width);
  }
}

// V of tiles [begin, end) and channels [c, c + count) of both parts: v + point·plane + tile·row.
inline void transform_inputs(const float* const* input, const int64_t* channels, bool upsampled, const Tiles& tiles,
                             int64_t begin, int64_t end, int64_t c, int64_t count, float* v, int64_t row,
                             int64_t plane) {
  const int64_t floats = 6 * max(channels[0], channels[1]);
  float* zeros = thread_scratch(kScratchZeros, floats);
  for (int64_t i = 0; i < floats; ++i) zeros[i] = 0;
  const int64_t left = max<int64_t>(0, min(c + count, channels[0]) - c), skipped = max<int64_t>(0, c - channels[0]);
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile(tiles, t);
    float* to = v + (t - begin) * row;
    if (left > 0) transform_input(input[0] + c, channels[0], left, upsampled, tiles, tile, zeros, to, plane);
    if (left < count) {
      transform_input(input[1] + skipped, channels[1], count - left, upsampled, tiles, tile, zeros, to + left, plane);
    }
  }
}

// Measured on two cores of a Zen 4 and of a Zen 3 (1 MB and 512 KB of second-level cache each, 32 MB of third-level):
// tiles of a group, a whole number of passes of the product's kernel of kRows; the largest transform of the taps that
// is made as a whole; the least tiles for which that pays; the floats of V that are made at a time.
constexpr int64_t kGroup = kLanes == 16 ? 14 : 18;
constexpr int64_t kMaxSharedU = 2 << 20, kMinTiles = 128, kMaxV = 2 << 20;

// Rough cycles of a Zen 4: of a panel's taps and products for one channel (and tile), and of a tile's inputs for one.
constexpr int64_t kCyclesOfTaps = 360, kCyclesOfProducts = 80, kCyclesOfInputs = 16;
constexpr int64_t kCyclesOfPiece = 80000;  // less is not worth another thread

// How many tasks of so many cycles make a piece.
DDPM_FAST_INLINE int64_t pieces_of(int64_t cycles) { return max<int64_t>(1, kCyclesOfPiece / max<int64_t>(1, cycles)); }

// Channels of a piece of M's sums, whose rounding is most of Winograd's. A gradient has shorter ones: backward passes
// it through every layer, and gradients of gains and biases sum what it has gathered. They cost a sixth of the product.
constexpr int64_t kForwardPiece = 64, kGradientPiece = 16;

DDPM_FAST_INLINE int64_t channels_of_piece(const Conv3x3Forward& p, int64_t C) {
  return piece_of(C, p.weight.mirrored ? kGradientPiece : kForwardPiece);
}

inline void forward_by_tiles(const Conv3x3Forward& p, const Tiles& tiles, int64_t C, int64_t K) {
  float* u = thread_scratch(kScratchShared, kPoints * packed_size(C, K));
  const int64_t num_panels = panels(K), point = C * kPanel, piece = channels_of_piece(p, C);
  parallel(num_panels * ceil_div(C, 16), pieces_of(16 * kCyclesOfTaps), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i % num_panels, c = i / num_panels * 16;
      transform_weight(p.weight, panel * kPanel, min<int64_t>(kPanel, K - panel * kPanel), c, min<int64_t>(C, c + 16),
                       u + panel * point + c * kPanel, num_panels * point);
    }
  });
  // As many groups for each thread; a tile's result does not depend on its group.
  const int64_t groups = round_up(ceil_div(tiles.total, kGroup), thread_count());
  const int64_t size = ceil_div(tiles.total, groups), v_row = row_stride(C), m_row = row_stride(num_panels * kPanel);
  const int64_t v_plane = plane_stride(size * v_row), m_plane = plane_stride(size * m_row);
  parallel(ceil_div(tiles.total, size), pieces_of(size * C * num_panels * kCyclesOfProducts),
           [&](int64_t first, int64_t last) {
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
                                 m + i * m_plane + panel * kPanel, m_row, kPanel, false, piece);
                 }
               }
               finish_columns(p, tiles, begin, end, 0, K, m, m_row, m_plane);
               for (int64_t t = begin; p.norm != nullptr && t < end; ++t) norm_tile(p, tiles, Tile(tiles, t));
             }
           });
}

constexpr int64_t kChannelBlock = 64;  // input channels whose taps are transformed at a time

// V lies block by block of channels: what one product reads is one piece of memory.
inline void forward_by_panels(const Conv3x3Forward& p, const Tiles& tiles, int64_t C, int64_t K, int64_t first_tile,
                              int64_t last_tile) {
  const int64_t T = last_tile - first_tile, blocks = ceil_div(C, kChannelBlock),
                row = round_up(min(C, kChannelBlock), 16), piece = channels_of_piece(p, min(C, kChannelBlock));
  const int64_t v_plane = plane_stride(T * row), v_block = kPoints * v_plane, m_plane = plane_stride(T * kPanel);
  float* v = thread_scratch(kScratchShared, blocks * v_block);
  parallel(blocks * T, pieces_of(row * kCyclesOfInputs), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin, count; n < end; n += count) {
      const int64_t block = n / T, t = n % T, c = block * kChannelBlock;
      count = min(end - n, T - t);
      transform_inputs(p.input, p.channels, p.upsampled, tiles, first_tile + t, first_tile + t + count, c,
                       min(kChannelBlock, C - c), v + block * v_block + t * row, row, v_plane);
    }
  });
  parallel(panels(K), pieces_of(C * (T * kCyclesOfProducts + kCyclesOfTaps)), [&](int64_t first, int64_t last) {
    const int64_t u_plane = plane_stride(kChannelBlock * kPanel);
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
                        kPanel, block > 0, piece);
        }
      }
      finish_columns(p, tiles, first_tile, last_tile, panel * kPanel, columns, m, kPanel, m_plane);
    }
  });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
