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

// The block with GroupNorm before, biases and no memory (in.M is 0).
struct GroupAttentionInputs {
  AttentionInputs in;
  int64_t C, groups;  // groups of the norm, 0: none
  bool by_head;       // rows of weight_qkv, and so of qkv, are (heads, 3, D), else (3, heads, D)
  bool folded;        // by products of weights, see folded_attention_block-inl.h: for one head of C channels
  bool residual;
  bool narrow;  // the products with weights, and of weights' gradients, by bfloat16 pairs
  float output_scale;
  const float* x;           // (B, N, C)
  const float* gain;        // (C), null without a norm, as is offset
  const float* offset;      // (C)
  const float* weight_qkv;  // (3·heads·D, C)
  const float* bias_qkv;    // (3·heads·D) or null
  const float* weight;      // (C, heads·D)
};

// The distance in floats between the rows of maps that forward keeps: an odd number of lines of 64 bytes.
constexpr int64_t kept_row(int64_t channels) { return ((channels + 15) / 16 * 16) | 16; }

struct GroupAttentionForward {
  GroupAttentionInputs block;
  float eps;
  const float* bias;  // (C) or null
  float* out;         // (B, N, C)
  float* statistics;  // (B, groups, 2), mean and 1/√(variance + eps); unused without a norm
  float* qkv;         // (B, N, kept_row(3·heads·D)), kept for backward with `attended`, or null
  float* attended;    // (B, N, kept_row(heads·D)); where folded the folded weights, (2, C, C)
};

struct GroupAttentionBackward {
  GroupAttentionInputs block;
  const float* grad;  // (B, N, C)
  const float* statistics;
  const float* qkv;
  const float* attended;
  float* dx;           // (B, N, C)
  float* dgain;        // (C), null without a norm, as is doffset
  float* doffset;      // (C)
  float* dweight_qkv;  // (3·heads·D, C), null where the four are not wanted
  float* dbias_qkv;    // (3·heads·D), also where there is no such bias
  float* dweight;      // (C, heads·D)
  float* dbias;        // (C)
};

struct AttentionKernels {
  void (*forward)(const AttentionForward&);
  void (*backward)(const AttentionBackward&);
  void (*block_forward)(const AttentionBlockForward&);
  void (*block_backward)(const AttentionBlockBackward&);
  void (*group_block_forward)(const GroupAttentionForward&);
  void (*group_block_backward)(const GroupAttentionBackward&);
};

}  // namespace ddpm_fast
