// The integer layouts of mlora/ops/layout.py and the element types, for every backend.
#pragma once

#include <cstdint>

namespace mlora {

// Columns of a table row; offsets are in elements of the arena, -1 where the part is absent.
enum Column : int { kA, kB, kRank, kScale, kGain, kInGain, kShift, kUnused, kTableWidth };

constexpr int64_t kPlanHeader = 8;

enum Type : int { kFloat, kHalf, kBFloat16 };  // of an arena's elements

}  // namespace mlora
