// The integer layouts of mlora/ops/layout.py and the element types, for every backend.
#pragma once

#include <cstdint>

namespace mlora {

// Columns of a table row; offsets are in elements of the arena, -1 where the part is absent.
enum Column : int {
  kA, kB, kRank, kScale, kGain, kInGain, kShift, kWhole, kTurn, kTurnShape, kInTurn, kInTurnShape, kTableWidth
};

// What a table's word says of a turn.
inline constexpr int64_t turn_size(int64_t shape) { return shape & 0xffffffff; }
inline constexpr int64_t turn_stride(int64_t shape) { return shape >> 32; }

constexpr int64_t kPlanHeader = 8;

enum Type : int { kFloat, kHalf, kBFloat16 };  // of elements

// Of x, y and what else is of rows, and of the arena: one type, or fp32 in the arena beside 16 bits.
enum Types : int { kFloats, kHalves, kBFloats, kHalvesByFloats, kBFloatsByFloats, kTypesCount };

inline constexpr Type rows_type(Types types) {
  return types == kHalvesByFloats ? kHalf : types == kBFloatsByFloats ? kBFloat16 : static_cast<Type>(types);
}

}  // namespace mlora
