// apply_ and apply_group_: y += shrink, expand, gains and shifts of every row's recipe, in one launch.
//
// A cluster of C blocks takes tiles, up to kTile tokens of one route, and batches them. Each of its blocks computes
// A x over its own slice of the input features, the blocks add up each other's parts through distributed shared
// memory, in the order of the slices, and share the output columns. So A, B and x of a tile are read once a cluster,
// and A x never leaves the chip. A group of siblings is one list of rank rows over one x.
//
// The grid is one block a multiprocessor. With fewer tiles than clusters, clusters share a tile's columns and each
// repeats its shrink: for one tile on K clusters A and x are asked for K times, K - 1 of them from the second-level
// cache, and every block has work. Without clusters (sm_80) C is 1, the same holds block by block, and A and x are
// asked for once by each block that shares the tile.
//
// The order of every sum depends on the shapes, the device and the row's own recipe only.

#include "device.cuh"
#include "kernels.h"

namespace mlora {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTile = 8;           // tokens of a route that share one read of A and B
constexpr int kTokens = 16;        // tokens of a batch
constexpr int kRows = 256;         // rank rows of a batch; a tile with more goes through them in chunks
constexpr int kStep = 8 * kWarp;   // features of x that a block stages at a time
constexpr int kUnit = 64;          // output columns of a warp: 8 lanes of 8, for 4 pairs of tokens
constexpr int kSlice = 64;         // a block's slice of the features is a multiple of it
constexpr int kUnroll = 4;         // rank rows in flight a warp

struct Tile {
  int32_t route, offset;            // tokens [offset, offset + count) of the route
  int32_t first, count;             // where they lie in the batch
  int32_t rows[kSiblings + 1];      // sibling s has rank rows [rows[s], rows[s + 1]) of the batch
  int32_t extras;                   // bit s: some term has a gain or a shift for sibling s
};

struct Shared {
  Plan plan;
  alignas(16) float x[kTokens][2][kWarp][4];  // halves apart, so that a warp's 16-byte reads do not collide
  alignas(16) float partial[kRows][kTile];    // A x over this block's slice
  alignas(16) float v[kRows][kTile];          // A x, scaled
  int64_t row_a[kRows], row_b[kRows];
  float row_scale[kRows];
  int32_t row_tile[kRows];
  int64_t token[kTokens];
  Tile tile[kTokens];
  int32_t route, offset;          // where the next batch starts
  int32_t tiles, tokens, rows;    // of this batch
  // What all threads know is here so as not to take registers. This cluster's share:
  int32_t left;                   // tiles
  int32_t first_unit, units;      // columns, in units of all siblings laid side by side
  int32_t from, to, from_unit;    // the siblings that these belong to, and where the first of them starts
};

__device__ __forceinline__ int32_t tiles_of(const Plan& plan, int route) {
  if (route >= plan.routes) return 0;
  const int64_t tokens = int64_t{plan.row_start[route + 1] - plan.row_start[route]} * plan.length;
  return static_cast<int32_t>((tokens + kTile - 1) / kTile);
}

__device__ __forceinline__ int32_t running_sum(int32_t value, int lane) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t below = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += below;
  }
  return value;
}

__device__ __forceinline__ int32_t count_tiles(const Plan& plan, int lane) {
  int32_t total = 0;
  for (int32_t p = 0; p < plan.routes; p += kWarp) {
    total += __shfl_sync(kAllLanes, running_sum(tiles_of(plan, p + lane), lane), kWarp - 1);
  }
  return total;
}

