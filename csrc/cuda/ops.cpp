// The CUDA operators: validation of what the host knows, strides, and the launches. Under csrc/emulation the same
// operators serve CPU tensors.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <mutex>
#include <optional>
#include <vector>

#include "../common.h"
#include "../strides.h"
#include "kernels.h"

namespace mlora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef MLORA_EMULATION

// MLORA_EMULATION_MULTIPROCESSORS: those of each GPC, "16,18", which a cluster does not leave. MLORA_EMULATION_CLUSTER:
// blocks of a cluster at most. Small if not set, so that tests see clusters share tiles and tiles share clusters.
DeviceShape shape_of(int) {
  const auto variable = [](const char* name, const char* otherwise) {
    const char* text = std::getenv(name);
    return text && *text ? text : otherwise;
  };
  const int most = std::atoi(variable("MLORA_EMULATION_CLUSTER", "4"));
  DeviceShape shape = {};
  const char* next = variable("MLORA_EMULATION_MULTIPROCESSORS", "9");
  for (char* end; *next; next = *end ? end + 1 : end) {
    const int gpc = static_cast<int>(std::strtol(next, &end, 10));
    shape.multiprocessors += gpc;
    for (int i = 0; i < kClusterSizes && 1 << i <= most; ++i) shape.clusters[i] += gpc >> i;
  }
  return shape;
}

struct Launch {
  DeviceShape shape;
  cudaStream_t stream = nullptr;
  explicit Launch(const Tensor&) : shape(shape_of(0)) {}
};

void check(cudaError_t) {}

#else

void check(cudaError_t error) { STD_CUDA_CHECK(error); }

DeviceShape shape_of(int device) {
  static std::mutex mutex;
  static std::vector<std::optional<DeviceShape>> shapes;
  const std::lock_guard<std::mutex> lock(mutex);
  if (static_cast<size_t>(device) >= shapes.size()) shapes.resize(static_cast<size_t>(device) + 1);
  std::optional<DeviceShape>& shape = shapes[static_cast<size_t>(device)];
  if (!shape) {
    DeviceShape found;
    check(device_shape(device, &found));
    shape = found;
  }
  return *shape;
}

struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  DeviceShape shape;
  cudaStream_t stream = nullptr;

  explicit Launch(const Tensor& t) : guard(t.get_device_index()), shape(shape_of(t.get_device_index())) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

#endif

// Of another device the kernels would take an address that means nothing here, which ends the process or its context.
void check_device(const char* name, const Tensor& t, const Tensor& arena) {
  STD_TORCH_CHECK(t.device() == arena.device(), "mlora: ", name, " and arena must be on one device");
}

const int64_t* table_of(const Tensor& arena, const Tensor& table) {
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == kTableWidth && table.scalar_type() == ScalarType::Long &&
                      table.is_contiguous(),
                  "mlora: table must be a contiguous int64 tensor of shape (slots, ", int64_t{kTableWidth}, ")");
  check_device("table", table, arena);
  return static_cast<const int64_t*>(table.const_data_ptr());
}

// The kernels count columns in 32 bits.
int64_t kernel_width(const char* name, int64_t width) {
  STD_TORCH_CHECK(width <= INT32_MAX - 1024, "mlora: ", name, " is ", width, " wide, which is too much");
  return width;
}

// What apply_ and apply_group_ share: x, arena and plan into args.
Tensor take_input(const Tensor& x, const Tensor& arena, const Tensor& plan, int64_t* width, int64_t* tokens,
                  int64_t* stride) {
  *width = kernel_width("x", width_of("x", x));
  *tokens = x.numel() / *width;
  STD_TORCH_CHECK(plan.dim() == 1 && plan.scalar_type() == ScalarType::Int && plan.is_contiguous(),
                  "mlora: plan must be a contiguous 1-D int32 tensor");
  STD_TORCH_CHECK(plan.numel() >= kPlanHeader, "mlora: plan has ", plan.numel(), " entries, its header alone takes ",
                  kPlanHeader);
  STD_TORCH_CHECK(arena.dim() == 1 && arena.is_contiguous(), "mlora: arena must be contiguous and 1-D");
  check_device("x", x, arena);
  check_device("plan", plan, arena);
  STD_TORCH_CHECK(*tokens <= INT32_MAX, "mlora: ", *tokens, " tokens in one call are too many");
  return rows_of(x, stride);
}

