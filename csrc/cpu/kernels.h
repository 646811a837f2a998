// What the portable operators (apply.cpp, linear.cpp, ...) and the per-ISA kernels exchange: plain structs and function
// pointers.
#pragma once

#include <cstdint>

#include "../common.h"

namespace mlora {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
// A bf16 that is loaded and stored in the order of memory, as floats are beside it.
struct bf16_in_order {
  uint16_t bits;
};

// What x and y are to a kernel, of type T beside an arena of type P: Pairs of both have one lane order.
template <class T, class P>
struct Beside {
  using type = T;
};
template <>
struct Beside<bf16, float> {
  using type = bf16_in_order;
};

// T - I of a block-diagonal T, [size, width]: in column n, what element n takes of each element of its block. Blocks are
// `size` elements, `stride` apart.
struct Turn {
  const void* values;
  int64_t size;
  int64_t stride;
};

// One weighted slot of a recipe. Absent parts are null. Where there are rank rows, one factor may be absent: it is the
// identity beside a whole matrix.
struct Term {
  const void* a;        // [rank, in]
  const void* b;        // [rank, out]
  const void* gain;     // [out], holds g - 1
  const void* in_gain;  // [in], holds u - 1
  const void* shift;    // [out]
  Turn turn;            // of the output
  Turn in_turn;
  int64_t rank;
  float weight;
  float scale;  // weight times the adapter's scaling
  int64_t slot;
};

// Up to kSegmentTokens tokens that share a recipe.
struct Segment {
  const Term* terms;
  const int32_t* tokens;
  float* v;  // [count, ranks]: what shrink leaves for expand
  int64_t ranks;
  int64_t b_ranks;     // of these, those that have a B
  int64_t both_ranks;  // and those that have both A and B
  int32_t term_count;
  int32_t count;
  bool has_output;  // adds something to the output
  bool has_gain;
  bool has_shift;
  bool has_in_gain;
  int64_t turns;  // sizes of all turns of the output
  int64_t in_turns;
  float* delta;  // [count, delta_stride]: B^T v in the lane order of the arena, which linear adds; null: it makes it itself
  int64_t delta_stride;
};

constexpr int32_t kSegmentTokens = 64;
constexpr int32_t kFewTokens = 2;       // up to which expand reads all of a rank row at a time
constexpr int64_t kFewColumns = 2048;   // most columns of an expand of few tokens
constexpr int64_t kLinearColumns = 32;  // output columns that linear computes at a time
constexpr int64_t kLinearTokens = 16;   // tokens that linear computes at a time
constexpr int64_t kAlongStep = 32;      // inputs of a step of kAlong
constexpr int64_t kAlong = -2;          // in place of a kblock: dot products along the input
constexpr int64_t kDots = -4;           // and in the order of torch's own
constexpr int64_t kDotStep = 32;        // of which the width of the input is a multiple there

// Units that linear computes with at a time, for more tokens than kLinearTokens. A panel of 128 fits the first-level cache;
// the sums of many tokens do not, and are read anew for each panel, so that few larger ones are faster there.
inline int64_t panel_units(int64_t tokens) { return tokens <= 128 ? 128 : 512; }

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
  int64_t itemsize;  // bytes of an element of the arena
  int64_t kblock;
  float* keep;  // where shrink leaves v, all segments' one after the other
  int64_t kept = -1;  // floats there; -1: nowhere
};

// A piece of one thread's work on a segment. With a term, the shrink of its rank rows [from, to):
//     v[t, r] = scale * (A[r] . x[t]), where v points at the term's first rank row.
// Without one, the expand of columns [from, to): y += gain * base + B^T v + shift.
// With fetch_b, a shrink also brings the same rank rows of B nearer, for an expand that will not read them in order.
struct Job {
  const Problem* problem;
  const Segment* segment;
  const Term* term;
  float* v;
  int64_t from;
  int64_t to;
  bool fetch_b;
};

// weight = source * (1 + gains of rows + in-gains of columns) + B^T A; source may be weight.
struct MergeProblem {
  const void* source;
  void* weight;
  int64_t in;
  int64_t out;
  bool stream;  // write past the caches; every row of `weight` starts at a multiple of 64 bytes then
};

constexpr int64_t kMergeRows = 6;      // rows of a tile
constexpr int64_t kMergeBlock = 96;    // rows of a weight whose part of B is packed at a time
constexpr int64_t kMergeColumns = 64;  // a multiple of every ISA's tile

