// A plan resolved against one module's table: the terms with their pointers, and the tokens in segments.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <cstring>
#include <vector>

#include "../common.h"
#include "kernels.h"

namespace mlora {

// Grow-only memory of one thread, so that a call allocates nothing once it has run.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      STD_TORCH_CHECK(data_ != nullptr, "mlora: cannot allocate ", bytes, " bytes of scratch");
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

inline float float_from_bits(int64_t bits) {
  const uint32_t low = static_cast<uint32_t>(bits);
  float value;
  std::memcpy(&value, &low, sizeof value);
  return value;
}

// What a plan is resolved against: the arena, one module's table, and the plan, as they lie in memory.
struct Routing {
  const char* arena;
  int64_t elements, itemsize;  // of the arena
  const int64_t* table;        // (slots, kTableWidth)
  int64_t slots;
  const int32_t* plan;
  int64_t words;
};

inline Routing routing_of(const torch::stable::Tensor& arena, const torch::stable::Tensor& table,
                          const torch::stable::Tensor& plan) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == kTableWidth && table.scalar_type() == ScalarType::Long &&
                      table.is_contiguous(),
                  "mlora: table must be a contiguous int64 tensor of shape (slots, ", int64_t{kTableWidth}, ")");
  STD_TORCH_CHECK(plan.dim() == 1 && plan.scalar_type() == ScalarType::Int && plan.is_contiguous(),
                  "mlora: plan must be a contiguous 1-D int32 tensor");
  STD_TORCH_CHECK(arena.dim() == 1 && arena.is_contiguous(), "mlora: arena must be contiguous and 1-D");
  return {static_cast<const char*>(arena.const_data_ptr()),
          arena.numel(),
          static_cast<int64_t>(arena.element_size()),
          static_cast<const int64_t*>(table.const_data_ptr()),
          table.size(0),
          static_cast<const int32_t*>(plan.const_data_ptr()),
          plan.numel()};
}

struct Work {
  std::vector<Term> terms;
  std::vector<Segment> segments;
  std::vector<int32_t> tokens;
  Scratch v;

  // Semantics: segments cover the tokens of every route, each at most kSegmentTokens of one route; with
  // `every_token`, also the tokens without a route, as segments without terms.
  // `keep`: where v lies, segment after segment, of `kept` floats; in memory of its own if that is -1.
  // Raises if the plan or the table would lead outside of its own memory or the arena's.
  void build(const Routing& from, int64_t token_count, int64_t in, int64_t out, bool every_token, float* keep = nullptr,
             int64_t kept = -1) {
    const int64_t size = from.words;
    STD_TORCH_CHECK(size >= kPlanHeader, "mlora: plan has ", size, " entries, its header alone takes ", kPlanHeader);
    STD_TORCH_CHECK(token_count <= INT32_MAX, "mlora: ", token_count, " tokens in one call are too many");
    const int32_t* header = from.plan;
    const int64_t rows = header[0], routes = header[1], entries = header[2];

    terms.clear();
    segments.clear();
    tokens.clear();
    const bool routed = rows > 0 && routes > 0;
    STD_TORCH_CHECK(rows >= 0 && routes >= 0 && entries >= 0 && (rows > 0 || routes == 0),
                    "mlora: plan header has rows ", rows, ", routes ", routes, ", terms ", entries);
    if (!routed) {
      if (every_token) {
        tokens.resize(token_count);
        for (int64_t t = 0; t < token_count; ++t) tokens[t] = static_cast<int32_t>(t);
        cut(0, 0, 0, token_count);
      }
      finish(keep, kept);
      return;
    }
    const int64_t needed = kPlanHeader + 2 * (routes + 1) + rows + 2 * entries;
    STD_TORCH_CHECK(needed <= size, "mlora: plan of ", rows, " rows, ", routes, " routes and ", entries,
                    " terms needs ", needed, " entries, it has ", size);
    STD_TORCH_CHECK(token_count % rows == 0, "mlora: ", token_count, " tokens do not divide into the plan's ", rows,
                    " rows");
    const int64_t length = token_count / rows;
    const int32_t* row_start = header + kPlanHeader;
    const int32_t* row_order = row_start + routes + 1;
    const int32_t* term_start = row_order + rows;
    const int32_t* term_slot = term_start + routes + 1;
    const int32_t* term_weight = term_slot + entries;
    check_starts("row_start", row_start, routes, rows);
    check_starts("term_start", term_start, routes, entries);

    const int64_t used = every_token ? rows : row_start[routes];
    tokens.resize(used * length);
    int32_t* to = tokens.data();
    for (int64_t i = 0; i < used; ++i) {
      const int64_t row = row_order[i];
      STD_TORCH_CHECK(row >= 0 && row < rows, "mlora: plan names row ", row, " of ", rows);
      for (int64_t t = 0; t < length; ++t) *to++ = static_cast<int32_t>(row * length + t);
    }

    const int64_t slots = from.slots, limit = from.elements;
    for (int64_t e = 0; e < entries; ++e) {
      const int64_t slot = term_slot[e];
      STD_TORCH_CHECK(slot >= 0 && slot < slots, "mlora: plan names slot ", slot, ", the table has ", slots);
      const int64_t* row = from.table + slot * kTableWidth;
      const auto part = [&](Column column, int64_t count) -> const void* {
        const int64_t offset = row[column];
        if (offset == -1) return nullptr;
        STD_TORCH_CHECK(offset >= 0 && count <= limit && offset <= limit - count, "mlora: slot ", slot, ", column ",
                        int64_t{column}, ": elements ", offset, " to ", offset + count,
                        " are outside of the arena of ", limit);
        return from.arena + offset * from.itemsize;
      };
      const auto turn = [&](Column column, Column shape, int64_t width) -> Turn {
        if (row[column] == -1) return {};
        const int64_t size = turn_size(row[shape]), stride = turn_stride(row[shape]);
        STD_TORCH_CHECK(size > 0 && stride > 0 && stride <= INT32_MAX && width % (size * stride) == 0, "mlora: slot ", slot,
                        " turns blocks of ", size, " elements, ", stride, " apart, of ", width);
        return {part(column, checked(size, width, limit)), size, stride};
      };
      Term term;
      term.slot = slot;
      term.rank = row[kRank];
      STD_TORCH_CHECK(term.rank >= 0 && term.rank <= limit, "mlora: slot ", slot, " has rank ", term.rank);
      const bool a = row[kA] != -1, b = row[kB] != -1;
      const int64_t side = a && b ? term.rank : a ? out : b ? in : -1;  // 0: the operator reads no factors
      STD_TORCH_CHECK(term.rank == 0 || side == 0 || side == term.rank, "mlora: slot ", slot, " has rank ", term.rank,
                      " but no A or B, and no identity of ", side, " in its place");
      term.a = term.rank ? part(kA, checked(term.rank, in, limit)) : nullptr;
      term.b = term.rank ? part(kB, checked(term.rank, out, limit)) : nullptr;
      term.gain = part(kGain, out);
      term.in_gain = part(kInGain, in);
      term.shift = part(kShift, out);
      term.turn = turn(kTurn, kTurnShape, out);
      term.in_turn = turn(kInTurn, kInTurnShape, in);
      term.weight = float_from_bits(term_weight[e]);
      term.scale = term.weight * float_from_bits(row[kScale]);
      terms.push_back(term);
    }
    for (int64_t p = 0; p < routes; ++p) {
      cut(term_start[p], term_start[p + 1], row_start[p] * length, row_start[p + 1] * length);
    }
    if (every_token) cut(0, 0, row_start[routes] * length, rows * length);
    finish(keep, kept);
  }

