// The noise function of ddpm_fast/noise.py in float32: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as
// easy as 1, 2, 3"), then Box-Muller (Box & Muller 1958). Torch-free, for host and device.
//
// No libm call and no branch: the logarithm, sine and cosine are polynomials, so that a host compiler vectorises the
// loop around them and host and device give the same numbers but for the rounding of fused multiply-adds.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DDPM_FAST_INLINE __host__ __device__ __forceinline__
#define DDPM_FAST_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
// Always inlined: a separate function would lack the instruction set of the vectorised clone that calls it.
#define DDPM_FAST_INLINE inline __attribute__((always_inline))
#define DDPM_FAST_UNROLL _Pragma("GCC unroll 16")
#else
#define DDPM_FAST_INLINE inline
#define DDPM_FAST_UNROLL
#endif

namespace ddpm_fast {

struct PhiloxKey {
  uint32_t k0, k1;
};

struct PhiloxWords {
  uint32_t x0, x1, x2, x3;
};

struct NormalPair {
  float z0, z1;
};

struct Normal4 {
  float z0, z1, z2, z3;
};

DDPM_FAST_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

DDPM_FAST_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

DDPM_FAST_INLINE PhiloxKey philox_key(int64_t seed) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

// One round (Salmon et al. 2011, section 3.3).
DDPM_FAST_INLINE PhiloxWords philox_round(PhiloxWords counter, PhiloxKey key) {
  const uint64_t product0 = static_cast<uint64_t>(counter.x0) * 0xD2511F53u;
  const uint64_t product1 = static_cast<uint64_t>(counter.x2) * 0xCD9E8D57u;
  return {static_cast<uint32_t>(product1 >> 32) ^ counter.x1 ^ key.k0, static_cast<uint32_t>(product1),
          static_cast<uint32_t>(product0 >> 32) ^ counter.x3 ^ key.k1, static_cast<uint32_t>(product0)};
}

DDPM_FAST_INLINE PhiloxKey next_round_key(PhiloxKey key) { return {key.k0 + 0x9E3779B9u, key.k1 + 0xBB67AE85u}; }

constexpr int kPhiloxRounds = 10;

DDPM_FAST_INLINE PhiloxWords philox4x32(PhiloxWords counter, PhiloxKey key) {
  DDPM_FAST_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    counter = philox_round(counter, key);
    key = next_round_key(key);
  }
  return counter;
}

// ln(u) for a positive normal u: u = 2^e·(1 + f) with 1 + f in [√½, √2), and a minimax polynomial for
// (ln(1 + f) − f) / f², so that the result keeps its relative accuracy where u is close to 1.
DDPM_FAST_INLINE float log_positive(float u) {
  const uint32_t bits = bits_of(u);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
  const float f = float_of(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  const float e = static_cast<float>(exponent);
  float poly = -0.0762240623f;
  poly = poly * f + 0.129034404f;
  poly = poly * f - 0.132421613f;
  poly = poly * f + 0.141819413f;
  poly = poly * f - 0.166092124f;
  poly = poly * f + 0.200019715f;
  poly = poly * f - 0.250015764f;
  poly = poly * f + 0.333333257f;
  poly = poly * f - 0.499999884f;
  // ln 2 in two parts; the first has 15 bits, so its product with an exponent is exact.
  const float tail = poly * (f * f) + e * 1.42860677e-6f;
  return e * 0.693145752f + (f + tail);
}

// (cos πw, sin πw) for w in [−1, 1]: w = quadrant/2 + t with t in [−¼, ¼], both exact in float32.
DDPM_FAST_INLINE NormalPair cos_sin_half_turns(float w) {
  const float magic = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer and leaves that in the low bits
  const float shifted = 2.0f * w + magic;
  const uint32_t quadrant = bits_of(shifted);
  const float t = w - 0.5f * (shifted - magic);
  const float y = t * t;
  const float sine = t * (3.14159264f + y * (-5.16770768f + y * (2.54976105f + y * -0.589012227f)));
  const float cosine = 1.0f + y * (-4.93480218f + y * (4.05870811f + y * (-1.33506357f + y * 0.231469379f)));
  const uint32_t swap = 0u - (quadrant & 1u);
  const uint32_t sine_bits = bits_of(sine), cosine_bits = bits_of(cosine);
  const uint32_t difference = (sine_bits ^ cosine_bits) & swap;
  return {float_of((cosine_bits ^ difference) ^ (((quadrant + 1u) & 2u) << 30)),
          float_of((sine_bits ^ difference) ^ ((quadrant & 2u) << 30))};
}

// Two normals from two words: u = (x0 + ½)/2^32 in (0, 1], angle = x1 as a signed number of half-turns.
DDPM_FAST_INLINE NormalPair box_muller(uint32_t x0, uint32_t x1) {
  const float u = static_cast<float>(x0) * 0x1p-32f + 0x1p-33f;
  const float w = static_cast<float>(static_cast<int32_t>(x1)) * 0x1p-31f;
  const float radius = sqrtf(-2.0f * log_positive(u));
  const NormalPair direction = cos_sin_half_turns(w);
  return {radius * direction.z0, radius * direction.z1};
}

DDPM_FAST_INLINE Normal4 normal4(PhiloxWords words) {
  const NormalPair first = box_muller(words.x0, words.x1);
  const NormalPair second = box_muller(words.x2, words.x3);
  return {first.z0, first.z1, second.z0, second.z1};
}

// Which noise: everything of the counter but the block.
struct NoiseIndex {
  PhiloxKey key;
  uint32_t sample, step, stream;
};

DDPM_FAST_INLINE PhiloxWords philox_counter(const NoiseIndex& index, uint32_t block) {
  return {block, index.sample, index.step, index.stream};
}

// Elements 4·block ... 4·block + 3 of a sample.
DDPM_FAST_INLINE Normal4 normal4(const NoiseIndex& index, uint32_t block) {
  return normal4(philox4x32(philox_counter(index, block), index.key));
}

}  // namespace ddpm_fast
