#include <cstring>

#include "cpu/kernels/kernels.h"

namespace ddpm_fast {

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#endif

namespace {

bool has_avx512() {
#if defined(__x86_64__) && !defined(DDPM_FAST_EMULATE_AVX512)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
#else
  return false;
#endif
}

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

const Kernels* table_of(const char* name) {
  if (std::strcmp(name, "portable") == 0) return &kPortableKernels;
#if defined(__x86_64__)
  if (std::strcmp(name, "avx2") == 0 && has_avx2()) return &kAvx2Kernels;
#if defined(DDPM_FAST_EMULATE_AVX512)
  if (std::strcmp(name, "avx512") == 0 && has_avx2()) return &kAvx512Kernels;
#endif
  if (std::strcmp(name, "avx512") == 0 && has_avx512()) return &kAvx512Kernels;
#endif
  return nullptr;
}

const Kernels*& chosen() {
  static const Kernels* table = table_of(has_avx512() ? "avx512" : has_avx2() ? "avx2" : "portable");
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
