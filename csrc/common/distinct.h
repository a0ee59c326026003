// First occurrence of every value inside a segment, by a small open-addressing table.
#pragma once

#include <cstdint>
#include <vector>

#include "types.h"

namespace xtg {

// index[t] = first token of [begin, end) whose value has the bits of values[t].
inline void distinct_in_segment(const float* values, int64_t begin, int64_t end, int32_t* index) {
  int64_t slots = 16;
  int shift = 28;
  while (slots < 2 * (end - begin)) {
    slots *= 2;
    --shift;
  }
  std::vector<int32_t> table(static_cast<size_t>(slots), -1);
  for (int64_t t = begin; t < end; ++t) {
    const uint32_t bits = float_bits(values[t]);
    int64_t slot = int64_t((bits * 2654435769u) >> shift);
    while (table[size_t(slot)] >= 0 && float_bits(values[table[size_t(slot)]]) != bits) slot = (slot + 1) & (slots - 1);
    if (table[size_t(slot)] < 0) table[size_t(slot)] = int32_t(t);
    index[t] = table[size_t(slot)];
  }
}

}  // namespace xtg
