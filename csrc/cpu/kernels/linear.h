// Products of maps as matrices (1×1 convolutions): what the kernels of linear-inl.h take. Free of torch.
#pragma once

#include <stdint.h>

namespace ddpm_fast {

// A = [a0 | a1] side by side, (rows, k0) and (rows, k1), each with its own memory; k1 = 0 where there is one map.
// W is (N, k0 + k1), torch's (O, I). Null stands for what is not there.

// out = row_scale·(A·(gain·W)ᵀ) + bias + residual, added to out where `add`.
struct LinearForward {
  const float* a[2];
  int64_t k[2];
  int64_t rows, N;
  const float* weight;    // (N, K)
  const float* bias;      // (N) or null
  const float* residual;  // (rows, N) or null; may be out
  float* out;             // (rows, N)
  bool add;
  const float* row_scale = nullptr;  // (rows) or null
  const float* gain = nullptr;       // (K) or null
};

// dx = grad·W, or += where `add`; a null dx is left out.
struct LinearDataGradient {
  const float* grad;    // (rows, N)
  const float* weight;  // (N, K)
  int64_t rows, N;
  float* dx[2];  // (rows, k)
  int64_t k[2];
  bool add;
};

// dweight = gradᵀ·(row_scale·A·gain), dbias = Σ over rows of grad.
struct LinearWeightGradient {
  const float* grad;  // (rows, N)
  const float* a[2];
  int64_t k[2];
  int64_t rows, N;
  float* dweight;                    // (N, K) or null
  float* dbias;                      // (N) or null
  const float* row_scale = nullptr;  // (rows) or null
  const float* gain = nullptr;       // (K) or null
};

// Several layers of one input, their outputs side by side: out = [x·W₀ᵀ + b₀ | x·W₁ᵀ + b₁ | …].
struct LinearsForward {
  const float* x;  // (rows, K)
  int64_t rows, K, count;
  const float* const* weights;  // (widths[i], K), `count` of them
  const float* const* biases;   // (widths[i])
  const int64_t* widths;
  float* out;  // (rows, N), N = Σ widths
  int64_t N;
};

struct LinearKernels {
  void (*forward)(const LinearForward&);
  void (*forward_many)(const LinearsForward&);
  void (*data_gradient)(const LinearDataGradient&);
  void (*weight_gradient)(const LinearWeightGradient&);
};

}  // namespace ddpm_fast
