// The operators attend_ and attend_step: validation, and the split of sequences into jobs.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <vector>

#include "../strides.h"
#include "ops.h"
#include "split.h"
#include "work.h"

namespace mlora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A job for all heads.
struct Unit {
  AttendJob job;
  int64_t cost;  // of a head, in elements read or so
};

// What the calling thread keeps between calls.
thread_local std::vector<Unit> thread_units;
thread_local std::vector<AttendMerge> thread_merges;
thread_local Scratch thread_partials;
thread_local std::vector<int64_t> thread_seen;
// And each task's.
thread_local std::vector<AttendJob> thread_attend_jobs;
thread_local Scratch thread_attend;

// (1, heads, tokens, dim) in evenly spaced heads and tokens.
Tensor tokens_of(const char* name, const Tensor& t, int64_t dim, ScalarType dtype, int64_t* token, int64_t* head) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == 1 && t.size(3) == dim && t.scalar_type() == dtype, "mlora: ", name,
                  " must be of q's dtype and of shape (1, heads, tokens, ", dim, ")");
  const Tensor rows = t.stride(3) == 1 || dim == 1 ? t : torch::stable::contiguous(t);
  *token = rows.stride(2);
  *head = rows.stride(1);
  return rows;
}

void check_cache(const char* name, const Tensor& t, const Attention& a, ScalarType dtype, int64_t* row) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(1) == a.kv_heads && t.size(2) == a.dim && t.scalar_type() == dtype, "mlora: ",
                  name, " must be of q's dtype and of shape (rows, ", a.kv_heads, ", ", a.dim, ")");
  const bool adjoin = (a.dim == 1 || t.stride(2) == 1) && (a.kv_heads == 1 || t.stride(1) == a.dim);
  STD_TORCH_CHECK(adjoin, "mlora: rows of ", name, " must be contiguous");
  *row = t.stride(0);
}

const int32_t* starts_of(const char* name, const Tensor& t, int64_t count) {
  STD_TORCH_CHECK(t.dim() == 1 && t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.numel() == count,
                  "mlora: ", name, " must be a contiguous 1-D int32 tensor of ", count, " elements");
  const int32_t* starts = static_cast<const int32_t*>(t.const_data_ptr());
  bool rise = starts[0] == 0;
  for (int64_t i = 1; i < count; ++i) rise = rise && starts[i - 1] <= starts[i];
  STD_TORCH_CHECK(rise, "mlora: ", name, " must rise from 0");
  return starts;
}

const int64_t* index_of(const char* name, const Tensor& t, int64_t rows) {
  STD_TORCH_CHECK(t.dim() == 1 && t.scalar_type() == ScalarType::Long && t.is_contiguous(), "mlora: ", name,
                  " must be a contiguous 1-D int64 tensor");
  const int64_t* index = static_cast<const int64_t*>(t.const_data_ptr());
  bool inside = true;
  for (int64_t i = 0; i < t.numel(); ++i) inside &= static_cast<uint64_t>(index[i]) < static_cast<uint64_t>(rows);
  STD_TORCH_CHECK(inside, "mlora: ", name, " leads outside of the cache of ", rows, " rows");
  return index;
}

// Units of a sequence's rows, by what is known of itself alone.
void cut(const Attention& a, AttendJob job, int64_t rows, int64_t tile, int64_t* floats) {
  const int64_t group = a.heads / a.kv_heads;
  const auto first = [&](int64_t row) {
    const int64_t to = attend_end(a, job.past, row / group);
    return a.window > 0 && to > a.window ? to - a.window : 0;
  };
  if (rows > kFewRows) {
    for (job.row = 0; job.row < rows; job.row = job.row_end) {
      job.row_end = job.row + tile < rows ? job.row + tile : rows;
      job.key = first(job.row);
      job.key_end = attend_end(a, job.past, (job.row_end - 1) / group);
      thread_units.push_back({job, (job.key_end - job.key) * a.dim * tile / 4});
    }
    return;
  }
  job.row_end = rows;
  const int64_t begin = first(0) / kKeyChunk * kKeyChunk, end = attend_end(a, job.past, (rows - 1) / group);
  const int64_t chunks = ceil_div(end - begin, kKeyChunk), size = a.kv_heads * rows * attend_row(a.dim);
  if (chunks > 1) thread_merges.push_back({nullptr, size, chunks, job.token, rows});
  for (job.key = begin; job.key < end; job.key = job.key_end) {
    job.key_end = job.key + kKeyChunk < end ? job.key + kKeyChunk : end;
    thread_units.push_back({job, (job.key_end - job.key) * a.dim * (8 + rows) / 4 + 1});
  }
  if (chunks > 1) *floats += chunks * size;
}

