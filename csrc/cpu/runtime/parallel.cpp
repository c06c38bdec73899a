#include "parallel.h"

#include <ATen/Parallel.h>
#if defined(__unix__)
#include <unistd.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <new>

namespace ddpm_fast {

namespace {

constexpr size_t kAlignment = 64;

struct Buffer {
  void* memory = nullptr;
  float* data = nullptr;  // in memory, aligned
  int64_t floats = 0;
  ~Buffer() { std::free(memory); }
};

}  // namespace

void run_parallel(int64_t count, int64_t grain, void (*task)(void*, int64_t, int64_t), void* context) {
  at::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { task(context, begin, end); });
}

int64_t thread_count() { return at::get_num_threads(); }

int64_t second_level_floats() {
  static const int64_t floats = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
    const long bytes = 0;
#endif
    return int64_t{bytes > 0 ? bytes : 512 << 10} / 4;
  }();
  return floats;
}

float* thread_scratch(int slot, int64_t floats) {
  thread_local Buffer buffers[kScratchSlots];
  Buffer& buffer = buffers[slot];
  if (buffer.floats < floats) {
    // Where a large piece grows, Linux moves its pages; a new piece's would be touched for the first time again.
    void* const memory = std::realloc(buffer.memory, static_cast<size_t>(floats) * sizeof(float) + kAlignment);
    if (memory == nullptr) throw std::bad_alloc();
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
    buffer.memory = memory;
    buffer.data = reinterpret_cast<float*>((address + kAlignment - 1) / kAlignment * kAlignment);
    buffer.floats = floats;
  }
  return buffer.data;
}

}  // namespace ddpm_fast
