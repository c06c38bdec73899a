// A pool for the maps and gradients of the native operators, which every step allocates again. malloc would return the
// memory to the system in every step (27,000 page faults, 5% of a training step of Unet(64) at 32×32), or keep it in
// holes between long-lived tensors such as Adam's moments (another 100 MB there).
//
// The pool is one range of addresses, first-fit: a tensor takes the lowest address where it fits, so backward's
// gradients follow the maps that it frees. Pages are huge if Linux has them, and the process is some seconds old: a
// virtual machine that has returned free memory to its host takes ten times as long for the first touch of a huge page.
#include "memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_ops.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/StorageImpl.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <mutex>

#include "cpu/kernels/kernels.h"

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)  // which watches malloc's borders, and knows none of ours
#define DDPM_FAST_POOL
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace ddpm_fast {

#ifdef DDPM_FAST_POOL
namespace {

constexpr size_t kMinBytes = 256 << 10;  // bytes; smaller tensors are malloc's
constexpr size_t kStep = 2 << 20;        // the range grows by huge pages
// Padding between neighbours, so maps whose sizes are powers of two are not a multiple of 4 KB apart: the processor
// would take a load for dependent on a store to the same offset of another map.
constexpr size_t kGap = 17 * 64;
// Of small pages, and of memory that no step has used: touching it again takes a third of a second for a network of
// 128×128, as where runs of sampling take turns with other work.
constexpr std::chrono::seconds kSmall{10}, kKept{60};

using Clock = std::chrono::steady_clock;

class Pool {
 public:
  // Never destroyed: tensors may outlive the library's other statics.
  static Pool& the() {
    static Pool* const pool = new Pool;
    return *pool;
  }

  // 64-byte aligned, or null where there is no room.
  void* take(size_t bytes) {
    const size_t size = (bytes + 63) / 64 * 64 + kGap;
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto piece = free_.begin(); piece != free_.end(); ++piece) {
      if (piece->second >= size) return cut(piece, size);
    }
    if (!grow(size)) return nullptr;
    return cut(std::prev(free_.end()), size);
  }

  void give(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto taken = taken_.find(static_cast<char*>(data));
    auto piece = free_.emplace(taken->first, taken->second).first;
    taken_.erase(taken);
    const auto next = std::next(piece);
    if (next != free_.end() && piece->first + piece->second == next->first) {
      piece->second += next->second;
      free_.erase(next);
    }
    if (piece != free_.begin()) {
      const auto before = std::prev(piece);
      if (before->first + before->second == piece->first) {
        before->second += piece->second;
        free_.erase(piece);
      }
    }
    if (taken_.empty()) end_step();
  }

  int64_t empty_cache() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return give_back(begin_);
  }

  void age(double seconds) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto passed = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    made_at_ -= passed;
    needed_at_ -= passed;
  }

 private:
  using Pieces = std::map<char*, size_t>;

  Pool() {
    const size_t memory = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* const range = mmap(nullptr, memory, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) return;  // limited address space: everything is malloc's
    const size_t into_page = reinterpret_cast<uintptr_t>(range) % kStep;
    begin_ = static_cast<char*>(range) + (kStep - into_page) % kStep;
    end_ = begin_;
    limit_ = static_cast<char*>(range) + memory;
    pthread_atfork([] { the().mutex_.lock(); }, [] { the().mutex_.unlock(); }, [] { the().mutex_.unlock(); });
  }

  void* cut(Pieces::iterator piece, size_t size) {
    char* const data = piece->first;
    const size_t left = piece->second - size;
    free_.erase(piece);
    if (left > 0) free_.emplace(data + size, left);
    taken_.emplace(data, size);
    step_high_ = std::max(step_high_, static_cast<size_t>(data + size - begin_));
    return data;
  }

  // Extends the last free piece, at the end of the used range, to at least `size` bytes.
  bool grow(size_t size) {
    const bool has_last = !free_.empty() && free_.rbegin()->first + free_.rbegin()->second == end_;
    const size_t more = (size - (has_last ? free_.rbegin()->second : 0) + kStep - 1) / kStep * kStep;
    if (more > static_cast<size_t>(limit_ - end_)) return false;
    if (mprotect(end_, more, PROT_READ | PROT_WRITE) != 0) return false;
    if (has_last) {
      free_.rbegin()->second += more;
    } else {
      free_.emplace(end_, more);
    }
    end_ += more;
    return true;
  }

  // Called when no tensor is left: a step, or a part of one, is over. Returns memory that no step has used for
  // kKept.
  void end_step() {
    const auto now = Clock::now();
    if (!is_huge_ && now - made_at_ > kSmall) {
      is_huge_ = true;
      give_back(begin_);                                // all of it, to be touched again as huge pages
      madvise(begin_, limit_ - begin_, MADV_HUGEPAGE);  // best effort
    }
    recent_high_ = std::max(recent_high_, step_high_);
    if (step_high_ >= needed_) {
      needed_ = step_high_;
      needed_at_ = now;
      recent_high_ = 0;
    } else if (now - needed_at_ > kKept) {
      give_back(begin_ + recent_high_);
      needed_ = recent_high_;
      needed_at_ = now;
      recent_high_ = 0;
    }
    step_high_ = 0;
  }

  // The whole pages of free pieces, from an address on.
  int64_t give_back(char* from) {
    int64_t given = 0;
    for (const auto& [data, size] : free_) {
      const size_t first = (std::max(data, from) - begin_ + kStep - 1) / kStep * kStep;
      const size_t end = (data + size - begin_) / kStep * kStep;
      if (first >= end) continue;
      madvise(begin_ + first, end - first, MADV_DONTNEED);
      given += static_cast<int64_t>(end - first);
    }
    return given;
  }

  std::mutex mutex_;
  char *begin_ = nullptr, *end_ = nullptr, *limit_ = nullptr;  // of what may be read and written, and of the range
  Pieces free_, taken_;
  size_t step_high_ = 0, recent_high_ = 0, needed_ = 0;
  Clock::time_point needed_at_, made_at_ = Clock::now();
  bool is_huge_ = false;
};