// Computes the thread's units, whose partial results take `floats`, and then calls `after` in every task.
template <class F>
void run(const Attention& a, Type type, int64_t floats, const F& after) {
  const Kernels& kernel = kernels();
  std::vector<Unit>& units = thread_units;
  std::vector<AttendMerge>& merges = thread_merges;
  // The jobs of a sequence's chunks adjoin, as do what they leave.
  float* partial = thread_partials.get<float>(floats);
  for (AttendMerge& merge : merges) {
    merge.partial = partial;
    partial += merge.chunk * merge.chunks;
  }
  auto merge = merges.begin();
  int64_t chunk = 0, cost = 0;
  for (Unit& unit : units) {
    cost += unit.cost * a.kv_heads;
    if (merge == merges.end() || unit.job.token != merge->token) continue;
    unit.job.partial = merge->partial + chunk * merge->chunk;
    if (++chunk == merge->chunks) {
      ++merge;
      chunk = 0;
    }
  }

  const auto compute = [&](int64_t task, int64_t tasks) {
    std::vector<AttendJob>& jobs = thread_attend_jobs;
    jobs.clear();
    Share share(cost, task, tasks);
    for (const Unit& unit : units) {
      AttendJob job = unit.job;
      if (share.take(a.kv_heads, unit.cost, &job.head, &job.head_end)) jobs.push_back(job);
    }
    float* scratch = thread_attend.get<float>(attend_scratch(a, kernel.attend_rows));
    kernel.attend[type](a, jobs.data(), static_cast<int64_t>(jobs.size()), scratch);
  };
  const auto complete = [&](int64_t task, int64_t tasks) {
    for (size_t i = static_cast<size_t>(task); i < merges.size(); i += tasks) kernel.merge_rows[type](a, merges[i]);
    after(task, tasks);
  };
  split_in_two(cost, compute, complete);
}

// The keys and values of all tokens, for heads of one of both, to the rows of the cache that `write` names.
void write_heads(const void* from, int64_t token_bytes, void* cache, int64_t row_bytes, int64_t bytes, int64_t tokens,
                 const int64_t* write) {
  for (int64_t t = 0; t < tokens; ++t) {
    std::memcpy(static_cast<char*>(cache) + write[t] * row_bytes, static_cast<const char*>(from) + t * token_bytes,
                static_cast<size_t>(bytes));
  }
}

