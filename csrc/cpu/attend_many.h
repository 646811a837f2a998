// attend_ of many rows: lanes are rows, and keys and values are copied into panels for the tile. See attend.h.
#pragma once

#include <type_traits>

#include "attend_rows.h"

namespace mlora {
namespace MLORA_ISA {
namespace {

constexpr int64_t kTileRows = 2 * W;

// What lies in 32 bits of a panel: a pair of bf16 where those have a dot product, else one float.
template <class T>
constexpr bool kPairs = MLORA_HAVE_BF16 && std::is_same_v<T, bf16>;

// Units whose products are summed before they are added to the others, for accuracy: of bf16 the rounding of the result is
// far larger.
template <class T>
constexpr int64_t kChain = kPairs<T> ? 64 : 16;

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
        const int64_t stop = u + kChain<T> < units ? u + kChain<T> : units;
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

}  // namespace
}  // namespace MLORA_ISA
}  // namespace mlora
