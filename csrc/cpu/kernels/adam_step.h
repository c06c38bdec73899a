// Adam on a chunk of a parameter: the kernels of adam_step-inl.h. Free of torch.
#pragma once

#include <stdint.h>

namespace ddpm_fast {

// See ddpm_fast/ops/adam_step/op.py. Numbers that do not depend on the element.
struct AdamNumbers {
  float beta1, rest1, beta2, rest2;  // rest = 1 − beta
  float step_size;                   // lr / (1 − beta1^t)
  float inverse_root;                // 1 / √(1 − beta2^t)
  float eps;
  float kept;          // p ← kept·p before the step: AdamW's decay, else 1
  float weight_decay;  // g ← g + weight_decay·p: Adam's decay, else 0
  float factor;        // of gradients
};

// Arrays of `count` elements, which do not overlap.
struct AdamChunk {
  float *param, *exp_avg, *exp_avg_sq;
  const float* grad;
  int64_t count;
};

struct AdamStepKernels {
  // Σ grad², in an order that depends on `count` alone.
  double (*squares)(const float* grad, int64_t count);
  // Returns Σ grad², too, in an order that depends on `count` alone.
  double (*update)(const AdamChunk& chunk, const AdamNumbers& numbers);
  // As torch.lerp does: exact at both ends.
  void (*move)(float* average, const float* param, float weight, int64_t count);
};

}  // namespace ddpm_fast
