// 3×3 convolutions of stride 1 and padding 1 on channels-last maps; the kernels of conv3x3-inl.h, free of torch.
#pragma once

#include <stdint.h>

#include "joined_norm.h"

namespace ddpm_fast {

// Where each of an axis' three taps acts: on the pixel before (0), on the pixel itself (1) or on the one after (2).
// Taps in one place add up. Of a mirrored weight, of the taps as they are mirrored.
struct TapPlaces {
  int8_t of[3] = {0, 1, 2};
  constexpr bool used(int place) const { return of[0] == place || of[1] == place || of[2] == place; }
  constexpr bool plain() const { return of[0] == 0 && of[1] == 1 && of[2] == 2; }
};

// The weight of a convolution from C to K channels: element (k, c, i, j) lies at
// data[k·out_stride + c·in_stride + 3i + j], or with the taps mirrored at ... + 8 - (3i + j). A torch weight (K, C, 3,
// 3) has strides 9·C and 9; for the gradient of the input, the same memory is a mirrored weight from K to C channels
// with 9 and 9·C.
struct Conv3x3Weight {
  const float* data;
  int64_t out_stride, in_stride;
  bool mirrored;
  TapPlaces rows{}, columns{};
};

// The epilogue on finished pixels: SiLU(RMSNorm(out)·gain·(1 + scale) + shift) + residual, see norm_silu.h.
struct PixelNorm {
  const float* gain;      // (K)
  const float* scale;     // (B, K) or null
  const float* shift;     // (B, K) or null
  const float* residual;  // (B, H, W, K) or null; may be out
  float* out;             // (B, H, W, K); may be the convolution's output
  float* norms;           // (B, H, W) or null
};

// output = (conv3x3(input, weight) + bias + residual)·factor. Maps of several parts have their channels side by side.
struct Conv3x3Forward {
  int64_t B, H, W;  // of the convolution
  bool upsampled;   // the input has half the height and width, and each of its pixels becomes 2×2
  bool pooled;      // the output has half the height and width: sums of 2×2 pixels; H and W are even then
  // 2: the map is every second pixel of every second row, from the address on, of one of twice the height and width.
  int64_t input_step = 1, output_step = 1;
  const float* input[2];  // (B, H, W, channels[i])
  int64_t channels[2];    // C in all; channels[1] is 0 where there is one part
  Conv3x3Weight weight;
  const float* bias;         // (K), or (B, K) with bias_stride = K; or null
  int64_t bias_stride;       // of images
  const float* residual[2];  // like output, or null
  float factor = 1.0f;
  float* output[2];            // (B, H, W, output_channels[i])
  int64_t output_channels[2];  // K in all
  const PixelNorm* norm;       // of the output, or null; for an output of one part that is not pooled
  // Or null. The input, of one part, is this norm's `out`, to be made from its inputs: as the convolution reads it, or
  // in that memory beforehand.
  const JoinedNormForward* input_norm = nullptr;
  // Or null: a norm of the output, which has one part and is not pooled. Its statistics are made, and known, where they
  // can be made of what is in a cache.
  JoinedNormForward* output_norm = nullptr;
};

// dweight (K, C, 3, 3) = Σ over pixels; maps as in the forward.
struct Conv3x3WeightGradient {
  int64_t B, H, W;
  bool upsampled;
  const float* input[2];
  int64_t channels[2];
  const float* grad;  // (B, H, W, K)
  int64_t K;
  int64_t grad_step = 1;        // as output_step of the forward
  TapPlaces rows{}, columns{};  // of the weight's taps
  bool add = false;             // to dweight
  float* dweight;               // contiguous, or null
  float* dbias;                 // (K), Σ over pixels of grad, or null
};

struct Conv3x3Kernels {
  void (*forward)(const Conv3x3Forward&);
  void (*weight_gradient)(const Conv3x3WeightGradient&);
};

}  // namespace ddpm_fast
