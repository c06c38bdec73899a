#include <cstring>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/targets/targets.h"

namespace ddpm_fast {

extern const Kernels kPortableKernels, kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels;

namespace {

bool has_avx2() {
#if defined(DDPM_FAST_AVX2)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

// Emulated, it runs where AVX2 does, but is not chosen unless asked for.
bool has_avx512() {
#if defined(DDPM_FAST_AVX512) && !defined(DDPM_FAST_EMULATE_AVX512)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
#else
  return false;
#endif
}

bool has_avx512_bf16() {
#if defined(DDPM_FAST_AVX512_BF16)
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

const Kernels* table_of(const char* name) {
  if (std::strcmp(name, "portable") == 0) return &kPortableKernels;
#if defined(DDPM_FAST_AVX2)
  if (std::strcmp(name, "avx2") == 0 && has_avx2()) return &kAvx2Kernels;
#endif
#if defined(DDPM_FAST_EMULATE_AVX512)
  if (std::strcmp(name, "avx512") == 0 && has_avx2()) return &kAvx512Kernels;
#elif defined(DDPM_FAST_AVX512)
  if (std::strcmp(name, "avx512") == 0 && has_avx512()) return &kAvx512Kernels;
#endif
#if defined(DDPM_FAST_AVX512_BF16)
  if (std::strcmp(name, "avx512_bf16") == 0 && has_avx512_bf16()) return &kAvx512Bf16Kernels;
#endif
  return nullptr;
}

const Kernels*& chosen() {
  static const Kernels* table = table_of(has_avx512_bf16() ? "avx512_bf16"
                                         : has_avx512()    ? "avx512"
                                         : has_avx2()      ? "avx2"
                                                           : "portable");
  return table;
}

}  // namespace

const Kernels& kernels() { return *chosen(); }

const char* use_instruction_set(const char* name) {
  const Kernels* table = table_of(name);
  if (table == nullptr) return nullptr;
  const char* before = chosen()->name;
  chosen() = table;
  return before;
}

}  // namespace ddpm_fast
