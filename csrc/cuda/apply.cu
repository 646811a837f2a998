// apply_ and apply_group_: y += shrink, expand, gains and shifts of every row's recipe, in one launch.
//
// A cluster of C blocks takes tiles, up to kTile tokens of one route, and batches them. Each of its blocks computes
// A x over its own slice of the input features, the blocks add up each other's parts through distributed shared
// memory, in the order of the slices, and share the output columns. So A, B and x of a tile are read once a cluster,
// and A x never leaves the chip. A group of siblings is one list of rank rows over one x.
//
// The grid is as many clusters as run at once, at most a block a multiprocessor. With fewer tiles than clusters,
// clusters share a tile's columns and each repeats its shrink: for one tile on K clusters A and x are asked for K
// times, K - 1 of them from the second-level cache, and every block has work. (To have both, A x would have to pass
// through global memory.) Without clusters (sm_80) C is 1, the same holds block by block, and A and x are asked for
// once by each block that shares the tile.
//
// The order of every sum depends on the shapes, the device and the row's own recipe only. T is the type of x and y, P that
// of the arena.

#include "device.cuh"
#include "kernels.h"

namespace mlora {
namespace {

constexpr int kThreads = 768;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTile = 8;           // tokens of a route that share one read of A and B
constexpr int kTokens = 16;        // tokens of a batch
constexpr int kRows = 256;         // rank rows of a batch; a tile with more goes through them in chunks
constexpr int kStep = 8 * kWarp;   // features of x that a block stages at a time
constexpr int kUnit = 64;          // output columns of a warp: 8 lanes of 8, for 4 pairs of tokens
constexpr int kSlice = 64;         // a block's slice of the features is a multiple of it
template <class P>
constexpr int kUnroll = 8 / sizeof(P);  // rank rows in flight a warp

struct Tile {
  int32_t route, offset;            // tokens [offset, offset + count) of the route
  int32_t first, count;             // where they lie in the batch
  int32_t rows[kSiblings + 1];      // sibling s has rank rows [rows[s], rows[s + 1]) of the batch
  int32_t extras;                   // bit s: some term has a gain or a shift for sibling s
};

struct Place {  // what a warp adds to the output
  int32_t tile, sibling, column;  // kUnit columns
  int32_t row_begin, row_end;     // by these rank rows
  int32_t tokens;
};

struct Shared {
  Plan plan;
  alignas(16) float x[kTokens][2][kWarp][4];  // halves apart, so that a warp's 16-byte reads do not collide
  alignas(16) float partial[kRows][kTile];    // A x over this block's slice
  alignas(16) float v[kRows][kTile];          // A x, scaled
  int64_t row_a[kRows], row_b[kRows];
  float row_scale[kRows];
  int32_t row_tile[kRows];
  int32_t token[kTokens];
  Tile tile[kTokens];
  Place place[kWarps];
  int32_t route, offset;          // where the next batch starts
  int32_t tiles, tokens, rows;    // of this batch
  bool ragged;                    // some rank row cannot be read 16 bytes at a time
  // What all threads know is here so as not to take registers. This cluster's share:
  int32_t left;                   // tiles
  int32_t first_unit, units;      // columns, in units of all siblings laid side by side
  int32_t from, to, from_unit;    // the siblings that these belong to, and where the first of them starts
};

__device__ __forceinline__ int32_t tiles_of(const Plan& plan, int route) {
  if (route >= plan.routes) return 0;
  return ((plan.row_start[route + 1] - plan.row_start[route]) * plan.length + kTile - 1) / kTile;
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

// By one warp: the plan, and of it this cluster's tiles, or columns of one tile if there are fewer tiles than clusters.
MLORA_NOINLINE __device__ void take_share(const ApplyArgs& args, int lane, Shared& s) {
  if (lane == 0) s.plan = Plan(args.plan, args.plan_size, args.tokens);
  __syncwarp();
  const Plan& plan = s.plan;
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

// By one warp: the next batch; lane i looks at the i-th route from where it starts. A batch has tiles of different
// routes, since a second tile of one route would only read the same rank rows again.
MLORA_NOINLINE __device__ void form_batch(const ApplyArgs& args, int lane, Shared& s) {
  const Plan& plan = s.plan;
  const int32_t route = s.route + lane, offset = lane == 0 ? s.offset : 0;
  int32_t tokens = 0, count = 0, rows = 0, extras = 0;
  int32_t ranks[kSiblings] = {};
  const bool wanted = lane < kTokens && lane < s.left && route < plan.routes;
  if (wanted) {
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
  const bool fits = lane == 0 || (wanted && used <= s.left && last_token <= kTokens && last_row <= kRows);
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

// The token behind position `index` of the batch.
MLORA_NOINLINE __device__ void find_token(int index, Shared& s) {
  int t = 0;
  while (index >= s.tile[t].first + s.tile[t].count) ++t;
  const Tile& tile = s.tile[t];
  s.token[index] = s.plan.token(s.plan.row_start[tile.route] * s.plan.length + tile.offset + (index - tile.first));
}

// Where rank rows [begin, begin + kRows) of the batch lie, one a thread. Returns whether this thread's cannot be read
// 16 bytes at a time.
template <class P>
MLORA_NOINLINE __device__ bool list_rows(const ApplyArgs& args, int32_t begin, int thread, Shared& s) {
  const Plan& plan = s.plan;
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
    const P* arena = static_cast<const P*>(args.arena);
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
template <class P>
__device__ __forceinline__ void add_dots(const Eight<P>& a, int row, bool first, int lane, Shared& s) {
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
template <class T, class P>
MLORA_NOINLINE __device__ void shrink(const ApplyArgs& args, int rows, bool ragged, int thread, Shared& s) {
  const int lane = thread % kWarp, warp = thread / kWarp;
  const P* arena = static_cast<const P*>(args.arena);
  const int32_t width = static_cast<int32_t>(args.in), slice = static_cast<int32_t>(args.slice);
  const int32_t begin = slice * cluster_rank(), end = begin + slice < width ? begin + slice : width;
  int32_t k = begin;
  do {  // once at least: a block without features adds zeros
    if (k > begin) __syncthreads();
    const int32_t column = k + lane * 8, count = end - column;
    for (int t = warp; t < s.tokens; t += kWarps) {
      float x[8];
      load(static_cast<const T*>(args.x) + s.token[t] * args.x_stride + column, count, x);
#pragma unroll
      for (int i = 0; i < 8; ++i) s.x[t][i / 4][lane][i % 4] = x[i];
    }
    __syncthreads();
    const P* columns = arena + column;
    // Warps meet in the sums, so that lanes with fewer than eight features choose along with the others.
    const bool whole = !ragged && (end - k) % 8 == 0;
    int r = warp;
    for (; whole && r + kWarps * (kUnroll<P> - 1) < rows; r += kWarps * kUnroll<P>) {
      Eight<P> a[kUnroll<P>];
#pragma unroll
      for (int u = 0; u < kUnroll<P>; ++u) {
        a[u] = count > 0 ? load_whole(columns + s.row_a[r + u * kWarps]) : Eight<P>{};
      }
#pragma unroll
      for (int u = 0; u < kUnroll<P>; ++u) add_dots(a[u], r + u * kWarps, k == begin, lane, s);
    }
#pragma unroll 1
    for (; r < rows; r += kWarps) add_dots(load(columns + s.row_a[r], count), r, k == begin, lane, s);
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
template <class P>
__device__ __forceinline__ void accumulate(const Eight<P>& b, const float* v, float (*acc)[8]) {
  float w[8];
  b.unpack(w);
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[t][i] = fmaf(v[t], w[i], acc[t][i]);
  }
}

// Item `item` of the batch: one tile's tokens, one unit of columns. Beyond the last, and where nothing is to be added,
// a place without tokens.
__device__ __forceinline__ Place place_of(const ApplyArgs& args, int32_t item, const Shared& s) {
  Place place = {};
  if (item >= s.tiles * s.units) return place;
  place.tile = item / s.units;
  place.sibling = s.from;
  int32_t unit = s.first_unit + item % s.units - s.from_unit;
  for (int32_t n; unit >= (n = units_of(args.sibling[place.sibling])); ++place.sibling) unit -= n;
  place.column = unit * kUnit;
  const Tile& tile = s.tile[place.tile];
  place.row_begin = tile.rows[place.sibling];
  place.row_end = tile.rows[place.sibling + 1];
  if (place.row_begin < place.row_end || (tile.extras >> place.sibling & 1)) place.tokens = tile.count;
  return place;
}

// y of one token, eight columns, += acc, gains and shifts.
template <class T, class P>
__device__ __forceinline__ void finish(const ApplyArgs& args, const Shared& s, const Place& place, int lane,
                                       int token, float* acc) {
  const Sibling& sibling = args.sibling[place.sibling];
  const Tile& tile = s.tile[place.tile];
  if (token >= tile.count) return;
  const int32_t column = place.column + (lane & 7) * 8, left = static_cast<int32_t>(sibling.out) - column;
  const int64_t at = s.token[tile.first + token];
  T* to = static_cast<T*>(sibling.y) + at * sibling.y_stride + column;
  if (tile.extras >> place.sibling & 1) {
    const P* columns = static_cast<const P*>(args.arena) + column;
    const T* from = sibling.base ? static_cast<const T*>(sibling.base) + at * sibling.base_stride + column : to;
#pragma unroll 1
    for (int32_t e = s.plan.term_start[tile.route]; e < s.plan.term_start[tile.route + 1]; ++e) {
      const int64_t* row = table_row(sibling.table, s.plan.term_slot[e]);
      const float weight = s.plan.weight(e);
      float part[8];
      if (row[kShift] >= 0) {
        load(columns + row[kShift], left, part);
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[i] = fmaf(weight, part[i], acc[i]);
      }
      if (row[kGain] >= 0) {
        float base[8];  // read for each term that has a gain, which is one as a rule, to be gone from registers at once
        load(columns + row[kGain], left, part);
        load(from, left, base);
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[i] = fmaf(weight * part[i], base[i], acc[i]);
      }
    }
  }
  float y[8];
  load(to, left, y);
#pragma unroll
  for (int i = 0; i < 8; ++i) y[i] += acc[i];
  store(to, left, y);
}

template <class T, class P>
__global__ void __launch_bounds__(kThreads, 1) apply_kernel(const __grid_constant__ ApplyArgs args) {
  Shared& s = shared_memory<Shared>();
  // Of unsigned numbers, for these are one instruction each and need no register between uses.
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = static_cast<int>(threadIdx.x % kWarp), warp = static_cast<int>(threadIdx.x / kWarp);
  if (warp == 0) take_share(args, lane, s);
  __syncthreads();
  if (s.left == 0) return;
  bool more;
  do {
    __syncthreads();  // nobody reads any more what the next batch changes
    if (warp == 0) form_batch(args, lane, s);
    __syncthreads();
    if (thread < s.tokens) find_token(thread, s);
    for (int32_t round = 0; round < s.tiles * s.units; round += cluster_size() * kWarps) {
      __syncwarp();
      if (lane == 0) s.place[warp] = place_of(args, round + warp * cluster_size() + cluster_rank(), s);
      __syncwarp();
      const Place& place = s.place[warp];
      const int token = (lane >> 3) * 2;
      const auto mine = [&] { return token < place.tokens; };  // read anew after each barrier: no register is held
      float acc[2][8] = {};
      // One chunk, whose shrink serves all rounds, or several, of which each round needs all.
      for (int32_t begin = 0; begin == 0 || begin < s.rows; begin += kRows) {
        const int32_t rows = s.rows - begin < kRows ? s.rows - begin : kRows;
        if (round == 0 || s.rows > kRows) {
          if (round + begin > 0) __syncthreads();  // no warp works with the rows before these any more
          const bool ragged = __syncthreads_or(list_rows<P>(args, begin, thread, s));
          if (thread == 0) s.ragged = ragged;
          if (s.rows > 0) shrink<T, P>(args, rows, ragged, thread, s);
        }
        if (rows <= 0 || !mine()) continue;
        const int32_t stop = place.row_end - begin < rows ? place.row_end - begin : rows;
        const int32_t column = place.column + (lane & 7) * 8;
        const int32_t count = static_cast<int32_t>(args.sibling[place.sibling].out) - column;
        const P* columns = static_cast<const P*>(args.arena) + column;
        const bool whole = !s.ragged && count >= 8;
        int32_t r = place.row_begin > begin ? place.row_begin - begin : 0;
        for (; whole && r + kUnroll<P> <= stop; r += kUnroll<P>) {
          Eight<P> b[kUnroll<P>];
#pragma unroll
          for (int u = 0; u < kUnroll<P>; ++u) b[u] = load_whole(columns + s.row_b[r + u]);
#pragma unroll
          for (int u = 0; u < kUnroll<P>; ++u) accumulate(b[u], &s.v[r + u][token], acc);
        }
#pragma unroll 1
        for (; r < stop; ++r) accumulate(load(columns + s.row_b[r], count), &s.v[r][token], acc);
      }
      if (mine()) {
        finish<T, P>(args, s, place, lane, token, acc[0]);
        finish<T, P>(args, s, place, lane, token + 1, acc[1]);
      }
    }
    more = s.left > 0;
  } while (more);
}

template <class T, class P>
cudaError_t launch_typed(ApplyArgs args, const DeviceShape& shape, cudaStream_t stream) {
  // A slice of fewer than kSlice features is not worth a block. A cluster lies within one GPC, and those of a chip
  // have different numbers of multiprocessors: of large clusters fewer run at once than there is room for. More would
  // be a second wave, and smaller ones read A more often, so a quarter of the multiprocessors may go without a block.
  // Nothing here may follow the number of tokens: it would change the order of the sums.
  int size = 0;
  for (int i = 1; i < kClusterSizes && (int64_t{kSlice} << (i - 1)) < args.in; ++i) {
    if (4 * (shape.clusters[i] << i) >= 3 * shape.multiprocessors) size = i;
  }
  const int cluster = 1 << size;
  args.slice = (args.in + cluster * kSlice - 1) / (cluster * kSlice) * kSlice;
  const int64_t grid = int64_t{shape.clusters[size]} * cluster;
  return launch(apply_kernel<T, P>, grid, kThreads, cluster, stream, args);
}

}  // namespace

cudaError_t launch_apply(Types types, const ApplyArgs& args, const DeviceShape& shape, cudaStream_t stream) {
  return with_types(types, [&](auto t, auto p) { return launch_typed<decltype(t), decltype(p)>(args, shape, stream); });
}

#ifndef MLORA_EMULATION
cudaError_t device_shape(int device, DeviceShape* shape) {
  *shape = {};
  int has_clusters = 0;
  cudaError_t error = cudaDeviceGetAttribute(&shape->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&has_clusters, cudaDevAttrClusterLaunch, device);
  if (error != cudaSuccess) return error;
  shape->clusters[0] = shape->multiprocessors;
  if (!has_clusters) return error;
  // Once a device, and of every type, since attributes are a function's: 16 blocks are more than is portable.
  for (int types = 0; types < kTypesCount; ++types) {
    const void* kernel = with_types(static_cast<Types>(types), [](auto t, auto p) {
      return reinterpret_cast<const void*>(apply_kernel<decltype(t), decltype(p)>);
    });
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  for (int i = 1; i < kClusterSizes; ++i) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(1u << i);
    config.blockDim = dim3(kThreads);
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = 1u << i;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&shape->clusters[i], apply_kernel<float, float>, &config) != cudaSuccess) {
      shape->clusters[i] = 0;  // more blocks than the device takes
      (void)cudaGetLastError();
    }
  }
  return cudaSuccess;
}
#endif

}  // namespace mlora
