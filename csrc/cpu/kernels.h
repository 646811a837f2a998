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

struct Kernels {
  // v[t, r] = scale * (A[r] . x[t]) for rank rows [from, to) of one term; v points at the term's first rank row.
  using Shrink = void (*)(const Problem&, const Segment&, const Term&, float* v, int64_t from, int64_t to);
  // y += gain * base + B^T v + shift for columns [from, to).
  using Expand = void (*)(const Problem&, const Segment&, int64_t from, int64_t to);
  // y = x * (1 + in_gain) for all columns; y has x's shape.
  using ScaleInput = void (*)(const Problem&, const Segment&);
  // xt[tile, pair, t]: pairs of x along `in` of each tile of kLinearTokens tokens, so that a pair's tokens adjoin.
  using Pack = void (*)(const Problem&, uint32_t* xt);
  // y = x weight^T + bias, then expand on the unrounded sum, for columns [from, to) and segments covering all tokens.
  using Linear = void (*)(const Problem&, const uint32_t* xt, const Segment*, int64_t segments, float* tile,
                          int64_t from, int64_t to);

  Shrink shrink[3];  // indexed by Type
  Expand expand[3];
  ScaleInput scale_input[3];
  Pack pack;  // null where linear is not offered
  Linear linear;
};

enum Type : int { kFloat, kHalf, kBFloat16 };
enum Isa : int { kScalar, kAvx2, kAvx512, kAvx512Bf16 };

extern const Kernels kernels_scalar;
#if defined(__x86_64__) && defined(__GNUC__)
#define MLORA_X86 1
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
#endif

}  // namespace mlora
