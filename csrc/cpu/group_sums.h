// Sums of the rows of a tensor by group, one owner for each sum.
#pragma once

#include <cstring>

#include "../common/work_list.h"
#include "parallel.h"

namespace xtg {

// dst[g] = sum of src[t] over the tokens t of group g, in their order. Groups without a token get zeros.
inline void sum_groups(const Kernels& kernels, DType dtype, const void* src, int64_t dim, const Groups& groups,
                       void* dst) {
  constexpr int64_t kGroups = 256;
  const int64_t count = int64_t(groups.offsets.size()) - 1;
  const int64_t row_bytes = dim * (dtype == DType::f32 ? 4 : 2);
  for_each_unit(ceil_div(count, kGroups), size_t(dim) * sizeof(float), [&](int64_t unit, void* scratch) {
    for (int64_t g = unit * kGroups; g < min_of((unit + 1) * kGroups, count); ++g) {
      const int32_t first = groups.offsets[size_t(g)], tokens = groups.offsets[size_t(g) + 1] - first;
      if (tokens)
        kernels.sum_rows(dtype, src, dim, groups.tokens.data() + first, tokens, static_cast<float*>(scratch),
                         static_cast<char*>(dst) + g * row_bytes);
      else
        std::memset(static_cast<char*>(dst) + g * row_bytes, 0, size_t(row_bytes));
    }
  });
}

}  // namespace xtg