// Sets s.route and s.offset to the tile that has `wanted` others before it.
__device__ __forceinline__ void locate(const Plan& plan, int32_t wanted, int lane, Shared& s) {
  int32_t before = 0;
  for (int32_t p = 0; p < plan.routes && before <= wanted; p += kWarp) {
    const int32_t tiles = tiles_of(plan, p + lane);
    const int32_t sum = before + running_sum(tiles, lane);
    if (sum - tiles <= wanted && wanted < sum) {
      s.route = p + lane;
      s.offset = (wanted - (sum - tiles)) * kTile;
    }
    before = __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
}

__device__ __forceinline__ int32_t units_of(const Sibling& sibling) {
  return static_cast<int32_t>((sibling.out + kUnit - 1) / kUnit);
}

// By one warp: this cluster's tiles, or columns of one tile if there are fewer tiles than clusters.
MLORA_NOINLINE __device__ void take_share(const ApplyArgs& args, const Plan& plan, int lane, Shared& s) {
  const int64_t clusters = gridDim.x / cluster_size(), cluster = blockIdx.x / cluster_size();
  const int64_t total = count_tiles(plan, lane), first = cluster * total / clusters;
  int64_t left = (cluster + 1) * total / clusters - first, part = 0, parts = 1;
  if (0 < total && total < clusters) {
    const int64_t before = (first * clusters + total - 1) / total;
    left = 1;
    part = cluster - before;
    parts = ((first + 1) * clusters + total - 1) / total - before;
  }
  int64_t units = 0;
  for (int i = 0; i < args.siblings; ++i) units += units_of(args.sibling[i]);
  const int64_t begin = units * part / parts, end = units * (part + 1) / parts;
  int from = 0, to = 0;
  int64_t from_unit = 0;
  for (int64_t at = 0; to < args.siblings && at < end; ++to) {
    at += units_of(args.sibling[to]);
    if (at <= begin) {
      from = to + 1;
      from_unit = at;
    }
  }
  if (lane == 0) {
    s.left = begin < end ? static_cast<int32_t>(left) : 0;
    s.first_unit = static_cast<int32_t>(begin);
    s.units = static_cast<int32_t>(end - begin);
    s.from = from;
    s.to = to;
    s.from_unit = static_cast<int32_t>(from_unit);
  }
  if (left > 0) locate(plan, static_cast<int32_t>(first), lane, s);
}

// By one warp: the next batch; lane i looks at the i-th route from where it starts. A batch
// has tiles of different routes, since a second tile of one route would only read the same rank rows again.
MLORA_NOINLINE __device__ void form_batch(const ApplyArgs& args, const Plan& plan, int lane, Shared& s) {
  const int32_t route = s.route + lane, offset = lane == 0 ? s.offset : 0;
  int32_t tokens = 0, count = 0, rows = 0, extras = 0;
  int32_t ranks[kSiblings] = {};
  if (lane < kTokens && route < plan.routes) {
    tokens = (plan.row_start[route + 1] - plan.row_start[route]) * plan.length;
    count = tokens - offset < kTile ? tokens - offset : kTile;
  }
  if (count > 0) {
    for (int32_t e = plan.term_start[route]; e < plan.term_start[route + 1]; ++e) {
#pragma unroll
      for (int i = 0; i < kSiblings; ++i) {
        if (i < s.from || i >= s.to) continue;
        const int64_t* row = table_row(args.sibling[i].table, plan.term_slot[e]);
        ranks[i] += static_cast<int32_t>(row[kRank]);
        if (row[kGain] >= 0 || row[kShift] >= 0) extras |= 1 << i;
      }
    }
#pragma unroll
    for (int i = 0; i < kSiblings; ++i) rows += ranks[i];
  }
  const int32_t used = running_sum(count > 0, lane), last_token = running_sum(count, lane);
  const int32_t last_row = running_sum(rows, lane);
  const bool fits = lane == 0 || (lane < kTokens && route < plan.routes && used <= s.left && last_token <= kTokens &&
                                  last_row <= kRows);
  const bool open = offset + count < tokens;
  const unsigned misfits = ~__ballot_sync(kAllLanes, fits), opens = __ballot_sync(kAllLanes, open);
  int32_t tiles = __ffs(static_cast<int>(misfits)) - 1;
  if (opens && __ffs(static_cast<int>(opens)) < tiles) tiles = __ffs(static_cast<int>(opens));
  __syncwarp();  // every lane has read what the last one of the batch is to change
  if (lane < tiles) {
    Tile& tile = s.tile[lane];
    tile.route = route;
    tile.offset = offset;
    tile.first = last_token - count;
    tile.count = count;
    tile.extras = extras;
    int32_t row = last_row - rows;
#pragma unroll
    for (int i = 0; i < kSiblings; ++i) {
      tile.rows[i] = row;
      row += ranks[i];
    }
    tile.rows[kSiblings] = row;
  }
  if (lane == tiles - 1) {
    s.tiles = tiles;
    s.tokens = last_token;
    s.rows = last_row;
    s.route = open ? route : route + 1;
    s.offset = open ? offset + count : 0;
    s.left -= used;
  }
}

// Where rank rows [begin, begin + kRows) of the batch lie, one a thread. Returns whether this thread's cannot be read
// 16 bytes at a time.
template <class T>
MLORA_NOINLINE __device__ bool list_rows(const ApplyArgs& args, const Plan& plan, int32_t begin, int thread, Shared& s) {
  int32_t index = begin + thread;
  if (thread >= kRows || index >= s.rows) return false;
  int t = 0, i = 0;
  while (index >= s.tile[t].rows[kSiblings]) ++t;
  while (index >= s.tile[t].rows[i + 1]) ++i;
  index -= s.tile[t].rows[i];
  const Sibling& sibling = args.sibling[i];
  for (int32_t e = plan.term_start[s.tile[t].route];; ++e) {
    const int64_t* row = table_row(sibling.table, plan.term_slot[e]);
    const int32_t rank = static_cast<int32_t>(row[kRank]);
    if (index >= rank) {
      index -= rank;
      continue;
    }
    s.row_a[thread] = row[kA] + index * args.in;
    s.row_b[thread] = row[kB] + index * sibling.out;
    s.row_scale[thread] = plan.weight(e) * table_scale(row);
    s.row_tile[thread] = t;
    const T* arena = static_cast<const T*>(args.arena);
    return !aligned(arena + s.row_a[thread]) || !aligned(arena + s.row_b[thread]);
  }
}

// Sums of four values over the warp. Lane l returns that of value l / 8; the order is the same for all four.
__device__ __forceinline__ float reduce_four(const float* value, int lane) {
  const bool upper = lane & 16, odd = lane & 8;
  float a = upper ? value[2] : value[0], b = upper ? value[3] : value[1];
  a += __shfl_xor_sync(kAllLanes, upper ? value[0] : value[2], 16);
  b += __shfl_xor_sync(kAllLanes, upper ? value[1] : value[3], 16);
  float sum = odd ? b : a;
  sum += __shfl_xor_sync(kAllLanes, odd ? a : b, 8);
#pragma unroll
  for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

// s.partial of one rank row += its dot products with the staged features of its tile's tokens.
template <class T>
__device__ __forceinline__ void add_dots(const Eight<T>& a, int row, bool first, int lane, Shared& s) {
  float w[8];
  a.unpack(w);
  const Tile& tile = s.tile[s.row_tile[row]];
#pragma unroll 1
  for (int from = 0; from < tile.count; from += 4) {
    float sum[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = tile.first + (from + i < tile.count ? from + i : tile.count - 1);
      float acc = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) acc = fmaf(w[j], s.x[t][j / 4][lane][j % 4], acc);
      sum[i] = acc;
    }
    const float total = reduce_four(sum, lane);
    if (lane % 8 == 0) {
      float& to = s.partial[row][from + lane / 8];
      to = first ? total : to + total;
    }
  }
}

// s.v of rank rows [0, rows) of the list: A x over all features, scaled. Ends with a barrier of the cluster.
template <class T>
MLORA_NOINLINE __device__ void shrink(const ApplyArgs& args, int rows, bool ragged, int thread, Shared& s) {
  const int lane = thread % kWarp, warp = thread / kWarp, blocks = cluster_size();
  const T* arena = static_cast<const T*>(args.arena);
  const int64_t slice = ((args.in + blocks - 1) / blocks + kSlice - 1) / kSlice * kSlice;
  const int64_t begin = slice * cluster_rank();
  const int64_t end = begin + slice < args.in ? begin + slice : args.in;
  int64_t k = begin;
  do {  // once at least: a block without features adds zeros
    if (k > begin) __syncthreads();
    const int64_t column = k + lane * 8;
    for (int t = warp; t < s.tokens; t += kWarps) {
      float x[8];
      load_eight(static_cast<const T*>(args.x) + s.token[t] * args.x_stride + column, end - column, x);
#pragma unroll
      for (int i = 0; i < 8; ++i) s.x[t][i / 4][lane][i % 4] = x[i];
    }
    __syncthreads();
    const T* columns = arena + column;
    const int64_t count = end - column;
    // Warps meet in the sums, so that lanes with fewer than eight features choose along with the others.
    const bool whole = !ragged && (end - k) % 8 == 0;
    int r = warp;
    for (; whole && r + kWarps * (kUnroll - 1) < rows; r += kWarps * kUnroll) {
      Eight<T> a[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        a[u] = count > 0 ? load_whole(columns + s.row_a[r + u * kWarps]) : Eight<T>{};
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) add_dots(a[u], r + u * kWarps, k == begin, lane, s);
    }
    for (; r < rows; r += kWarps) add_dots(load_eight(columns + s.row_a[r], count), r, k == begin, lane, s);
    k += kStep;
  } while (k < end);
  cluster_sync();

  for (int i = thread; i < rows * (kTile / 4); i += kThreads) {
    const int row = i / (kTile / 4), from = i % (kTile / 4) * 4;
    if (from >= s.tile[s.row_tile[row]].count) continue;
    float sum[4] = {};
    for (int rank = 0; rank < cluster_size(); ++rank) {
      const Vector part = load_vector(peer(&s.partial[row][from], rank));
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] += float_from_bits(part.word[j]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) s.v[row][from + j] = sum[j] * s.row_scale[row];
  }
  cluster_sync();  // v is complete, and no peer reads `partial` any more
}

// acc[t] += v[t] * b
template <class T>
__device__ __forceinline__ void accumulate(const Eight<T>& b, const float* v, float (*acc)[8]) {
  float w[8];
  b.unpack(w);
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[t][i] = fmaf(v[t], w[i], acc[t][i]);
  }
}

