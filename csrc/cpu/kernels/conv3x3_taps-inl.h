// The Winograd transform of a 3×3 convolution's weight, U in conv3x3-inl.h: packed for products, output channels side
// by side.
#pragma once

#include "conv3x3_points-inl.h"
#include "dispatch-inl.h"
#include "gemm-inl.h"
#include "shuffle-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// Lane l is element 9·l + tap of nine vectors.
template <int kTap>
DDPM_FAST_INLINE vf gather_tap(const vf (&parts)[9]) {
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
  return shuffle(mixed, mixed, lanes_of(place));
}

// Of a mirrored weight whose input channels have their taps in a row, those of one input channel and kLanes output
// channels, 9 apart: 9 is odd, so the floats of one tap lie in different lanes of nine vectors. write(tap, channels).
template <typename Write>
DDPM_FAST_INLINE void gather_taps(const float* from, const Write& write) {
  const vf parts[9] = {load(from),
                       load(from + kLanes),
                       load(from + 2 * kLanes),
                       load(from + 3 * kLanes),
                       load(from + 4 * kLanes),
                       load(from + 5 * kLanes),
                       load(from + 6 * kLanes),
                       load(from + 7 * kLanes),
                       load(from + 8 * kLanes)};
  write(8, gather_tap<0>(parts));
  write(7, gather_tap<1>(parts));
  write(6, gather_tap<2>(parts));
  write(5, gather_tap<3>(parts));
  write(4, gather_tap<4>(parts));
  write(3, gather_tap<5>(parts));
  write(2, gather_tap<6>(parts));
  write(1, gather_tap<7>(parts));
  write(0, gather_tap<8>(parts));
}

// The lane of a vector of channels that has the place 9·channel + tap in its lane l of nine vectors.
template <int kTap>
DDPM_FAST_INLINE vf spread_tap(vf channels) {
  constexpr auto channel = [](int l) constexpr {
    int c = 0;
    while ((9 * c + kTap) % kLanes != l) ++c;
    return c;
  };
  return shuffle(channels, channels, lanes_of(channel));
}

// Vector `kPart` of the nine in which the taps of a channel lie side by side; of `spread`, one for each tap.
template <int kPart>
DDPM_FAST_INLINE vf join_taps(const vf (&spread)[9]) {
  vf joined = spread[0];
#pragma GCC unroll 9
  for (int tap = 1; tap < 9; ++tap) {
    const auto here = [&](int l) { return (kLanes * kPart + l) % 9 == tap ? -1 : 0; };
    joined = lanes_of(here) ? spread[tap] : joined;
  }
  return joined;
}

// to[9·c + tap] = read(tap)'s lane c, for kLanes channels: what gather_taps takes apart.
template <typename Read>
DDPM_FAST_INLINE void put_taps(const Read& read, float* to) {
  const vf spread[9] = {spread_tap<0>(read(0)), spread_tap<1>(read(1)), spread_tap<2>(read(2)),
                        spread_tap<3>(read(3)), spread_tap<4>(read(4)), spread_tap<5>(read(5)),
                        spread_tap<6>(read(6)), spread_tap<7>(read(7)), spread_tap<8>(read(8))};
  store(to, join_taps<0>(spread));
  store(to + kLanes, join_taps<1>(spread));
  store(to + 2 * kLanes, join_taps<2>(spread));
  store(to + 3 * kLanes, join_taps<3>(spread));
  store(to + 4 * kLanes, join_taps<4>(spread));
  store(to + 5 * kLanes, join_taps<5>(spread));
  store(to + 6 * kLanes, join_taps<6>(spread));
  store(to + 7 * kLanes, join_taps<7>(spread));
  store(to + 8 * kLanes, join_taps<8>(spread));
}

DDPM_FAST_INLINE bool has_rows(const Conv3x3Weight& w) { return !w.mirrored && w.in_stride == 9; }
DDPM_FAST_INLINE bool has_mirrored_rows(const Conv3x3Weight& w) { return w.mirrored && w.out_stride == 9; }

// Of a weight whose output channels have their taps in a row, 9·kLanes of kLanes of them: nine transpositions.
// write(9·n + tap, kLanes output channels).
template <typename Write>
DDPM_FAST_INLINE void transpose_taps(const Conv3x3Weight& w, const float* from, const Write& write) {
  for (int part = 0; part < 9; ++part) {
    vf rows[kLanes];
#pragma GCC unroll 16
    for (int n = 0; n < kLanes; ++n) rows[n] = load(from + n * w.out_stride + part * kLanes);
    transpose(rows);
#pragma GCC unroll 16
    for (int n = 0; n < kLanes; ++n) write(part * kLanes + n, rows[n]);
  }
}

