// masked_decoder_gather on a CPU: the algorithm, over raw pointers and one vector type V; no torch in here.
//
// A unit of work is a block of genes in all cells (or all asked genes of some cells). The ids of a cell ascend, so the
// source of each row (token, mask_row, zero_row) is found by walking tokens and masked genes along with the rows; the
// table's rows of a block stay in cache from cell to cell. Every row is written once, or in the backward read once.
// The same words as in xtg_kernels/ops/masked_decoder_gather/reference.py and triton_kernel.py.
#pragma once

#include "../common/kernels.h"
#include "../common/product.h"
#include "../common/scratch.h"

namespace xtg {

// First of the ascending ids [begin, end) that is not below id.
static inline const int32_t* first_from(const int32_t* begin, const int32_t* end, int64_t id) {
  while (begin < end) {
    const int32_t* middle = begin + (end - begin) / 2;
    if (*middle < id)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

constexpr int64_t kZeroRow = -1, kMaskRow = -2;  // sources that are no token

// Calls f(row, gene, source) for each output row of cell c with a gene in [first_gene, end_gene), in ascending order.
template <class F>
static inline void for_each_row(const GatherArgs& args, int64_t c, int64_t first_gene, int64_t end_gene, F f) {
  const int32_t* tokens_end = args.gene_ids + args.cu_seqlens[c + 1];
  const int32_t* token = first_from(args.gene_ids + args.cu_seqlens[c], tokens_end, first_gene);
  const int32_t *masked = nullptr, *masked_end = nullptr;
  if (args.masked_ids) {
    masked_end = args.masked_ids + args.masked_cu_seqlens[c + 1];
    masked = first_from(args.masked_ids + args.masked_cu_seqlens[c], masked_end, first_gene);
  }
  const auto visit = [&](int64_t row, int64_t gene) {
    while (token < tokens_end && *token < gene) ++token;
    while (masked < masked_end && *masked < gene) ++masked;
    int64_t source = kZeroRow;
    if (masked < masked_end && *masked == gene)
      source = kMaskRow;
    else if (token < tokens_end && *token == gene)
      source = token - args.gene_ids;
    f(row, gene, source);
  };
  if (!args.out_genes) {
    for (int64_t gene = first_gene; gene < end_gene; ++gene) visit(c * args.num_genes + gene, gene);
    return;
  }
  const int32_t* out_end = args.out_genes + args.out_cu_seqlens[c + 1];
  const int32_t* out = first_from(args.out_genes + args.out_cu_seqlens[c], out_end, first_gene);
  for (; out < out_end && *out < end_gene; ++out) visit(out - args.out_genes, *out);
}

// out = a + b.
template <class V, class T, class B>
static inline void add_row(const T* a, const B* b, int64_t n, T* out) {
  int64_t d = 0;
  for (; d + V::width <= n; d += V::width) V::store(out + d, V::add(V::load(a + d), V::load(b + d)));
  for (; d < n; ++d) from_float(to_float(a[d]) + to_float(b[d]), out + d);
}

template <class V, class T>
void gather_forward(const GatherArgs& args, const GatherUnit& unit) {
  const int64_t dim = args.dim;
  const T *table = static_cast<const T*>(args.table), *encoded = static_cast<const T*>(args.encoded);
  T* out = static_cast<T*>(args.out);
  for (int64_t c = unit.first_cell; c < unit.end_cell; ++c)
    for_each_row(args, c, unit.first_gene, unit.end_gene, [&](int64_t row, int64_t gene, int64_t source) {
      const T* gene_row = table + gene * dim;
      if (source >= 0)
        add_row<V>(gene_row, encoded + source * dim, dim, out + row * dim);
      else
        add_row<V>(gene_row, source == kMaskRow ? args.mask_row : args.zero_row, dim, out + row * dim);
    });
}

template <class V>
struct GatherScratch {
  float* grad_genes;                       // (genes of the unit, dim), where the unit owns rows of the table's gradient
  float *grad_zero_cell, *grad_mask_cell;  // (dim,), sums over one cell
  size_t bytes;

  GatherScratch(const GatherArgs& args, int64_t genes, void* base) {
    ScratchCursor cursor{static_cast<char*>(base), 0};
    grad_genes = cursor.take<float>(args.grad_table ? genes * args.dim : 0);
    grad_zero_cell = cursor.take<float>(args.dim);
    grad_mask_cell = cursor.take<float>(args.dim);
    bytes = cursor.used;
  }
};

template <class V>
size_t gather_scratch(const GatherArgs& args, int64_t genes) {
  return GatherScratch<V>(args, genes, nullptr).bytes;
}

template <class V, class T>
static inline void accumulate_row(const T* src, int64_t n, float* sum) {
  int64_t d = 0;
  for (; d + V::width <= n; d += V::width) V::store(sum + d, V::add(V::load(sum + d), V::load(src + d)));
  for (; d < n; ++d) sum[d] += to_float(src[d]);
}

// Writes grad_encoded of the tokens met and grad_table of the unit's genes, if that is wanted; adds the unit's share to
// grad_zero_row and grad_mask_row, summed a cell at a time first, so that long sums stay exact.
template <class V, class T>
void gather_backward(const GatherArgs& args, const GatherUnit& unit, float* grad_zero_row, float* grad_mask_row,
                     void* scratch) {
  const int64_t dim = args.dim, genes = unit.end_gene - unit.first_gene;
  const GatherScratch<V> s(args, genes, scratch);
  const T* grad_out = static_cast<const T*>(args.grad_out);
  T* grad_encoded = static_cast<T*>(args.grad_encoded);
  if (args.grad_table) std::memset(s.grad_genes, 0, size_t(genes * dim) * sizeof(float));
  for (int64_t c = unit.first_cell; c < unit.end_cell; ++c) {
    bool zero_used = false, mask_used = false;
    for_each_row(args, c, unit.first_gene, unit.end_gene, [&](int64_t row, int64_t gene, int64_t source) {
      const T* grad_row = grad_out + row * dim;
      if (args.grad_table) accumulate_row<V>(grad_row, dim, s.grad_genes + (gene - unit.first_gene) * dim);
      if (source >= 0) {
        std::memcpy(grad_encoded + source * dim, grad_row, size_t(dim) * sizeof(T));
        return;
      }
      float* sum = source == kMaskRow ? s.grad_mask_cell : s.grad_zero_cell;
      bool& used = source == kMaskRow ? mask_used : zero_used;
      if (used)
        accumulate_row<V>(grad_row, dim, sum);
      else
        load_row<V>(grad_row, dim, sum, dim);
      used = true;
    });
    if (zero_used) accumulate_row<V>(s.grad_zero_cell, dim, grad_zero_row);
    if (mask_used) accumulate_row<V>(s.grad_mask_cell, dim, grad_mask_row);
  }
  if (args.grad_table)
    for (int64_t g = 0; g < genes; ++g)
      store_row<V>(s.grad_genes + g * dim, dim, 1.0f, static_cast<T*>(args.grad_table) + (unit.first_gene + g) * dim);
}

}  // namespace xtg
