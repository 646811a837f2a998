// The split of an operator's work over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <thread>

#include "kernels.h"
#if MLORA_X86
#include <xmmintrin.h>
#endif

namespace mlora {

// Subnormal operands make FMA code 30 times slower; dot-product instructions flush them anyway.
class FlushSubnormals {
 public:
#if MLORA_X86
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned saved_;
#endif
};

// For what must give torch's bits, of subnormals too.
class KeepSubnormals {};

// Threads for work of this cost, in elements read or so.
inline int64_t threads_for(int64_t cost) {
  constexpr int64_t kSmall = 1 << 17;  // not worth waking a thread for
  return cost < kSmall ? 1 : torch::stable::get_num_threads();
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(task, tasks) for every task, one a thread.
template <class Subnormals = FlushSubnormals, class F>
void split(int64_t cost, const F& f) {
  const int64_t tasks = threads_for(cost);
  if (tasks == 1) {
    [[maybe_unused]] const Subnormals mode;
    f(int64_t{0}, int64_t{1});
    return;
  }
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const Subnormals mode;
    for (int64_t task = begin; task < end; ++task) f(task, tasks);
  });
}

// As two calls of `split`, first(task, tasks) for every task before second(task, tasks) for any, but waking the
// threads once. A task of the first phase is run by whoever claims it, so that a thread that comes late holds nobody
// up, and so that nobody ever waits for a task that nobody is running.
template <class First, class Second>
void split_in_two(int64_t cost, const First& first, const Second& second) {
  constexpr int64_t kMost = 256;
  const int64_t tasks = threads_for(cost);
  if (tasks == 1 || tasks > kMost) {
    split(tasks == 1 ? 0 : cost, first);
    split(tasks == 1 ? 0 : cost, second);
    return;
  }
  std::atomic<bool> claimed[kMost] = {};
  std::atomic<int64_t> done{0};
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const FlushSubnormals flush;
    for (int64_t i = 0; i < tasks; ++i) {
      const int64_t task = (begin + i) % tasks;
      if (claimed[task].exchange(true, std::memory_order_relaxed)) continue;
      first(task, tasks);
      done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; done.load(std::memory_order_acquire) != tasks; ++spins) {
#if MLORA_X86
      _mm_pause();
#endif
      if (spins > 4096) std::this_thread::yield();
    }
    for (int64_t task = begin; task < end; ++task) second(task, tasks);
  });
}

// Walks jobs laid end to end along the cost axis, and hands out each one's share of one task's range of that axis.
class Share {
 public:
  Share(int64_t cost, int64_t task, int64_t tasks) : from_(task * cost / tasks), to_((task + 1) * cost / tasks) {}

  // A job of `units` units that cost `each`: sets [begin, end) to the units whose first cost lies in the range.
  bool take(int64_t units, int64_t each, int64_t* begin, int64_t* end) {
    *begin = clamp((from_ - position_ + each - 1) / each, from_ <= position_, units);
    *end = clamp((to_ - position_ + each - 1) / each, to_ <= position_, units);
    position_ += units * each;
    return *begin < *end;
  }

 private:
  static int64_t clamp(int64_t unit, bool before, int64_t units) { return before ? 0 : unit < units ? unit : units; }

  int64_t from_, to_, position_ = 0;
};

}  // namespace mlora