 private:
  static void check_starts(const char* name, const int32_t* starts, int64_t count, int64_t limit) {
    bool ok = starts[0] == 0 && starts[count] <= limit;
    for (int64_t i = 0; i < count; ++i) ok = ok && starts[i] <= starts[i + 1];
    STD_TORCH_CHECK(ok, "mlora: plan's ", name, " must rise from 0 to at most ", limit);
  }

  // rank * width, or something beyond the limit where that would overflow.
  static int64_t checked(int64_t rank, int64_t width, int64_t limit) {
    return width > 0 && rank > limit / width ? limit + 1 : rank * width;
  }

  void cut(int64_t first_term, int64_t last_term, int64_t from, int64_t to) {
    Segment s = {};
    s.term_count = static_cast<int32_t>(last_term - first_term);
    for (int64_t e = first_term; e < last_term; ++e) {
      const Term& term = terms[e];
      s.ranks += term.rank;
      s.b_ranks += term.b ? term.rank : 0;
      s.both_ranks += term.a && term.b ? term.rank : 0;
      s.has_gain = s.has_gain || term.gain;
      s.has_shift = s.has_shift || term.shift;
      s.has_in_gain = s.has_in_gain || term.in_gain;
      s.turns += term.turn.size;
      s.in_turns += term.in_turn.size;
      s.has_output = s.has_output || term.rank || term.gain || term.shift;
    }
    s.terms = terms.data() + first_term;
    for (int64_t t = from; t < to; t += kSegmentTokens) {
      s.tokens = tokens.data() + t;
      s.count = static_cast<int32_t>(to - t < kSegmentTokens ? to - t : kSegmentTokens);
      segments.push_back(s);
    }
  }

  void finish(float* keep, int64_t kept) {
    int64_t count = 0;
    for (const Segment& s : segments) count += s.ranks * s.count;
    STD_TORCH_CHECK(kept == -1 || kept == count, "mlora: v has ", kept, " elements, the plan's ranks and tokens take ", count);
    float* to = kept == -1 ? v.get<float>(count) : keep;
    for (Segment& s : segments) {
      s.v = to;
      to += s.ranks * s.count;
    }
  }
};

}  // namespace mlora