// The taps of input channels [c, c + count) for the output channels [first, first + columns) of one vector, count and
// columns at most kLanes: tap (i, j) of channel c + n as taps[n·9 + 3i + j], output channels side by side, 0 past
// `columns`.
DDPM_FAST_INLINE void load_taps(const Conv3x3Weight& w, int64_t first, int64_t columns, int64_t c, int64_t count,
                                float (*taps)[kLanes]) {
  const float* from = w.data + first * w.out_stride + c * w.in_stride;
  if (columns == kLanes && count == kLanes && has_rows(w)) {
    transpose_taps(w, from, [&](int i, vf tap) DDPM_FAST_LAMBDA { store(taps[i], tap); });
    return;
  }
  if (columns == kLanes && has_mirrored_rows(w)) {
    for (int64_t n = 0; n < count; ++n) {
      gather_taps(from + n * w.in_stride, [&](int i, vf tap) DDPM_FAST_LAMBDA { store(taps[9 * n + i], tap); });
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

// The taps of `count` channels where they act.
DDPM_FAST_INLINE void place_taps(const Conv3x3Weight& w, int64_t count, float (*taps)[kLanes]) {
  if (w.rows.plain() && w.columns.plain()) return;
  for (int64_t n = 0; n < count; ++n, taps += 9) {
    vf placed[9] = {};
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) {
        placed[3 * w.rows.of[i] + w.columns.of[j]] += load(taps[3 * i + j]);
      }
    }
    for (int i = 0; i < 9; ++i) store(taps[i], placed[i]);
  }
}

// U of output channels [first, first + columns) and input channels [begin, end): u + point·plane gets (end - begin)
// rows of kPanel floats, of which those of the last vector that are past `columns` are 0.
template <bool kAll>
inline void transform_weight_of(const Conv3x3Weight& w, int64_t first, int64_t columns, int64_t begin, int64_t end,
                                float* u, int64_t plane) {
  alignas(64) float taps[9 * kLanes][kLanes];
  const Points points(w.rows, w.columns);
  for (int64_t c = begin; c < end; c += kLanes) {
    const int64_t count = min<int64_t>(kLanes, end - c);
    for (int half = 0; half < panel_width(columns); half += kLanes) {
      load_taps(w, first + half, min<int64_t>(kLanes, columns - half), c, count, taps);
      place_taps(w, count, taps);
      for (int64_t n = 0; n < count; ++n) {
        const float* t = taps[9 * n];
        const Six a = tap_points({load(t), load(t + 3 * kLanes), load(t + 6 * kLanes)});
        const Six b = tap_points({load(t + kLanes), load(t + 4 * kLanes), load(t + 7 * kLanes)});
        const Six d = tap_points({load(t + 2 * kLanes), load(t + 5 * kLanes), load(t + 8 * kLanes)});
        float* to = u + (c - begin + n) * kPanel + half;
        const auto put = [&](int i, vf x, vf y, vf z) DDPM_FAST_LAMBDA {
          const Six u = tap_points({x, y, z});
          float* at = fresh(to + i * 6 * plane);
          if (kAll || points.first_column) store(at, u.a0);
          store(at + plane, u.a1);
          store(at + 2 * plane, u.a2);
          store(at + 3 * plane, u.a3);
          store(at + 4 * plane, u.a4);
          if (kAll || points.last_column) store(at + 5 * plane, u.a5);
        };
        if (kAll || points.first_row) put(0, a.a0, b.a0, d.a0);
        put(1, a.a1, b.a1, d.a1);
        put(2, a.a2, b.a2, d.a2);
        put(3, a.a3, b.a3, d.a3);
        put(4, a.a4, b.a4, d.a4);
        if (kAll || points.last_row) put(5, a.a5, b.a5, d.a5);
      }
    }
  }
}

inline void transform_weight(const Conv3x3Weight& w, int64_t first, int64_t columns, int64_t begin, int64_t end,
                             float* u, int64_t plane) {
  const auto transform = [&](auto all) {
    transform_weight_of<decltype(all)::value>(w, first, columns, begin, end, u, plane);
  };
  dispatch(transform, Points(w.rows, w.columns).all());
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
