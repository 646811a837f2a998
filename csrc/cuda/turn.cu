// scale_input: y = x * (1 + sum_i w_i in_gain_i) + sum_i w_i (in_turn_i - I) x over the terms of each row's recipe; and
// turn_output: y = base + sum_i w_i (turn_i - I) x. Rows without such parts are copied. T is the type of rows, P that of the
// arena.

#include "device.cuh"
#include "kernels.h"

namespace mlora {
namespace {

constexpr int kThreads = 128;
constexpr int32_t kChain = 64;  // elements of a block that are added up in one go; a longer chain would lose accuracy

struct Shared {  // what all threads know is here so as not to take registers
  Plan plan;
  int64_t position, token;  // in the order of routes, and of x
  int32_t first, last;  // the token's terms
};

template <class T>
constexpr int kColumns = 16 / sizeof(T);  // that a thread takes at a time: one access

template <class T>
struct Sums {
  float of[kColumns<T>];
};

// What one thread adds to its columns [k, k + left) for one term: weight * sum_j values[j, i] * x of element j of the
// block of column i.
template <class T, class P>
struct Turn {
  const P* values;
  const T* x;
  int64_t width;
  float weight;
  int32_t size, stride, k, left;
};

// sum + turn where shape and addresses do not let several columns' elements of x be read at once. A function of its
// own, as the other one is, so that their registers do not add up.
template <class T, class P>
MLORA_NOINLINE __device__ Sums<T> add_ragged(Turn<T, P> turn, Sums<T> sum) {
  int32_t at[kColumns<T>];  // element j of the column's block
#pragma unroll
  for (int i = 0; i < kColumns<T>; ++i) {
    const int32_t column = turn.k + i;
    at[i] = column - column / turn.stride % turn.size * turn.stride;
  }
  const P* values = turn.values + turn.k;
  for (int32_t left = turn.size; left > 0; left -= kChain) {
    Sums<T> chain = {};
#pragma unroll 1
    for (int32_t j = left < kChain ? left : kChain; j > 0; --j) {
      float part[kColumns<T>];
      load(values, turn.left, part);
      values += turn.width;
#pragma unroll
      for (int i = 0; i < kColumns<T>; ++i) {
        if (i < turn.left) chain.of[i] = fmaf(turn.weight * part[i], to_float(global(turn.x)[at[i]]), chain.of[i]);
        at[i] += turn.stride;
      }
    }
#pragma unroll
    for (int i = 0; i < kColumns<T>; ++i) sum.of[i] += chain.of[i];
  }
  return sum;
}

// The same where one access to x, from `first` on, has what all columns need for kGroup elements of their blocks. The
// blocks lie in spans of kStride * kGroup; a kGroup of 1 stands for any stride that keeps the columns side by side.
template <class T, class P, int kStride, int kGroup>
__device__ __forceinline__ void add_groups(const Turn<T, P>& turn, int32_t first, Sums<T>& sum) {
  constexpr int N = kColumns<T>, kSpan = kStride * kGroup;
  if constexpr (kSpan <= N) {
    const P* values = turn.values + turn.k;
    const T* x = turn.x + first;
    for (int32_t left = turn.size; left > 0; left -= kChain) {
      Sums<T> chain = {};
      int32_t j = left < kChain ? left : kChain;
#pragma unroll 1
      do {
        float other[N];
        load_whole<N>(x).unpack(other);
        x += kGroup == 1 ? turn.stride : N;
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          float part[N];
          load_whole<N>(values).unpack(part);
          values = opaque(values + turn.width);
#pragma unroll
          for (int i = 0; i < N; ++i) {
            const float of = other[i / kSpan * kSpan + g * kStride + i % kStride];
            chain.of[i] = fmaf(turn.weight * part[i], of, chain.of[i]);
          }
        }
      } while ((j -= kGroup) > 0);
#pragma unroll
      for (int i = 0; i < N; ++i) sum.of[i] += chain.of[i];
    }
  }
}

template <class T, class P>
MLORA_NOINLINE __device__ Sums<T> add_whole(Turn<T, P> turn, int32_t group, int32_t first, Sums<T> sum) {
  switch (group == 1 ? 1 : turn.stride * 16 + group) {
    case 1:
      add_groups<T, P, 1, 1>(turn, first, sum);
      break;
    case 16 + 2:
      add_groups<T, P, 1, 2>(turn, first, sum);
      break;
    case 16 + 4:
      add_groups<T, P, 1, 4>(turn, first, sum);
      break;
    case 16 + 8:
      add_groups<T, P, 1, 8>(turn, first, sum);
      break;
    case 32 + 2:
      add_groups<T, P, 2, 2>(turn, first, sum);
      break;
    case 32 + 4:
      add_groups<T, P, 2, 4>(turn, first, sum);
      break;
    case 64 + 2:
      add_groups<T, P, 4, 2>(turn, first, sum);
      break;
  }
  return sum;
}

// sum + turn
template <class T, class P>
__device__ __forceinline__ Sums<T> add_turn(const Turn<T, P>& turn, const Sums<T>& sum) {
  constexpr int N = kColumns<T>;
  const int32_t first = turn.k - turn.k / turn.stride % turn.size * turn.stride;  // of column k's block
  if (turn.width % N == 0 && aligned(turn.values + turn.k) && aligned(turn.x + first)) {
    if (turn.size == 1 || turn.stride % N == 0) return add_whole(turn, 1, first, sum);
    if (N % turn.stride == 0) {
      const int32_t span = turn.size * turn.stride;
      if (span % N == 0) return add_whole(turn, N / turn.stride, first, sum);
      if (N % span == 0) return add_whole(turn, turn.size, first, sum);  // several spans
    }
  }
  return add_ragged(turn, sum);
}

// Of a multiprocessor: with as many registers as these leave, nothing spills.
template <class T>
constexpr int kBlocks = sizeof(T) == 4 ? 7 : 6;

// By one thread: the token at s.position.
MLORA_NOINLINE __device__ void find_token(Shared& s) {
  const Plan& plan = s.plan;
  s.token = s.position;
  s.first = s.last = 0;
  if (plan.routes == 0) return;
  const int32_t position = static_cast<int32_t>(s.position), row = position / plan.length;
  s.token = plan.token(position);
  if (row >= plan.row_start[plan.routes]) return;
  int32_t low = 0, high = plan.routes;  // row_start[low] <= row < row_start[high]
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    (plan.row_start[middle] <= row ? low : high) = middle;
  }
  s.first = plan.term_start[low];
  s.last = plan.term_start[low + 1];
}

