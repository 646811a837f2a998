// What files of operators share, and what Python calls past torch's dispatcher (python.cpp) beside them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "work.h"

namespace mlora {

// Those of the best instruction set that the machine has, or of the lower one that MLORA_CPU_ISA asks for.
const Kernels& kernels();

// A plan resolved for a module, which the calling thread keeps between calls.
Work& thread_work();

constexpr int64_t kColumnUnit = 64;  // columns that a thread takes at least: a cache line of each rank row, or more

// Where an operator leaves what shrink makes, or finds it: checks v, and notes it in p.
void keep(Problem* p, const torch::stable::Tensor& v);

// apply_, with what is noted in p.
void apply_tensors(Problem p, torch::stable::Tensor y, std::optional<torch::stable::Tensor> base,
                   torch::stable::Tensor x, const torch::stable::Tensor& arena, const torch::stable::Tensor& table,
                   const torch::stable::Tensor& plan);

// apply_ on memory: p.x, p.y and where it differs from that p.base, with their strides, and `itemsize`.
void apply_rows(const Routing& routing, const Problem& p, Types types);

// linear on memory, with a kblock that is a number of inputs: contiguous p.weight and p.bias or null, p.x and p.y with
// their strides, and `itemsize`.
void linear_rows(const Routing& routing, const Problem& p, Types types);

}  // namespace mlora
