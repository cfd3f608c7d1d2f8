// SPDX-License-Identifier: Apache-2.0
// The parallel loop of builds for ThreadSanitizer: threads that are started and joined here.
//
// Torch's pool is not instrumented. So the sanitizer would not see that a loop begins after the code before it and ends
// before the code after it, and would call both a race. Loops are cut finer than in torch, to have more to compare.

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kThreads = 4;
thread_local bool inside = false;
thread_local uint32_t own = 0;

}  // namespace

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelFunc func, void* ctx) {
  if (begin >= end) return 0;
  if (inside) {
    func(begin, end, ctx);
    return 0;
  }
  const int64_t step = (end - begin + kThreads - 1) / kThreads;
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += step)
    threads.emplace_back([=, index = static_cast<uint32_t>(threads.size())] {
      inside = true;
      own = index;
      func(first, std::min(first + step, end), ctx);
    });
  for (std::thread& thread : threads) thread.join();
  return 0;
}

AOTITorchError torch_get_thread_idx(uint32_t* out) {
  *out = own;
  return 0;
}

AOTITorchError torch_get_num_threads(uint32_t* out) {
  *out = kThreads;
  return 0;
}
