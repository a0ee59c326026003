// Threads of the CPU ops: PyTorch's pool, units of work taken dynamically, one aligned scratch buffer a thread.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <memory>

#include "../common/types.h"

namespace xtg {

struct AlignedFree {
  void operator()(void* p) const { std::free(p); }
};

inline std::unique_ptr<void, AlignedFree> aligned_scratch(size_t bytes) {
  void* p = bytes ? std::aligned_alloc(64, size_t(round_up(int64_t(bytes), 64))) : nullptr;
  if (bytes && !p) throw std::bad_alloc();
  return std::unique_ptr<void, AlignedFree>(p);
}

// Calls f(unit, scratch) once for each unit in [0, units). Which thread takes a unit is left to chance, so f must write
// only what the unit owns. Units are taken `run` neighbours at a time.
template <class F>
void for_each_unit(int64_t units, size_t scratch_bytes, F f, int64_t run = 1) {
  const int64_t threads = min_of<int64_t>(torch::stable::get_num_threads(), ceil_div(units, run));
  if (threads < 1) return;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const auto scratch = aligned_scratch(scratch_bytes);
    for (int64_t first = next.fetch_add(run); first < units; first = next.fetch_add(run))
      for (int64_t unit = first; unit < min_of(first + run, units); ++unit) f(unit, scratch.get());
  });
}

}  // namespace xtg