void give_to_pool(void* data) {
  c10::profiledCPUMemoryReporter().Delete(data);
  Pool::the().give(data);
}

struct PoolAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* const data = bytes < kMinBytes ? nullptr : Pool::the().take(bytes);
    if (data == nullptr) return c10::GetCPUAllocator()->allocate(bytes);
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &give_to_pool, at::Device(at::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

at::Tensor empty_tensor(at::IntArrayRef sizes, at::ScalarType type, at::MemoryFormat format) {
  static PoolAllocator* const allocator = new PoolAllocator;
  return at::Tensor(
      at::detail::empty_generic(sizes, allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), type, format));
}

int64_t empty_cache() { return Pool::the().empty_cache(); }

void age_memory(double seconds) { Pool::the().age(seconds); }

#else

at::Tensor empty_tensor(at::IntArrayRef sizes, at::ScalarType type, at::MemoryFormat format) {
  return unpooled_tensor(sizes, type, format);
}

int64_t empty_cache() { return 0; }

void age_memory(double) {}

#endif

at::Tensor unpooled_tensor(at::IntArrayRef sizes, at::ScalarType type, at::MemoryFormat format) {
  // at::empty without its header, which brings ATen/Context.h.
  return at::_ops::empty_memory_format::call(c10::fromIntArrayRefSlow(sizes), type, at::kStrided, at::kCPU,
                                             /*pin_memory=*/false, format);
}

namespace {

constexpr int64_t kFewNumbers = 4096;

// Copies a small tensor without gaps to one of its strides and another type, and returns true; torch's copy takes 1 µs.
bool convert_few(const at::Tensor& from, const at::Tensor& to) {
  const int64_t count = from.numel();
  if (count > kFewNumbers || !from.is_non_overlapping_and_dense() || from.is_neg()) return false;
  const ConvertKernels& convert = kernels().convert;
  const auto type = from.scalar_type(), result = to.scalar_type();
  if (result == at::kFloat && type == at::kHalf) {
    convert.from_half(to.data_ptr<float>(), static_cast<const uint16_t*>(from.const_data_ptr()), count);
  } else if (result == at::kFloat && type == at::kBFloat16) {
    convert.from_bfloat16(to.data_ptr<float>(), static_cast<const uint16_t*>(from.const_data_ptr()), count);
  } else if (type == at::kFloat && result == at::kHalf) {
    convert.to_half(static_cast<uint16_t*>(to.data_ptr()), from.const_data_ptr<float>(), count);
  } else if (type == at::kFloat && result == at::kBFloat16) {
    convert.to_bfloat16(static_cast<uint16_t*>(to.data_ptr()), from.const_data_ptr<float>(), count);
  } else {
    return false;
  }
  return true;
}

// An empty tensor with the strides of another, where those leave no gaps.
at::Tensor with_strides_of(const at::Tensor& tensor, const at::Tensor& empty) {
  if (tensor.is_non_overlapping_and_dense()) {
    empty.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  }
  return empty;
}

}  // namespace

at::Tensor empty_tensor_like(const at::Tensor& tensor, at::ScalarType type) {
  return with_strides_of(tensor, empty_tensor(tensor.sizes(), type, tensor.suggest_memory_format()));
}

at::Tensor empty_tensor_like(const at::Tensor& tensor) { return empty_tensor_like(tensor, tensor.scalar_type()); }

at::Tensor as_type(const at::Tensor& tensor, at::ScalarType type) {
  if (tensor.scalar_type() == type) return tensor;
  const at::Tensor result = empty_tensor_like(tensor, type);
  return convert_few(tensor, result) ? result : result.copy_(tensor);
}

at::Tensor unpooled_tensor_like(const at::Tensor& tensor) {
  return with_strides_of(tensor, unpooled_tensor(tensor.sizes(), tensor.scalar_type(), tensor.suggest_memory_format()));
}

}  // namespace ddpm_fast
