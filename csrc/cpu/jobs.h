// The split of shrink and expand into the jobs of each thread.
#pragma once

#include <vector>

#include "ops.h"
#include "split.h"
#include "work.h"

namespace mlora {

constexpr int64_t kRankUnit = 4;     // rank rows that a shrink tile takes
constexpr int64_t kStaysNear = 1 << 19;  // bytes that a core's second-level cache keeps beside what else it reads

// In elements read or so; reading a rank row costs about as much as using it for four tokens.
inline int64_t rank_unit_cost(const Problem& p, const Segment& s) { return (s.count + 4) * p.in; }
inline int64_t column_unit_cost(const Segment& s) { return (s.count + 4) * (s.b_ranks + 2) * kColumnUnit / 4; }

inline int64_t shrink_cost(const Problem& p, const Segment& s) {
  int64_t units = 0;
  for (int32_t e = 0; e < s.term_count; ++e) units += ceil_div(s.terms[e].rank, kRankUnit);
  return units * rank_unit_cost(p, s);
}

inline int64_t expand_cost(const Problem& p, const Segment& s) {
  return s.has_output ? ceil_div(p.out, kColumnUnit) * column_unit_cost(s) : 0;
}

// A segment of one module's work. What costs nothing is not done.
struct Piece {
  const Problem* problem;
  const Segment* segment;
  int64_t shrink, expand;  // costs
};

inline Piece piece_of(const Problem& p, const Segment& s) { return {&p, &s, shrink_cost(p, s), expand_cost(p, s)}; }

// One task's part of the work on the pieces.
struct Jobs {
  std::vector<Job> first, second;

  // Columns of every segment, which need all of its rank rows: `second` waits for every task's `first`. Without
  // `expand`, only what is before.
  void cut(const std::vector<Piece>& pieces, int64_t shrink, int64_t expand, int64_t task, int64_t tasks,
           bool fetch_b) {
    first.clear();
    second.clear();
    Share rank_rows(shrink, task, tasks), columns(expand, task, tasks);
    for (const Piece& piece : pieces) {
      const Problem& p = *piece.problem;
      const Segment& s = *piece.segment;
      float* v = s.v;
      int64_t begin, end;
      for (int32_t e = 0; e < s.term_count; ++e) {
        const Term& term = s.terms[e];
        if (piece.shrink && rank_rows.take(ceil_div(term.rank, kRankUnit), rank_unit_cost(p, s), &begin, &end)) {
          const int64_t last = end * kRankUnit < term.rank ? end * kRankUnit : term.rank;
          first.push_back({&p, &s, &term, v, begin * kRankUnit, last, fetch_b && term.b});
        }
        v += term.rank;
      }
      if (expand && piece.expand &&
          columns.take(ceil_div(p.out, kColumnUnit), column_unit_cost(s), &begin, &end)) {
        add_columns(second, p, s, begin * kColumnUnit, end * kColumnUnit < p.out ? end * kColumnUnit : p.out);
      }
    }
  }

  // Whole pieces, so that nobody waits and an adapter's A and B, which adjoin, are read in one go. Returns false,
  // if they do not divide evenly into the tasks.
  bool take_whole(const std::vector<Piece>& pieces, int64_t total, int64_t task, int64_t tasks) {
    first.clear();
    second.clear();
    int64_t position = 0, mine = 0;
    for (const Piece& piece : pieces) {
      const int64_t cost = piece.shrink + piece.expand, middle = position + cost / 2;
      position += cost;
      if (cost == 0 || middle * tasks / total != task) continue;
      mine += cost;
      const Problem& p = *piece.problem;
      const Segment& s = *piece.segment;
      const bool fetch_b = piece.expand && s.count > kFewTokens && s.b_ranks * p.out * p.itemsize <= kStaysNear;
      float* v = s.v;
      for (int32_t e = 0; e < s.term_count; ++e) {
        const Term& term = s.terms[e];
        if (piece.shrink && term.rank) first.push_back({&p, &s, &term, v, 0, term.rank, fetch_b && term.b});
        v += term.rank;
      }
      add_columns(first, p, s, 0, p.out);
    }
    return mine * tasks <= total + total / 8;
  }

  // Columns [from, to) of a piece, in `jobs`.
  static void add_columns(std::vector<Job>& jobs, const Problem& p, const Segment& s, int64_t from, int64_t to) {
    const int64_t most = s.count <= kFewTokens ? kFewColumns : to;
    for (; from < to; from += most) {
      jobs.push_back({&p, &s, nullptr, nullptr, from, to - from < most ? to : from + most, false});
    }
  }
};

// What the calling thread keeps between calls beside its Work: the segments' costs, and the jobs of each task.
struct Planned {
  std::vector<Piece> pieces;
  std::vector<Jobs> jobs;

  std::vector<Jobs>& jobs_of(int64_t tasks) {
    if (static_cast<int64_t>(jobs.size()) < tasks) jobs.resize(tasks);
    return jobs;
  }
};
Planned& thread_planned();

}  // namespace mlora
