// masked_decoder_gather and its backward for CPU tensors: arguments, units of work, threads.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "../common/isa.h"
#include "../common/work_list.h"
#include "arguments.h"
#include "group_sums.h"

namespace xtg {
namespace {

// Units of work depend on shapes alone, so that the sums over them do not depend on the number of threads: at least this
// many, as far as there are genes (or cells), and blocks of genes no larger than what stays in cache.
constexpr int64_t kUnits = 64, kGeneBlock = 32;

struct Gather {
  GatherArgs args{};
  std::vector<Tensor> kept;          // contiguous copies that args points into
  std::vector<float> zero_row, mask_row;
  std::vector<GatherUnit> units;
  int64_t unit_genes = 0;            // most genes of a unit
  int64_t out_rows = 0, used_rows = 0;
};

const Tensor& keep(Gather& g, const Tensor& x) {
  g.kept.push_back(torch::stable::contiguous(x));
  return g.kept.back();
}

struct Genes {
  const int32_t *ids, *cu_seqlens;
};

// The genes of each cell, ascending rows of the table.
Genes checked_genes(Gather& g, const Tensor& ids_in, const Tensor& cu_in, const char* name) {
  const int64_t total = ids_in.numel(), rows = g.args.num_genes;
  STD_TORCH_CHECK(total < INT32_MAX, name, ": expected fewer than 2^31 genes in a batch");
  const bool wide = ids_in.scalar_type() == ScalarType::Long;
  check_sizes(ids_in, name, wide ? ScalarType::Long : ScalarType::Int, {total});
  const Tensor& cu = keep(g, cu_in);
  const int32_t* bounds = checked_cu_seqlens(cu, total);
  STD_TORCH_CHECK(cu.size(0) - 1 == g.args.batch, name, ": expected segments of ", g.args.batch, " cells, got ",
                  cu.size(0) - 1);
  if (wide) {
    const Tensor& ids = keep(g, ids_in);
    const auto* p = static_cast<const int64_t*>(ids.data_ptr());
    for (int64_t t = 0; t < bounds[g.args.batch]; ++t)
      STD_TORCH_CHECK(p[t] >= 0 && p[t] < rows, name, ": expected ids in [0, ", rows, "), got ", p[t], " at ", t);
  }
  const Tensor& ids = keep(g, wide ? torch::stable::to(ids_in, ScalarType::Int) : ids_in);
  const auto* p = static_cast<const int32_t*>(ids.data_ptr());
  for (int64_t c = 0; c < g.args.batch; ++c)
    for (int64_t t = bounds[c]; t < bounds[c + 1]; ++t) {
      STD_TORCH_CHECK(p[t] >= 0 && p[t] < rows, name, ": expected ids in [0, ", rows, "), got ", p[t], " at ", t);
      STD_TORCH_CHECK(t == bounds[c] || p[t - 1] < p[t], name, ": expected strictly ascending ids in each cell, got ",
                      p[t - 1], " then ", p[t], " at ", t);
    }
  return {p, bounds};
}

void check_no_overlap(const GatherArgs& args) {
  for (int64_t c = 0; c < args.batch; ++c) {
    const int32_t* masked = args.masked_ids + args.masked_cu_seqlens[c];
    const int32_t* masked_end = args.masked_ids + args.masked_cu_seqlens[c + 1];
    for (int64_t t = args.cu_seqlens[c]; t < args.cu_seqlens[c + 1]; ++t) {
      while (masked < masked_end && *masked < args.gene_ids[t]) ++masked;
      STD_TORCH_CHECK(masked == masked_end || *masked != args.gene_ids[t],
                      "masked_ids: expected genes that are not in gene_ids, got gene ", args.gene_ids[t], " of cell ", c,
                      " in both");
    }
  }
}

Gather gather(int64_t num_genes, int64_t dim, const Tensor& cu_seqlens, const Tensor& gene_ids,
              const std::optional<Tensor>& masked_ids, const std::optional<Tensor>& masked_cu_seqlens,
              const std::optional<Tensor>& out_genes, const std::optional<Tensor>& out_cu_seqlens) {
  Gather g;
  g.kept.reserve(16);
  GatherArgs& args = g.args;
  STD_TORCH_CHECK(num_genes >= 1 && dim >= 1, "table: expected at least one gene and one channel");
  STD_TORCH_CHECK(num_genes < INT32_MAX, "table: expected fewer than 2^31 genes");
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "cu_seqlens: expected (batch + 1,)");
  args.num_genes = num_genes;
  args.dim = dim;
  args.batch = cu_seqlens.size(0) - 1;
  const Genes tokens = checked_genes(g, gene_ids, cu_seqlens, "gene_ids");
  args.gene_ids = tokens.ids;
  args.cu_seqlens = tokens.cu_seqlens;
  if (masked_ids) {
    STD_TORCH_CHECK(masked_cu_seqlens.has_value(), "masked_cu_seqlens: expected together with masked_ids");
    const Genes masked = checked_genes(g, *masked_ids, *masked_cu_seqlens, "masked_ids");
    args.masked_ids = masked.ids;
    args.masked_cu_seqlens = masked.cu_seqlens;
  }
  if (masked_ids) check_no_overlap(args);
  if (out_genes) {
    STD_TORCH_CHECK(out_cu_seqlens.has_value(), "out_cu_seqlens: expected together with out_genes");
    const Genes out = checked_genes(g, *out_genes, *out_cu_seqlens, "out_genes");
    args.out_genes = out.ids;
    args.out_cu_seqlens = out.cu_seqlens;
    g.out_rows = out_genes->numel();
    g.used_rows = out.cu_seqlens[args.batch];
    g.unit_genes = num_genes;
    const int64_t cells = max_of<int64_t>(ceil_div(args.batch, kUnits), 1);
    // Without rows out_genes may have no storage, and a null pointer stands for all genes.
    for (int64_t c = 0; c < args.batch && g.used_rows; c += cells)
      g.units.push_back({c, min_of(c + cells, args.batch), 0, num_genes});
  } else {
    g.out_rows = g.used_rows = args.batch * num_genes;
    g.unit_genes = min_of(max_of<int64_t>(num_genes / kUnits, 1), kGeneBlock);
    for (int64_t gene = 0; gene < num_genes && args.batch; gene += g.unit_genes)
      g.units.push_back({0, args.batch, gene, min_of(gene + g.unit_genes, num_genes)});
  }
  return g;
}

Tensor masked_decoder_gather(const Tensor& table, const Tensor& zero_row, const Tensor& mask_row, const Tensor& encoded,
                             const Tensor& cu_seqlens, const Tensor& gene_ids, const std::optional<Tensor>& masked_ids,
                             const std::optional<Tensor>& masked_cu_seqlens, const std::optional<Tensor>& out_genes,
                             const std::optional<Tensor>& out_cu_seqlens) {
  const Kernels& kernels = active_kernels();
  STD_TORCH_CHECK(table.dim() == 2, "table: expected (num_genes, dim)");
  const int64_t num_genes = table.size(0), dim = table.size(1);
  const ScalarType dtype = table.scalar_type();
  Gather g =
      gather(num_genes, dim, cu_seqlens, gene_ids, masked_ids, masked_cu_seqlens, out_genes, out_cu_seqlens);
  GatherArgs& args = g.args;
  args.dtype = element_type(table, "table");
  check_sizes(zero_row, "zero_row", dtype, {dim});
  check_sizes(mask_row, "mask_row", dtype, {dim});
  check_sizes(encoded, "encoded", dtype, {gene_ids.numel(), dim});
  args.table = keep(g, table).data_ptr();
  args.encoded = keep(g, encoded).data_ptr();
  const auto as_floats = [&](const Tensor& x) {
    std::vector<float> row(static_cast<size_t>(dim));
    kernels.load_rows(args.dtype, keep(g, x).data_ptr(), 1, dim, row.data(), dim);
    return row;
  };
  g.zero_row = as_floats(zero_row);
  g.mask_row = as_floats(mask_row);
  args.zero_row = g.zero_row.data();
  args.mask_row = g.mask_row.data();

  const auto shape = out_genes ? std::vector<int64_t>{g.out_rows, dim} : std::vector<int64_t>{args.batch, num_genes, dim};
  Tensor out = with_large_pages(torch::stable::new_empty(table, shape));
  args.out = out.data_ptr();
  const int64_t row_bytes = dim * int64_t(out.element_size());
  for_each_unit(int64_t(g.units.size()), 0,
                [&](int64_t unit, void*) { kernels.gather_forward(args, g.units[size_t(unit)]); });
  if (g.used_rows < g.out_rows)
    std::memset(static_cast<char*>(args.out) + g.used_rows * row_bytes, 0, size_t((g.out_rows - g.used_rows) * row_bytes));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_decoder_gather_backward(
    const Tensor& grad_out, const Tensor& cu_seqlens, const Tensor& gene_ids, const std::optional<Tensor>& masked_ids,
    const std::optional<Tensor>& masked_cu_seqlens, const std::optional<Tensor>& out_genes,
    const std::optional<Tensor>& out_cu_seqlens, int64_t num_genes) {
  const Kernels& kernels = active_kernels();
  STD_TORCH_CHECK(grad_out.dim() == (out_genes ? 2 : 3), "grad_out: expected the shape of the output");
  const int64_t dim = grad_out.size(grad_out.dim() - 1), total_nnz = gene_ids.numel();
  Gather g =
      gather(num_genes, dim, cu_seqlens, gene_ids, masked_ids, masked_cu_seqlens, out_genes, out_cu_seqlens);
  GatherArgs& args = g.args;
  args.dtype = element_type(grad_out, "grad_out");
  if (out_genes)
    check_sizes(grad_out, "grad_out", grad_out.scalar_type(), {g.out_rows, dim});
  else
    check_sizes(grad_out, "grad_out", grad_out.scalar_type(), {args.batch, num_genes, dim});
  args.grad_out = keep(g, grad_out).data_ptr();
  const int64_t units = int64_t(g.units.size());
  // Where every gene of every cell has a row, each gene of the table belongs to a unit and each token in use to a row.
  // Sums over asked genes write every row of the table's gradient.
  const bool all_rows = !out_genes && args.batch > 0;
  const auto new_grad = [&](int64_t rows, bool written) {
    return written ? with_large_pages(torch::stable::new_empty(grad_out, {rows, dim}))
                   : torch::stable::new_zeros(grad_out, {rows, dim});
  };
  Tensor grad_encoded = new_grad(total_nnz, all_rows && args.cu_seqlens[args.batch] == total_nnz);
  Tensor grad_table = new_grad(num_genes, all_rows || out_genes.has_value());
  args.grad_encoded = grad_encoded.data_ptr();
  args.grad_table = out_genes ? nullptr : grad_table.data_ptr();
  std::vector<float> sums(size_t(2 * max_of<int64_t>(units, 1) * dim), 0.0f);
  for_each_unit(units, kernels.gather_scratch(args, g.unit_genes), [&](int64_t unit, void* scratch) {
    float* grad_zero_row = sums.data() + 2 * unit * dim;
    kernels.gather_backward(args, g.units[size_t(unit)], grad_zero_row, grad_zero_row + dim, scratch);
  });
  for (int64_t unit = 1; unit < units; ++unit)
    for (int64_t i = 0; i < 2 * dim; ++i) sums[size_t(i)] += sums[size_t(2 * unit * dim + i)];
  if (out_genes) {
    const Groups genes = group_by(args.out_genes, g.used_rows, num_genes);
    sum_groups(kernels, args.dtype, args.grad_out, dim, genes, grad_table.data_ptr());
  }
  const auto stored = [&](const float* src) {
    Tensor grad = torch::stable::new_empty(grad_out, {dim});
    kernels.store_rows(args.dtype, src, dim, 1, dim, grad.data_ptr());
    return grad;
  };
  return {grad_table, stored(sums.data()), stored(sums.data() + dim), grad_encoded};
}

}  // namespace
}  // namespace xtg

STABLE_TORCH_LIBRARY_IMPL(xtg, CPU, m) {
  m.impl("masked_decoder_gather", TORCH_BOX(&xtg::masked_decoder_gather));
  m.impl("masked_decoder_gather_backward", TORCH_BOX(&xtg::masked_decoder_gather_backward));
}