void apply(std::vector<Tensor> ys, const std::optional<Tensor>& base, const Tensor& input, const Tensor& arena,
           const std::vector<Tensor>& tables, const Tensor& plan) {
  ApplyArgs args = {};
  const Types types = types_of("x", input, arena);
  const Tensor x = take_input(input, arena, plan, &args.in, &args.tokens, &args.x_stride);
  args.x = x.const_data_ptr();
  args.arena = arena.const_data_ptr();
  args.plan = static_cast<const int32_t*>(plan.const_data_ptr());
  args.plan_size = plan.numel();
  args.siblings = static_cast<int32_t>(ys.size());
  std::vector<Tensor> rows;
  std::optional<Tensor> base_rows;
  for (size_t i = 0; i < ys.size(); ++i) {
    const Tensor& y = ys[i];
    Sibling& sibling = args.sibling[i];
    sibling.out = kernel_width("y", width_of("y", y));
    STD_TORCH_CHECK(y.scalar_type() == input.scalar_type(), "mlora: y and x must have one dtype");
    STD_TORCH_CHECK(y.numel() == args.tokens * sibling.out, "mlora: x has ", args.tokens, " tokens, y has ",
                    y.numel() / sibling.out);
    check_device("y", y, arena);
    sibling.table = table_of(arena, tables[i]);
    rows.push_back(rows_of(y, &sibling.y_stride));
    sibling.y = rows.back().mutable_data_ptr();
    if (base) {
      STD_TORCH_CHECK(base->scalar_type() == input.scalar_type(), "mlora: base and x must have one dtype");
      STD_TORCH_CHECK(base->dim() >= 1 && base->size(base->dim() - 1) == sibling.out && base->numel() == y.numel(),
                      "mlora: base must have y's shape");
      check_device("base", *base, arena);
      base_rows = rows_of(*base, &sibling.base_stride);
      sibling.base = base_rows->const_data_ptr();
    }
  }
  if (args.tokens == 0) return;
  const Launch launch(arena);
  check(launch_apply(types, args, launch.shape, launch.stream));
  for (size_t i = 0; i < ys.size(); ++i) {
    if (rows[i].get() != ys[i].get()) torch::stable::copy_(ys[i], rows[i]);
  }
}

void apply_(Tensor y, std::optional<Tensor> base, Tensor x, Tensor arena, Tensor table, Tensor plan) {
  apply({y}, base, x, arena, {table}, plan);
}

void apply_group_(std::vector<Tensor> y, Tensor x, Tensor arena, std::vector<Tensor> tables, Tensor plan) {
  STD_TORCH_CHECK(!y.empty() && y.size() <= kSiblings && y.size() == tables.size(), "mlora: a group has 1 to ",
                  kSiblings, " outputs and as many tables, got ", y.size(), " and ", tables.size());
  apply(std::move(y), std::nullopt, x, arena, tables, plan);
}

// What scale_input and turn_output share; `x` and `y` are to live as long as args are used.
Tensor turn_args(const Tensor& x, const Tensor& y, const Tensor& arena, const Tensor& table, const Tensor& plan,
                 TurnArgs* to) {
  TurnArgs& args = *to;
  const Tensor rows = take_input(x, arena, plan, &args.width, &args.tokens, &args.x_stride);
  args.x = rows.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.arena = arena.const_data_ptr();
  args.table = table_of(arena, table);
  args.plan = static_cast<const int32_t*>(plan.const_data_ptr());
  args.plan_size = plan.numel();
  return rows;
}

