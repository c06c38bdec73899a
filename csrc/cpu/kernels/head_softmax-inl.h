// Softmax over short rows, the D channels of a head or the keys of a query, and its backward.
#pragma once

#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// value with its lanes swapped in blocks of `distance`.
template <int distance>
DDPM_FAST_INLINE vf swapped(vf value) {
  vi lanes = {};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i ^ distance;
  return __builtin_shuffle(value, lanes);
}
// The largest lane and the sum of all lanes, in every lane; in registers, where rows are as short as these.
template <int distance = kLanes / 2>
DDPM_FAST_INLINE vf all_max(vf value) {
  if constexpr (distance == 0)
    return value;
  else
    return all_max<distance / 2>(vmax(value, swapped<distance>(value)));
}
template <int distance = kLanes / 2>
DDPM_FAST_INLINE vf all_sum(vf value) {
  if constexpr (distance == 0)
    return value;
  else
    return all_sum<distance / 2>(value + swapped<distance>(value));
}

// exp(scale·(x − max)) / Σ in place, of a row of n.
DDPM_FAST_INLINE void row_softmax(float* x, int64_t n, float scale) {
  vf largest = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) largest = vmax(load(x + i), largest);
  vf shift = all_max(largest);
  for (; i < n; ++i) shift = vmax(splat(x[i]), shift);
  vf sum = {};
  const vf by = splat(scale);
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const vf e = exp((load(x + i) - shift) * by);
    store(x + i, e);
    sum += e;
  }
  if (i < n) {
    store_partial(x + i, exp((load_partial(x + i, n - i) - shift) * by), n - i);
    sum += load_partial(x + i, n - i);  // zeros behind
  }
  const vf inverse = splat(1.0f / all_sum(sum)[0]);
  for (i = 0; i < n; i += kLanes) store_upto(x + i, load_upto(x + i, n - i) * inverse, n - i);
}

// dx = scale·p·(dp − Σ p·dp), into dp.
DDPM_FAST_INLINE void row_softmax_backward(const float* p, float* dp, int64_t n, float scale) {
  vf sum = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum = load(p + i) * load(dp + i) + sum;
  if (i < n) sum = load_partial(p + i, n - i) * load_partial(dp + i, n - i) + sum;
  const vf mean = all_sum(sum), by = splat(scale);
  for (i = 0; i + kLanes <= n; i += kLanes) store(dp + i, (load(dp + i) - mean) * load(p + i) * by);
  if (i < n) store_partial(dp + i, (load_partial(dp + i, n - i) - mean) * load_partial(p + i, n - i) * by, n - i);
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
