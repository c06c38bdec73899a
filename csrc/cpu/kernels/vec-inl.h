// One vector of floats of the instruction set that the including file was compiled for, by the compiler's own vector
// types: AVX-512, AVX2 and the portable build (NEON, SSE2) are one source. See avx512.cpp, avx2.cpp, portable.cpp,
// which define DDPM_FAST_ISA (the namespace) and DDPM_FAST_LANES before they include anything.
//
// No standard library here: of several copies of an inline function the linker keeps one, perhaps the AVX-512 copy, for
// all targets.
#pragma once

#include <stdint.h>

#ifndef DDPM_FAST_ISA
#error "include this from avx512.cpp, avx2.cpp or portable.cpp"
#endif

#define DDPM_FAST_INLINE inline __attribute__((always_inline))
// For functions with many callers and much work per call. Packing, inlined everywhere, was two fifths of a target's
// compile time and a quarter of its code.
#define DDPM_FAST_NOINLINE inline __attribute__((noinline))
#define DDPM_FAST_LAMBDA __attribute__((always_inline))

// Vectors are registers of AVX2 or AVX-512, for instructions that compilers do not find.
#if defined(__x86_64__) && (DDPM_FAST_LANES == 8 || (DDPM_FAST_LANES == 16 && !defined(DDPM_FAST_EMULATE_AVX512)))
#define DDPM_FAST_X86
#endif

namespace ddpm_fast::DDPM_FAST_ISA {

constexpr int kLanes = DDPM_FAST_LANES;
// Vector registers of the instruction set: AVX-512 and NEON have 32, AVX2 and SSE2 have 16.
#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = kLanes == 16 ? 32 : 16;
#endif

typedef float vf __attribute__((vector_size(DDPM_FAST_LANES * 4)));
typedef int32_t vi __attribute__((vector_size(DDPM_FAST_LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(DDPM_FAST_LANES * 4)));
typedef float vf_unaligned __attribute__((vector_size(DDPM_FAST_LANES * 4), aligned(4), may_alias));

template <typename T>
DDPM_FAST_INLINE constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
DDPM_FAST_INLINE constexpr T max(T a, T b) {
  return a < b ? b : a;
}
DDPM_FAST_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DDPM_FAST_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// value - 0 is the identity for every float and compiles to a broadcast. 0 + value maps -0 to +0, stays an addition,
// and cost a third of a product's time.
DDPM_FAST_INLINE vf splat(float value) { return value - vf{}; }
DDPM_FAST_INLINE vf load(const float* from) { return *reinterpret_cast<const vf_unaligned*>(from); }
DDPM_FAST_INLINE void store(float* to, vf value) { *reinterpret_cast<vf_unaligned*>(to) = value; }

// The first `count` < kLanes elements; the others are 0, and nothing behind them is touched.
DDPM_FAST_INLINE vf load_partial(const float* from, int64_t count) {
  vf value = {};
  __builtin_memcpy(&value, from, static_cast<unsigned long>(count) * 4);
  return value;
}
DDPM_FAST_INLINE void store_partial(float* to, vf value, int64_t count) {
  __builtin_memcpy(to, &value, static_cast<unsigned long>(count) * 4);
}
DDPM_FAST_INLINE vf load_upto(const float* from, int64_t count) {
  return count >= kLanes ? load(from) : load_partial(from, count);
}
DDPM_FAST_INLINE void store_upto(float* to, vf value, int64_t count) {
  if (count >= kLanes) {
    store(to, value);
  } else {
    store_partial(to, value, count);
  }
}

// sum += x·y, in the register of the sum: gcc 12 puts sums of a product into registers of others, and of two terms some
// into memory.
DDPM_FAST_INLINE void add_product(vf& sum, vf x, vf y) {
#if defined(DDPM_FAST_X86) && DDPM_FAST_LANES == 16
  __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
#else
  sum = x * y + sum;
#endif
}

// Asks for memory that will be read, or written, a while from now. gcc 12 takes a function that does nothing else for
// one without effect, and its calls away: the empty statement is an effect.
constexpr int64_t kCacheLine = 16;  // floats

DDPM_FAST_INLINE void prefetch(const float* from, int64_t floats) {
  for (int64_t i = 0; i < floats; i += kCacheLine) {
    __builtin_prefetch(from + i, 0, 2);
    __asm__ volatile("");
  }
}
DDPM_FAST_INLINE void prefetch_to_write(const float* to, int64_t floats) {
  for (int64_t i = 0; i < floats; i += kCacheLine) {
    __builtin_prefetch(to + i, 1, 2);
    __asm__ volatile("");
  }
}

// The share of `count` things that falls to step i of `steps`: prefetches go between products a few at a time.
template <typename Body>
DDPM_FAST_INLINE void spread(int64_t count, int64_t i, int64_t steps, const Body& body) {
  for (int64_t n = count * i / steps; n < count * (i + 1) / steps; ++n) body(n);
}

#if defined(__clang__)
// clang knows shuffles by constants only; these are such, but reach it as a vector.
DDPM_FAST_INLINE vf shuffle(vf a, vf b, vi lanes) {
  vf out;
#pragma clang loop unroll(full)
  for (int l = 0; l < kLanes; ++l) out[l] = lanes[l] < kLanes ? a[lanes[l]] : b[lanes[l] - kLanes];
  return out;
}
#else
DDPM_FAST_INLINE vf shuffle(vf a, vf b, vi lanes) { return __builtin_shuffle(a, b, lanes); }
#endif

DDPM_FAST_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }

// b where one of them is NaN. gcc 12 compares and then chooses, which takes two instructions and the time of six.
DDPM_FAST_INLINE vf vmax(vf a, vf b) {
#if defined(DDPM_FAST_X86)
  vf larger;
  __asm__("vmaxps %2, %1, %0" : "=v"(larger) : "v"(a), "vm"(b));
  return larger;
#else
  return a > b ? a : b;
#endif
}
DDPM_FAST_INLINE vf vmin(vf a, vf b) {
#if defined(DDPM_FAST_X86)
  vf smaller;
  __asm__("vminps %2, %1, %0" : "=v"(smaller) : "v"(a), "vm"(b));
  return smaller;
#else
  return a < b ? a : b;
#endif
}

// Sums are halved lane by lane: the order does not depend on anything.
DDPM_FAST_INLINE float reduce_add(vf value) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, &value, sizeof(lanes));
#pragma GCC unroll 8
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}
// Sums of halves: of a's blocks of 2·kHalf lanes, and of b's. Lane i of a block of kHalf has the block's lanes i and
// i + kHalf added; a's blocks come before b's.
template <int kHalf>
DDPM_FAST_INLINE vf add_halves(vf a, vf b) {
  vi low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / kHalf * 2 * kHalf + i % kHalf;  // of a and b side by side
    high[i] = low[i] + kHalf;
  }
  return shuffle(a, b, low) + shuffle(a, b, high);
}