Tensor scale_input(Tensor x, Tensor arena, Tensor table, Tensor plan) {
  TurnArgs args = {};
  const Types types = types_of("x", x, arena);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  const Tensor rows = turn_args(x, out, arena, table, plan, &args);
  if (args.tokens == 0) return out;
  const Launch launch(arena);
  check(launch_scale_input(types, args, launch.shape, launch.stream));
  return out;
}

Tensor turn_output(Tensor y, std::optional<Tensor> base, Tensor arena, Tensor table, Tensor plan) {
  TurnArgs args = {};
  const Types types = types_of("y", y, arena);
  if (base) {
    STD_TORCH_CHECK(base->scalar_type() == y.scalar_type(), "mlora: base and y must have one dtype");
    STD_TORCH_CHECK(base->dim() >= 1 && base->size(base->dim() - 1) == width_of("y", y) && base->numel() == y.numel(),
                    "mlora: base must have y's shape");
    check_device("base", *base, arena);
  }
  check_device("y", y, arena);
  Tensor out = torch::stable::new_empty(y, y.sizes());
  const Tensor rows = turn_args(base ? *base : y, out, arena, table, plan, &args);
  const Tensor added = rows_of(y, &args.base_stride);
  args.base = added.const_data_ptr();
  if (args.tokens == 0) return out;
  const Launch launch(arena);
  check(launch_turn_output(types, args, launch.shape, launch.stream));
  return out;
}

void merge_(Tensor weight, std::optional<Tensor> source, Tensor arena, Tensor table, Tensor plan) {
  MergeArgs args = {};
  const Types types = types_of("weight", weight, arena);
  const Tensor from = source ? *source : weight;
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "mlora: weight must be contiguous, (out, in)");
  STD_TORCH_CHECK(from.scalar_type() == weight.scalar_type() && from.dim() == 2 && from.size(0) == weight.size(0) &&
                      from.size(1) == weight.size(1) && from.is_contiguous(),
                  "mlora: source must be as weight is");
  STD_TORCH_CHECK(arena.dim() == 1 && arena.is_contiguous(), "mlora: arena must be contiguous and 1-D");
  STD_TORCH_CHECK(plan.dim() == 1 && plan.scalar_type() == ScalarType::Int && plan.is_contiguous(),
                  "mlora: plan must be a contiguous 1-D int32 tensor");
  check_device("weight", weight, arena);
  check_device("source", from, arena);
  check_device("plan", plan, arena);
  // A plan of one row and one route, without spare capacity, says by its size how many terms it has.
  constexpr int64_t kTerms = kPlanHeader + 2 + 1 + 2;
  args.out = kernel_width("weight", weight.size(0));
  args.in = kernel_width("weight", weight.size(1));
  args.source = from.const_data_ptr();
  args.weight = weight.mutable_data_ptr();
  args.arena = arena.const_data_ptr();
  args.table = table_of(arena, table);
  args.terms = plan.numel() > kTerms ? static_cast<int32_t>((plan.numel() - kTerms) / 2) : 0;
  args.slots = static_cast<const int32_t*>(plan.const_data_ptr()) + (args.terms ? kTerms : 0);
  args.weights = reinterpret_cast<const float*>(args.slots + args.terms);
  if (weight.numel() == 0 || (args.terms == 0 && !source)) return;
  const Launch launch(arena);
  check(launch_merge(types, args, launch.stream));
}

}  // namespace
}  // namespace mlora

#ifdef MLORA_EMULATION
#define MLORA_KEY CPU
#else
#define MLORA_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(mlora, MLORA_KEY, m) {
  m.impl("apply_", TORCH_BOX(&mlora::apply_));
  m.impl("apply_group_", TORCH_BOX(&mlora::apply_group_));
  m.impl("scale_input", TORCH_BOX(&mlora::scale_input));
  m.impl("turn_output", TORCH_BOX(&mlora::turn_output));
  m.impl("merge_", TORCH_BOX(&mlora::merge_));
}
