// attend_: attention over a paged cache, read where it lies. A row, which is a query of one head, goes through its keys
// in order, kKeyBlock at a time: scores, the largest so far, weights, and the sum of values, in fp32. What it gets depends
// on its own sequence only: not on other sequences, on the heads that a job has, or on threads.
//
// Of few rows (a decode step), lanes are keys for the scores and dimensions for the values, and every key and value is
// used as it is read. Of many, lanes are rows, and keys and values are copied into panels for the tile.
#pragma once

#include <type_traits>

#include "apply.h"
#include "softmax.h"

namespace mlora {
namespace MLORA_ISA {
namespace {

constexpr int64_t kTileRows = 2 * W;
constexpr int64_t kChain = 64;  // units whose products are summed before they are added to the others, for accuracy
constexpr int kValuePairs = MLORA_HAVE_AVX512 ? 2 : 1;  // of a row's sums in registers

// Asks for the cache's rows that jobs of few rows will read, kKeyBlock keys before they do.
template <class T>
class FetchKeys {
 public:
  FetchKeys(const Attention& a, const AttendJob* job, const AttendJob* end) : a_(a), job_(job), end_(end) {
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
  const T* k_cache = static_cast<const T*>(a.k_cache) + head * a.dim;
  const T* v_cache = static_cast<const T*>(a.v_cache) + head * a.dim;
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
  const int64_t to = job.past + row / (a.heads / a.kv_heads) + 1;
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

template <class T, int Rows, bool Tail>
MLORA_INLINE void products_step(const T* const* q, const T* const* keys, int64_t d, int64_t left, vf (*acc)[Rows]) {
  Operand<T> qs[Rows];
  MLORA_UNROLL for (int r = 0; r < Rows; ++r) qs[r] = load_operand<T, Tail>(q[r] + d, left);
  MLORA_UNROLL for (int j = 0; j < 4; ++j) {
    const Operand<T> k = load_operand<T, Tail>(keys[j] + d, left);
    MLORA_UNROLL for (int r = 0; r < Rows; ++r) acc[j][r] = dot<T>(qs[r], k, acc[j][r]);
  }
}

// s[r * kKeyBlock + j] = q[r] . keys[j] for four keys.
template <class T, int Rows>
MLORA_INLINE void products(const T* const* q, const T* const* keys, int64_t dim, float* s) {
  vf acc[4][Rows];
  MLORA_UNROLL for (int j = 0; j < 4; ++j) {
    MLORA_UNROLL for (int r = 0; r < Rows; ++r) acc[j][r] = zero();
  }
  int64_t d = 0;
  for (; d + 2 * W <= dim; d += 2 * W) products_step<T, Rows, false>(q, keys, d, 2 * W, acc);
  if (d < dim) products_step<T, Rows, true>(q, keys, d, dim - d, acc);
  MLORA_UNROLL for (int r = 0; r < Rows; ++r) {
    sum_four(acc[0][r], acc[1][r], acc[2][r], acc[3][r], s + r * kKeyBlock);
  }
}

// sums[r] = sums[r] * alpha[r] + sum over j of weights[r * kKeyBlock + j] * values[j], for Pairs Pairs from d on.
template <class T, int Rows, int Pairs, bool Tail>
MLORA_INLINE void add_values(const float* weights, const T* const* values, int64_t count, const float* alpha, int64_t d,
                             int64_t left, int64_t padded, float* sums) {
  Pair acc[Rows][Pairs];
  MLORA_UNROLL for (int r = 0; r < Rows; ++r) {
    MLORA_UNROLL for (int i = 0; i < Pairs; ++i) acc[r][i] = {zero(), zero()};
  }
  for (int64_t j = 0; j < count; ++j) {
    MLORA_UNROLL for (int i = 0; i < Pairs; ++i) {
      const Pair value = load<Tail>(values[j] + d + i * 2 * W, left);
      MLORA_UNROLL for (int r = 0; r < Rows; ++r) {
        const vf w = set1(weights[r * kKeyBlock + j]);
        acc[r][i] = {fma(w, value.a, acc[r][i].a), fma(w, value.b, acc[r][i].b)};
      }
    }
  }
  MLORA_UNROLL for (int r = 0; r < Rows; ++r) {
    const vf old = set1(alpha[r]);
    MLORA_UNROLL for (int i = 0; i < Pairs; ++i) {
      float* to = sums + r * padded + d + i * 2 * W;
      store_sums(to, fma(load_sums(to), old, acc[r][i].a));
      store_sums(to + W, fma(load_sums(to + W), old, acc[r][i].b));
    }
  }
}

// One block of keys for Rows rows of a head. `most`, `weight` and `sums` are the rows' so far.
template <class T, int Rows>
void few_block(const Attention& a, const AttendJob& job, int64_t head, int64_t row, int64_t block, int64_t count,
               int64_t lines, FetchKeys<T>& fetch, const T* const* keys, const T* const* values, float* most,
               float* weight, float* sums) {
  alignas(64) float s[Rows * kKeyBlock];
  float alpha[Rows];
  const T* q[Rows];
  MLORA_UNROLL for (int r = 0; r < Rows; ++r) q[r] = query<T>(a, job, head, row + r);
  for (int64_t j = 0; j < count; j += 4) {
    const int64_t cached = job.past - block - j;
    fetch.step(lines * (cached < 0 ? 0 : cached < 4 ? cached : 4) / 4);
    products<T, Rows>(q, keys + j, a.dim, s + j);
  }
  for (int r = 0; r < Rows; ++r) {
    float* of = s + r * kKeyBlock;
    const Range range = seen(a, job, row + r);
    for (int64_t j = 0; j < count; j += W) store_sums(of + j, score(a, load_sums(of + j)));
    for (int64_t j = count; j % W; ++j) of[j] = kLeast;
    if (range.from > block || range.to < block + count) {
      for (int64_t j = 0; j < count; ++j) {
        if (block + j < range.from || block + j >= range.to) of[j] = kLeast;
      }
    }
    vf largest = set1(most[r]);
    for (int64_t j = 0; j < count; j += W) largest = larger(largest, load_sums(of + j));
    const float now = largest_of(largest);
    const vf base = set1(now == kLeast ? 0 : now);
    alpha[r] = exponential(set1(most[r]) - base)[0];
    vf total = zero();
    for (int64_t j = 0; j < count; j += W) {
      const vf e = exponential(load_sums(of + j) - base);
      total = add(total, e);
      store_sums(of + j, e);
    }
    weight[r] = weight[r] * alpha[r] + reduce(total);
    most[r] = now;
  }
  const int64_t padded = attend_padded(a.dim);
  int64_t d = 0;
  for (; d + kValuePairs * 2 * W <= a.dim; d += kValuePairs * 2 * W) {
    add_values<T, Rows, kValuePairs, false>(s, values, count, alpha, d, 2 * W, padded, sums);
  }
  for (; d + 2 * W <= a.dim; d += 2 * W) {
    add_values<T, Rows, 1, false>(s, values, count, alpha, d, 2 * W, padded, sums);
  }
  if (d < a.dim) add_values<T, Rows, 1, true>(s, values, count, alpha, d, a.dim - d, padded, sums);
}

// At most kFewRows rows. `scratch` is [head, row, attend_row(dim)].
template <class T>
void few(const Attention& a, const AttendJob& job, FetchKeys<T>& fetch, float* scratch) {
  const int64_t padded = attend_padded(a.dim), rows = job.row_end - job.row, heads = job.head_end - job.head;
  float* const sums = scratch;
  float* const most = scratch + heads * rows * padded;
  float* const weight = most + heads * rows;
  for (int64_t i = 0; i < heads * rows; ++i) {
    most[i] = kLeast;
    weight[i] = 0;
  }
  __builtin_memset(sums, 0, static_cast<size_t>(heads * rows * padded) * sizeof(float));
  const int64_t lines = fetch.lines(job) * 4 / heads;
  for (int64_t block = job.key; block < job.key_end; block += kKeyBlock) {
    const int64_t count = job.key_end - block < kKeyBlock ? job.key_end - block : kKeyBlock;
    for (int64_t h = 0; h < heads; ++h) {
      const T* keys[kKeyBlock];
      const T* values[kKeyBlock];
      locate(a, job, job.head + h, block, count, keys, values);
      for (int64_t r = 0; r < rows; r += 4) {
        const int64_t at = h * rows + r;
        const auto run = [&](auto group) {
          few_block<T, group>(a, job, job.head + h, job.row + r, block, count, r == 0 ? lines : 0, fetch, keys, values,
                              most + at, weight + at, sums + at * padded);
        };
        switch (rows - r) {
          case 1:
            run(std::integral_constant<int, 1>{});
            break;
          case 2:
            run(std::integral_constant<int, 2>{});
            break;
          case 3:
            run(std::integral_constant<int, 3>{});
            break;
          default:
            run(std::integral_constant<int, 4>{});
        }
      }
    }
  }
  for (int64_t i = 0; i < heads * rows; ++i) {
    finish<T>(a, job, job.head + i / rows, job.row + i % rows, most[i], weight[i], sums + i * padded);
  }
}

// What lies in 32 bits of a panel: a pair of bf16 where those have a dot product, else one float.
template <class T>
constexpr bool kPairs = MLORA_HAVE_BF16 && std::is_same_v<T, bf16>;

// to[Stride * i] = unit i of a row of `dim` elements, in any order that is the same for every row, zeros to the end of
// the last one.
template <class T, int64_t Stride>
MLORA_INLINE void unpack(const T* from, int64_t dim, float* to) {
  if constexpr (kPairs<T>) {
    int64_t d = 0;
    for (; d + 1 < dim; d += 2) __builtin_memcpy(to + d / 2 * Stride, from + d, 4);
    if (d < dim) {
      const T last[2] = {from[d], {}};
      __builtin_memcpy(to + d / 2 * Stride, last, 4);
    }
  } else {
    alignas(64) float wide[2 * W];
    for (int64_t d = 0; d < dim; d += 2 * W) {
      const Pair pair = d + 2 * W <= dim ? load<false>(from + d, 2 * W) : load<true>(from + d, dim - d);
      store_sums(wide, pair.a);
      store_sums(wide + W, pair.b);
      for (int64_t i = 0; i < 2 * W; ++i) to[(d + i) * Stride] = wide[i];
    }
  }
}

// acc += the products of units of the lanes with one unit.
template <class T>
MLORA_INLINE vf multiply(vf lanes, float unit, vf acc) {
#if MLORA_HAVE_BF16
  if constexpr (kPairs<T>) return _mm512_dpbf16_ps(acc, (__m512bh)lanes, (__m512bh)set1(unit));
#endif
  return fma(lanes, set1(unit), acc);
}

// Up to kTileRows rows of one head.
template <class T>
void many(const Attention& a, const AttendJob& job, int64_t head, float* scratch) {
  constexpr int64_t L = kTileRows;
  const int64_t padded = attend_padded(a.dim), rows = job.row_end - job.row;
  const int64_t used = (a.dim + 2 * W - 1) / (2 * W) * 2 * W, units = kPairs<T> ? (a.dim + 1) / 2 : used;
  float* const q = scratch;                            // [unit, row]
  float* const sums = q + L * padded;                  // [dimension, row]
  float* const keys = sums + L * padded;               // [key, unit]
  float* const values = keys + kKeyBlock * padded;     // [key, dimension]
  float* const weights = values + kKeyBlock * padded;  // [key, row]
  float* const one = weights + kKeyBlock * L;          // [dimension]
  __builtin_memset(sums, 0, static_cast<size_t>(L * padded) * sizeof(float));
  alignas(64) int32_t from[L], to[L];  // the keys that each row sees
  int64_t full = 0, all = job.key_end;
  for (int64_t r = 0; r < L; ++r) {
    const int64_t row = job.row + (r < rows ? r : rows - 1);
    unpack<T, L>(query<T>(a, job, head, row), a.dim, q + r);
    const Range range = seen(a, job, row);
    from[r] = static_cast<int32_t>(range.from - job.key);
    to[r] = static_cast<int32_t>(range.to - job.key);
    full = range.from > full ? range.from : full;
    all = range.to < all ? range.to : all;
  }
  vf most[2] = {set1(kLeast), set1(kLeast)}, weight[2] = {zero(), zero()};
  for (int64_t block = job.key; block < job.key_end; block += kKeyBlock) {
    const int64_t count = job.key_end - block < kKeyBlock ? job.key_end - block : kKeyBlock;
    const T* at[2][kKeyBlock];
    locate(a, job, head, block, count, at[0], at[1]);
    for (int64_t j = 0; j < (count + 3) / 4 * 4; ++j) unpack<T, 1>(at[0][j], a.dim, keys + j * padded);
    vf now[2] = {most[0], most[1]};
    const bool masked = full > block || all < block + count;
    for (int64_t j = 0; j < count; j += 4) {
      vf all[4][2];
      MLORA_UNROLL for (int i = 0; i < 4; ++i) all[i][0] = all[i][1] = zero();
      const float* of = keys + j * padded;
      for (int64_t u = 0; u < units;) {
        const int64_t stop = u + kChain < units ? u + kChain : units;
        vf acc[4][2];
        MLORA_UNROLL for (int i = 0; i < 4; ++i) acc[i][0] = acc[i][1] = zero();
        for (; u < stop; ++u) {
          const vf q0 = load_sums(q + u * L), q1 = load_sums(q + u * L + W);
          MLORA_UNROLL for (int i = 0; i < 4; ++i) {
            acc[i][0] = multiply<T>(q0, of[i * padded + u], acc[i][0]);
            acc[i][1] = multiply<T>(q1, of[i * padded + u], acc[i][1]);
          }
        }
        MLORA_UNROLL for (int i = 0; i < 4; ++i) {
          MLORA_UNROLL for (int g = 0; g < 2; ++g) all[i][g] = add(all[i][g], acc[i][g]);
        }
      }
      MLORA_UNROLL for (int i = 0; i < 4; ++i) {
        MLORA_UNROLL for (int g = 0; g < 2; ++g) {
          vf s = score(a, all[i][g]);
          if (masked) {
            const vi key = vi{} + static_cast<int32_t>(block - job.key + j + i);
            vi first, last;
            __builtin_memcpy(&first, from + g * W, sizeof first);
            __builtin_memcpy(&last, to + g * W, sizeof last);
            s = (first <= key) & (last > key) ? s : set1(kLeast);
          }
          store_sums(weights + (j + i) * L + g * W, s);
          if (j + i < count) now[g] = larger(now[g], s);
        }
      }
    }
    vf alpha[2];
    MLORA_UNROLL for (int g = 0; g < 2; ++g) {
      const vf base = now[g] == set1(kLeast) ? zero() : now[g];
      alpha[g] = exponential(most[g] - base);
      vf total = zero();
      for (int64_t j = 0; j < count; ++j) {
        const vf e = exponential(load_sums(weights + j * L + g * W) - base);
        store_sums(weights + j * L + g * W, e);
        total = add(total, e);
      }
      weight[g] = fma(weight[g], alpha[g], total);
      most[g] = now[g];
    }
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t d = 0; d < a.dim; d += 2 * W) {
        const T* value = at[1][j] + d;
        const Pair pair = d + 2 * W <= a.dim ? load<false>(value, 2 * W) : load<true>(value, a.dim - d);
        store_sums(values + j * padded + d, pair.a);
        store_sums(values + j * padded + d + W, pair.b);
      }
    }
    for (int64_t d = 0; d < used; d += 4) {
      vf acc[4][2];
      MLORA_UNROLL for (int i = 0; i < 4; ++i) acc[i][0] = acc[i][1] = zero();
      for (int64_t j = 0; j < count; ++j) {
        const vf w0 = load_sums(weights + j * L), w1 = load_sums(weights + j * L + W);
        MLORA_UNROLL for (int i = 0; i < 4; ++i) {
          const vf value = set1(values[j * padded + d + i]);
          acc[i][0] = fma(w0, value, acc[i][0]);
          acc[i][1] = fma(w1, value, acc[i][1]);
        }
      }
      MLORA_UNROLL for (int i = 0; i < 4; ++i) {
        MLORA_UNROLL for (int g = 0; g < 2; ++g) {
          float* to = sums + (d + i) * L + g * W;
          store_sums(to, fma(load_sums(to), alpha[g], acc[i][g]));
        }
      }
    }
  }
  alignas(64) float of_row[2][L];
  MLORA_UNROLL for (int g = 0; g < 2; ++g) {
    store_sums(of_row[0] + g * W, most[g]);
    store_sums(of_row[1] + g * W, weight[g]);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < used; ++d) one[d] = sums[d * L + r];
    finish<T>(a, job, head, job.row + r, of_row[0][r], of_row[1][r], one);
  }
}

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
