// The scheduler of the emulation: fibers, barriers and warp operations. Never instrumented itself.

#include "emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "state.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the emulation switches stacks in x86-64 assembly"
#endif

// Saves what a call preserves on the running stack, and goes on with the other one.
extern "C" void mlora_switch_stack(void** save, void* to);
asm(R"(
.text
.globl mlora_switch_stack
.hidden mlora_switch_stack
.type mlora_switch_stack, @function
mlora_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mlora_switch_stack, .-mlora_switch_stack
)");

namespace emulation {

State state;

namespace {

constexpr size_t kStack = 256 << 10;

enum Wait : uint8_t { kReady, kBlock, kCluster, kWarpOp, kDone };

struct Fiber {
  void* stack_pointer = nullptr;
  Wait wait = kReady;
  int line = 0;
};

struct WarpState {
  unsigned arrived = 0, mask = 0;
  char kind = 0;
  int line = 0, parity = 0;
  uint64_t value[2][32];
};

struct Vote {
  bool pending, result;
};

std::vector<Fiber> fibers;
std::vector<WarpState> warps;
std::vector<int> block_arrived;
std::vector<Vote> block_votes;
int cluster_arrived, remaining;
void* main_stack;
unsigned char* stacks;
size_t stack_count;
const std::function<void()>* body;
std::string error;
uint64_t launches;
#if defined(__SANITIZE_ADDRESS__)
const void* main_bottom;
size_t main_size;
#endif

unsigned char* stack_of(int fiber) { return stacks + static_cast<size_t>(fiber) * kStack; }

void enter(int fiber) {
  state.fiber = fiber;
  state.thread = fiber % state.block;
  state.rank = fiber / state.block;
  threadIdx.x = static_cast<unsigned>(state.thread);
  blockIdx.x = static_cast<unsigned>(state.first_block + state.rank);
#if defined(__SANITIZE_ADDRESS__)
  void* fake;
  __sanitizer_start_switch_fiber(&fake, stack_of(fiber), kStack);
#endif
  mlora_switch_stack(&main_stack, fibers[fiber].stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void leave() {
#if defined(__SANITIZE_ADDRESS__)
  void* fake;
  __sanitizer_start_switch_fiber(fibers[state.fiber].wait == kDone ? nullptr : &fake, main_bottom, main_size);
#endif
  mlora_switch_stack(&fibers[state.fiber].stack_pointer, main_stack);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &main_bottom, &main_size);
#endif
}

void start() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &main_bottom, &main_size);
#endif
  (*body)();
  Fiber& fiber = fibers[state.fiber];
  if (warps[state.fiber / 32].arrived) fail("a thread ended while its warp waits for it in a warp operation");
  fiber.wait = kDone;
  --remaining;
  leave();
  __builtin_unreachable();
}

void suspend(Wait why, int line) {
  fibers[state.fiber].wait = why;
  fibers[state.fiber].line = line;
  leave();
}

void wake(int from, int to, Wait why) {
  for (int f = from; f < to; ++f) {
    if (fibers[f].wait == why) fibers[f].wait = kReady;
  }
}

void run_cluster(int blocks, const std::vector<int>& order) {
  const int count = blocks * state.block;
  if (stack_count < static_cast<size_t>(count)) {
    if (stacks) munmap(stacks, stack_count * kStack);
    stacks = static_cast<unsigned char*>(mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks == MAP_FAILED) {
      stacks = nullptr;
      stack_count = 0;
      throw std::runtime_error("emulation: no memory for stacks");
    }
    stack_count = count;
  }
  fibers.assign(count, {});
  warps.assign(count / 32, {});
  state.warp_epoch.assign(count / 32, 1);
  block_arrived.assign(blocks, 0);
  block_votes.assign(blocks, {});
  cluster_arrived = 0;
  remaining = count;
  state.blocks.clear();
  state.blocks.resize(blocks);
  state.cluster_epoch = 1;
  for (int f = 0; f < count; ++f) {
    void** top = reinterpret_cast<void**>(stack_of(f) + kStack) - 1;  // as after a call: 16-aligned less 8
    *top = nullptr;
    *--top = reinterpret_cast<void*>(&start);
    top -= 6;
    std::memset(top, 0, 6 * sizeof(void*));
    fibers[f].stack_pointer = top;
  }
  while (remaining && error.empty()) {
    bool ran = false;
    for (const int f : order) {
      if (fibers[f].wait != kReady) continue;
      ran = true;
      enter(f);
      if (!error.empty()) return;
    }
    if (ran || !remaining) continue;
    for (const int f : order) {
      if (fibers[f].wait == kDone) continue;
      const char* what = fibers[f].wait == kBlock     ? "a barrier of the block"
                         : fibers[f].wait == kCluster ? "a barrier of the cluster"
                                                      : "a warp operation (divergent shuffle)";
      error = std::string("not every thread reaches ") + what + ": thread " + std::to_string(f % state.block) +
              " of block " + std::to_string(state.first_block + f / state.block) + " waits at line " +
              std::to_string(fibers[f].line);
      return;
    }
  }
}

}  // namespace

void fail(const char* message) {
  if (error.empty()) {
    error = std::string(message) + " (block " + std::to_string(state.first_block + state.rank) + ", thread " +
            std::to_string(state.thread) + ")";
  }
  leave();
  __builtin_unreachable();
}

