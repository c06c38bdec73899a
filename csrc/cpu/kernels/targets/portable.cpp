// The kernels for any processor: vectors of four, which are NEON on aarch64 and SSE2 on x86-64.
#include <stdint.h>

#include "cpu/runtime/parallel.h"
#define DDPM_FAST_ISA portable
#define DDPM_FAST_LANES 4
#include "cpu/kernels/kernels-inl.h"

namespace ddpm_fast {
extern const Kernels kPortableKernels;
constinit const Kernels kPortableKernels = portable::make_kernels("portable");
}  // namespace ddpm_fast