// How many columns' part of every A is packed at a time: as many as leave it in the second-level cache.
inline int64_t merge_columns(int64_t in, int64_t ranks) {
  constexpr int64_t kCached = 1 << 17;
  const int64_t all = (in + kMergeColumns - 1) / kMergeColumns * kMergeColumns;
  const int64_t fit = kCached / (ranks + 1) / kMergeColumns * kMergeColumns;
  return fit < kMergeColumns ? kMergeColumns : fit < all ? fit : all;
}

// Floats that merge packs A and B into.
inline int64_t merge_scratch(int64_t in, int64_t ranks) {
  return ranks * merge_columns(in, ranks) + (ranks + 1) * kMergeBlock;
}

// Attention of packed sequences, whose past keys and values lie in a cache and whose new ones do not yet. Strides are in
// elements; the last dimension adjoins.
struct Attention {
  const void* q;  // [token, head, dim]
  const void* k;  // [token, kv head, dim]; null: every key is in the cache
  const void* v;
  const void* k_cache;  // [row, kv head, dim]
  const void* v_cache;
  void* out;  // [token, head, dim], contiguous
  int64_t heads, kv_heads, dim;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;
  int64_t k_row, v_row, cache_head;  // of the caches; cache_head, between heads, is both's
  float scale;
  float softcap;   // 0: none
  int64_t window;  // keys that a token sees, its own included; 0: all
};

// Rows [row, row_end) of a sequence under its keys [key, key_end), for kv heads [head, head_end). Row r is the query of
// token r / group and of the kv head's query head r % group. Key j is row read[j] of the cache where j < past, and then
// the sequence's token j - past, if the tokens' keys are given. The sequence's tokens lie from `token` on.
struct AttendJob {
  const int64_t* read;
  int64_t past, token;
  int64_t row, row_end;
  int64_t head, head_end;
  int64_t key, key_end;
  float* partial;  // [kv head, row - first row, attend_row(dim)], for attend_merge; null: the result goes to `out`
};

// Rows of a sequence of which `chunks` jobs left partial results, `chunk` floats apart.
struct AttendMerge {
  float* partial;
  int64_t chunk, chunks;
  int64_t token, rows;
};

constexpr int64_t kKeyBlock = 64;    // keys whose scores are held at a time
constexpr int64_t kKeyChunk = 256;   // keys of a job of few rows, whatever the number of threads
constexpr int64_t kFewRows = 8;      // up to which lanes are keys; beyond, lanes are rows
constexpr int64_t kRowHeader = 16;   // floats before a row's sums: its largest score, and the sum of its weights

// Keys up to the last that a sequence's token sees.
inline int64_t attend_end(const Attention& a, int64_t past, int64_t token) { return a.k ? past + token + 1 : past; }

inline int64_t attend_padded(int64_t dim) { return (dim + 31) / 32 * 32; }
inline int64_t attend_row(int64_t dim) { return kRowHeader + attend_padded(dim); }

// Floats that jobs of tiles of `rows` rows work in.
inline int64_t attend_scratch(const Attention& a, int64_t rows) {
  const int64_t padded = attend_padded(a.dim), few = a.kv_heads * kFewRows * attend_row(a.dim);
  const int64_t many = 2 * rows * padded + kKeyBlock * (2 * padded + rows) + padded;
  return few > many ? few : many;
}

// to[j, n] = sum over the parts' tokens t of v[t, j] * rows[t, n], (rank, width), of one adapter's tokens.
struct GradientPart {
  const Segment* segment;
  const float* v;  // of the first token and rank row; the next token's are segment->ranks on
};
struct Gradient {
  const GradientPart* parts;
  int64_t count;
  const void* rows;
  int64_t stride, width, rank;
  float* to;
};

// to[n] = sum over t of left[t, n] * right[t, n], or of left[t, n]; t are the `count` numbers in `tokens`, or the first ones.
struct ColumnSums {
  const void* left;
  const void* right;      // or null
  const int64_t* tokens;  // or null
  int64_t left_stride, right_stride, count;
  float* to;
};

// to[n] = |W + scale B A| of row n.
struct RowNorms {
  const void* weight;  // [out, in]
  const float* a;      // [rank, in]
  const float* b;      // [out, rank], elements b_row and b_rank apart
  int64_t stride, in, rank, b_row, b_rank;
  float scale;
  float* to;
};
constexpr int64_t kNormRows = 4;  // of a tile, which share what is read of A

// What drop reads of a row of its input, and of an adapter; as in mlora/ops/dropout.py.
enum PlaceWord : int { kWho, kStep, kRow, kPosition, kPlaceWidth };
enum OddsWord : int { kKey, kThreshold = 2, kOddsWidth };

// y[t] = what is kept of x[t], scaled, for tokens that lie `length` to a row.
struct Drop {
  const void* x;
  void* y;  // contiguous
  int64_t x_stride, width, length;
  const int32_t* places;  // [row, kPlaceWidth]
  const int32_t* odds;    // [adapter, kOddsWidth]
};

