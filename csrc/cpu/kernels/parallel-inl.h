// Loops over torch's threads from code that includes nothing of torch.
//
// A task's result does not depend on the thread that takes it.
#pragma once

#include "cpu/runtime/parallel.h"
#include "cpu/runtime/shares.h"
#include "vec-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// body(begin, end) over pieces of [0, count), one for each thread, see run_parallel.
template <typename Body>
inline void parallel(int64_t count, int64_t grain, const Body& body, int64_t most = 1) {
  run_parallel(
      count, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body), most);
}

// The same with more pieces, and threads that help each other: for long products. Who helps reads what the other's
// cache has, so that norms by whole samples took longer.
template <typename Body>
inline void parallel_helped(int64_t count, int64_t grain, const Body& body) {
  parallel(count, grain, body, kPiecesOfThread);
}

// Tasks [0, count), in shares of at least `grain`, of threads that help each other. make_worker() is called once by
// each thread that has a task, and what it returns for each of its tasks.
template <typename MakeWorker>
inline void parallel_shares(int64_t count, int64_t grain, const MakeWorker& make_worker) {
  const int64_t most = min(thread_count(), Shares::kMostThreads);
  const int64_t threads = max<int64_t>(1, min(most, ceil_div(count, max<int64_t>(1, grain))));
  Shares shares(threads);
  for (int64_t i = 0; i < threads; ++i) shares.give(i, count * i / threads, count * (i + 1) / threads);
  parallel(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t task = shares.take_any(i);
      if (task < 0) continue;
      auto worker = make_worker();
      for (; task >= 0; task = shares.take_any(i)) worker(task);
    }
  });
}

// The same where a thread makes something that its tasks read, perhaps more than once: its tasks are given with it, and
// who helps reads it, too. body(made, task).
template <typename Made, typename Body>
class Helpers {
 public:
  Helpers(int64_t threads, const Body& body) : shares_(threads), body_(body) {}

  // Tasks [first, last) of a thread. When it returns, all are done; when it throws, nobody is at one.
  void work(int64_t thread, const Made& made, int64_t first, int64_t last) {
    Part& part = parts_[thread];
    part.made = &made;
    __atomic_store_n(&part.left, last - first, __ATOMIC_RELAXED);
    shares_.give(thread, first, last);
    const Ended ended{*this, thread};
    for (int64_t task; (task = shares_.take(thread)) >= 0;) run(part, task);
  }

  // What is left of the other threads' tasks.
  void help(int64_t thread) {
    for (int64_t task, of; (task = shares_.take_of_another(thread, of)) >= 0;) run(parts_[of], task);
  }

 private:
  struct alignas(128) Part {
    const Made* made;
    int64_t left;  // tasks that are not done
  };
  // Also of a task that throws: its thread must not wait for ever.
  struct Done {
    int64_t& left;
    ~Done() { __atomic_fetch_sub(&left, 1, __ATOMIC_RELEASE); }
  };
  // Those who help read what the thread made, and it frees that next, also where a task of its own has thrown.
  struct Ended {
    Helpers& helpers;
    int64_t thread;
    ~Ended() {
      Part& part = helpers.parts_[thread];
      while (helpers.shares_.take(thread) >= 0) const Done dropped{part.left};
      while (__atomic_load_n(&part.left, __ATOMIC_ACQUIRE) > 0) wait_a_moment();
    }
  };

  void run(Part& part, int64_t task) {
    const Done done{part.left};
    body_(*part.made, task);
  }
  static void wait_a_moment() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  Shares shares_;
  Part parts_[Shares::kMostThreads];
  const Body& body_;
};

}  // namespace ddpm_fast::DDPM_FAST_ISA
