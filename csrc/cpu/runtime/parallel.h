// Threads, caches and memory for the kernels of cpu/kernels/, which include nothing of torch.
#pragma once

#include <stdint.h>

namespace ddpm_fast {

// task(context, begin, end) over pieces of [0, count) on torch's threads; pieces of less than `grain` are not split.
// A thread has at most `most` pieces, next to each other; one that has done its own takes the last of another's. The
// pieces depend on the number of threads, so a task must compute each index the same way in any piece.
constexpr int64_t kPiecesOfThread = 16;
void run_parallel(int64_t count, int64_t grain, void (*task)(void*, int64_t, int64_t), void* context,
                  int64_t most = kPiecesOfThread);

// How many threads run_parallel may use: to cut work into even pieces where the cuts do not touch the results.
int64_t thread_count();

// Floats of a core's second-level cache, and of the third-level cache that cores share, as the system reports them,
// read once; of 512 KB and 32 MB where it reports none. Of the latter at most 64 MB: scratch memory is a part of it.
int64_t second_level_floats();
int64_t third_level_floats();

// Memory of the calling thread, kept for its next call with this slot, aligned to 64 bytes, not cleared. One slot is
// one use at a time: a kernel that calls another must use other slots.
float* thread_scratch(int slot, int64_t floats);
constexpr int kScratchSlots = 8;

}  // namespace ddpm_fast
