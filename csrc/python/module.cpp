// The Python side of the extension: tapes, snapshots, memory, build information, and Philox itself for its known
// answers. The operators register themselves with torch when the module is loaded; their schemas are in
// ddpm_fast/ops/*/op.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "core/philox.h"
#include "cpu/kernels/kernels.h"
#include "cpu/runtime/memory.h"
#include "ivalue.h"
#include "native_operator.h"
#include "snapshot.h"
#include "tape.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def(
      "philox4x32",
      [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
        const ddpm_fast::PhiloxWords words = ddpm_fast::philox4x32({c0, c1, c2, c3}, {k0, k1});
        return pybind11::make_tuple(words.x0, words.x1, words.x2, words.x3);
      },
      "Philox4x32-10 of counter c0 ... c3 and key k0, k1: four 32-bit words.");
  m.def("instruction_set", [] { return ddpm_fast::kernels().name; }, "The vectors that the CPU's kernels use now.");
  m.def(
      "use_instruction_set",
      [](const std::string& name) {
        const char* before = ddpm_fast::use_instruction_set(name.c_str());
        if (before == nullptr) throw pybind11::value_error("this build or processor has no kernels for " + name);
        return before;
      },
      "Take the kernels of \"avx512_bf16\", \"avx512\", \"avx2\" or \"portable\"; returns what was taken before. For "
      "tests.");
  m.def("empty_cache", &ddpm_fast::empty_cache, "See runtime/extension.py.");
  m.def(
      "empty_tensor",
      [](const std::vector<int64_t>& sizes) { return torch::jit::toPyObject(ddpm_fast::empty_tensor(sizes)); },
      "A float32 tensor where native operators have theirs. For tests.");
  m.def("age_memory", &ddpm_fast::age_memory, "As if so many seconds had passed for the pool. For tests.");
  ddpm_fast::bind_native_operator(m);
  ddpm_fast::bind_tape(m);
  ddpm_fast::bind_snapshot(m);
  m.attr("torch_version") = TORCH_VERSION;
#ifdef DDPM_FAST_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
