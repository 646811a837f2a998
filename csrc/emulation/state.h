// What the scheduler and the hooks share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace emulation {

// The barriers that a thread's warp (__syncwarp), block and cluster have passed.
struct Time {
  uint32_t warp = 0, block = 0, cluster = 0;
};

// Who touched a shared byte last, and when: a thread of the cluster, -1 for none, -2 for several.
struct Access {
  int32_t writer = -1, reader = -1;
  int32_t reader_warp = -1;  // the warp that all readers belong to, -1 if there are others
  Time written, read;
};

struct Free {
  void operator()(unsigned char* p) const { std::free(p); }
};

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuard = 0;  // AddressSanitizer has its own
#else
constexpr size_t kGuard = 4096;  // bytes behind a block's shared memory, where an access is one beyond its end
#endif

struct SharedBlock {
  std::unique_ptr<unsigned char, Free> memory;
  size_t bytes = 0;
  uint32_t epoch = 1;  // barriers passed
  std::vector<Access> access;
};

struct State {
  int64_t first_block = 0;
  int fiber = -1, thread = 0, rank = 0;  // of the running fiber: in the cluster, in its block, its block in the cluster
  int block = 0;                         // threads of a block
  uint32_t cluster_epoch = 1;
  std::vector<uint32_t> warp_epoch;  // of the running cluster
  std::vector<SharedBlock> blocks;  // of the running cluster
  void (*launched)(int64_t grid) = nullptr;
  void (*cluster_done)(int blocks) = nullptr;
};
extern State state;

}  // namespace emulation
