// attend_: attention over a paged cache, read where it lies. A row, which is a query of one head, goes through its keys
// in order, kKeyBlock at a time: scores, the largest so far, weights, and the sum of values, in fp32. What it gets depends
// on its own sequence only: not on other sequences, on the heads that a job has, or on threads.
//
// Of few rows (a decode step), lanes are keys for the scores and dimensions for the values, and every key and value is
// used as it is read. Of many, lanes are rows, and keys and values are copied into panels for the tile.
#pragma once

#include "attend_few.h"
#include "attend_many.h"

namespace mlora {
namespace MLORA_ISA {
namespace {

template <class T>
void attend(const Attention& a, const AttendJob* jobs, int64_t count, float* scratch) {
  if (count == 0) return;
  FetchKeys<T> fetch(a, jobs, jobs + count);
  for (const AttendJob* job = jobs; job != jobs + count; ++job) {
    if (job->row_end - job->row <= kFewRows) {
      few<T>(a, *job, fetch, scratch);
    } else {
      for (int64_t head = job->head; head < job->head_end; ++head) many<T>(a, *job, head, scratch);
    }
  }
}

// Brings the chunks of every row together, in order, in the first one's place.
template <class T>
void merge_rows(const Attention& a, const AttendMerge& m) {
  AttendJob job = {};
  job.token = m.token;
  for (int64_t i = 0; i < a.kv_heads * m.rows; ++i) {
    float* const to = m.partial + i * attend_row(a.dim);
    for (int64_t c = 1; c < m.chunks; ++c) {
      const float* from = to + c * m.chunk;
      const float most = from[0] > to[0] ? from[0] : to[0];
      const vf base = set1(most == kLeast ? 0 : most);
      const vf ours = exponential(set1(to[0]) - base), theirs = exponential(set1(from[0]) - base);
      for (int64_t d = kRowHeader; d < attend_row(a.dim); d += W) {
        store_sums(to + d, fma(load_sums(from + d), theirs, load_sums(to + d) * ours));
      }
      to[0] = most;
      to[1] = to[1] * ours[0] + from[1] * theirs[0];
    }
    finish<T>(a, job, i / m.rows, i % m.rows, to[0], to[1], to + kRowHeader);
  }
}

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora
