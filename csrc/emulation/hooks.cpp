// What the compiler's -fsanitize=thread calls before each memory access of the kernels, in place of that sanitizer's
// own library: checks of shared memory or, while buffers are watched, counts of the accesses to those instead.
//
// A byte of shared memory may be read after it was written, by the writer or past a barrier since; and written if
// nobody else touched it since the last barrier. The barrier is the block's, or the cluster's if it lies in a peer.

#include <algorithm>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "emulation.h"
#include "state.h"

namespace emulation {
namespace {

struct Watched {
  uintptr_t begin, end;
  bool data;  // false: metadata, such as a plan
};
std::vector<Watched> watched;

struct Counts {
  int64_t launches, programs, idle_programs, sectors_read, sectors_written, metadata_sectors, narrow;
};
Counts counts;
std::vector<bool> busy;  // blocks of the running cluster that touched data

// A memory instruction of a warp is what its lanes execute at one address in the code for the same time.
struct Instruction {
  uint64_t warp_site;
  uint32_t occurrence;
  bool operator==(const Instruction& o) const { return warp_site == o.warp_site && occurrence == o.occurrence; }
};
struct Hash {
  size_t operator()(const Instruction& i) const {
    return (i.warp_site * 0x9e3779b97f4a7c15u) ^ (i.occurrence * 0x85ebca6bu);
  }
};
std::unordered_map<uint64_t, uint32_t> occurrences;  // by (fiber, site)
std::unordered_map<Instruction, std::vector<uintptr_t>, Hash> sectors;

void count(uintptr_t at, size_t bytes, bool write, uintptr_t site) {
  for (const Watched& w : watched) {
    if (at < w.begin || at >= w.end) continue;
    const uint64_t fiber = static_cast<uint64_t>(state.fiber);
    const uint32_t occurrence = occurrences[site * 16384 + fiber]++;
    std::vector<uintptr_t>& seen = sectors[{site * 16384 + fiber / 32, occurrence}];
    for (uintptr_t sector = at / 32; sector <= (at + bytes - 1) / 32; ++sector) {
      if (std::find(seen.begin(), seen.end(), sector) != seen.end()) continue;
      seen.push_back(sector);
      ++(w.data ? write ? counts.sectors_written : counts.sectors_read : counts.metadata_sectors);
    }
    if (w.data) {
      busy[state.rank] = true;
      counts.narrow += bytes < 16;
    }
    return;
  }
}

void launched(int64_t grid) {
  ++counts.launches;
  counts.programs += grid;
  busy.assign(64, false);
}

void cluster_done(int blocks) {
  for (int b = 0; b < blocks; ++b) counts.idle_programs += !busy[b];
  busy.assign(64, false);
  occurrences.clear();
  sectors.clear();
}

[[noreturn]] void race(const char* what, size_t offset, int other) {
  static std::string message;
  message = std::string(what) + " at byte " + std::to_string(offset) + " of shared memory";
  if (other >= 0) message += ", with thread " + std::to_string(other % state.block);
  fail(message.c_str());
}

void check(size_t rank, size_t offset, size_t bytes, bool write) {
  SharedBlock& block = state.blocks[rank];
  const bool remote = static_cast<int>(rank) != state.rank;
  if (remote && write) race("a write to a peer", offset, -1);
  if (offset + bytes > block.bytes) race("an access beyond the end", offset, -1);
  const Time now = {state.warp_epoch[state.fiber / 32], block.epoch, state.cluster_epoch};
  for (size_t i = offset; i < offset + bytes; ++i) {
    Access& a = block.access[i];
    // Whether what somebody did then lies behind a barrier that both passed since.
    const int32_t warp = state.fiber / 32;
    const auto past = [&](int32_t who, const Time& then) {
      if (who == -2 && a.reader_warp == warp && then.warp < now.warp) return true;
      if (who == -2) return then.block < now.block && then.cluster < now.cluster;
      if (who >= 0 && who / 32 == warp && then.warp < now.warp) return true;
      const bool near = who / state.block == static_cast<int>(rank) && !remote;
      return near ? then.block < now.block : then.cluster < now.cluster;
    };
    if (a.writer == -1 && !write) race("uninitialised shared read", i, -1);
    if (a.writer != -1 && a.writer != state.fiber && !past(a.writer, a.written)) {
      race(write ? "two writes with no barrier between" : "a read with no barrier since the write", i, a.writer);
    }
    if (write) {
      if (a.reader != -1 && a.reader != state.fiber && !past(a.reader, a.read)) {
        race("a write with no barrier since a read", i, a.reader);
      }
      a = {};
      a.writer = state.fiber;
      a.written = now;
    } else {
      // Several readers count as one that both the block's and the cluster's barrier have to pass: a cluster's is both.
      const bool others = a.reader != -1 && a.reader != state.fiber && !past(a.reader, a.read);
      if (others && a.reader_warp != warp) a.reader_warp = -1;
      if (a.reader == -2 && others) {
        if (a.reader_warp == warp) a.read.warp = now.warp;
        if (remote) a.read.cluster = now.cluster;
        if (!remote) a.read.block = now.block;
      } else if (others) {
        const bool was_remote = a.reader / state.block != static_cast<int>(rank);
        a.read = {now.warp, !remote || !was_remote ? now.block : 0, remote || was_remote ? now.cluster : 0};
        a.reader = -2;
      } else {
        a.reader = state.fiber;
        a.reader_warp = warp;
        a.read = now;
      }
    }
  }
}

inline void touch(const void* p, size_t bytes, bool write, uintptr_t site) {
  if (state.fiber < 0 || !state.launched) return;  // not in a kernel, or built without the hooks
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  if (!watched.empty()) return count(at, bytes, write, site);
  for (size_t rank = 0; rank < state.blocks.size(); ++rank) {
    const uintptr_t base = reinterpret_cast<uintptr_t>(state.blocks[rank].memory.get());
    if (base && at >= base && at < base + state.blocks[rank].bytes + kGuard) {
      return check(rank, at - base, bytes, write);
    }
  }
}

}  // namespace

void load16(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("a 16-byte load at an address that is not aligned");
  touch(from, 16, false, reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
  std::memcpy(to, from, 16);
}

void store16(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16) fail("a 16-byte store at an address that is not aligned");
  touch(to, 16, true, reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
  std::memcpy(to, from, 16);
}

}  // namespace emulation

// Called by bench/gpu_static.py. Counts stay 0 unless the kernels are built with -fsanitize=thread.
extern "C" {
__attribute__((visibility("default"))) void mlora_watch(const void* p, int64_t bytes, int data) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  emulation::watched.push_back({begin, begin + static_cast<uintptr_t>(bytes), data != 0});
}
// launches, programs, programs that touched no data, sectors of data read and written, of metadata, accesses below 16 B
__attribute__((visibility("default"))) void mlora_counts(int64_t* to) {
  std::memcpy(to, &emulation::counts, sizeof emulation::counts);
  emulation::counts = {};
  emulation::watched.clear();
}

#define MLORA_HOOK(name, bytes, write)                                                                       \
  void __tsan_##name(void* p) {                                                                              \
    emulation::touch(p, bytes, write, reinterpret_cast<uintptr_t>(__builtin_return_address(0)));             \
  }
#define MLORA_HOOKS(bytes)                      \
  MLORA_HOOK(read##bytes, bytes, false)         \
  MLORA_HOOK(write##bytes, bytes, true)         \
  MLORA_HOOK(unaligned_read##bytes, bytes, false) \
  MLORA_HOOK(unaligned_write##bytes, bytes, true)
MLORA_HOOKS(1)
MLORA_HOOKS(2)
MLORA_HOOKS(4)
MLORA_HOOKS(8)
MLORA_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) {
  emulation::touch(p, bytes, false, reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}
void __tsan_write_range(void* p, size_t bytes) {
  emulation::touch(p, bytes, true, reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}
void __tsan_init() {
  emulation::state.launched = emulation::launched;
  emulation::state.cluster_done = emulation::cluster_done;
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
}
