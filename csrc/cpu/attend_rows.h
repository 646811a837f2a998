// What a row of attend_ reads and where it goes, for few rows and for many. See attend.h.
#pragma once

#include "apply.h"
#include "softmax.h"

namespace mlora {
namespace MLORA_ISA {
namespace {

// Asks for the cache's rows that jobs of few rows will read, kKeyBlock keys before they do. Not where heads lie apart: there
// a head's keys mostly adjoin, and hardware brings them.
template <class T>
class FetchKeys {
 public:
  FetchKeys(const Attention& a, const AttendJob* job, const AttendJob* end)
      : a_(a), job_(a.cache_head == a.dim ? job : end), end_(end) {
    settle();
    if (job_ != end_) step(kKeyBlock * lines(*job_));
  }

  // Lines of a key and its value, for all heads of a job.
  MLORA_INLINE int64_t lines(const AttendJob& job) const {
    return (2 * (job.head_end - job.head) * a_.dim * static_cast<int64_t>(sizeof(T)) + 63) / 64;
  }

  MLORA_INLINE void step(int64_t lines) {
    for (; lines > 0; --lines, line_ += 64) {
      if (line_ >= stop_ && !next()) return;
      __builtin_prefetch(reinterpret_cast<const void*>(line_));
    }
  }

 private:
  // To the next job that has keys left, if this one has none.
  void settle() {
    for (; job_ != end_; ++job_, read_ = 0) {
      const int64_t stop = job_->past < job_->key_end ? job_->past : job_->key_end;
      left_ = job_->row_end - job_->row <= kFewRows ? stop - job_->key - read_ : 0;
      if (left_ > 0) return;
    }
  }

  bool next() {
    if (job_ == end_) return false;
    const int64_t row = job_->read[job_->key + read_];
    const T* cached = value_ ? static_cast<const T*>(a_.v_cache) + row * a_.v_row
                             : static_cast<const T*>(a_.k_cache) + row * a_.k_row;
    line_ = reinterpret_cast<uintptr_t>(cached + job_->head * a_.dim) / 64 * 64;
    stop_ = reinterpret_cast<uintptr_t>(cached + job_->head_end * a_.dim);
    if (value_) {
      ++read_;
      settle();
    }
    value_ = !value_;
    return true;
  }

  const Attention& a_;
  const AttendJob* job_;
  const AttendJob* end_;
  int64_t read_ = 0, left_ = 0;
  bool value_ = false;
  uintptr_t line_ = 0, stop_ = 0;
};

// Where keys [block, block + count) of a job and their values lie, and up to a multiple of four the last one again.
template <class T>
MLORA_INLINE void locate(const Attention& a, const AttendJob& job, int64_t head, int64_t block, int64_t count,
                         const T** keys, const T** values) {
  const T* k_cache = static_cast<const T*>(a.k_cache) + head * a.cache_head;
  const T* v_cache = static_cast<const T*>(a.v_cache) + head * a.cache_head;
  const int64_t cached = job.past - block < count ? job.past - block : count;
  int64_t j = 0;
  for (; j < cached; ++j) {
    const int64_t row = job.read[block + j];
    keys[j] = k_cache + row * a.k_row;
    values[j] = v_cache + row * a.v_row;
  }
  for (; j < count; ++j) {
    const int64_t token = job.token + block + j - job.past;
    keys[j] = static_cast<const T*>(a.k) + token * a.k_token + head * a.k_head;
    values[j] = static_cast<const T*>(a.v) + token * a.v_token + head * a.v_head;
  }
  for (; j % 4; ++j) {
    keys[j] = keys[count - 1];
    values[j] = values[count - 1];
  }
}

struct Range {
  int64_t from, to;
};

// The keys that a row sees.
MLORA_INLINE Range seen(const Attention& a, const AttendJob& job, int64_t row) {
  const int64_t to = attend_end(a, job.past, row / (a.heads / a.kv_heads));
  return {a.window > 0 && to > a.window ? to - a.window : 0, to};
}

template <class T>
MLORA_INLINE const T* query(const Attention& a, const AttendJob& job, int64_t head, int64_t row) {
  const int64_t group = a.heads / a.kv_heads;
  return static_cast<const T*>(a.q) + (job.token + row / group) * a.q_token + (head * group + row % group) * a.q_head;
}

// A score from a product.
MLORA_INLINE vf score(const Attention& a, vf product) {
  const vf s = product * set1(a.scale);
  return a.softcap > 0 ? set1(a.softcap) * tangent(s / set1(a.softcap)) : s;
}

// The sums of a row, in the lane order of T, to where its result goes.
template <class T>
MLORA_INLINE void finish(const Attention& a, const AttendJob& job, int64_t head, int64_t row, float most, float weight,
                         const float* sums) {
  const int64_t padded = attend_padded(a.dim), group = a.heads / a.kv_heads;
  if (job.partial) {
    const int64_t rows = job.row_end - job.row;
    float* to = job.partial + (head * rows + row - job.row) * attend_row(a.dim);
    to[0] = most;
    to[1] = weight;
    __builtin_memcpy(to + kRowHeader, sums, static_cast<size_t>(padded) * sizeof(float));
    return;
  }
  T* to = static_cast<T*>(a.out) + ((job.token + row / group) * a.heads + head * group + row % group) * a.dim;
  const vf total = set1(weight);
  int64_t d = 0;
  for (; d + 2 * W <= a.dim; d += 2 * W) {
    store<false>(to + d, Pair{load_sums(sums + d) / total, load_sums(sums + d + W) / total}, 2 * W);
  }
  if (d < a.dim) {
    store<true>(to + d, Pair{load_sums(sums + d) / total, load_sums(sums + d + W) / total}, a.dim - d);
  }
}

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora
