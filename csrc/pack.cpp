// Python binding of the CSR packer (csr_pack.h) and of the masking plan (mask_cells.h): NumPy arrays in, NumPy arrays
// out, the GIL released while they work.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cpu/csr_pack.h"
#include "cpu/mask_cells.h"

namespace py = pybind11;

namespace {

constexpr int contiguous = py::array::c_style | py::array::forcecast;
using Int64Array = py::array_t<int64_t, contiguous>;
using Int32Array = py::array_t<int32_t, contiguous>;
using DoubleArray = py::array_t<double, contiguous>;

void require_integers(const py::array& array, const char* name) {
  const char kind = array.dtype().kind();
  if (kind != 'i' && kind != 'u')
    throw py::type_error(std::string(name) + ": expected an integer array, got dtype " +
                         py::str(array.dtype()).cast<std::string>());
  if (array.ndim() != 1)
    throw py::value_error(std::string(name) + ": expected 1 dimension, got " + std::to_string(array.ndim()));
}

const char* fault_name(xtg::CsrPackFault fault) {
  switch (fault) {
    case xtg::CsrPackFault::column_out_of_range:
      return "column_out_of_range";
    case xtg::CsrPackFault::negative:
      return "negative";
    case xtg::CsrPackFault::not_finite:
      return "not_finite";
    case xtg::CsrPackFault::too_large:
      return "too_large";
    case xtg::CsrPackFault::not_whole:
      return "not_whole";
    default:
      return "total_not_finite";
  }
}

std::string describe(const xtg::CsrPackError& error, int64_t first_row, int64_t num_columns) {
  const std::string where =
      "row " + std::to_string(first_row + error.row) + ", column " + std::to_string(error.column);
  const std::string value = py::str(py::float_(error.value)).cast<std::string>();
  switch (error.fault) {
    case xtg::CsrPackFault::column_out_of_range:
      return where + ": column index outside the matrix, expected 0 .. " + std::to_string(num_columns - 1);
    case xtg::CsrPackFault::negative:
      return where + ": negative value " + value + "; expected raw counts (or log-normalised values), not scaled data";
    case xtg::CsrPackFault::not_finite:
      return where + ": value " + value + " is not finite; expected raw counts";
    case xtg::CsrPackFault::too_large:
      return where + ": value " + value + " does not fit float32";
    case xtg::CsrPackFault::not_whole:
      return where + ": value " + value + " is not whole; expected raw counts";
    default:
      return "row " + std::to_string(first_row + error.row) + ": the sum of its values is not finite";
  }
}

// A ValueError that also has the fault, row and column as attributes, for who knows the names of cells and genes.
[[noreturn]] void refuse(const xtg::CsrPackError& error, int64_t first_row, int64_t num_columns) {
  const py::object refused = py::reinterpret_borrow<py::object>(PyExc_ValueError)(describe(error, first_row, num_columns));
  refused.attr("fault") = fault_name(error.fault);
  refused.attr("row") = first_row + error.row;
  refused.attr("column") = error.column;
  PyErr_SetObject(PyExc_ValueError, refused.ptr());
  throw py::error_already_set();
}

struct Arguments {
  Int64Array indptr;
  Int32Array column_gene_ids;
  std::optional<Int64Array> rows;
  std::optional<DoubleArray> cell_totals;
  xtg::CsrPackOptions options;
  int64_t first_row;
  int64_t num_genes;
  bool identity_map;
};

template <typename Index, typename Value>
py::dict pack(const Arguments& arguments, const py::array& indices_in, const py::array& data_in) {
  const auto indices = py::array_t<Index, contiguous>::ensure(indices_in);
  const auto data = py::array_t<Value, contiguous>::ensure(data_in);
  if (!indices || !data) throw py::error_already_set();
  const int64_t num_rows =
      arguments.rows ? arguments.rows->size() : static_cast<int64_t>(arguments.indptr.size()) - 1;
  xtg::CsrRows<Index, Value> in{arguments.indptr.data(),
                                indices.data(),
                                data.data(),
                                arguments.rows ? arguments.rows->data() : nullptr,
                                num_rows,
                                arguments.column_gene_ids.data(),
                                static_cast<int64_t>(arguments.column_gene_ids.size())};
  const xtg::CsrPackOptions& options = arguments.options;

  xtg::CsrPackPlan plan;
  {
    py::gil_scoped_release release;
    plan = xtg::csr_pack_scan(in, options);
  }
  if (plan.error.fault != xtg::CsrPackFault::none) refuse(plan.error, arguments.first_row, in.num_columns);
  std::vector<Value> whole;
  bool rounded = false;
  if (plan.noisy) {
    py::gil_scoped_release release;
    whole.assign(in.data, in.data + data.size());
    rounded = xtg::csr_pack_round(in, whole.data());
    in.data = whole.data();
    plan = xtg::csr_pack_scan(in, options);
  }
  int64_t capacity = 0;
  for (int64_t length : plan.row_lengths) capacity += length;
  if (capacity > std::numeric_limits<int32_t>::max())
    throw py::value_error("rows: expected at most 2147483647 expressed genes in one batch, got " +
                          std::to_string(capacity) + "; pack fewer rows at a time");

  py::array_t<int32_t> cu_seqlens(num_rows + 1);
  py::array_t<double> totals(num_rows);
  std::copy(plan.totals.begin(), plan.totals.end(), totals.mutable_data());
  if (arguments.cell_totals) {
    if (arguments.cell_totals->size() != num_rows)
      throw py::value_error("cell_totals: expected one for each of " + std::to_string(num_rows) + " rows, got " +
                            std::to_string(arguments.cell_totals->size()));
    std::copy_n(arguments.cell_totals->data(), num_rows, plan.totals.begin());
  }
  py::object distinct_index = py::none();
  int32_t* distinct_data = nullptr;
  if (options.distinct) {
    py::array_t<int32_t> array(capacity);
    distinct_data = array.mutable_data();
    distinct_index = std::move(array);
  }

  py::object values, gene_ids;
  if constexpr (std::is_same<Index, int32_t>::value && std::is_same<Value, float>::value) {
    if (!options.normalize && arguments.identity_map && !arguments.rows && !plan.any_dropped &&
        !plan.any_needs_sorting && whole.empty()) {
      {
        py::gil_scoped_release release;
        xtg::csr_pack_in_place(in, options, distinct_data, cu_seqlens.mutable_data());
      }
      const py::slice stored(static_cast<py::ssize_t>(in.indptr[0]), static_cast<py::ssize_t>(in.indptr[num_rows]), 1);
      values = data[stored];
      gene_ids = indices[stored];
    }
  }
  if (!values) {
    py::array_t<float> packed_values(capacity);
    py::array_t<int32_t> packed_genes(capacity);
    int64_t total_nnz;
    {
      float* values_data = packed_values.mutable_data();
      int32_t* genes_data = packed_genes.mutable_data();
      int32_t* cu_data = cu_seqlens.mutable_data();
      py::gil_scoped_release release;
      total_nnz = xtg::csr_pack_fill(in, plan, options, arguments.num_genes, values_data, genes_data, distinct_data,
                                     cu_data);
    }
    values = std::move(packed_values);
    gene_ids = std::move(packed_genes);
    if (total_nnz < capacity) {
      const py::slice used(0, static_cast<py::ssize_t>(total_nnz), 1);
      values = values[used];
      gene_ids = gene_ids[used];
      if (options.distinct) distinct_index = distinct_index[used];
    }
  }

  py::dict packed;
  packed["values"] = values;
  packed["gene_ids"] = gene_ids;
  packed["cu_seqlens"] = cu_seqlens;
  packed["distinct_index"] = distinct_index;
  packed["totals"] = totals;
  packed["rounded"] = rounded;
  return packed;
}

template <typename Index>
py::dict pack_by_value(const Arguments& arguments, const py::array& indices, const py::array& data) {
  const char kind = data.dtype().kind();
  const auto size = data.dtype().itemsize();
  if (kind == 'f' && size == 8) return pack<Index, double>(arguments, indices, data);
  if (kind == 'f' && size <= 4) return pack<Index, float>(arguments, indices, data);
  if (kind == 'b' || (kind == 'u' && size == 1)) return pack<Index, uint8_t>(arguments, indices, data);
  if (kind == 'u' && size == 2) return pack<Index, uint16_t>(arguments, indices, data);
  if (kind == 'u' && size == 4) return pack<Index, uint32_t>(arguments, indices, data);
  if (kind == 'u' && size == 8) return pack<Index, uint64_t>(arguments, indices, data);
  if (kind == 'i' && size == 1) return pack<Index, int8_t>(arguments, indices, data);
  if (kind == 'i' && size == 2) return pack<Index, int16_t>(arguments, indices, data);
  if (kind == 'i' && size == 4) return pack<Index, int32_t>(arguments, indices, data);
  if (kind == 'i' && size == 8) return pack<Index, int64_t>(arguments, indices, data);
  throw py::type_error("data: expected integers, float16, float32 or float64, got dtype " +
                       py::str(data.dtype()).cast<std::string>());
}

py::dict pack_csr(const py::array& indptr, const py::array& indices, const py::array& data,
                  const py::array& column_gene_ids, const std::optional<py::array>& rows, bool normalize,
                  double target_sum, int num_threads, bool distinct, int64_t first_row, bool whole,
                  const std::optional<py::array>& cell_totals) {
  require_integers(indptr, "indptr");
  require_integers(indices, "indices");
  require_integers(column_gene_ids, "column_gene_ids");
  if (data.ndim() != 1 || data.size() != indices.size())
    throw py::value_error("data: expected one value for each of the " + std::to_string(indices.size()) + " indices");
  if (indptr.size() < 1) throw py::value_error("indptr: expected at least 1 entry, got 0");
  if (!(target_sum > 0.0) || !std::isfinite(target_sum))
    throw py::value_error("target_sum: expected a positive number, got " + std::to_string(target_sum));
  if (num_threads < 1)
    throw py::value_error("num_threads: expected at least 1, got " + std::to_string(num_threads));

  Arguments arguments{Int64Array::ensure(indptr), Int32Array::ensure(column_gene_ids), std::nullopt, std::nullopt,
                      {normalize, target_sum, distinct, num_threads, whole}, first_row, 0, true};
  if (cell_totals) {
    arguments.cell_totals = DoubleArray::ensure(*cell_totals);
    if (!*arguments.cell_totals) throw py::error_already_set();
  }
  const int64_t num_rows = static_cast<int64_t>(arguments.indptr.size()) - 1;
  const int64_t* starts = arguments.indptr.data();
  for (int64_t i = 0; i < num_rows; ++i)
    if (starts[i] > starts[i + 1])
      throw py::value_error("indptr: expected non-decreasing entries, got " + std::to_string(starts[i]) + " before " +
                            std::to_string(starts[i + 1]) + " at row " + std::to_string(first_row + i));
  if (starts[0] < 0 || starts[num_rows] > static_cast<int64_t>(indices.size()))
    throw py::value_error("indptr: expected entries in 0 .. " + std::to_string(indices.size()) + ", got " +
                          std::to_string(starts[0]) + " .. " + std::to_string(starts[num_rows]));
  const int32_t* genes = arguments.column_gene_ids.data();
  for (int64_t column = 0; column < static_cast<int64_t>(arguments.column_gene_ids.size()); ++column) {
    if (genes[column] < xtg::kLeftOutColumn)
      throw py::value_error("column_gene_ids: expected gene ids, -1 or -2, got " + std::to_string(genes[column]) +
                            " for column " + std::to_string(column));
    arguments.num_genes = std::max<int64_t>(arguments.num_genes, int64_t{genes[column]} + 1);
    arguments.identity_map &= genes[column] == column;
  }
  if (rows) {
    require_integers(*rows, "rows");
    arguments.rows = Int64Array::ensure(*rows);
    for (int64_t i = 0; i < static_cast<int64_t>(arguments.rows->size()); ++i)
      if (arguments.rows->data()[i] < 0 || arguments.rows->data()[i] >= num_rows)
        throw py::value_error("rows: expected row numbers in 0 .. " + std::to_string(num_rows - 1) + ", got " +
                              std::to_string(arguments.rows->data()[i]));
  }
  if (indices.dtype().kind() == 'i' && indices.dtype().itemsize() <= 4)
    return pack_by_value<int32_t>(arguments, indices, data);
  return pack_by_value<int64_t>(arguments, indices, data);
}

using FloatArray = py::array_t<float, contiguous>;
using CellArrays = std::tuple<py::array, py::array, py::array>;

struct CheckedCells {
  FloatArray values;
  Int32Array gene_ids;
  Int32Array cu_seqlens;
  xtg::PackedCells cells;
  int64_t num_cells;
};

// Packed cells with offsets that can be followed.
CheckedCells checked_cells(const CellArrays& arrays, const std::string& name) {
  const auto& [values, gene_ids, cu_seqlens] = arrays;
  require_integers(gene_ids, (name + " gene_ids").c_str());
  require_integers(cu_seqlens, (name + " cu_seqlens").c_str());
  if (values.dtype().kind() != 'f' || values.dtype().itemsize() != 4)
    throw py::type_error(name + " values: expected float32, got dtype " + py::str(values.dtype()).cast<std::string>());
  if (values.ndim() != 1 || values.size() != gene_ids.size())
    throw py::value_error(name + " values: expected one for each of the " + std::to_string(gene_ids.size()) +
                          " gene_ids");
  CheckedCells checked{FloatArray::ensure(values), Int32Array::ensure(gene_ids), Int32Array::ensure(cu_seqlens), {}, 0};
  checked.cells = {checked.values.data(), checked.gene_ids.data(), checked.cu_seqlens.data()};
  checked.num_cells = static_cast<int64_t>(checked.cu_seqlens.size()) - 1;
  const int32_t* starts = checked.cells.cu_seqlens;
  if (checked.num_cells < 0 || starts[0] < 0 || starts[checked.num_cells] > static_cast<int64_t>(gene_ids.size()))
    throw py::value_error(name + " cu_seqlens: expected offsets in 0 .. " + std::to_string(gene_ids.size()));
  for (int64_t row = 0; row < checked.num_cells; ++row) {
    if (starts[row] > starts[row + 1])
      throw py::value_error(name + " cu_seqlens: expected non-decreasing offsets, got " + std::to_string(starts[row]) +
                            " before " + std::to_string(starts[row + 1]));
  }
  return checked;
}

// In the cells that are to be masked, every gene id is below num_genes and above the one before it.
void require_ascending_genes(const CheckedCells& batch, const std::string& name, const int64_t* rows, int64_t num_rows,
                             int64_t num_genes) {
  bool right = true;
  {
    py::gil_scoped_release release;
    for (int64_t i = 0; i < num_rows; ++i) {
      const int64_t row = rows ? rows[i] : i;
      int64_t previous = -1;
      for (int64_t t = batch.cells.cu_seqlens[row]; t < batch.cells.cu_seqlens[row + 1]; ++t) {
        right &= batch.cells.gene_ids[t] > previous;
        previous = batch.cells.gene_ids[t];
      }
      right &= previous < num_genes;
    }
  }
  if (!right)
    throw py::value_error(name + " gene_ids: expected ids ascending in each cell, from 0 to " +
                          std::to_string(num_genes - 1));
}

py::array_t<int32_t> as_offsets(const std::vector<int64_t>& starts) {
  py::array_t<int32_t> offsets(static_cast<py::ssize_t>(starts.size()));
  std::transform(starts.begin(), starts.end(), offsets.mutable_data(),
                 [](int64_t start) { return static_cast<int32_t>(start); });
  return offsets;
}

py::dict mask_cells(const py::array& values, const py::array& gene_ids, const py::array& cu_seqlens,
                    const py::array& cells, int64_t num_genes, double nonzero_rate, double zero_rate,
                    double mask_share, double random_share, uint64_t seed, uint64_t epoch,
                    const std::optional<py::array>& rows, const std::optional<CellArrays>& target,
                    const std::optional<py::array>& depth, int num_threads) {
  // The two tokens of the read depth have the ids num_genes and num_genes + 1.
  if (num_genes < 0 || num_genes > std::numeric_limits<int32_t>::max() - 2)
    throw py::value_error("num_genes: expected a number from 0 to 2147483645, got " + std::to_string(num_genes));
  if (num_threads < 1)
    throw py::value_error("num_threads: expected at least 1, got " + std::to_string(num_threads));
  const xtg::MaskOptions options{num_genes,    nonzero_rate, zero_rate, mask_share,
                                 random_share, seed,         epoch,     depth.has_value(), num_threads};
  for (double share : {nonzero_rate, zero_rate, mask_share, random_share})
    if (!(share >= 0.0 && share <= 1.0))
      throw py::value_error("rates and shares: expected numbers from 0 to 1, got " + std::to_string(share));
  const CheckedCells batch = checked_cells({values, gene_ids, cu_seqlens}, "batch");
  const CheckedCells truth = target ? checked_cells(*target, "target") : batch;
  if (truth.num_cells != batch.num_cells)
    throw py::value_error("target: expected " + std::to_string(batch.num_cells) + " cells as the batch has, got " +
                          std::to_string(truth.num_cells));

  require_integers(cells, "cells");
  const auto cell_numbers = Int64Array::ensure(cells);
  const int64_t num_cells = cell_numbers.size();
  std::optional<Int64Array> row_numbers;
  if (rows) {
    require_integers(*rows, "rows");
    row_numbers = Int64Array::ensure(*rows);
  }
  const int64_t num_rows = rows ? static_cast<int64_t>(row_numbers->size()) : batch.num_cells;
  if (num_cells != num_rows)
    throw py::value_error("cells: expected one number for each of the " + std::to_string(num_rows) + " rows, got " +
                          std::to_string(num_cells));
  for (int64_t c = 0; c < num_cells; ++c) {
    if (cell_numbers.data()[c] < 0)
      throw py::value_error("cells: expected numbers of at least 0, got " + std::to_string(cell_numbers.data()[c]));
    if (rows && (row_numbers->data()[c] < 0 || row_numbers->data()[c] >= batch.num_cells))
      throw py::value_error("rows: expected row numbers in 0 .. " + std::to_string(batch.num_cells - 1) + ", got " +
                            std::to_string(row_numbers->data()[c]));
  }
  std::optional<FloatArray> depth_values;
  if (depth) {
    if (depth->ndim() != 2 || depth->shape(0) != num_cells || depth->shape(1) != 2)
      throw py::value_error("depth: expected shape (" + std::to_string(num_cells) + ", 2)");
    depth_values = FloatArray::ensure(*depth);
    if (!*depth_values) throw py::error_already_set();
  }

  const int64_t* row_data = rows ? row_numbers->data() : nullptr;
  require_ascending_genes(batch, "batch", row_data, num_cells, num_genes);
  if (target) require_ascending_genes(truth, "target", row_data, num_cells, num_genes);
  xtg::MaskPlan plan;
  {
    py::gil_scoped_release release;
    plan = xtg::mask_plan(batch.cells, row_data, num_cells, options);
  }
  if (std::max(plan.tokens.back(), plan.chosen.back()) > std::numeric_limits<int32_t>::max())
    throw py::value_error("cells: expected at most 2147483647 tokens in one batch, got " +
                          std::to_string(std::max(plan.tokens.back(), plan.chosen.back())) +
                          "; mask fewer cells at a time");
  FloatArray out_values(plan.tokens.back()), chosen_values(plan.chosen.back());
  Int32Array out_genes(plan.tokens.back()), distinct_index(plan.tokens.back()), masked_ids(plan.masked.back()),
      chosen_ids(plan.chosen.back());
  const xtg::MaskOutputs out{out_values.mutable_data(), out_genes.mutable_data(),  distinct_index.mutable_data(),
                             masked_ids.mutable_data(), chosen_ids.mutable_data(), chosen_values.mutable_data()};
  {
    const int64_t* cell_data = cell_numbers.data();
    const float* depth_data = depth ? depth_values->data() : nullptr;
    py::gil_scoped_release release;
    xtg::csr_pack_detail::for_ranges(
        num_cells, num_threads, [&](int64_t c) { return num_genes + plan.tokens[c + 1] - plan.tokens[c]; },
        [&](int64_t begin, int64_t end) {
          xtg::mask_cells(batch.cells, truth.cells, row_data, cell_data, depth_data, begin, end, plan, options, out);
        });
  }

  py::dict masked;
  masked["values"] = out_values;
  masked["gene_ids"] = out_genes;
  masked["cu_seqlens"] = as_offsets(plan.tokens);
  masked["distinct_index"] = distinct_index;
  masked["masked_ids"] = masked_ids;
  masked["masked_cu_seqlens"] = as_offsets(plan.masked);
  masked["chosen_ids"] = chosen_ids;
  masked["chosen_cu_seqlens"] = as_offsets(plan.chosen);
  masked["chosen_values"] = chosen_values;
  return masked;
}

}  // namespace