void run(int64_t grid, int block, int cluster, const std::function<void()>& kernel) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (block % 32 || cluster < 1 || grid % cluster) throw std::runtime_error("emulation: wrong launch shape");
  gridDim.x = static_cast<unsigned>(grid);
  blockDim.x = static_cast<unsigned>(block);
  body = &kernel;
  state.block = block;
  error.clear();
  std::vector<int> order(static_cast<size_t>(block) * cluster);
  std::iota(order.begin(), order.end(), 0);
  if (launches % 3 == 1) std::vector<int>(order.rbegin(), order.rend()).swap(order);
  if (launches % 3 == 2) std::shuffle(order.begin(), order.end(), std::mt19937(static_cast<unsigned>(launches)));
  ++launches;
  if (state.launched) state.launched(grid);
  for (int64_t first = 0; first < grid && error.empty(); first += cluster) {
    state.first_block = first;
    run_cluster(cluster, order);
    if (state.cluster_done) state.cluster_done(cluster);
  }
  state.blocks.clear();
  state.fiber = -1;
#if defined(__SANITIZE_ADDRESS__)
  if (!error.empty()) __asan_unpoison_memory_region(stacks, stack_count * kStack);  // of threads that were abandoned
#endif
  if (!error.empty()) throw std::runtime_error("emulation: " + error);
}

void* shared_block(size_t bytes) {
  SharedBlock& shared = state.blocks[state.rank];
  if (!shared.memory) {
    shared.bytes = bytes;
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, bytes + kGuard)) fail("no memory");
    shared.memory.reset(static_cast<unsigned char*>(memory));
    std::memset(shared.memory.get(), 0xff, bytes);
    shared.access.assign(bytes, {});
  }
  if (shared.bytes != bytes) fail("a block asks for two kinds of shared memory");
  return shared.memory.get();
}

const void* peer_block(const void* p, int rank) {
  const SharedBlock& mine = state.blocks[state.rank];
  const std::ptrdiff_t offset = static_cast<const unsigned char*>(p) - mine.memory.get();
  if (rank < 0 || rank >= static_cast<int>(state.blocks.size()) || offset < 0 ||
      offset >= static_cast<std::ptrdiff_t>(mine.bytes)) {
    fail("peer() of an address or a block that is not there");
  }
  if (!state.blocks[rank].memory) fail("peer() of a block that has not started");
  return state.blocks[rank].memory.get() + offset;
}

void block_barrier(int line) {
  const int from = state.rank * state.block;
  if (++block_arrived[state.rank] < state.block) return suspend(kBlock, line);
  block_arrived[state.rank] = 0;
  ++state.blocks[state.rank].epoch;
  wake(from, from + state.block, kBlock);
}

bool block_or(bool value, int line) {
  Vote& vote = block_votes[state.rank];
  vote.pending |= value;
  if (block_arrived[state.rank] == state.block - 1) vote = {false, vote.pending};
  block_barrier(line);
  return vote.result;
}

void cluster_barrier(int line) {
  if (++cluster_arrived < static_cast<int>(fibers.size())) return suspend(kCluster, line);
  cluster_arrived = 0;
  ++state.cluster_epoch;
  for (SharedBlock& block : state.blocks) ++block.epoch;
  wake(0, static_cast<int>(fibers.size()), kCluster);
}

uint64_t exchange(unsigned mask, uint64_t value, int source, char kind, int line) {
  WarpState& warp = warps[state.fiber / 32];
  const int me = lane(), parity = warp.parity;
  const unsigned bit = 1u << me;
  if (!(mask & bit)) fail("a lane is not in its own mask");
  if (!(mask >> source & 1)) fail("a shuffle reads a lane outside of its mask");
  if (!warp.arrived) {
    warp.mask = mask;
    warp.kind = kind;
    warp.line = line;
  } else if (warp.mask != mask || warp.kind != kind || warp.line != line) {
    fail("divergent shuffle: lanes of a warp meet in different operations");
  }
  warp.value[parity][me] = value;
  warp.arrived |= bit;
  if (warp.arrived != mask) {
    suspend(kWarpOp, line);
  } else {
    warp.arrived = 0;
    warp.parity ^= 1;
    if (kind == 'w' && mask == 0xffffffffu) ++state.warp_epoch[state.fiber / 32];  // shuffles do not order memory
    const int first = state.fiber / 32 * 32;
    wake(first, first + 32, kWarpOp);
  }
  return warp.value[parity][source];
}

unsigned ballot(unsigned mask, bool value, int line) {
  WarpState& warp = warps[state.fiber / 32];
  const int parity = warp.parity;
  exchange(mask, value, lane(), 'b', line);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= (mask >> i & 1 && warp.value[parity][i] ? 1u : 0u) << i;
  return bits;
}

int lane() { return state.thread % 32; }
int cluster_rank() { return state.rank; }
int cluster_size() { return static_cast<int>(state.blocks.size()); }

float half_to_float(uint16_t bits) { return static_cast<float>(bit_cast<_Float16>(bits)); }
uint16_t float_to_half(float value) { return bit_cast<uint16_t>(static_cast<_Float16>(value)); }

}  // namespace emulation