Tensor attend_(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor read, Tensor write, Tensor q_starts,
               Tensor k_starts, double scale, double softcap, int64_t window) {
  STD_TORCH_CHECK(q.dim() == 4 && q.size(0) == 1 && q.size(3) > 0, "mlora: q must be of shape (1, heads, tokens, dim)");
  STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4, "mlora: k and v must be of shape (1, heads, tokens, dim)");
  Attention a = {};
  const Type type = rows_type(types_of("q", q, q));
  const ScalarType dtype = q.scalar_type();
  const int64_t tokens = q.size(2);
  a.heads = q.size(1);
  a.kv_heads = k.size(1);
  a.dim = q.size(3);
  STD_TORCH_CHECK(a.kv_heads > 0 && a.heads % a.kv_heads == 0 && v.size(1) == a.kv_heads, "mlora: ", a.heads,
                  " heads are no multiple of ", a.kv_heads, " of k and ", v.size(1), " of v");
  STD_TORCH_CHECK(k.size(2) == tokens && v.size(2) == tokens, "mlora: q has ", tokens, " tokens, k ", k.size(2),
                  " and v ", v.size(2));
  STD_TORCH_CHECK(window >= 0 && softcap >= 0, "mlora: window and softcap must be 0, for none, or more");
  q = tokens_of("q", q, a.dim, dtype, &a.q_token, &a.q_head);
  k = tokens_of("k", k, a.dim, dtype, &a.k_token, &a.k_head);
  v = tokens_of("v", v, a.dim, dtype, &a.v_token, &a.v_head);
  check_cache("k_cache", k_cache, a, dtype, &a.k_row);
  check_cache("v_cache", v_cache, a, dtype, &a.v_row);
  a.cache_head = a.dim;
  const int64_t rows = k_cache.size(0) < v_cache.size(0) ? k_cache.size(0) : v_cache.size(0);
  const int64_t* reads = index_of("read", read, rows);
  const int64_t* writes = index_of("write", write, rows);
  STD_TORCH_CHECK(write.numel() == tokens, "mlora: write has ", write.numel(), " rows for ", tokens, " tokens");
  STD_TORCH_CHECK(q_starts.numel() > 0, "mlora: q_starts must have an element more than there are sequences");
  const int64_t sequences = q_starts.numel() - 1;
  const int32_t* q_start = starts_of("q_starts", q_starts, sequences + 1);
  const int32_t* k_start = starts_of("k_starts", k_starts, sequences + 1);
  STD_TORCH_CHECK(q_start[sequences] == tokens, "mlora: q_starts end at ", q_start[sequences], " of ", tokens,
                  " tokens");

  const int64_t shape[] = {1, tokens, a.heads, a.dim};
  Tensor out = torch::stable::new_empty(q, torch::headeronly::IntHeaderOnlyArrayRef(shape, 4));
  a.q = q.const_data_ptr();
  a.k = k.const_data_ptr();
  a.v = v.const_data_ptr();
  a.k_cache = k_cache.const_data_ptr();
  a.v_cache = v_cache.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.scale = static_cast<float>(scale);
  a.softcap = static_cast<float>(softcap);
  a.window = window;

  const int64_t group = a.heads / a.kv_heads;
  thread_units.clear();
  thread_merges.clear();
  int64_t floats = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t queries = q_start[s + 1] - q_start[s], past = k_start[s + 1] - k_start[s] - queries;
    STD_TORCH_CHECK(past >= 0 && (past == 0 || k_start[s] + past <= read.numel()), "mlora: sequence ", s, " has ",
                    queries, " queries and ", past, " past keys from ", k_start[s], " of ", read.numel());
    if (queries == 0) continue;
    AttendJob job = {};
    job.read = reads + (past > 0 ? k_start[s] : 0);
    job.past = past;
    job.token = q_start[s];
    job.head_end = a.kv_heads;
    cut(a, job, queries * group, kernels().attend_rows, &floats);
  }
  const int64_t size = static_cast<int64_t>(q.element_size());
  char* const keys = static_cast<char*>(k_cache.mutable_data_ptr());
  char* const values = static_cast<char*>(v_cache.mutable_data_ptr());
  // Of a sliding window the new keys take the place of some that this call reads, so they come last.
  run(a, type, floats, [&](int64_t task, int64_t tasks) {
    for (int64_t i = task; i < 2 * a.kv_heads; i += tasks) {
      const int64_t head = i / 2, offset = head * a.dim * size;
      if (i % 2 == 0) {
        write_heads(static_cast<const char*>(a.k) + head * a.k_head * size, a.k_token * size, keys + offset,
                    a.k_row * size, a.dim * size, tokens, writes);
      } else {
        write_heads(static_cast<const char*>(a.v) + head * a.v_head * size, a.v_token * size, values + offset,
                    a.v_row * size, a.dim * size, tokens, writes);
      }
    }
  });
  return out;
}

// Whether keys and values, (batch, kv heads, keys, dim), lie alike, and each of them in one piece.
bool alike(const Tensor& k, const Tensor& v) {
  bool same = k.stride(3) == 1 && v.stride(3) == 1;
  for (int i = 0; i < 3; ++i) same = same && k.stride(i) == v.stride(i);
  return same;
}

