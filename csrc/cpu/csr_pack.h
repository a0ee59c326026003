// Packs CSR rows of a cells x genes matrix into a ragged batch: column -> gene id, zeros dropped, rows in
// ascending gene order with duplicates summed, library-size normalisation + log1p, distinct-value index.
// Plain C++17 over raw pointers: no torch, no Python, no intrinsics.
//
// Two passes over the rows, each split into contiguous row ranges of about equal nnz. `scan` checks every
// entry, counts what each row keeps and sums its total; a prefix sum then gives each row its place, and `fill`
// writes. No row's result depends on another row, hence on the split: the bits are the same for any thread count.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace xtg {

struct CsrPackOptions {
  bool normalize = true;      // value = log1p(count / total * target_sum); otherwise the stored number as float32
  double target_sum = 1e4;
  bool distinct = true;       // fill distinct_index
  int num_threads = 1;
  bool whole = false;         // refuse numbers that are not whole; those that are but for rounding make the plan noisy
};

enum class CsrPackFault { none, column_out_of_range, negative, not_finite, too_large, not_whole, total_not_finite };

// A column whose numbers nobody looks at, such as that of an antibody. -1: a gene that the vocabulary lacks.
constexpr int32_t kLeftOutColumn = -2;

struct CsrPackError {
  CsrPackFault fault = CsrPackFault::none;
  int64_t row = 0;     // row of the input matrix
  int64_t column = 0;  // the stored column index
  double value = 0.0;
};

// Rows of the input. `indptr` may start anywhere (a window of a larger matrix); `rows`, where given, lists the
// rows to pack in the order wanted, otherwise rows 0 .. num_rows - 1 are packed.
template <typename Index, typename Value>
struct CsrRows {
  const int64_t* indptr;
  const Index* indices;
  const Value* data;
  const int64_t* rows;
  int64_t num_rows;
  const int32_t* column_gene_ids;  // (num_columns,), negative where the column is no gene of the vocabulary
  int64_t num_columns;

  int64_t row(int64_t i) const { return rows ? rows[i] : i; }
};

// What `scan` finds out. `row_lengths` counts kept entries before duplicates are merged.
struct CsrPackPlan {
  std::vector<int64_t> row_lengths;
  std::vector<double> totals;         // sum over the row's vocabulary genes of the stored numbers
  std::vector<uint8_t> needs_sorting;  // gene ids not strictly ascending: unsorted or duplicated
  bool any_needs_sorting = false;
  bool any_dropped = false;  // an absent column or a stored zero
  bool noisy = false;        // options.whole, and some number is whole but for rounding
  CsrPackError error;
};

namespace csr_pack_detail {

// Calls body(begin, end) for contiguous ranges of 0 .. n - 1 with about equal sums of cost(i), each on its own thread.
template <typename Cost, typename Body>
void for_ranges(int64_t n, int num_threads, Cost&& cost, Body&& body) {
  const int64_t wanted = std::max<int64_t>(1, std::min<int64_t>(num_threads, n));
  if (wanted == 1) {
    body(int64_t{0}, n);
    return;
  }
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += cost(i);
  std::vector<int64_t> bounds{0};
  int64_t seen = 0;
  for (int64_t i = 0; i < n && static_cast<int64_t>(bounds.size()) < wanted; ++i) {
    seen += cost(i);
    if (seen * wanted >= total * static_cast<int64_t>(bounds.size())) bounds.push_back(i + 1);
  }
  bounds.push_back(n);
  std::vector<std::thread> threads;
  for (size_t t = 1; t + 1 < bounds.size(); ++t) threads.emplace_back(body, bounds[t], bounds[t + 1]);
  body(bounds[0], bounds[1]);
  for (std::thread& thread : threads) thread.join();
}

// for_ranges over the rows of a matrix: about equal numbers of stored entries.
template <typename Index, typename Value, typename Body>
void for_row_ranges(const CsrRows<Index, Value>& in, int num_threads, Body&& body) {
  for_ranges(
      in.num_rows, num_threads, [&](int64_t i) { return in.indptr[in.row(i) + 1] - in.indptr[in.row(i)]; }, body);
}

// A stored number as the packer sums it: counts in double; without normalisation as the float32 the model gets.
template <bool normalize, typename Value>
inline double as_count(Value v) {
  if constexpr (normalize) return static_cast<double>(v);
  return static_cast<double>(static_cast<float>(v));
}

// Whether a number is whole. Of numbers that have no room for a fraction it may say no; there near_whole knows better.
// Two additions, because a compiler makes vectors of them on any machine.
template <typename Value>
inline bool is_whole(Value v) {
  if constexpr (std::is_floating_point<Value>::value) {
    constexpr Value no_fractions = std::is_same<Value, float>::value ? Value(1LL << 23) : Value(1LL << 52);
    return (v + no_fractions) - no_fractions == v;
  } else {
    (void)v;
    return true;
  }
}

// Whether a number is whole but for the rounding of a logarithm that was undone, in float32 or in double.
inline bool near_whole(double v) {
  return std::abs(v - std::nearbyint(v)) <= 1e-6 * std::max(1.0, v);
}

// Largest number that needs no look by first_fault: one comparison covers negative, NaN and infinite.
template <bool normalize, typename Value>
constexpr Value largest_value() {
  if constexpr (!normalize && std::is_same<Value, double>::value)
    return static_cast<double>(std::numeric_limits<float>::max());
  return std::numeric_limits<Value>::max();
}

// Whether all numbers of a row are counts that need no look by first_fault.
template <bool normalize, bool whole, bool zeros, typename Value>
bool all_fit(const Value* data, int64_t first, int64_t last) {
  int32_t fine = 1;
  for (int64_t t = first; t < last; ++t) {
    fine &= (zeros ? data[t] >= 0 : data[t] > 0) & (data[t] <= largest_value<normalize, Value>());
    if constexpr (whole) fine &= is_whole(data[t]);
  }
  return fine;
}

// What the scan finds in a row. plain: it goes into the batch entry by entry, nothing to refuse, drop, sort or add up.
// sound: nothing to refuse. unsound: to be looked at entry by entry.
enum class RowKind { plain, sound, unsound };

// Most rows are plain, and loops without conditions tell so fast. Sums a plain row's total on the way.
template <bool normalize, typename Index, typename Value>
RowKind kind_of_row(const CsrRows<Index, Value>& in, int64_t first, int64_t last, bool whole, double& total) {
  using Unsigned = std::make_unsigned_t<Index>;
  const Index* indices = in.indices;
  const Value* data = in.data;
  const auto last_column = static_cast<Unsigned>(std::min<int64_t>(in.num_columns, std::numeric_limits<Index>::max()) - 1);
  // Written so that a compiler makes vectors of them: the top bit tells of a column below 0 or above the last one.
  Unsigned signs = 0;
  for (int64_t t = first; t < last; ++t)
    signs |= static_cast<Unsigned>(indices[t]) | (last_column - static_cast<Unsigned>(indices[t]));
  if (static_cast<Index>(signs) < 0) return RowKind::unsound;
  if (!(whole ? all_fit<normalize, true, false>(data, first, last)
              : all_fit<normalize, false, false>(data, first, last))) {
    const bool fit = whole ? all_fit<normalize, true, true>(data, first, last)
                           : all_fit<normalize, false, true>(data, first, last);
    return fit ? RowKind::sound : RowKind::unsound;
  }
  bool wrong = false;
  int32_t previous = -1;
  for (int64_t t = first; t < last; ++t) {
    const int32_t gene = in.column_gene_ids[indices[t]];
    wrong |= gene <= previous;  // an absent column, -1 or -2, is below all
    previous = gene;
    total += as_count<normalize>(data[t]);
  }
  return wrong || !std::isfinite(total) ? RowKind::sound : RowKind::plain;
}

// The first entry of a row, in stored order, that is refused.
template <typename Index, typename Value>
CsrPackError first_fault(const CsrRows<Index, Value>& in, int64_t row, const CsrPackOptions& options) {
  for (int64_t t = in.indptr[row]; t < in.indptr[row + 1]; ++t) {
    const double v = static_cast<double>(in.data[t]);
    CsrPackFault fault = CsrPackFault::none;
    if (static_cast<uint64_t>(in.indices[t]) >= static_cast<uint64_t>(in.num_columns))
      fault = CsrPackFault::column_out_of_range;
    else if (in.column_gene_ids[in.indices[t]] == kLeftOutColumn)
      continue;
    else if (!std::isfinite(v))
      fault = CsrPackFault::not_finite;
    else if (v < 0 && !(options.whole && near_whole(v) && std::nearbyint(v) == 0))
      fault = CsrPackFault::negative;
    else if (!options.normalize && v > std::numeric_limits<float>::max())
      fault = CsrPackFault::too_large;
    else if (options.whole && !near_whole(v))
      fault = CsrPackFault::not_whole;
    if (fault != CsrPackFault::none) return {fault, row, static_cast<int64_t>(in.indices[t]), v};
  }
  return {};
}

template <bool normalize, typename Index, typename Value>
CsrPackError scan_rows(const CsrRows<Index, Value>& in, int64_t begin, int64_t end, const CsrPackOptions& options,
                       CsrPackPlan& plan, bool& any_needs_sorting, bool& any_dropped, bool& any_noisy) {
  bool sorting = false, dropped = false, noisy = false;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = in.row(i);
    const int64_t first = in.indptr[row], last = in.indptr[row + 1];
    int64_t length = 0;
    double total = 0.0;
    const RowKind kind = kind_of_row<normalize>(in, first, last, options.whole, total);
    if (kind == RowKind::plain) {
      plan.row_lengths[i] = last - first;
      plan.totals[i] = total;
      plan.needs_sorting[i] = false;
      continue;
    }
    if (kind == RowKind::unsound) {
      const CsrPackError error = first_fault(in, row, options);
      if (error.fault != CsrPackFault::none) return error;
      noisy |= options.whole;
    }
    total = 0.0;
    int32_t previous = -1;
    bool unsorted = false;
    for (int64_t t = first; t < last; ++t) {
      const int32_t gene = in.column_gene_ids[in.indices[t]];
      const double count = as_count<normalize>(in.data[t]);
      // Conditional moves, not branches: which entries a row keeps cannot be predicted.
      const bool keep = (gene >= 0) & (count != 0.0);
      length += keep;
      total += keep ? count : 0.0;
      const int32_t kept_gene = keep ? gene : -1;
      unsorted |= keep & (kept_gene <= previous);
      previous = std::max(previous, kept_gene);
    }
    if (!std::isfinite(total)) return {CsrPackFault::total_not_finite, row, 0, total};
    plan.row_lengths[i] = length;
    plan.totals[i] = total;
    plan.needs_sorting[i] = unsorted;
    sorting |= unsorted;
    dropped |= length != last - first;
  }
  any_needs_sorting = sorting;
  any_dropped = dropped;
  any_noisy = noisy;
  return {};
}

// Finds, for each token of a row, the first token of that row with the same float32 value. Slots are never
// cleared: rows are visited in ascending order of their first token, so a slot is stale when it points before it.
class FirstOccurrence {
 public:
  void start_row(int64_t row_start, int64_t row_length) {
    row_start_ = row_start;
    while (slots_.size() < 2 * static_cast<size_t>(row_length)) {
      slots_.assign(2 * slots_.size(), Slot{0, -1});
      --shift_;
    }
  }
  int32_t find_or_insert(float value, int64_t token) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    // Multiplicative hash, top bits: the low bits of small integers' floats are all zero.
    size_t slot = (bits * 0x9E3779B1u) >> shift_;
    while (slots_[slot].token >= row_start_ && slots_[slot].bits != bits) slot = (slot + 1) & (slots_.size() - 1);
    if (slots_[slot].token < row_start_) slots_[slot] = {bits, static_cast<int32_t>(token)};
    return slots_[slot].token;
  }

 private:
  struct Slot {
    uint32_t bits;
    int32_t token;
  };
  std::vector<Slot> slots_{1024, Slot{0, -1}};
  int shift_ = 22;  // 32 - log2(slots_.size())
  int64_t row_start_ = 0;
};

// Turns the counts of a row into values and distinct indices. UMI counts are small integers, and log1p costs more than
// everything else here: each small count is normalised once per row and then served from `memo_`, whose entries, as in
// FirstOccurrence, are stale when they point before the row.
template <bool normalize>
class ValueWriter {
 public:
  ValueWriter(const CsrPackOptions& options, float* values, int32_t* distinct_index)
      : target_sum_(options.target_sum), values_(values), distinct_index_(distinct_index) {}

  // n counts of one row, of which `total` is the sum, to the tokens from `token` on.
  template <typename Value>
  void write(int64_t token, const Value* counts, int64_t n, double total) {
    row_start_ = token;
    total_ = total;
    if (distinct_index_) {
      first_occurrence_.start_row(token, n);
      write_row<true>(counts, n, values_ + token, distinct_index_ + token);
    } else {
      write_row<false>(counts, n, values_ + token, nullptr);
    }
  }

 private:
  static constexpr int kSmallCounts = 1024;
  struct Memo {
    float value = 0.0f;
    int32_t first = -1;  // the distinct index of its value
  };

  template <bool distinct, typename Value>
  void write_row(const Value* counts, int64_t n, float* values, int32_t* distinct_index) {
    const int32_t row_start = static_cast<int32_t>(row_start_);
    for (int64_t i = 0; i < n; ++i) {
      const Value count = counts[i];
      if constexpr (normalize) {
        const int small = count < kSmallCounts ? static_cast<int>(count) : 0;
        if (small > 0 && static_cast<Value>(small) == count) {
          Memo& entry = memo_[small];
          if (entry.first < row_start) {
            entry.value = normalized(static_cast<double>(count));
            // Another number of the row may round to the same float32, so the table has to know this one too.
            const int64_t token = row_start_ + i;
            entry.first = distinct ? first_occurrence_.find_or_insert(entry.value, token) : static_cast<int32_t>(token);
          }
          values[i] = entry.value;
          if constexpr (distinct) distinct_index[i] = entry.first;
          continue;
        }
        values[i] = normalized(static_cast<double>(count));
      } else {
        values[i] = static_cast<float>(count);
      }
      if constexpr (distinct) distinct_index[i] = first_occurrence_.find_or_insert(values[i], row_start_ + i);
    }
  }

  // log is the faster of the two, and what 1 + x rounds away shows in float32 only where x is small.
  float normalized(double count) const {
    const double x = count / total_ * target_sum_;
    return static_cast<float>(x > 0.125 ? std::log(1.0 + x) : std::log1p(x));
  }

  Memo memo_[kSmallCounts];
  FirstOccurrence first_occurrence_;
  double target_sum_, total_ = 0.0;
  int64_t row_start_ = 0;
  float* values_;
  int32_t* distinct_index_;
};

// Brings one unsorted or duplicated row into ascending gene order, duplicates summed in stored order: counts are
// added up at their gene's place, and a bit per gene says which places to visit.
class GeneAccumulator {
 public:
  explicit GeneAccumulator(int64_t num_genes) : counts_(num_genes), present_((num_genes + 63) / 64) {}

  void add(int32_t gene, double count) {
    const uint64_t bit = uint64_t{1} << (gene & 63);
    uint64_t& word = present_[gene >> 6];
    counts_[gene] = (word & bit) ? counts_[gene] + count : count;
    word |= bit;
  }

  // Calls visit(gene, count) in ascending gene order and forgets everything.
  template <typename Visit>
  void drain(Visit&& visit) {
    for (size_t w = 0; w < present_.size(); ++w) {
      for (uint64_t word = present_[w]; word; word &= word - 1) {
        const int32_t gene = static_cast<int32_t>(w * 64) + __builtin_ctzll(word);
        visit(gene, counts_[gene]);
      }
      present_[w] = 0;
    }
  }

 private:
  std::vector<double> counts_;
  std::vector<uint64_t> present_;
};

template <bool normalize, typename Index, typename Value>
void fill_rows(const CsrRows<Index, Value>& in, int64_t begin, int64_t end, const CsrPackPlan& plan,
               const CsrPackOptions& options, int64_t num_genes, const int64_t* row_starts, float* values,
               int32_t* gene_ids, int32_t* distinct_index, int64_t* lengths) {
  ValueWriter<normalize> writer(options, values, distinct_index);
  GeneAccumulator accumulator(plan.any_needs_sorting ? num_genes : 0);
  std::vector<Value> kept;
  std::vector<int32_t> kept_genes;
  std::vector<double> sums;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = in.row(i), first = in.indptr[row], stored = in.indptr[row + 1] - first;
    const int64_t start = row_starts[i];
    int32_t* genes = gene_ids + start;
    int64_t length = plan.row_lengths[i];
    if (plan.needs_sorting[i]) {
      for (int64_t t = first; t < first + stored; ++t) {
        const int32_t gene = in.column_gene_ids[in.indices[t]];
        const double count = as_count<normalize>(in.data[t]);
        if (gene >= 0 && count != 0.0) accumulator.add(gene, count);
      }
      sums.clear();
      accumulator.drain([&](int32_t gene, double count) {
        genes[sums.size()] = gene;
        sums.push_back(count);
      });
      length = static_cast<int64_t>(sums.size());
      writer.write(start, sums.data(), length, plan.totals[i]);
    } else if (length == stored) {
      for (int64_t t = 0; t < stored; ++t) genes[t] = in.column_gene_ids[in.indices[first + t]];
      writer.write(start, in.data + first, length, plan.totals[i]);
    } else {
      // Which entries a row keeps cannot be predicted, so they are gathered without a branch first.
      kept.resize(std::max<size_t>(kept.size(), static_cast<size_t>(stored)));
      kept_genes.resize(kept.size());
      int64_t num_kept = 0;
      for (int64_t t = first; t < first + stored; ++t) {
        const int32_t gene = in.column_gene_ids[in.indices[t]];
        kept_genes[num_kept] = gene;
        kept[num_kept] = in.data[t];
        num_kept += (gene >= 0) & (as_count<normalize>(in.data[t]) != 0.0);
      }
      std::copy_n(kept_genes.data(), length, genes);
      writer.write(start, kept.data(), length, plan.totals[i]);
    }
    lengths[i] = length;
  }
}

}  // namespace csr_pack_detail

// First pass. On a fault, plan.error names the first faulty row in packing order, whatever the thread count.
template <typename Index, typename Value>
CsrPackPlan csr_pack_scan(const CsrRows<Index, Value>& in, const CsrPackOptions& options) {
  CsrPackPlan plan;
  plan.row_lengths.resize(in.num_rows);
  plan.totals.resize(in.num_rows);
  plan.needs_sorting.resize(in.num_rows);
  std::mutex merge;
  int64_t error_begin = in.num_rows;
  csr_pack_detail::for_row_ranges(in, options.num_threads, [&](int64_t begin, int64_t end) {
    bool needs_sorting = false, dropped = false, noisy = false;
    const CsrPackError error =
        options.normalize
            ? csr_pack_detail::scan_rows<true>(in, begin, end, options, plan, needs_sorting, dropped, noisy)
            : csr_pack_detail::scan_rows<false>(in, begin, end, options, plan, needs_sorting, dropped, noisy);
    std::lock_guard<std::mutex> lock(merge);
    plan.any_needs_sorting |= needs_sorting;
    plan.any_dropped |= dropped;
    plan.noisy |= noisy;
    // A range stops at its first fault, so the fault of the first faulty range is the first of all.
    if (error.fault != CsrPackFault::none && begin < error_begin) {
      plan.error = error;
      error_begin = begin;
    }
  });
  return plan;
}

