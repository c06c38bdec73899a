#include "parallel.h"

#include <ATen/Parallel.h>
#if defined(__unix__)
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "shares.h"

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

void run_parallel(int64_t count, int64_t grain, void (*task)(void*, int64_t, int64_t), void* context, int64_t most) {
  const int64_t largest = (count + grain - 1) / std::max<int64_t>(1, grain);
  const int64_t threads = std::min({thread_count(), Shares::kMostThreads, largest});
  const int64_t pieces = std::min(largest / std::max<int64_t>(1, threads), most) * threads;
  if (most == 1 || threads <= 1) {
    return at::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { task(context, begin, end); });
  }
  Shares shares(threads);
  for (int64_t i = 0; i < threads; ++i) shares.give(i, pieces * i / threads, pieces * (i + 1) / threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t piece; (piece = shares.take_any(i)) >= 0;) {
        task(context, count * piece / pieces, count * (piece + 1) / pieces);
      }
    }
  });
}

int64_t thread_count() { return at::get_num_threads(); }

namespace {

// `name`: of sysconf. `otherwise`: bytes where it reports none.
int64_t floats_of_cache(int name, int64_t otherwise) {
  const long bytes = name < 0 ? 0 : sysconf(name);
  return (bytes > 0 ? int64_t{bytes} : otherwise) / 4;
}

#if defined(_SC_LEVEL2_CACHE_SIZE)
constexpr int kSecondLevel = _SC_LEVEL2_CACHE_SIZE, kThirdLevel = _SC_LEVEL3_CACHE_SIZE;
#else
constexpr int kSecondLevel = -1, kThirdLevel = -1;
#endif

}  // namespace

int64_t second_level_floats() {
  static const int64_t floats = floats_of_cache(kSecondLevel, int64_t{512} << 10);
  return floats;
}

int64_t third_level_floats() {
  static const int64_t floats =
      std::min(floats_of_cache(kThirdLevel, int64_t{32} << 20), int64_t{64} << 18);  // floats of 64 MB
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
