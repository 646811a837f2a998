// Runs the scalar kernels on the cases that tests/aarch64.py wrote, with the plan, the jobs and the tables of the
// operators in csrc/cpu, on one thread and without torch: aarch64 CASES RESULTS.

#include <cstdio>
#include <cstdlib>

#include "jobs.h"

namespace {

using namespace mlora;

enum Operator : int64_t { kApply, kScaleInput, kTurnOutput, kMerge };

struct Header {
  int64_t op, types, tokens, in, out, itemsize;  // `itemsize`: bytes of an element of the arena
};

void need(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "aarch64: %s\n", what);
  std::exit(1);
}

// A count of bytes, and they; a block ends where its bytes do, for checkers of memory.
template <class T>
std::vector<T> read(std::FILE* from) {
  int64_t bytes;
  need(std::fread(&bytes, sizeof bytes, 1, from) == 1 && bytes % sizeof(T) == 0, "a case ends early");
  std::vector<T> block(bytes / sizeof(T));
  need(std::fread(block.data(), 1, bytes, from) == static_cast<size_t>(bytes), "a case ends early");
  return block;
}

// As the operators of apply.cpp, turn.cpp and merge.cpp.
void run(const Header& h, const Routing& routing, const void* x, const void* base, void* y) {
  const Types types = static_cast<Types>(h.types);
  const Kernels& k = kernels_scalar;
  Work work;
  Problem p = {};
  p.x = x;
  p.base = base;
  p.y = y;
  p.in = p.x_stride = h.in;
  p.out = p.y_stride = p.base_stride = h.out;
  p.tokens = h.tokens;
  p.itemsize = h.itemsize;
  if (h.op == kApply) {
    work.build(routing, h.tokens, h.in, h.out, false);
    std::vector<Piece> pieces;
    int64_t total = 0;
    for (const Segment& s : work.segments) {
      pieces.push_back(piece_of(p, s));
      total += pieces.back().shrink + pieces.back().expand;
    }
    Jobs jobs;
    if (total == 0) return;
    need(jobs.take_whole(pieces, total, 0, 1), "one thread does not take all");
    k.run[types](jobs.first.data(), static_cast<int64_t>(jobs.first.size()));
  } else if (h.op == kScaleInput) {
    work.build(routing, h.tokens, h.in, 0, true);
    for (const Segment& s : work.segments) k.scale_input[types](p, s, 0, h.in);
  } else if (h.op == kTurnOutput) {
    work.build(routing, h.tokens, 0, h.out, true);
    for (const Segment& s : work.segments) k.turn_output[types](p, s, 0, h.out);
  } else {
    need(h.op == kMerge, "no such operator");
    work.build(routing, 1, h.in, h.out, true);
    Scratch scratch;
    const Segment& s = work.segments[0];
    const MergeProblem merge = {x, y, h.in, h.out, false};
    k.merge[types](merge, s, 0, h.out, scratch.get<float>(merge_scratch(h.in, s.both_ranks)));
  }
}

}  // namespace

int main(int count, char** arguments) {
  need(count == 3, "aarch64 CASES RESULTS");
  std::FILE* cases = std::fopen(arguments[1], "rb");
  std::FILE* results = std::fopen(arguments[2], "wb");
  need(cases && results, "cannot open its files");
  Header h;
  while (std::fread(&h, sizeof h, 1, cases) == 1) {
    const std::vector<char> arena = read<char>(cases);
    const std::vector<int64_t> table = read<int64_t>(cases);
    const std::vector<int32_t> plan = read<int32_t>(cases);
    const std::vector<char> x = read<char>(cases), base = read<char>(cases);
    std::vector<char> y = read<char>(cases);
    const Routing routing = {arena.data(),
                             static_cast<int64_t>(arena.size()) / h.itemsize,
                             h.itemsize,
                             table.data(),
                             static_cast<int64_t>(table.size()) / kTableWidth,
                             plan.data(),
                             static_cast<int64_t>(plan.size())};
    run(h, routing, x.data(), base.empty() ? nullptr : base.data(), y.data());
    need(std::fwrite(y.data(), 1, y.size(), results) == y.size(), "cannot write");
  }
  return std::fclose(results) ? 1 : 0;
}
