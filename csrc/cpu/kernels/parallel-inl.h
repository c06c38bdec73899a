// Loops over torch's threads from code that includes nothing of torch.
#pragma once

#include "cpu/runtime/parallel.h"
#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// body(begin, end) over pieces of [0, count), see run_parallel.
template <typename Body>
inline void parallel(int64_t count, int64_t grain, const Body& body) {
  run_parallel(
      count, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
