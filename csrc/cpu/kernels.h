// What the portable driver (ops.cpp) and the per-ISA kernels exchange: plain structs and function pointers.
#pragma once

#include <cstdint>

namespace mlora {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// One weighted slot of a recipe. Absent parts are null.
struct Term {
  const void* a;        // [rank, in]
  const void* b;        // [rank, out]
  const void* gain;     // [out], holds g - 1
  const void* in_gain;  // [in], holds u - 1
  const void* shift;    // [out]
  int64_t rank;
  float weight;
  float scale;  // weight times the adapter's scaling
};

// Up to kSegmentTokens tokens that share a recipe.
struct Segment {
  const Term* terms;
  const int32_t* tokens;
  float* v;  // [count, ranks]: what shrink leaves for expand
  int64_t ranks;
  int32_t term_count;
  int32_t count;
  bool has_output;  // adds something to the output
  bool has_gain;
  bool has_in_gain;
};

constexpr int32_t kSegmentTokens = 64;
constexpr int64_t kLinearColumns = 32;  // output columns that linear computes at a time
constexpr int64_t kLinearTokens = 16;   // tokens that linear computes at a time

// Rows of x, y and base are `*_stride` elements apart.
struct Problem {
  const void* x;
  void* y;
  const void* base;  // null: y as it was
  const void* weight;
  const void* bias;
  int64_t in;
  int64_t out;
  int64_t x_stride;
  int64_t y_stride;
  int64_t base_stride;
  int64_t tokens;
  int64_t kblock;
};

// A piece of one thread's work on a segment. With a term, the shrink of its rank rows [from, to):
//     v[t, r] = scale * (A[r] . x[t]), where v points at the term's first rank row.
// Without one, the expand of columns [from, to): y += gain * base + B^T v + shift.
struct Job {
  const Segment* segment;
  const Term* term;
  float* v;
  int64_t from;
  int64_t to;
};

// weight = source * (1 + gains of rows + in-gains of columns) + B^T A; source may be weight.
struct MergeProblem {
  const void* source;
  void* weight;
  int64_t in;
  int64_t out;
};

constexpr int64_t kMergeCoefficients = 6;  // scratch floats that merge needs for each rank row, and once more

struct Kernels {
  // Runs jobs in order, and asks for each one's bytes during the one before: an adapter's parts are a few KiB each and
  // lie anywhere, and the hardware's prefetchers, which learn a stream and stop at its end, leave most of such a part
  // to be waited for. With `fetch_b`, shrinks also bring the same rank rows of B nearer, for a linear that follows.
  using Run = void (*)(const Problem&, const Job*, int64_t jobs, bool fetch_b);
  // y = x * (1 + in_gain) for all columns; y has x's shape.
  using ScaleInput = void (*)(const Problem&, const Segment&);
  // xt[tile, pair, t]: pairs of x along `in` of each tile of kLinearTokens tokens, so that a pair's tokens adjoin.
  using Pack = void (*)(const Problem&, uint32_t* xt);
  // y = x weight^T + bias, then expand on the unrounded sum, for columns [from, to) and segments covering all tokens.
  using Linear = void (*)(const Problem&, const uint32_t* xt, const Segment*, int64_t segments, float* tile,
                          int64_t from, int64_t to);

  // Rows [from, to) of the weight, by the segment's terms; v is the thread's own.
  using Merge = void (*)(const MergeProblem&, const Segment&, int64_t from, int64_t to, float* v);

  Run run[3];  // indexed by Type
  ScaleInput scale_input[3];
  Merge merge[3];
  Pack pack;  // null where linear is not offered
  Linear linear;
};

enum Isa : int { kScalar, kAvx2, kAvx512, kAvx512Bf16 };

extern const Kernels kernels_scalar;
#if defined(__x86_64__) && defined(__GNUC__)
#define MLORA_X86 1
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
#endif

}  // namespace mlora