Tensor attend_step(Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask, double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && q.size(2) == 1 && q.size(3) > 0, "mlora: q must be of shape (batch, heads, 1, dim)");
  Attention a = {};
  const Type type = rows_type(types_of("q", q, q));
  const ScalarType dtype = q.scalar_type();
  const int64_t batch = q.size(0);
  a.heads = q.size(1);
  a.dim = q.size(3);
  for (const Tensor& t : {k, v}) {
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == batch && t.size(3) == a.dim && t.scalar_type() == dtype,
                    "mlora: k and v must be of q's dtype and of shape (", batch, ", kv heads, keys, ", a.dim, ")");
  }
  a.kv_heads = k.size(1);
  const int64_t keys = k.size(2), group = a.kv_heads > 0 ? a.heads / a.kv_heads : 0;
  STD_TORCH_CHECK(v.size(1) == a.kv_heads && v.size(2) == keys, "mlora: k has ", a.kv_heads, " heads of ", keys,
                  " keys, v ", v.size(1), " of ", v.size(2));
  STD_TORCH_CHECK(group * a.kv_heads == a.heads && group > 0, "mlora: ", a.heads, " heads are no multiple of ", a.kv_heads);
  if (mask) {
    STD_TORCH_CHECK(mask->dim() == 4 && (mask->size(0) == batch || mask->size(0) == 1) && mask->size(1) == 1 &&
                        mask->size(2) == 1 && mask->size(3) == keys && mask->scalar_type() == ScalarType::Bool,
                    "mlora: mask must be of bool and of shape (", batch, " or 1, 1, 1, ", keys, ")");
  }
  if (q.stride(3) != 1) q = torch::stable::contiguous(q);
  if (!alike(k, v)) {
    k = torch::stable::contiguous(k);
    v = torch::stable::contiguous(v);
  }
  const int64_t shape[] = {batch, 1, a.heads, a.dim};
  Tensor out = torch::stable::new_empty(q, torch::headeronly::IntHeaderOnlyArrayRef(shape, 4));
  a.q = q.const_data_ptr();
  a.q_token = q.stride(0);
  a.q_head = q.stride(1);
  a.k_cache = k.const_data_ptr();
  a.v_cache = v.const_data_ptr();
  a.k_row = a.v_row = 1;  // of rows that are named by their first element
  a.cache_head = k.stride(1);
  a.out = out.mutable_data_ptr();
  a.scale = static_cast<float>(scale);

  // By bytes: of those that are no bool, torch takes all but 0 for true.
  const uint8_t* sees = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
  const int64_t mask_row = mask && mask->size(0) > 1 ? mask->stride(0) : 0, mask_key = mask ? mask->stride(3) : 0;
  std::vector<int64_t>& seen = thread_seen;
  seen.resize(static_cast<size_t>(batch * keys));
  thread_units.clear();
  thread_merges.clear();
  int64_t floats = 0, count = 0;
  for (int64_t row = 0; row < batch; ++row) {
    AttendJob job = {};
    job.read = seen.data() + count;
    for (int64_t key = 0; key < keys; ++key) {
      seen[static_cast<size_t>(count)] = row * k.stride(0) + key * k.stride(2);
      count += !sees || sees[row * mask_row + key * mask_key] != 0;
    }
    job.past = seen.data() + count - job.read;
    job.token = row;
    job.head_end = a.kv_heads;
    if (job.past > 0) {
      cut(a, job, group, kernels().attend_rows, &floats);
    } else {
      const size_t bytes = static_cast<size_t>(a.heads * a.dim * static_cast<int64_t>(q.element_size()));
      std::memset(static_cast<char*>(a.out) + row * bytes, 0, bytes);
    }
  }
  run(a, type, floats, [](int64_t, int64_t) {});
  return out;
}

}  // namespace
}  // namespace mlora

STABLE_TORCH_LIBRARY_IMPL(mlora, CPU, m) {
  m.impl("attend_", TORCH_BOX(&mlora::attend_));
  m.impl("attend_step", TORCH_BOX(&mlora::attend_step));
}
