// Products of maps as matrices (1×1 convolutions): the arguments of the kernels in linear-inl.h. Free of torch.
#pragma once

#include <stdint.h>

namespace ddpm_fast {

// The input A is one map or two side by side, (rows, channels[i]) each with its own memory: C channels in all, and
// channels[1] is 0 where there is one map. The weight W is (K, C), torch's (O, I). Null is an absent argument.

// out = row_scale·(A·(gain·W)ᵀ) + bias + residual, added to out where `add`.
struct LinearForward {
  const float* input[2];
  int64_t channels[2];
  int64_t rows, K;
  const float* weight;     // (K, C)
  const float* bias;       // (K) or null
  const float* residual;   // (rows, K) or null; may be out
  const float* row_scale;  // (rows) or null
  const float* gain;       // (C) or null
  float* out;              // (rows, K)
  bool add;
  bool narrow;  // by bfloat16 pairs
};

// dinput = grad·W, or += where `add`; a null dinput is left out.
struct LinearDataGradient {
  const float* grad;    // (rows, K)
  const float* weight;  // (K, C)
  int64_t rows, K;
  float* dinput[2];  // (rows, channels[i])
  int64_t channels[2];
  bool add;
  bool narrow;
};

// dweight = gradᵀ·(row_scale·A·gain), dbias = Σ over rows of grad.
struct LinearWeightGradient {
  const float* grad;  // (rows, K)
  const float* input[2];
  int64_t channels[2];
  int64_t rows, K;
  const float* row_scale;  // (rows) or null
  const float* gain;       // (C) or null
  float* dweight;          // (K, C) or null
  float* dbias;            // (K) or null
};

// Several layers of one input, their outputs side by side: out = [x·W₀ᵀ + b₀ | x·W₁ᵀ + b₁ | …].
struct LinearsForward {
  const float* x;  // (rows, C)
  int64_t rows, C, count;
  const float* const* weights;  // (widths[i], C), `count` of them
  const float* const* biases;   // (widths[i])
  const int64_t* widths;
  float* out;  // (rows, K), K = Σ widths
  int64_t K;
};

struct LinearKernels {
  void (*forward)(const LinearForward&);
  void (*forward_many)(const LinearsForward&);
  void (*data_gradient)(const LinearDataGradient&);
  void (*weight_gradient)(const LinearWeightGradient&);
};

}  // namespace ddpm_fast
