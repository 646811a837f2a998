// What files of operators share, and what Python calls past torch's dispatcher (python.cpp) beside them.
#pragma once

#include "work.h"

namespace mlora {

// Those of the best instruction set that the machine has, or of the lower one that MLORA_CPU_ISA asks for.
const Kernels& kernels();

// apply_ on memory: p.x, p.y and where it differs from that p.base, with their strides, and `itemsize`.
void apply_rows(const Routing& routing, const Problem& p, Type type);

// linear on memory, with a kblock that is a number of inputs: contiguous p.weight and p.bias or null, p.x and p.y with
// their strides, and `itemsize`.
void linear_rows(const Routing& routing, const Problem& p, Type type);

}  // namespace mlora
