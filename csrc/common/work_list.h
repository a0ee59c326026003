// Work of a ragged batch: blocks of rows inside segments, the dearest first so that dynamic threads end together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace xtg {

inline void dearest_first(std::vector<SegmentBlock>& work) {
  std::stable_sort(work.begin(), work.end(), [](const SegmentBlock& a, const SegmentBlock& b) {
    return a.cost() > b.cost();
  });
}

// A larger block packs the rest of its segment less often, a smaller one leaves more units to share: about eight a thread.
// The bits of a row do not depend on the block that it is in.
// Segments of other lengths than [shortest, longest] are left out.
inline std::vector<SegmentBlock> segment_blocks(const int32_t* cu_seqlens, int64_t batch, int64_t num_heads,
                                                int64_t threads, int64_t shortest = 1, int64_t longest = INT32_MAX) {
  const int64_t share = cu_seqlens[batch] * num_heads / (8 * threads);
  const int64_t block = std::min(std::max(round_up(share, kBlockRowMultiple), 2 * kBlockRowMultiple), kMaxBlockRows);
  std::vector<SegmentBlock> work;
  for (int64_t c = 0; c < batch; ++c) {
    const int64_t begin = cu_seqlens[c], length = cu_seqlens[c + 1] - begin;
    if (length < shortest || length > longest) continue;
    // Parts of nearly equal size: a segment of block + 1 rows should not leave a thread with a single row.
    const int64_t rows = round_up(ceil_div(length, ceil_div(length, block)), kBlockRowMultiple);
    for (int64_t first = 0; first < length; first += rows)
      work.push_back({begin, length, first, std::min(rows, length - first)});
  }
  dearest_first(work);
  return work;
}

// Each segment as one unit of work, with the same limits.
inline std::vector<SegmentBlock> whole_segments(const int32_t* cu_seqlens, int64_t batch, int64_t shortest,
                                                int64_t longest) {
  std::vector<SegmentBlock> work;
  for (int64_t c = 0; c < batch; ++c) {
    const int64_t begin = cu_seqlens[c], length = cu_seqlens[c + 1] - begin;
    if (length >= shortest && length <= longest) work.push_back({begin, length, 0, length});
  }
  dearest_first(work);
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
