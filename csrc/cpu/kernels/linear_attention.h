// Linear attention with its norms and products: the arguments of the kernels in linear_attention-inl.h; free of
// torch.
#pragma once

#include <stdint.h>

namespace ddpm_fast {

// B samples of N positions, `heads` heads of D channels, C channels of the output, M memory entries. Maps are
// channels-last. The input is either qkv, or x with gain_in and weight_qkv; then x has C channels, too.
struct LinearAttentionInputs {
  int64_t B, N, heads, D, C, M;
  const float* qkv;         // (B, N, 3, heads, D) or null
  const float* x;           // (B, N, C) or null
  const float* gain_in;     // (C) or null
  const float* weight_qkv;  // (3·heads·D, C) or null
  const float* mem_kv;      // (2, heads, D, M)
  const float* weight;      // (C, heads·D)
  const float* bias;        // (C)
  const float* gain;        // (C)
  bool narrow;              // products over positions by bfloat16 pairs
};

struct LinearAttentionForward {
  LinearAttentionInputs in;
  const float* residual;  // (B, N, C) or null
  float* out;             // (B, N, C)
  float* statistics;      // (B, 2, heads·D): of k over positions and memory, the largest and 1 / Σ exp(k − largest)
  // (B, heads·D, V): Σ softmax(k)·values over the positions, without the memory. Values are v, V = D, or with x its
  // normed rows, V = C.
  float* sums;
};

struct LinearAttentionBackward {
  LinearAttentionInputs in;
  const float* grad;        // (B, N, C)
  const float* statistics;  // as forward wrote them
  const float* sums;
  float* dqkv;         // (B, N, 3, heads, D) or, with x, null
  float* dx;           // (B, N, C) or, with qkv, null; so the next two
  float* dgain_in;     // (C)
  float* dweight_qkv;  // (3·heads·D, C)
  float* dmem_kv;      // (2, heads, D, M)
  float* dweight;      // (C, heads·D)
  float* dbias;        // (C)
  float* dgain;        // (C)
};

struct LinearAttentionKernels {
  void (*forward)(const LinearAttentionForward&);
  void (*backward)(const LinearAttentionBackward&);
};

}  // namespace ddpm_fast
