// 3×3 convolutions after nearest upsampling, and their gradients, as four convolutions of the small map's size.
//
// Every second pixel of every second row is a phase of the large map; there are four. Upsampling repeats pixels, so
// that along one axis the even outputs are g0·d[i-1] + (g1 + g2)·d[i] and the odd ones (g0 + g1)·d[i] + g2·d[i+1]. A
// phase is hence a convolution whose taps act in two of three places, and one of its axis' six points vanishes
// (conv3x3_points-inl.h): 100 products per 16 pixels of the small map, where tiles of the large map take 144.
#pragma once

#include "conv3x3_forward-inl.h"
#include "conv3x3_gradient-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// The places of the taps for the even and for the odd pixels of an axis. A gradient of the input has its taps mirrored.
struct Phases {
  TapPlaces of[2];
};
constexpr Phases kUpsampled{{{{0, 1, 1}}, {{1, 1, 2}}}}, kUpsampledGradient{{{{1, 1, 2}}, {{0, 1, 1}}}};

// body(row, column, first pixel) for each phase of a map of 2·width pixels per row.
template <typename Body>
DDPM_FAST_INLINE void for_phases(int64_t width, const Body& body) {
  for (int row = 0; row < 2; ++row) {
    for (int column = 0; column < 2; ++column) body(row, column, row * 2 * width + column);
  }
}

// From a map of p.H × p.W to the phases of the output.
inline void to_phases(const Conv3x3Forward& p, const Phases& phases) {
  Conv3x3Forward of[4] = {p, p, p, p};
  for_phases(p.W, [&](int row, int column, int64_t pixel) {
    Conv3x3Forward& phase = of[2 * row + column];
    phase.output_step = 2;
    phase.output[0] += pixel * p.output_channels[0];
    if (p.residual[0] != nullptr) phase.residual[0] += pixel * p.output_channels[0];
    phase.weight.rows = phases.of[row];
    phase.weight.columns = phases.of[column];
  });
  forward_in_passes({of, 4, 1}, Tiles(p.B, p.H, p.W), p.channels[0] + p.channels[1], p.output_channels[0]);
}

// From the phases of the input to a map of p.H × p.W.
inline void from_phases(const Conv3x3Forward& p, const Phases& phases) {
  Conv3x3Forward of[4] = {p, p, p, p};
  for_phases(p.W, [&](int row, int column, int64_t pixel) {
    Conv3x3Forward& phase = of[2 * row + column];
    phase.input_step = 2;
    phase.input[0] += pixel * p.channels[0];
    phase.weight.rows = phases.of[row];
    phase.weight.columns = phases.of[column];
  });
  forward_in_passes({of, 1, 4}, Tiles(p.B, p.H, p.W), p.channels[0], p.output_channels[0] + p.output_channels[1]);
}

// dweight from a map of p.H × p.W and the phases of the gradient.
inline void weight_gradient_of_phases(const Conv3x3WeightGradient& p, const Phases& phases) {
  for_phases(p.W, [&](int row, int column, int64_t pixel) {
    Conv3x3WeightGradient phase = p;
    phase.grad_step = 2;
    phase.grad += pixel * p.K;
    phase.rows = phases.of[row];
    phase.columns = phases.of[column];
    phase.add = pixel > 0;
    plain_weight_gradient(phase);
  });
}

// Rough cycles of a point's product, for a tile and a pair of an input channel and a panel of output channels.
constexpr int64_t kCyclesOfPoint = 2;
// Fewer tiles of a phase do not pay for four transforms of the taps, which each thread makes for itself. Measured with
// two threads on a Zen 4: 32 tiles lost a tenth, 64 gained a fifth.
constexpr int64_t kMinTilesOfPhase = 64;

// Whether the phases of a map of H × W are fewer products than its tiles, the transforms of the taps included.
DDPM_FAST_INLINE bool by_phases(int64_t B, int64_t H, int64_t W) {
  const Tiles large(B, H, W), small(B, H / 2, W / 2);
  return 4 * (25 * kCyclesOfPoint * small.products() / kPoints + kCyclesOfTaps) <
         kCyclesOfPoint * large.products() + kCyclesOfTaps;
}

inline void conv3x3_forward(const Conv3x3Forward& p) {
  // The large map is one part, without a norm after it.
  const bool fits = p.upsampled ? p.output_channels[1] == 0 && p.norm == nullptr : p.pooled && p.channels[1] == 0;
  const bool enough = Tiles(p.B, p.H / 2, p.W / 2).total >= kMinTilesOfPhase;
  if (!fits || !enough || !by_phases(p.B, p.H, p.W)) return plain_forward(p);
  Conv3x3Forward small = p;
  small.H /= 2;
  small.W /= 2;
  small.upsampled = small.pooled = false;
  if (p.upsampled) return to_phases(small, kUpsampled);
  from_phases(small, kUpsampledGradient);
}

inline void conv3x3_weight_gradient(const Conv3x3WeightGradient& p) {
  if (p.dbias != nullptr) sum_rows(p.grad, p.B * p.H * p.W, p.K, p.dbias);
  if (p.dweight == nullptr) return;
  if (!p.upsampled || !by_phases(p.B, p.H, p.W)) return plain_weight_gradient(p);
  Conv3x3WeightGradient small = p;
  small.H /= 2;
  small.W /= 2;
  small.upsampled = false;
  weight_gradient_of_phases(small, kUpsampled);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
