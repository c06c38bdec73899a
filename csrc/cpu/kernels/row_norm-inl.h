// RMSNorm of a row, x·√C / max(‖x‖₂, 1e-12), and its backward (Zhang & Sennrich 2019, in upstream's form).
#pragma once

#include "parallel-inl.h"
#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// √C / n with n = max(‖x‖₂, 1e-12), and 1 / C, or 0 where n is that bound: nothing flows through a constant.
struct RowNorm {
  float factor, mean;
};

// Σ a·b over a row of C.
DDPM_FAST_INLINE float row_dot(const float* a, const float* b, int64_t C) {
  vf even = {}, odd = {};
  int64_t c = 0;
  for (; c + 2 * kLanes <= C; c += 2 * kLanes) {
    even = load(a + c) * load(b + c) + even;
    odd = load(a + c + kLanes) * load(b + c + kLanes) + odd;
  }
  for (; c < C; c += kLanes) even = load_upto(a + c, C - c) * load_upto(b + c, C - c) + even;
  return reduce_add(even + odd);
}

DDPM_FAST_INLINE RowNorm row_norm_of(float sum_of_squares, int64_t C) {
  const float norm = __builtin_sqrtf(sum_of_squares);
  const float root = __builtin_sqrtf(static_cast<float>(C));
  const bool clamped = norm <= 1e-12f;
  return {root / (clamped ? 1e-12f : norm), clamped ? 0.0f : 1.0f / static_cast<float>(C)};
}
DDPM_FAST_INLINE RowNorm row_norm(const float* x, int64_t C) { return row_norm_of(row_dot(x, x, C), C); }

// to = (z − x̂·mean(z·x̂))·factor, where z is the gradient of the normed row x̂. `to` may be z.
DDPM_FAST_INLINE void row_norm_backward(const float* z, const float* normed, RowNorm norm, int64_t C, float* to) {
  const vf along = splat(row_dot(z, normed, C) * norm.mean), factor = splat(norm.factor);
  for (int64_t c = 0; c < C; c += kLanes) {
    const int64_t count = C - c;
    store_upto(to + c, (load_upto(z + c, count) - load_upto(normed + c, count) * along) * factor, count);
  }
}

// x·gain by columns of a (rows, C) matrix: folds a norm's gain into the weight of the product after the norm.
inline void scale_columns(const float* x, const float* gain, int64_t rows, int64_t C, float* to) {
  for (int64_t r = 0; r < rows; ++r, x += C, to += C) {
    for (int64_t c = 0; c < C; c += kLanes) {
      store_upto(to + c, load_upto(x + c, C - c) * load_upto(gain + c, C - c), C - c);
    }
  }
}

// Gradients of weight (rows, C) and gain (C) where folded = weight·gain by columns. Threads take columns.
inline void scale_columns_backward(const float* dfolded, const float* weight, const float* gain, int64_t rows,
                                   int64_t C, float* dweight, float* dgain) {
  constexpr int64_t kColumns = 64, kGrain = 65536;
  parallel(ceil_div(C, kColumns), max<int64_t>(1, kGrain / (rows * kColumns)), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kColumns, last = min(C, end * kColumns);
    for (int64_t c = first; c < last; c += kLanes) store_upto(dgain + c, vf{}, last - c);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = first; c < last; c += kLanes) {
        const int64_t at = r * C + c, count = last - c;
        const vf d = load_upto(dfolded + at, count);
        store_upto(dgain + c, d * load_upto(weight + at, count) + load_upto(dgain + c, count), count);
        store_upto(dweight + at, d * load_upto(gain + c, count), count);
      }
    }
  });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
