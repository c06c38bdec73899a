"""Threads that help each other (csrc/cpu/kernels/parallel-inl.h) in a program of their own, where a task may fail."""

from __future__ import annotations

import os
import subprocess

from test_kernel_code import CSRC

# Two threads. The first makes something and its first task throws while the second is at another of its tasks, which
# looks at what was made once the first has had time to free it.
PROGRAM = """
#define DDPM_FAST_ISA portable
#define DDPM_FAST_LANES 4
#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <thread>
#include "cpu/kernels/parallel-inl.h"
#include "cpu/runtime/shares.cpp"

struct Made {
  bool& alive;
  ~Made() { alive = false; }
};

int main() {
  bool alive = true, was_alive = false, caught = false;
  int begun = 0, done = 0;
  const auto pause = [] { std::this_thread::sleep_for(std::chrono::milliseconds(1)); };
  const auto run = [&](const Made& made, int64_t task) {
    if (task == 0) {
      while (!__atomic_load_n(&begun, __ATOMIC_ACQUIRE)) pause();
      throw std::runtime_error("no memory");
    }
    if (!__atomic_exchange_n(&begun, 1, __ATOMIC_ACQ_REL)) {
      std::this_thread::sleep_for(std::chrono::milliseconds(300));
      was_alive = made.alive;
    }
    __atomic_fetch_add(&done, 1, __ATOMIC_RELEASE);
  };
  ddpm_fast::portable::Helpers<Made, decltype(run)> helpers(2, run);
  std::thread other([&] {
    while (!__atomic_load_n(&begun, __ATOMIC_ACQUIRE)) helpers.help(1);
  });
  try {
    const Made made{alive};
    helpers.work(0, made, 0, 1000000);
  } catch (const std::runtime_error&) {
    caught = true;
  }
  const int when_caught = __atomic_load_n(&done, __ATOMIC_ACQUIRE);
  other.join();
  std::printf("%d %d %d %d", caught, was_alive, when_caught > 0, done == when_caught);
}
"""


def test_what_a_thread_made_outlives_those_who_read_it_where_a_task_fails(tmp_path):
    (tmp_path / "program.cpp").write_text(PROGRAM)
    flags = ["-std=c++20", "-O1", "-pthread", f"-I{CSRC}"]
    command = [os.environ.get("CXX", "c++"), *flags, "program.cpp", "-o", "program"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    printed = subprocess.run([tmp_path / "program"], capture_output=True, text=True, check=True, timeout=300).stdout
    assert printed == "1 1 1 1"
