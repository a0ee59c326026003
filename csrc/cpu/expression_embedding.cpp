// expression_embedding, its backward and distinct_index for CPU tensors: arguments, grouping of equal values, threads.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../common/distinct.h"
#include "../common/isa.h"
#include "arguments.h"
#include "group_sums.h"

namespace xtg {
namespace {

// The parameter gradients are summed in at most this many parts, split by the distinct values alone, so that the order
// of the sums does not depend on the number of threads.
constexpr int64_t kGradientParts = 16;

using Floats = std::unique_ptr<void, AlignedFree>;

Floats floats(int64_t count) { return aligned_scratch(size_t(max_of<int64_t>(count, 1)) * sizeof(float)); }

float* data(const Floats& x) { return static_cast<float*>(x.get()); }

struct Weights {
  Floats w1, b1, b2, w2, w2_transposed, bin_table, bin_table_transposed;
};

Floats transposed(const float* src, int64_t rows, int64_t columns, int64_t ld, int64_t padded) {
  Floats out = floats(columns * padded);
  std::memset(out.get(), 0, size_t(columns * padded) * sizeof(float));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) data(out)[j * padded + i] = src[i * ld + j];
  return out;
}

struct Embedding {
  EmbeddingArgs args{};
  Weights weights;
  Groups distinct;  // tokens of each distinct value
  std::vector<int32_t> first_token;
  std::vector<Tensor> kept;  // contiguous copies that args points into
  int64_t count() const { return int64_t(first_token.size()); }
};

const Tensor& keep(Embedding& e, const Tensor& x) {
  e.kept.push_back(torch::stable::contiguous(x));
  return e.kept.back();
}

Embedding embedding(const Kernels& kernels, const Tensor& values, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                    const Tensor& b2, const Tensor& bin_table, double alpha, const std::optional<Tensor>& gene_ids,
                    const std::optional<Tensor>& gene_table, const std::optional<Tensor>& distinct_index,
                    bool backward) {
  Embedding e;
  e.kept.reserve(16);
  EmbeddingArgs& args = e.args;
  STD_TORCH_CHECK(values.dim() == 1 && bin_table.dim() == 2, "values: expected (total_nnz,), bin_table: (bins, dim)");
  const int64_t total = values.size(0), bins = bin_table.size(0), dim = bin_table.size(1);
  const ScalarType dtype = bin_table.scalar_type();
  args.dtype = element_type(bin_table, "bin_table");
  STD_TORCH_CHECK(bins >= 1 && dim >= 1, "bin_table: expected at least one bin and one channel");
  STD_TORCH_CHECK(total < INT32_MAX, "values: expected fewer than 2^31 tokens in a batch");
  check_sizes(values, "values", ScalarType::Float, {total});
  check_sizes(w1, "w1", dtype, {bins});
  check_sizes(b1, "b1", dtype, {bins});
  check_sizes(w2, "w2", dtype, {bins, bins});
  check_sizes(b2, "b2", dtype, {bins});
  args.bins = bins;
  args.dim = dim;
  args.padded_bins = round_up(bins, kernels.width);
  args.padded_dim = round_up(dim, kernels.width);
  args.alpha = float(alpha);
  args.values = static_cast<const float*>(keep(e, values).data_ptr());

  const auto load = [&](const Tensor& x, int64_t rows, int64_t columns, int64_t padded) {
    Floats out = floats(rows * padded);
    kernels.load_rows(args.dtype, keep(e, x).data_ptr(), rows, columns, data(out), padded);
    return out;
  };
  Weights& w = e.weights;
  w.w1 = load(w1, 1, bins, args.padded_bins);
  w.b1 = load(b1, 1, bins, args.padded_bins);
  w.b2 = load(b2, 1, bins, args.padded_bins);
  w.w2 = load(w2, bins, bins, args.padded_bins);
  w.w2_transposed = transposed(data(w.w2), bins, bins, args.padded_bins, args.padded_bins);
  w.bin_table = load(bin_table, bins, dim, args.padded_dim);
  if (backward) w.bin_table_transposed = transposed(data(w.bin_table), bins, dim, args.padded_dim, args.padded_bins);
  args.w1 = data(w.w1);
  args.b1 = data(w.b1);
  args.b2 = data(w.b2);
  args.w2 = data(w.w2);
  args.w2_transposed = data(w.w2_transposed);
  args.bin_table = data(w.bin_table);
  args.bin_table_transposed = data(w.bin_table_transposed);

  std::vector<int32_t> value_of(static_cast<size_t>(total));  // distinct value of each token, -1 for slack
  if (distinct_index) {
    check_sizes(*distinct_index, "distinct_index", ScalarType::Int, {total});
    const auto* first = static_cast<const int32_t*>(keep(e, *distinct_index).data_ptr());
    for (int64_t t = 0; t < total; ++t) {
      const int64_t f = first[t];
      if (f == t) {
        value_of[size_t(t)] = int32_t(e.first_token.size());
        e.first_token.push_back(int32_t(t));
        continue;
      }
      STD_TORCH_CHECK(f < t && (f < 0 || first[f] == f), "distinct_index: expected the first token of an equal value, got ",
                      f, " at ", t);
      value_of[size_t(t)] = f < 0 ? -1 : value_of[size_t(f)];
    }
  } else {
    e.first_token.resize(size_t(total));
    for (int64_t t = 0; t < total; ++t) value_of[size_t(t)] = e.first_token[size_t(t)] = int32_t(t);
  }
  e.distinct = group_by(value_of.data(), total, e.count());
  args.first_token = e.first_token.data();
  args.offsets = e.distinct.offsets.data();
  args.tokens = e.distinct.tokens.data();

  if (gene_table) {
    STD_TORCH_CHECK(gene_ids.has_value(), "gene_ids: expected together with gene_table");
    const int64_t rows = gene_table->size(0);
    check_sizes(*gene_table, "gene_table", dtype, {rows, dim});
    const bool wide = gene_ids->scalar_type() == ScalarType::Long;
    check_sizes(*gene_ids, "gene_ids", wide ? ScalarType::Long : ScalarType::Int, {total});
    const Tensor& ids = keep(e, wide ? torch::stable::to(*gene_ids, ScalarType::Int) : *gene_ids);
    args.gene_ids = static_cast<const int32_t*>(ids.data_ptr());
    args.gene_table = keep(e, *gene_table).data_ptr();
    for (int64_t t = 0; t < total; ++t)
      STD_TORCH_CHECK(value_of[size_t(t)] < 0 || (args.gene_ids[t] >= 0 && args.gene_ids[t] < rows),
                      "gene_ids: expected ids in [0, ", rows, "), got ", args.gene_ids[t], " at ", t);
  }
  return e;
}

void zero_rows_without_value(const Tensor& x, const Embedding& e) {
  if (int64_t(e.distinct.tokens.size()) < x.size(0)) std::memset(x.data_ptr(), 0, size_t(x.numel()) * x.element_size());
}

Tensor expression_embedding(const Tensor& values, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                            const Tensor& b2, const Tensor& bin_table, double alpha,
                            const std::optional<Tensor>& gene_ids, const std::optional<Tensor>& gene_table,
                            const std::optional<Tensor>& distinct_index) {
  const Kernels& kernels = active_kernels();
  Embedding e =
      embedding(kernels, values, w1, b1, w2, b2, bin_table, alpha, gene_ids, gene_table, distinct_index, false);
  Tensor out = with_large_pages(torch::stable::new_empty(bin_table, {values.size(0), e.args.dim}));
  zero_rows_without_value(out, e);
  e.args.out = out.data_ptr();
  const int64_t block = kernels.value_block;
  for_each_unit(ceil_div(e.count(), block), kernels.embedding_scratch(e.args), [&](int64_t unit, void* scratch) {
    kernels.embedding_forward(e.args, unit * block, min_of(block, e.count() - unit * block), scratch);
  });
  return out;
}

// grad_gene_table: the row of each gene sums grad_out over that gene's tokens, in token order; one owner a row.
Tensor gene_table_gradient(const Kernels& kernels, const Embedding& e, const Tensor& gene_table, int64_t total) {
  const int64_t rows = gene_table.size(0), dim = e.args.dim;
  Tensor grad = with_large_pages(torch::stable::new_empty(gene_table, {rows, dim}));
  std::vector<int32_t> ids(size_t(total), -1);
  for (int32_t t : e.distinct.tokens) ids[size_t(t)] = e.args.gene_ids[t];
  sum_groups(kernels, e.args.dtype, e.args.grad_out, dim, group_by(ids.data(), total, rows), grad.data_ptr());
  return grad;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expression_embedding_backward(
    const Tensor& grad_out_in, const Tensor& values, const Tensor& w1, const Tensor& b1, const Tensor& w2,
    const Tensor& b2, const Tensor& bin_table, double alpha, const std::optional<Tensor>& gene_ids,
    const std::optional<Tensor>& gene_table, const std::optional<Tensor>& distinct_index, bool needs_values_grad) {
  const Kernels& kernels = active_kernels();
  Embedding e =
      embedding(kernels, values, w1, b1, w2, b2, bin_table, alpha, gene_ids, gene_table, distinct_index, true);
  EmbeddingArgs& args = e.args;
  const int64_t total = values.size(0), bins = args.bins, dim = args.dim;
  check_sizes(grad_out_in, "grad_out", bin_table.scalar_type(), {total, dim});
  args.grad_out = keep(e, grad_out_in).data_ptr();
  Tensor grad_values = torch::stable::new_empty(values, {needs_values_grad ? total : 0});
  if (needs_values_grad) {
    zero_rows_without_value(grad_values, e);
    args.grad_values = static_cast<float*>(grad_values.data_ptr());
  }

  const int64_t block = kernels.value_block, blocks = ceil_div(e.count(), block);
  const int64_t parts = min_of(kGradientParts, max_of<int64_t>(blocks, 1));
  const int64_t small = args.padded_bins, w2_size = bins * args.padded_bins, table_size = bins * args.padded_dim;
  const int64_t part_size = 3 * small + w2_size + table_size;
  const Floats sums = floats(parts * part_size);
  for_each_unit(parts, kernels.embedding_scratch(args), [&](int64_t part, void* scratch) {
    float* p = data(sums) + part * part_size;
    std::memset(p, 0, size_t(part_size) * sizeof(float));
    const EmbeddingGrads grads{p, p + small, p + 2 * small, p + 3 * small, p + 3 * small + w2_size};
    for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; ++b)
      kernels.embedding_backward(args, b * block, min_of(block, e.count() - b * block), grads, scratch);
  });
  constexpr int64_t kSlice = 4096;
  for_each_unit(ceil_div(part_size, kSlice), 0, [&](int64_t unit, void*) {
    const int64_t end = min_of((unit + 1) * kSlice, part_size);
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = unit * kSlice; i < end; ++i) data(sums)[i] += data(sums)[part * part_size + i];
  });
  const auto stored = [&](const Tensor& like, const float* src, int64_t rows, int64_t columns, int64_t padded) {
    Tensor grad = torch::stable::new_empty(like, like.dim() == 1 ? std::vector<int64_t>{columns}
                                                                 : std::vector<int64_t>{rows, columns});
    kernels.store_rows(args.dtype, src, padded, rows, columns, grad.data_ptr());
    return grad;
  };
  const float* p = data(sums);
  Tensor grad_gene_table = gene_table ? gene_table_gradient(kernels, e, *gene_table, total)
                                      : torch::stable::new_empty(bin_table, {0});
  return {grad_values,
          stored(w1, p, 1, bins, small),
          stored(b1, p + small, 1, bins, small),
          stored(w2, p + 3 * small, bins, bins, small),
          stored(b2, p + 2 * small, 1, bins, small),
          stored(bin_table, p + 3 * small + w2_size, bins, dim, args.padded_dim),
          grad_gene_table};
}