struct Place {  // of a warp in the output
  int tile, sibling;
  int64_t column;  // the lane's first
};

// y of two tokens, eight columns: adds acc, gains and shifts.
template <class T>
__device__ __forceinline__ void finish(const ApplyArgs& args, const Plan& plan, const Shared& s, const Place& place,
                                       int token, float (*acc)[8]) {
  const Sibling& sibling = args.sibling[place.sibling];
  const Tile& tile = s.tile[place.tile];
  const T* arena = static_cast<const T*>(args.arena);
  const int64_t left = sibling.out - place.column;
  const bool extras = tile.extras >> place.sibling & 1;
  float gain[8] = {};
  bool gains = false;
  if (extras) {
    for (int32_t e = plan.term_start[tile.route]; e < plan.term_start[tile.route + 1]; ++e) {
      const int64_t* row = table_row(sibling.table, plan.term_slot[e]);
      const float weight = plan.weight(e);
      float part[8];
      if (row[kShift] >= 0) {
        load_eight(arena + row[kShift] + place.column, left, part);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          acc[0][i] = fmaf(weight, part[i], acc[0][i]);
          acc[1][i] = fmaf(weight, part[i], acc[1][i]);
        }
      }
      if (row[kGain] >= 0) {
        gains = true;
        load_eight(arena + row[kGain] + place.column, left, part);
#pragma unroll
        for (int i = 0; i < 8; ++i) gain[i] = fmaf(weight, part[i], gain[i]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    if (token + t >= tile.count) break;
    const int64_t at = s.token[tile.first + token + t];
    T* to = static_cast<T*>(sibling.y) + at * sibling.y_stride + place.column;
    float y[8];
    load_eight(to, left, y);
    if (gains) {
      float base[8];
      if (sibling.base) {
        load_eight(static_cast<const T*>(sibling.base) + at * sibling.base_stride + place.column, left, base);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) base[i] = y[i];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[t][i] = fmaf(gain[i], base[i], acc[t][i]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] += acc[t][i];
    store_eight(to, left, y);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) apply_kernel(const __grid_constant__ ApplyArgs args) {
  Shared& s = shared_memory<Shared>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const Plan& plan = s.plan;
  if (thread == 0) s.plan = Plan(args.plan, args.plan_size, args.tokens);
  if (warp == 0) {
    __syncwarp();
    take_share(args, plan, lane, s);
  }
  __syncthreads();
  if (s.left == 0) return;
  bool more;
  do {
    __syncthreads();  // nobody reads any more what the next batch changes
    if (warp == 0) form_batch(args, plan, lane, s);
    __syncthreads();
    if (thread < s.tokens) {
      int t = 0;
      while (thread >= s.tile[t].first + s.tile[t].count) ++t;
      const Tile& tile = s.tile[t];
      s.token[thread] =
          plan.token(int64_t{plan.row_start[tile.route]} * plan.length + tile.offset + (thread - tile.first));
    }
    const int32_t work = s.tiles * s.units, chunks = s.rows > kRows ? (s.rows + kRows - 1) / kRows : 1;
    bool ragged = false;
    for (int32_t round = 0; round < work; round += cluster_size() * kWarps) {
      const int32_t item = round + warp * cluster_size() + cluster_rank();
      Place place = {};
      int32_t row_begin = 0, row_end = 0;
      bool mine = item < work;
      const int token = lane / 8 * 2;
      if (mine) {
        place.tile = item / s.units;
        place.sibling = s.from;
        int32_t unit = s.first_unit + item % s.units - s.from_unit;
        for (int32_t n; unit >= (n = units_of(args.sibling[place.sibling])); ++place.sibling) unit -= n;
        place.column = int64_t{unit} * kUnit + lane % 8 * 8;
        const Tile& tile = s.tile[place.tile];
        row_begin = tile.rows[place.sibling];
        row_end = tile.rows[place.sibling + 1];
        mine = token < tile.count && (row_begin < row_end || (tile.extras >> place.sibling & 1));
      }
      float acc[2][8] = {};
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const int32_t begin = chunk * kRows;
        const int32_t rows = s.rows - begin < kRows ? s.rows - begin : kRows;
        if (round == 0 || chunks > 1) {
          if (round + chunk > 0) __syncthreads();  // no warp works with the rows before these any more
          ragged = __syncthreads_or(list_rows<T>(args, plan, begin, thread, s));
          shrink<T>(args, rows, ragged, thread, s);
        }
        if (!mine) continue;
        const int64_t out = args.sibling[place.sibling].out;
        const T* columns = static_cast<const T*>(args.arena) + place.column;
        const int32_t stop = row_end - begin < rows ? row_end - begin : rows;
        const int32_t start = row_begin > begin ? row_begin - begin : 0;
        const int64_t count = out - place.column;
        if (ragged || count < 8) {
          for (int32_t r = start; r < stop; ++r) accumulate(load_eight(columns + s.row_b[r], count), &s.v[r][token], acc);
        } else {
          int32_t r = start;
          for (; r + kUnroll <= stop; r += kUnroll) {
            Eight<T> b[kUnroll];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) b[u] = load_whole(columns + s.row_b[r + u]);
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) accumulate(b[u], &s.v[r + u][token], acc);
          }
          for (; r < stop; ++r) accumulate(load_whole(columns + s.row_b[r]), &s.v[r][token], acc);
        }
      }
      if (mine) finish<T>(args, plan, s, place, token, acc);
    }
    more = s.left > 0;
  } while (more);
}

template <class T>
cudaError_t launch_typed(const ApplyArgs& args, const DeviceShape& shape, cudaStream_t stream) {
  // A slice of fewer than kSlice features is not worth a block. Nothing here may follow the number of tokens: it
  // would change the order of the sums.
  int cluster = 1;
  while (cluster * 2 <= shape.max_cluster && cluster * kSlice < args.in) cluster *= 2;
  const int64_t clusters = shape.multiprocessors / cluster;
  const int64_t grid = (clusters > 0 ? clusters : 1) * cluster;
#ifndef MLORA_EMULATION
  if (cluster > 8) {
    const cudaError_t error =
        cudaFuncSetAttribute(apply_kernel<T>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
#endif
  return launch(apply_kernel<T>, grid, kThreads, cluster, stream, args);
}

}  // namespace

cudaError_t launch_apply(Type type, const ApplyArgs& args, const DeviceShape& shape, cudaStream_t stream) {
  switch (type) {
    case kFloat:
      return launch_typed<float>(args, shape, stream);
    case kHalf:
      return launch_typed<f16>(args, shape, stream);
    default:
      return launch_typed<bf16>(args, shape, stream);
  }
}

#ifndef MLORA_EMULATION
cudaError_t device_shape(int device, DeviceShape* shape) {
  int clusters = 0;
  cudaError_t error = cudaDeviceGetAttribute(&shape->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  shape->max_cluster = 1;
  if (error != cudaSuccess || !clusters) return error;
  error = cudaFuncSetAttribute(apply_kernel<float>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  for (int size = 16; size > 1; size /= 2) {  // 16 where the device takes it
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(size));
    config.blockDim = dim3(kThreads);
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(size);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int fit = 0;
    if (cudaOccupancyMaxActiveClusters(&fit, apply_kernel<float>, &config) == cudaSuccess &&
        fit >= shape->multiprocessors / size) {
      shape->max_cluster = size;
      break;
    }
    (void)cudaGetLastError();
  }
  return cudaSuccess;
}
#endif

}  // namespace mlora
