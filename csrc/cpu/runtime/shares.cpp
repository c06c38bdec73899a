#include "shares.h"

namespace ddpm_fast {

namespace {

uint64_t packed(int64_t first, int64_t last) { return static_cast<uint64_t>(first << 32 | last); }

int64_t take_one(uint64_t& tasks, bool first_one) {
  uint64_t left = __atomic_load_n(&tasks, __ATOMIC_ACQUIRE);
  for (;;) {
    const int64_t first = static_cast<int64_t>(left >> 32), last = static_cast<int64_t>(left & 0xffffffff);
    if (first >= last) return -1;
    const uint64_t rest = first_one ? packed(first + 1, last) : packed(first, last - 1);
    if (__atomic_compare_exchange_n(&tasks, &left, rest, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
      return first_one ? first : last - 1;
    }
  }
}

}  // namespace

Shares::Shares(int64_t threads) : threads_(threads) {
  for (int64_t i = 0; i < threads; ++i) give(i, 0, 0);
}

void Shares::give(int64_t thread, int64_t first, int64_t last) {
  __atomic_store_n(&rows_[thread].left, packed(first, last), __ATOMIC_RELEASE);
}

int64_t Shares::take(int64_t thread) { return take_one(rows_[thread].left, true); }

int64_t Shares::take_of_another(int64_t thread, int64_t& of) {
  for (int64_t i = 1; i < threads_; ++i) {
    of = (thread + i) % threads_;
    const int64_t task = take_one(rows_[of].left, false);
    if (task >= 0) return task;
  }
  return -1;
}

int64_t Shares::take_any(int64_t thread) {
  const int64_t task = take(thread);
  int64_t of;
  return task >= 0 ? task : take_of_another(thread, of);
}

}  // namespace ddpm_fast