void bind_pack(py::module_& module) {
  module.def("pack_csr", &pack_csr, py::arg("indptr"), py::arg("indices"), py::arg("data"), py::arg("column_gene_ids"),
             py::kw_only(), py::arg("rows") = py::none(), py::arg("normalize") = true, py::arg("target_sum") = 1e4,
             py::arg("num_threads") = 1, py::arg("distinct") = true, py::arg("first_row") = 0, py::arg("whole") = false,
             py::arg("cell_totals") = py::none(),
             R"doc(Packs rows of a CSR matrix (cells x genes) into ragged arrays.

Columns that are no gene of the vocabulary and stored zeros are dropped, rows come out in ascending gene order,
duplicates are summed. With normalize, value = log1p(count / total * target_sum) in float64, stored as float32, where
total is the cell's sum over the genes of the vocabulary; otherwise the stored number as float32. Results do not depend
on num_threads. Where nothing has to change (normalize=False, float32 data, int32 indices, column == gene, sorted,
rows=None) values and gene_ids are views of the input.

Args:
    indptr: (n + 1,) integers; may start past 0, as a window of a longer indptr does.
    indices, data: stored columns and numbers; data in any integer type, float16, float32 or float64.
    column_gene_ids: (n_columns,) gene id of each column, -1 for none. Columns may share a gene: their counts add up.
    rows: rows to pack, in the order wanted; None for all.
    first_row: number of row 0 in error messages.

Returns:
    dict: values (total_nnz,) float32, gene_ids (total_nnz,) int32, cu_seqlens (rows + 1,) int32,
    distinct_index (total_nnz,) int32 or None: the first token of the same cell with the same value,
    totals (rows,) float64: sum of the cell's stored numbers over the genes of the vocabulary.

Raises:
    ValueError: a negative, NaN or infinite number (anywhere in a packed row), a column index outside
        column_gene_ids, a malformed indptr; names row, column and value.
    TypeError: an array of another kind.)doc");
  module.def("mask_cells", &mask_cells, py::arg("values"), py::arg("gene_ids"), py::arg("cu_seqlens"), py::kw_only(),
             py::arg("cells"), py::arg("num_genes"), py::arg("nonzero_rate"), py::arg("zero_rate"),
             py::arg("mask_share"), py::arg("random_share"), py::arg("seed"), py::arg("epoch"),
             py::arg("rows") = py::none(), py::arg("target") = py::none(), py::arg("depth") = py::none(),
             py::arg("num_threads") = 1,
             R"doc(The masking plan of pre-training over packed cells; xtrimogene.masking.mask_cells is its public face.

Args:
    values, gene_ids, cu_seqlens: (total_nnz,) float32, (total_nnz,) integers ascending in each cell, (cells + 1,).
    cells: (n,) integers, the number of each cell in the data.
    rows: (n,) the packed cell for each of `cells`; None for all, in order.
    target: (values, gene_ids, cu_seqlens) of the true values, cell by cell as the packed ones; None for these.
    depth: (n, 2) float32 values of the read-depth tokens, None for none.

Returns:
    dict: values, gene_ids, cu_seqlens, distinct_index of the encoder's tokens; masked_ids, masked_cu_seqlens;
    chosen_ids, chosen_cu_seqlens, chosen_values.

Raises:
    ValueError, TypeError: arrays that do not fit together, gene ids that do not ascend or are not below num_genes.)doc");
}