template <class T, class P, bool kOutput>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) turn_kernel(const __grid_constant__ TurnArgs args) {
  Shared& s = shared_memory<Shared>();
  constexpr int N = kColumns<T>;
  const bool leader = threadIdx.x == 0;
  if (leader) {
    s.plan = Plan(args.plan, args.plan_size, args.tokens);
    s.position = blockIdx.x;
  }
  const P* arena = static_cast<const P*>(args.arena);
  for (;;) {
    if (leader && s.position < args.tokens) find_token(s);
    __syncthreads();
    if (s.position >= args.tokens) break;
    const T* x = static_cast<const T*>(args.x) + s.token * args.x_stride;
    for (int32_t k = static_cast<int32_t>(threadIdx.x) * N; k < args.width; k += kThreads * N) {
      const int32_t left = args.width - k < N ? static_cast<int32_t>(args.width) - k : N;
      Sums<T> value;
      load(kOutput ? static_cast<const T*>(args.base) + s.token * args.base_stride + k : x + k, left, value.of);
      if (!kOutput) {
        float gain[N] = {};
#pragma unroll 1  // more loads at a time take more registers than there are
        for (int32_t e = s.first; e < s.last; ++e) {
          const int64_t offset = table_row(args.table, s.plan.term_slot[e])[kInGain];
          if (offset < 0) continue;
          float part[N];
          load(arena + offset + k, left, part);
#pragma unroll
          for (int i = 0; i < N; ++i) gain[i] = fmaf(s.plan.weight(e), part[i], gain[i]);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) value.of[i] = fmaf(gain[i], value.of[i], value.of[i]);
      }
#pragma unroll 1
      for (int32_t e = s.first; e < s.last; ++e) {
        const int64_t* row = table_row(args.table, s.plan.term_slot[e]);
        const int64_t offset = row[kOutput ? kTurn : kInTurn], shape = row[kOutput ? kTurnShape : kInTurnShape];
        if (offset < 0) continue;
        const int32_t size = static_cast<int32_t>(turn_size(shape)), stride = static_cast<int32_t>(turn_stride(shape));
        value = add_turn<T, P>({arena + offset, x, args.width, s.plan.weight(e), size, stride, k, left}, value);
      }
      store(static_cast<T*>(args.y) + s.token * args.width + k, left, value.of);
    }
    __syncthreads();  // nobody works with the token any more
    if (leader) s.position += gridDim.x;
  }
}

template <class T, class P, bool kOutput>
cudaError_t launch_typed(const TurnArgs& args, const DeviceShape& shape, cudaStream_t stream) {
  const int64_t most = int64_t{shape.multiprocessors} * kBlocks<T>;
  return launch(turn_kernel<T, P, kOutput>, args.tokens < most ? args.tokens : most, kThreads, 1, stream, args);
}

}  // namespace

cudaError_t launch_scale_input(Types types, const TurnArgs& args, const DeviceShape& shape, cudaStream_t stream) {
  return with_types(
      types, [&](auto t, auto p) { return launch_typed<decltype(t), decltype(p), false>(args, shape, stream); });
}

cudaError_t launch_turn_output(Types types, const TurnArgs& args, const DeviceShape& shape, cudaStream_t stream) {
  return with_types(
      types, [&](auto t, auto p) { return launch_typed<decltype(t), decltype(p), true>(args, shape, stream); });
}

}  // namespace mlora
