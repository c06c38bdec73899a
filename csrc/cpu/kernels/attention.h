// Softmax attention with its norm and products: the arguments of the kernels in attention-inl.h; free of torch.
#pragma once

#include <stdint.h>

namespace ddpm_fast {

// B samples of N positions, `heads` heads of D channels, M memory entries. Maps are channels-last.
struct AttentionInputs {
  int64_t B, N, heads, D, M;
  const float* mem_kv;  // (2, heads, M, D)
};

struct AttentionForward {
  AttentionInputs in;
  const float* qkv;  // (B, N, 3, heads, D)
  float* out;        // (B, N, heads, D)
};

struct AttentionBackward {
  AttentionInputs in;
  const float* qkv;
  const float* grad;  // (B, N, heads, D)
  float* dqkv;        // (B, N, 3, heads, D)
  float* dmem_kv;     // (2, heads, M, D)
};

// The whole block, from x with C channels to as many.
struct AttentionBlockInputs {
  AttentionInputs in;
  int64_t C;
  const float* x;           // (B, N, C)
  const float* gain_in;     // (C)
  const float* weight_qkv;  // (3·heads·D, C)
  const float* weight;      // (C, heads·D)
};

struct AttentionBlockForward {
  AttentionBlockInputs block;
  const float* bias;      // (C)
  const float* residual;  // (B, N, C) or null
  float* out;             // (B, N, C)
};

struct AttentionBlockBackward {
  AttentionBlockInputs block;
  const float* grad;   // (B, N, C)
  float* dx;           // (B, N, C)
  float* dgain_in;     // (C)
  float* dweight_qkv;  // (3·heads·D, C)
  float* dmem_kv;      // (2, heads, M, D)
  float* dweight;      // (C, heads·D)
  float* dbias;        // (C)
};

struct AttentionKernels {
  void (*forward)(const AttentionForward&);
  void (*backward)(const AttentionBackward&);
  void (*block_forward)(const AttentionBlockForward&);
  void (*block_backward)(const AttentionBlockBackward&);
};

}  // namespace ddpm_fast