// to[i] = reduce_add(values[i]) with the same bits, four at a time.
DDPM_FAST_INLINE void reduce_add_many(const vf* values, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    vf sums = add_halves<kLanes / 4>(add_halves<kLanes / 2>(values[i], values[i + 1]),
                                     add_halves<kLanes / 2>(values[i + 2], values[i + 3]));
    if constexpr (kLanes >= 8) sums = add_halves<kLanes / 8>(sums, sums);
    if constexpr (kLanes >= 16) sums = add_halves<kLanes / 16>(sums, sums);
    __builtin_memcpy(to + i, &sums, 4 * sizeof(float));
  }
  for (; i < count; ++i) to[i] = reduce_add(values[i]);
}

DDPM_FAST_INLINE float reduce_max(vf value) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, &value, sizeof(lanes));
#pragma GCC unroll 8
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  }
  return lanes[0];
}

// A sum of many terms that rounds as if of two (Kahan 1965, "Further remarks on reducing truncation errors").
struct KahanSum {
  vf sum = {}, excess = {};

  DDPM_FAST_INLINE void add(vf term) {
    const vf corrected = term - excess, next = sum + corrected;
    excess = (next - sum) - corrected;
    sum = next;
  }
};

inline void clear(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = 0;
}

// Rows whose sums are made before they are added to those of more rows: the rounding of n terms in one row grows with
// √n.
constexpr int64_t kRowsOfPiece = 16;

// e^x to 1 ulp or so for x in [-87, 88]; beyond, the value at that bound. NaN stays NaN.
DDPM_FAST_INLINE vf exp(vf x) {
  x = vmax(splat(-87.0f), x);
  x = vmin(splat(88.0f), x);
  const vf shifted = x * splat(1.44269504088896341f) + splat(12582912.0f);  // 1.5·2^23: rounds to an integer
  const vf n = shifted - splat(12582912.0f);
  vf r = x - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  vf p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.0f);
  vu bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127) << 23;  // n is in the lowest bits of `shifted`, above which there are zeros enough
  vf scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

DDPM_FAST_INLINE vf sigmoid(vf x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }

}  // namespace ddpm_fast::DDPM_FAST_ISA
