// Softmax over short rows, the D channels of a head or the keys of a query, and its backward.
#pragma once

#include "vec.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// exp(scale·(x − max)) / Σ in place, of a row of n.
DDPM_FAST_INLINE void row_softmax(float* x, int64_t n, float scale) {
  vf largest = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) largest = vmax(load(x + i), largest);
  float max = reduce_max(largest);
  for (; i < n; ++i) max = x[i] > max ? x[i] : max;
  vf sum = {};
  const vf by = splat(scale), shift = splat(max);
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const vf e = exp((load(x + i) - shift) * by);
    store(x + i, e);
    sum += e;
  }
  if (i < n) {
    store_partial(x + i, exp((load_partial(x + i, n - i) - shift) * by), n - i);
    sum += load_partial(x + i, n - i);  // zeros behind
  }
  const vf inverse = splat(1.0f / reduce_add(sum));
  for (i = 0; i < n; i += kLanes) store_upto(x + i, load_upto(x + i, n - i) * inverse, n - i);
}

// dx = scale·p·(dp − Σ p·dp), into dp.
DDPM_FAST_INLINE void row_softmax_backward(const float* p, float* dp, int64_t n, float scale) {
  vf sum = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum = load(p + i) * load(dp + i) + sum;
  if (i < n) sum = load_partial(p + i, n - i) * load_partial(dp + i, n - i) + sum;
  const vf mean = splat(reduce_add(sum)), by = splat(scale);
  for (i = 0; i + kLanes <= n; i += kLanes) store(dp + i, (load(dp + i) - mean) * load(p + i) * by);
  if (i < n) store_partial(dp + i, (load_partial(dp + i, n - i) - mean) * load_partial(p + i, n - i) * by, n - i);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