// What models compute between their linears, as torch does it operator by operator, with its roundings: pointwise.h.

// y = T(weight * T(x / sqrt(mean(x^2) + eps))), for rows that are x_stride apart; those of y adjoin.
struct RmsNorm {
  const void* x;
  const void* weight;
  void* y;
  int64_t x_stride, width;
  float eps;
};

// y = x * cos + (-second half of x, first half of x) * sin over the last of four dimensions: batch, head, token, dim.
// Strides are in elements; cos and sin are [batch, token, dim].
struct Rotation {
  const void* x;
  const void* cos;
  const void* sin;
  void* y;
  int64_t heads, tokens, dim;
  int64_t x_stride[3], y_stride[3], cos_stride[2], sin_stride[2];
};

struct Kernels {
  // Runs jobs in order, and asks for each one's bytes during the one before: an adapter's parts are a few KiB each and
  // lie anywhere, and the hardware's prefetchers, which learn a stream and stop at its end, leave most of such a part
  // to be waited for.
  using Run = void (*)(const Job*, int64_t jobs);
  // Columns [from, to) of a segment's tokens, p.in wide: y = x * (1 + in_gain) + (in_turn - I) x.
  using ScaleInput = void (*)(const Problem&, const Segment&, int64_t from, int64_t to);
  // The same of y = base + (turn - I) x.
  using TurnOutput = void (*)(const Problem&, const Segment&, int64_t from, int64_t to);
  // With kAlong or kDots: steps [from, to) of all tokens, as in along.h and dots.h. Else xt[tile, unit, t]: what lies in
  // 32 bits of x along `in` of each tile of kLinearTokens tokens, a pair of bf16 or one float, so that a unit's tokens
  // adjoin. Of all tiles' groups of 16 units, one after the other, [from, to).
  using Pack = void (*)(const Problem&, uint32_t* xt, int64_t from, int64_t to);
  // y = x weight^T + bias, then expand on the unrounded sum, for columns [from, to) and segments covering all tokens.
  // The thread's own: sums [tokens rounded up to kLinearTokens, kLinearColumns], and in blocks as much again for
  // chains that go on, and panel [panel_units, kLinearColumns].
  using Linear = void (*)(const Problem&, const uint32_t* xt, const Segment*, int64_t segments, uint32_t* panel,
                          float* sums, int64_t from, int64_t to);

  // Rows [from, to) of the weight, by the segment's terms; `scratch` is of merge_scratch floats.
  using Merge = void (*)(const MergeProblem&, const Segment&, int64_t from, int64_t to, float* scratch);
  // Columns [from, to) of a gradient.
  using Gradients = void (*)(const Gradient&, int64_t from, int64_t to);

  // Columns [from, to).
  using SumColumns = void (*)(const ColumnSums&, int64_t from, int64_t to);
  // Rows [from, to); `factors` is of kNormRows * rank floats.
  using NormRows = void (*)(const RowNorms&, int64_t from, int64_t to, float* factors);

  // Tokens [from, to).
  using DropTokens = void (*)(const Drop&, int64_t from, int64_t to);

  // Rows [from, to).
  using Norm = void (*)(const RmsNorm&, int64_t from, int64_t to);
  // Of batch times tokens, [from, to).
  using Rotate = void (*)(const Rotation&, int64_t from, int64_t to);
  // Elements [from, to) of y = T(silu(gate)) * up.
  using Gate = void (*)(const void* gate, const void* up, void* y, int64_t from, int64_t to);

  // Jobs in order; `scratch` is of attend_scratch floats.
  using Attend = void (*)(const Attention&, const AttendJob*, int64_t jobs, float* scratch);
  using MergeRows = void (*)(const Attention&, const AttendMerge&);

  Run run[kTypesCount];  // indexed by Types
  ScaleInput scale_input[kTypesCount];
  TurnOutput turn_output[kTypesCount];
  Merge merge[kTypesCount];
  Linear linear[kTypesCount];
  bool blocks[3];  // indexed by Type: whether linear takes a block for a kblock
  bool dots[3];    // and whether kDots
  Pack pack[3];
  int64_t packed[3];  // bytes of an input that pack has packed for kAlong; of one for kDots, four
  Attend attend[3];
  MergeRows merge_rows[3];
  int64_t attend_rows;  // of a tile of more than kFewRows
  Gradients gradients[3];
  SumColumns column_sums[3];
  NormRows row_norms[3];
  DropTokens drop[3];
  Norm rms_norm[3];
  Rotate rotate[3];
  Gate gate[3];
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