// The numbers of the rows that are whole but for rounding, rounded in `data`, a copy of in.data: what a noisy plan asks
// for before it is made again. Whether there were any.
template <typename Index, typename Value>
bool csr_pack_round(const CsrRows<Index, Value>& in, Value* data) {
  bool rounded = false;
  if constexpr (std::is_floating_point<Value>::value) {
    for (int64_t i = 0; i < in.num_rows; ++i) {
      for (int64_t t = in.indptr[in.row(i)]; t < in.indptr[in.row(i) + 1]; ++t) {
        const Value whole = std::nearbyint(in.data[t]);
        if (in.data[t] == whole || in.column_gene_ids[in.indices[t]] == kLeftOutColumn ||
            !csr_pack_detail::near_whole(static_cast<double>(in.data[t])))
          continue;
        data[t] = whole;
        rounded = true;
      }
    }
  }
  return rounded;
}

// Second pass. Outputs hold sum(plan.row_lengths) entries, distinct_index may be null; cu_seqlens holds num_rows + 1.
// Returns the number of tokens, smaller than sum(plan.row_lengths) where duplicates were merged.
template <typename Index, typename Value>
int64_t csr_pack_fill(const CsrRows<Index, Value>& in, const CsrPackPlan& plan, const CsrPackOptions& options,
                      int64_t num_genes, float* values, int32_t* gene_ids, int32_t* distinct_index,
                      int32_t* cu_seqlens) {
  std::vector<int64_t> row_starts(in.num_rows + 1, 0), lengths(in.num_rows);
  for (int64_t i = 0; i < in.num_rows; ++i) row_starts[i + 1] = row_starts[i] + plan.row_lengths[i];
  csr_pack_detail::for_row_ranges(in, options.num_threads, [&](int64_t begin, int64_t end) {
    if (options.normalize)
      csr_pack_detail::fill_rows<true>(in, begin, end, plan, options, num_genes, row_starts.data(), values, gene_ids,
                                       distinct_index, lengths.data());
    else
      csr_pack_detail::fill_rows<false>(in, begin, end, plan, options, num_genes, row_starts.data(), values, gene_ids,
                                        distinct_index, lengths.data());
  });
  // Merged duplicates leave holes at row ends: close them.
  int64_t token = 0;
  cu_seqlens[0] = 0;
  for (int64_t i = 0; i < in.num_rows; ++i) {
    const int64_t shift = row_starts[i] - token;
    if (shift > 0) {
      std::memmove(values + token, values + row_starts[i], lengths[i] * sizeof(float));
      std::memmove(gene_ids + token, gene_ids + row_starts[i], lengths[i] * sizeof(int32_t));
      if (distinct_index)
        for (int64_t t = 0; t < lengths[i]; ++t)
          distinct_index[token + t] = distinct_index[row_starts[i] + t] - static_cast<int32_t>(shift);
    }
    token += lengths[i];
    cu_seqlens[i + 1] = static_cast<int32_t>(token);
  }
  return token;
}

// Second pass where the input's own arrays serve as values and gene ids (float32 data, int32 indices, column == gene,
// nothing dropped, sorted or normalised, rows in order): only distinct_index and cu_seqlens are left to write.
template <typename Index>
void csr_pack_in_place(const CsrRows<Index, float>& in, const CsrPackOptions& options, int32_t* distinct_index,
                       int32_t* cu_seqlens) {
  const int64_t origin = in.indptr[0];
  for (int64_t i = 0; i <= in.num_rows; ++i) cu_seqlens[i] = static_cast<int32_t>(in.indptr[i] - origin);
  if (!distinct_index) return;
  csr_pack_detail::for_row_ranges(in, options.num_threads, [&](int64_t begin, int64_t end) {
    csr_pack_detail::FirstOccurrence first_occurrence;
    for (int64_t i = begin; i < end; ++i) {
      first_occurrence.start_row(cu_seqlens[i], cu_seqlens[i + 1] - cu_seqlens[i]);
      for (int64_t token = cu_seqlens[i]; token < cu_seqlens[i + 1]; ++token)
        distinct_index[token] = first_occurrence.find_or_insert(in.data[origin + token], token);
    }
  });
}

}  // namespace xtg
