// The formula of core/sampler_math.h for a tile of one sample. The compiler vectorises the loop.
#pragma once

#include "core/sampler_math.h"
#include "sampler_step.h"
#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA::sampler_step {

// Element i is read before it is written, and iterations are independent: in place is allowed.
inline void step(const SamplerRow& row, bool clip_x_start, const SamplerStepTile& tile) {
  const SamplerRow columns = row;  // a copy, since a store to x_next might change what `row` refers to
  const float *x = tile.x, *output = tile.output, *previous = tile.previous, *eps = tile.eps;
  float *x_next = tile.x_next, *x_start = tile.x_start;
  const int64_t count = tile.count;
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep
#endif
  for (int64_t i = 0; i < count; ++i) {
    const float start = predict_x_start(columns, x[i], output[i], clip_x_start);
    const float next = next_state(columns, start, x[i], previous[i], eps[i]);
    x_start[i] = start;
    x_next[i] = next;
  }
}

inline void step_extended(const SamplerRow& row, bool clip_x_start, const ExtendedStepTile& tile) {
  const SamplerRow columns = row;
  const float *x = tile.x, *output = tile.output, *eps = tile.eps;
  const float *previous = tile.previous, *previous2 = tile.previous2, *previous3 = tile.previous3;
  float *x_next = tile.x_next, *x_start = tile.x_start, *kept = tile.kept;
  const int64_t count = tile.count;
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep
#endif
  for (int64_t i = 0; i < count; ++i) {
    const float start = predict_x_start(columns, x[i], output[i], clip_x_start);
    const float next = next_state(columns, start, x[i], previous[i], previous2[i], previous3[i], eps[i]);
    kept[i] = kept_combination(columns, x[i], start);
    x_start[i] = start;
    x_next[i] = next;
  }
}

// kGuides: u guides. kMakes: u is made, too, where it only moves the momentum. kMore: there is anything else of
// `GuidanceRow`, or a mask.
template <bool kGuides, bool kMakes, bool kMore>
inline void step_guided_as(const SamplerRow& row, const GuidanceRow& guidance, const GuidanceScales& scales,
                           bool clip_x_start, const GuidedStepTile& tile) {
  const SamplerRow columns = row;
  const GuidanceRow more = guidance;
  const GuidanceScales g_scales = scales;
  const GuidanceSpace space = guidance_space(columns, more);
  const float limit = clip_limit(clip_x_start);
  const float *x = tile.x, *output = tile.output, *second = tile.second, *update = tile.update, *eps = tile.eps;
  const float *gradient = tile.gradient, *known = tile.known, *mask = tile.mask, *known_eps = tile.known_eps;
  const float *previous = tile.previous, *previous2 = tile.previous2, *previous3 = tile.previous3;
  const float* second_added = tile.second_added;
  float *x_next = tile.x_next, *x_start = tile.x_start, *kept = tile.kept, *next_update = tile.next_update;
  const int64_t count = tile.count;
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep
#endif
  for (int64_t i = 0; i < count; ++i) {
    float g = guidance_output(space, x[i], output[i]);
    if constexpr (kMakes) {
      const float u = guidance_update(space, kMore ? more.mu : 0.0f, output[i], second[i], kMore ? update[i] : 0.0f);
      if constexpr (kMore) next_update[i] = u;
      if constexpr (kGuides) g = guided_output(g_scales, g, u);
    }
    const float x_start_guided = space.g_x * x[i] + space.g_g * g;
    const float start = clipped_x_start(kMore ? x_start_guided + more.h * gradient[i] : x_start_guided, limit);
    float next = next_state(columns, start, x[i], previous[i], previous2[i], previous3[i], eps[i]);
    if constexpr (kMore) {
      const float x_start_second = columns.p * x[i] + columns.q * second_added[i];
      next += more.kg * x_start_guided + more.kn * x_start_second + more.kc * clipped_x_start(x_start_second, limit) +
              more.j * gradient[i];
      next = masked_state(mask[i], more.A * known[i] + more.B * known_eps[i], next);
    }
    kept[i] = kept_combination(columns, x[i], start);
    x_start[i] = start;
    x_next[i] = next;
  }
}

inline void step_guided(const SamplerRow& row, const GuidanceRow& guidance, const GuidanceScales& scales,
                        bool clip_x_start, bool has_more, const GuidedStepTile& tile) {
  if (!has_more) return step_guided_as<true, true, false>(row, guidance, scales, clip_x_start, tile);
  if (guides(guidance)) return step_guided_as<true, true, true>(row, guidance, scales, clip_x_start, tile);
  if (makes_update(guidance)) return step_guided_as<false, true, true>(row, guidance, scales, clip_x_start, tile);
  step_guided_as<false, false, true>(row, guidance, scales, clip_x_start, tile);
}

// Half a vector of floats, and the doubles that it becomes.
constexpr int64_t kHalf = kLanes / 2;
typedef float vh __attribute__((vector_size(DDPM_FAST_LANES * 2)));
typedef double vd __attribute__((vector_size(DDPM_FAST_LANES * 4)));

DDPM_FAST_INLINE vh load_half(const float* from, int64_t count) {
  vh value = {};
  __builtin_memcpy(&value, from, count >= kHalf ? sizeof(vh) : static_cast<unsigned long>(count) * 4);
  return value;
}

DDPM_FAST_INLINE double sum_of_lanes(vd value) {
  double sum = 0.0;
  for (int i = 0; i < kHalf; ++i) sum += value[i];
  return sum;
}

// The order of the sums depends on nothing but the tile's length. They are of doubles: a deviation is a difference of
// large sums.
inline GuidanceSums guidance_sums(const SamplerRow& row, const GuidanceRow& guidance, const GuidedStepTile& tile) {
  const GuidanceSpace space = guidance_space(row, guidance);
  const float mu = guidance.mu;
  vd sum_y = {}, sum_u = {}, sum_yy = {}, sum_yu = {}, sum_uu = {};
  const auto add = [&](int64_t i, int64_t left) DDPM_FAST_LAMBDA {
    const vh output = load_half(tile.output + i, left), second = load_half(tile.second + i, left);
    const vh y_floats = space.y_x * load_half(tile.x + i, left) + space.y_out * output;
    const vh u_floats = space.y_out * (output - second) + mu * load_half(tile.update + i, left);
    const vd y = __builtin_convertvector(y_floats, vd), u = __builtin_convertvector(u_floats, vd);
    sum_y += y;
    sum_u += u;
    sum_yy += y * y;
    sum_yu += y * u;
    sum_uu += u * u;
  };
  int64_t i = 0;
  for (; i + kHalf <= tile.count; i += kHalf) add(i, kHalf);
  if (i < tile.count) add(i, tile.count - i);
  return {sum_of_lanes(sum_y), sum_of_lanes(sum_u), sum_of_lanes(sum_yy), sum_of_lanes(sum_yu), sum_of_lanes(sum_uu)};
}

inline void scale_noise(const SamplerRow& row, float* to, const float* v, const float* eps, int64_t count) {
  const SamplerRow columns = row;
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep
#endif
  for (int64_t i = 0; i < count; ++i) to[i] = learned_scale(columns, v[i]) * eps[i];
}

}  // namespace ddpm_fast::DDPM_FAST_ISA::sampler_step
