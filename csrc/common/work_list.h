// Work of a ragged batch: blocks of rows inside segments, the dearest first so that dynamic threads end together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace xtg {

inline std::vector<SegmentBlock> segment_blocks(const int32_t* cu_seqlens, int64_t batch, int64_t block) {
  std::vector<SegmentBlock> work;
  for (int64_t c = 0; c < batch; ++c) {
    const int64_t begin = cu_seqlens[c], length = cu_seqlens[c + 1] - begin;
    // Equal parts of at most one block: a segment of block + 1 rows should not leave a thread with a single row.
    const int64_t parts = (length + block - 1) / block;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t first = length * i / parts, end = length * (i + 1) / parts;
      work.push_back({begin, length, first, end - first});
    }
  }
  std::stable_sort(work.begin(), work.end(), [](const SegmentBlock& a, const SegmentBlock& b) {
    return a.length * a.rows > b.length * b.rows;
  });
  return work;
}

// Tokens grouped by key: tokens[offsets[g]..offsets[g + 1]] are those with key g, in token order. Negative keys are left out.
struct Groups {
  std::vector<int32_t> offsets, tokens;
};

template <class Id>
Groups group_by(const Id* keys, int64_t n, int64_t groups) {
  Groups g;
  g.offsets.assign(size_t(groups) + 1, 0);
  for (int64_t t = 0; t < n; ++t)
    if (keys[t] >= 0) ++g.offsets[size_t(keys[t]) + 1];
  for (int64_t i = 0; i < groups; ++i) g.offsets[size_t(i) + 1] += g.offsets[size_t(i)];
  g.tokens.resize(size_t(g.offsets[size_t(groups)]));
  std::vector<int32_t> next(g.offsets.begin(), g.offsets.end() - 1);
  for (int64_t t = 0; t < n; ++t)
    if (keys[t] >= 0) g.tokens[size_t(next[size_t(keys[t])]++)] = int32_t(t);
  return g;
}

}  // namespace xtg
