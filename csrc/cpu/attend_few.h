// attend_ of few rows: lanes are keys for the scores and dimensions for the values. See attend.h.
#pragma once

#include <type_traits>

#include "attend_rows.h"

namespace mlora {
namespace MLORA_ISA {
namespace {

constexpr int kValuePairs = MLORA_HAVE_AVX512 ? 2 : 1;  // of a row's sums in registers

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

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora
