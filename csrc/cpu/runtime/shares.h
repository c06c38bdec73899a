// Tasks that threads take from each other. Nothing here is inline: kernels are compiled for several processors.
#pragma once

#include <stdint.h>

namespace ddpm_fast {

// Tasks of several threads. Each has some of its own, which it takes from the first on; when none is left, it takes the
// last of another thread. Cores of a shared machine are slower by turns: on two of an Ice Lake one thread waited for
// the other for 9% of a network's time where each took half of every convolution.
class Shares {
 public:
  static constexpr int64_t kMostThreads = 256;

  explicit Shares(int64_t threads);

  // Gives a thread tasks [first, last), 2^31 at most. Who takes one sees what this thread wrote before.
  void give(int64_t thread, int64_t first, int64_t last);

  // A thread's next task, the last task of another thread, which is `of` then, or the one where there is no other; -1
  // where there is none.
  int64_t take(int64_t thread);
  int64_t take_of_another(int64_t thread, int64_t& of);
  int64_t take_any(int64_t thread);

 private:
  struct alignas(128) Row {  // two lines: processors fetch pairs
    uint64_t left;
  };
  Row rows_[kMostThreads];
  int64_t threads_;
};

}  // namespace ddpm_fast
