// Tensors of the stable ABI as the raw pointers that the kernels take.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../common/kernels.h"

namespace xtg {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

// The public functions check first and raise ValueError; what is checked here keeps a direct call of an op memory-safe.
inline DType element_type(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

inline void check_sizes(const Tensor& x, const char* name, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, ": wrong dtype");
  STD_TORCH_CHECK(x.dim() == int64_t(sizes.size()), name, ": expected ", sizes.size(), " dimensions, got ", x.dim());
  int64_t i = 0;
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(x.size(i) == size, name, ": expected size ", size, " in dimension ", i, ", got ", x.size(i));
    ++i;
  }
}

inline const int32_t* checked_cu_seqlens(const Tensor& cu_seqlens, int64_t total_nnz) {
  STD_TORCH_CHECK(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 &&
                      cu_seqlens.is_contiguous(),
                  "cu_seqlens: expected a contiguous int32 tensor (batch + 1,)");
  const auto* p = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  const int64_t batch = cu_seqlens.size(0) - 1;
  STD_TORCH_CHECK(p[0] == 0 && p[batch] <= total_nnz, "cu_seqlens: expected to start at 0 and end within ", total_nnz);
  for (int64_t c = 0; c < batch; ++c)
    STD_TORCH_CHECK(p[c] <= p[c + 1], "cu_seqlens: expected non-decreasing values, got ", p[c], " then ", p[c + 1]);
  return p;
}

// A strided view whose last dimension is contiguous is used as it is; anything else is copied.
inline Tensor last_contiguous(const Tensor& x) {
  return x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

// Asks for large pages under a new tensor that the kernel will fill: memory comes fresh from the system for every large
// output, and handing it out 4 KiB at a time costs as much as writing it.
inline const Tensor& with_large_pages(const Tensor& x) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const auto begin = reinterpret_cast<uintptr_t>(x.data_ptr());
  const uintptr_t end = begin + size_t(x.numel()) * size_t(x.element_size());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return x;
}

inline Operand operand(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }

}  // namespace xtg
