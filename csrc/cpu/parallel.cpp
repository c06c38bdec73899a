#include "parallel.h"

#include <ATen/Parallel.h>

#include <cstdlib>
#include <new>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace ddpm_fast {

namespace {

struct Buffer {
  float* data = nullptr;
  int64_t floats = 0;
  ~Buffer() { std::free(data); }
};

// A network asks for the memory of its maps and gradients again in every step. glibc would give it back to the system in
// between and take it anew, page by page: 27,000 page faults, 5% of the time of a training step of a Unet(64) at 32×32.
// So freed memory stays with the process, from the first native kernel on. malloc_trim(0) still gives it back.
bool keep_freed_memory() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the most that glibc takes
  mallopt(M_TRIM_THRESHOLD, 2047 << 20);
  mallopt(M_TOP_PAD, 16 << 20);
#endif
  return true;
}

}  // namespace

void run_parallel(int64_t count, int64_t grain, void (*task)(void*, int64_t, int64_t), void* context) {
  static const bool kept = keep_freed_memory();
  static_cast<void>(kept);
  at::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { task(context, begin, end); });
}

int64_t thread_count() { return at::get_num_threads(); }

float* thread_scratch(int slot, int64_t floats) {
  thread_local Buffer buffers[kScratchSlots];
  Buffer& buffer = buffers[slot];
  if (buffer.floats < floats) {
    std::free(buffer.data);
    buffer.floats = 0;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(floats + 15) / 16 * 64));
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.floats = floats;
  }
  return buffer.data;
}

}  // namespace ddpm_fast