Tensor distinct_index(const Tensor& values_in, const Tensor& cu_seqlens_in) {
  const Tensor values = torch::stable::contiguous(values_in), cu_seqlens = torch::stable::contiguous(cu_seqlens_in);
  const int64_t total = values.numel();
  check_sizes(values, "values", ScalarType::Float, {total});
  const int32_t* cu = checked_cu_seqlens(cu_seqlens, total);
  const int64_t batch = cu_seqlens.size(0) - 1;
  Tensor index = torch::stable::new_empty(values, {total}, ScalarType::Int);
  auto* out = static_cast<int32_t*>(index.data_ptr());
  const auto* x = static_cast<const float*>(values.data_ptr());
  for (int64_t t = cu[batch]; t < total; ++t) out[t] = -1;
  for_each_unit(batch, 0, [&](int64_t c, void*) { distinct_in_segment(x, cu[c], cu[c + 1], out); });
  return index;
}

}  // namespace
}  // namespace xtg

STABLE_TORCH_LIBRARY_IMPL(xtg, CPU, m) {
  m.impl("expression_embedding", TORCH_BOX(&xtg::expression_embedding));
  m.impl("expression_embedding_backward", TORCH_BOX(&xtg::expression_embedding_backward));
  m.impl("distinct_index", TORCH_BOX(&xtg::distinct_index));
}
