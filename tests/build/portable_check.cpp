// The portable kernels' building blocks in a program of its own, free of torch, so that a cross compiler can build it
// and an emulator run it. Prints standard normals of the C++ side of ddpm_fast/noise.py for seed 5, stream 3, sample 7,
// step 2, one a line; exits with 1 and a sentence where something is wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "core/philox.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/targets/portable.cpp"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/shares.cpp"
#include "portable_ops.h"

namespace ddpm_fast {
// parallel.cpp without torch: one thread.
void run_parallel(int64_t count, int64_t, void (*task)(void*, int64_t, int64_t), void* context, int64_t) {
  if (count > 0) task(context, 0, count);
}
int64_t thread_count() { return 1; }
int64_t second_level_floats() { return 128 << 10; }
int64_t third_level_floats() { return 8 << 20; }
float* thread_scratch(int slot, int64_t floats) {
  static std::vector<float> memory[kScratchSlots];
  memory[slot].resize(static_cast<size_t>(floats) + 16);
  const auto address = reinterpret_cast<uintptr_t>(memory[slot].data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}
}  // namespace ddpm_fast

namespace {

using namespace ddpm_fast;
using portable::kLanes;
using portable::vf;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("wrong: %s\n", what);
  std::exit(1);
}

float random_number() { return static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.5f; }

// Both orders of A, products added and stored, odd sizes; columns behind the matrix stay as they are.
void check_products() {
  for (int64_t M : {1, 5, 6, 13, 14, 29}) {
    for (int64_t N : {1, 7, 8, 17}) {
      for (int64_t K : {1, 3, 64}) {
        for (int form = 0; form < 4; ++form) {
          const bool transposed = form & 1, add = form & 2;
          const int64_t stride = N + 3, row = transposed ? 1 : K, step = transposed ? M : 1;
          std::vector<float> a(M * K), b(K * N), packed(portable::packed_size(K, N)), c(M * stride, 2.0f);
          for (float& x : a) x = random_number();
          for (float& x : b) x = random_number();
          portable::pack_panels(b.data(), N, 1, K, N, 0, portable::panels(N), packed.data());
          portable::product(a.data(), row, step, packed.data(), M, K, N, c.data(), stride, add);
          for (int64_t m = 0; m < M; ++m) {
            for (int64_t n = 0; n < stride; ++n) {
              double sum = n < N && !add ? 0.0 : 2.0;
              for (int64_t k = 0; n < N && k < K; ++k) sum += double(a[m * row + k * step]) * b[k * N + n];
              expect(std::abs(sum - c[m * stride + n]) <= 1e-5, "a product");
            }
          }
        }
      }
    }
  }
}

void check_exp() {
  for (float x = -87.0f; x < 88.0f; x += 0.0137f) {
    const double truth = std::exp(static_cast<double>(x));
    expect(std::abs(portable::exp(portable::splat(x))[0] - truth) <= 2e-7 * truth, "exp");
  }
  expect(std::isnan(portable::exp(portable::splat(NAN))[1]), "exp of NaN");
  expect(portable::exp(portable::splat(-INFINITY))[1] < 2e-38f, "exp of -inf");
  expect(std::abs(portable::sigmoid(portable::splat(0.0f))[1] - 0.5f) < 1e-7f, "sigmoid of 0");
}

void check_vectors() {
  float memory[2 * kLanes];
  for (int i = 0; i < 2 * kLanes; ++i) memory[i] = static_cast<float>(i + 1);
  const vf whole = portable::load(memory + 1);
  for (int64_t count = 0; count <= kLanes; ++count) {
    const vf part = portable::load_upto(memory + 1, count);
    float to[kLanes + 1];
    std::fill(to, to + kLanes + 1, -1.0f);
    portable::store_upto(to, whole, count);
    for (int i = 0; i < kLanes; ++i) {
      expect(part[i] == (i < count ? whole[i] : 0.0f), "load_upto");
      expect(to[i] == (i < count ? whole[i] : -1.0f), "store_upto");
    }
    expect(to[kLanes] == -1.0f, "store_upto wrote on");
  }
  expect(portable::reduce_add(whole) == kLanes * (kLanes + 3) / 2.0f, "reduce_add");
  expect(portable::reduce_max(whole) == kLanes + 1.0f, "reduce_max");
}

// Sizes for each of a kernel's orders of work, none a multiple of the vectors. The bounds are about twice the errors.
void check_ops() {
  const auto random = [](int64_t count) {
    std::vector<float> values(count);
    for (float& x : values) x = random_number();
    return values;
  };
  const auto within = [](double error, double bound, const char* what) {
    if (!(error <= bound)) std::printf("error %g of ", error);
    expect(error <= bound, what);
  };
  const Kernels& kernels = kPortableKernels;
  within(check::conv3x3(kernels, {1, 5, 4, 21, 13, 3}, random), 3e-6, "conv3x3, directly");
  within(check::conv3x3(kernels, {2, 9, 11, 21, 13, 3}, random), 3e-6, "conv3x3, by panels");
  within(check::conv3x3(kernels, {3, 29, 27, 9, 19, 3}, random), 3e-6, "conv3x3, by tiles");
  within(check::strided_conv(kernels, {2, 9, 12, 21, 13, 3}, random), 1e-6, "strided_conv");
  within(check::stem_conv(kernels, {2, 9, 17, 3, 19, 7}, random), 1e-6, "stem_conv");
  within(check::linear(kernels, 31, 300, 21, random), 1e-6, "linear");
  within(check::attention(kernels, {.B = 2, .N = 45, .heads = 2, .D = 13, .M = 4}, random), 1e-6, "attention");
  within(check::linear_attention(kernels, {.B = 2, .N = 45, .heads = 2, .D = 13, .C = 21, .M = 4}, random), 1e-6,
         "linear_attention");
}

}  // namespace

int main() {
  expect(std::strcmp(kPortableKernels.name, "portable") == 0 && kPortableKernels.lanes == kLanes, "the table");
  check_vectors();
  check_exp();
  check_products();
  check_ops();
  for (uint32_t block = 0; block < 64; ++block) {
    const Normal4 z = normal4(NoiseIndex{philox_key(5), 7, 2, 3}, block);
    std::printf("%.9g\n%.9g\n%.9g\n%.9g\n", z.z0, z.z1, z.z2, z.z3);
  }
}
