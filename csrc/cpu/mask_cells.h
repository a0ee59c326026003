// The masking plan of pre-training over packed cells: chooses genes by hashed keys, then writes what the encoder sees,
// the hidden genes, and the chosen genes with their true values. xtrimogene/masking.py says what is chosen and why, and
// holds the same algorithm in NumPy (mask_cells_numpy), to the bit.
//
// A cell's lengths follow from its number of non-zero genes alone, so every cell has its place before any is written.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "csr_pack.h"

namespace xtg {

struct MaskOptions {
  int64_t num_genes = 0;
  double nonzero_rate = 0.3;
  double zero_rate = 0.03;
  double mask_share = 0.8;
  double random_share = 0.1;
  uint64_t seed = 0;
  uint64_t epoch = 0;
  bool depth_tokens = false;
  int num_threads = 1;
};

// Packed cells, genes ascending in each.
struct PackedCells {
  const float* values;
  const int32_t* gene_ids;
  const int32_t* cu_seqlens;

  int64_t length(int64_t row) const { return int64_t{cu_seqlens[row + 1]} - cu_seqlens[row]; }
};

// The genes of one group (non-zero or zero) of a cell: the first `chosen` by key, of these the first `masked` are
// hidden and the next `random` get another value.
struct MaskCounts {
  int64_t chosen, masked, random;

  // std::nearbyint rounds halves to even, as NumPy's rint and Python's round do.
  MaskCounts(int64_t n, double rate, const MaskOptions& options)
      : chosen(static_cast<int64_t>(std::nearbyint(rate * static_cast<double>(n)))),
        masked(share(options.mask_share)),
        random(std::min(share(options.random_share), chosen - masked)) {}

 private:
  int64_t share(double part) const {
    return static_cast<int64_t>(std::nearbyint(part * static_cast<double>(chosen)));
  }
};

// Where each cell's outputs begin: (num_cells + 1,) each.
struct MaskPlan {
  std::vector<int64_t> tokens, masked, chosen;
};

namespace mask_cells_detail {

constexpr uint64_t kStep = 0x9E3779B97F4A7C15;  // between the states of splitmix64
constexpr uint64_t kDraw = 0xD1B54A32D192ED03;  // tells the hash that draws a value from the one that orders genes

inline uint64_t mix(uint64_t word) {
  word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9;
  word = (word ^ word >> 27) * 0x94D049BB133111EB;
  return word ^ word >> 31;
}

inline uint64_t hash_words(uint64_t a, uint64_t b, uint64_t c) {
  return mix(mix(mix(a + kStep) + b + kStep) + c + kStep);
}

struct Candidate {
  uint64_t key;
  int32_t gene;
  int32_t index;  // of the gene among the cell's non-zero ones, -1 for a zero gene
};

// What becomes of a chosen gene.
enum class Role : int32_t { masked, random, kept };

struct Choice {
  Candidate of;
  Role role;
};

// The keys up to that of some rank in ascending order; none where the rank is 0.
struct KeysUpTo {
  uint64_t last;
  bool any;

  bool holds(uint64_t key) const { return any & (key <= last); }
};

class CellMasker {
 public:
  explicit CellMasker(const MaskOptions& options)
      : options_(options), candidates_(static_cast<size_t>(options.num_genes) + 1) {}

  // The chosen genes of both groups, ascending.
  const std::vector<Choice>& choose(uint64_t cell, const int32_t* genes, int64_t num_nonzero) {
    const uint64_t stream = hash_words(options_.seed, options_.epoch, cell);
    const int64_t num_zero = options_.num_genes - num_nonzero;
    select(MaskCounts(num_nonzero, options_.nonzero_rate, options_), num_nonzero, true, nonzero_, [&](uint64_t limit) {
      int64_t n = 0;
      for (int64_t i = 0; i < num_nonzero; ++i) {
        const uint64_t key = mix(stream + (uint64_t{static_cast<uint32_t>(genes[i])} + 1) * kStep);
        candidates_[n] = {key, genes[i], static_cast<int32_t>(i)};
        n += key <= limit;
      }
      return n;
    });
    select(MaskCounts(num_zero, options_.zero_rate, options_), num_zero, num_nonzero > 0, zero_, [&](uint64_t limit) {
      // The keys of all genes, kept without a branch where they are small; the non-zero genes among them then go.
      int64_t n = 0;
      uint64_t state = stream;
      for (int64_t gene = 0; gene < options_.num_genes; ++gene) {
        state += kStep;
        const uint64_t key = mix(state);
        candidates_[n] = {key, static_cast<int32_t>(gene), -1};
        n += key <= limit;
      }
      int64_t kept = 0, i = 0;
      for (int64_t k = 0; k < n; ++k) {
        while (i < num_nonzero && genes[i] < candidates_[k].gene) ++i;
        const bool is_zero = i == num_nonzero || genes[i] != candidates_[k].gene;
        candidates_[kept] = candidates_[k];
        kept += is_zero;
      }
      return kept;
    });
    choices_.resize(nonzero_.size() + zero_.size());
    std::merge(nonzero_.begin(), nonzero_.end(), zero_.begin(), zero_.end(), choices_.begin(),
               [](const Choice& a, const Choice& b) { return a.of.gene < b.of.gene; });
    return choices_;
  }

 private:
  // The genes of the smallest keys of a group of n, ascending, with their roles. `collect(limit)` puts the genes whose
  // keys are at most the limit into candidates_, ascending, and returns how many. Keys are uniform, so a limit a little
  // above the share that is wanted nearly always leaves enough of them, and few to look at again; where it does not,
  // all are collected.
  template <typename Collect>
  void select(const MaskCounts& counts, int64_t n, bool has_values, std::vector<Choice>& choices, Collect&& collect) {
    choices.clear();
    if (counts.chosen == 0) return;
    const double share = (counts.chosen + 3.0 * std::sqrt(static_cast<double>(counts.chosen))) / n;
    constexpr uint64_t everything = std::numeric_limits<uint64_t>::max();
    int64_t found = collect(share < 1.0 ? static_cast<uint64_t>(share * 0x1p64) : everything);
    if (found < counts.chosen) found = collect(everything);

    keys_.resize(found);
    for (int64_t k = 0; k < found; ++k) keys_[k] = candidates_[k].key;
    int64_t end = found;
    const auto keys_up_to = [&](int64_t rank) {
      if (rank == 0) return KeysUpTo{0, false};
      std::nth_element(keys_.begin(), keys_.begin() + (rank - 1), keys_.begin() + end);
      end = rank;
      return KeysUpTo{keys_[rank - 1], true};
    };
    const KeysUpTo chosen = keys_up_to(counts.chosen);
    const KeysUpTo replaced = keys_up_to(counts.masked + counts.random);
    const KeysUpTo masked = keys_up_to(counts.masked);
    choices.resize(found);
    int64_t num_chosen = 0;
    for (int64_t k = 0; k < found; ++k) {
      const uint64_t key = candidates_[k].key;
      const Role role = masked.holds(key)                   ? Role::masked
                        : replaced.holds(key) && has_values ? Role::random
                                                            : Role::kept;
      choices[num_chosen] = {candidates_[k], role};
      num_chosen += chosen.holds(key);
    }
    choices.resize(num_chosen);
  }

  MaskOptions options_;
  std::vector<Candidate> candidates_;  // one more than genes: an entry that is not kept may be written past the last
  std::vector<uint64_t> keys_;
  std::vector<Choice> nonzero_, zero_, choices_;
};

}  // namespace mask_cells_detail

inline MaskPlan mask_plan(const PackedCells& in, const int64_t* rows, int64_t num_cells, const MaskOptions& options) {
  MaskPlan plan;
  for (std::vector<int64_t>* starts : {&plan.tokens, &plan.masked, &plan.chosen}) starts->assign(num_cells + 1, 0);
  for (int64_t i = 0; i < num_cells; ++i) {
    const int64_t num_nonzero = in.length(rows ? rows[i] : i);
    const MaskCounts nonzero(num_nonzero, options.nonzero_rate, options);
    const MaskCounts zero(options.num_genes - num_nonzero, options.zero_rate, options);
    const int64_t replaced_zeros = num_nonzero > 0 ? zero.random : 0;
    const int64_t tokens = num_nonzero - nonzero.masked + replaced_zeros + (options.depth_tokens ? 2 : 0);
    plan.tokens[i + 1] = plan.tokens[i] + tokens;
    plan.masked[i + 1] = plan.masked[i] + nonzero.masked + zero.masked;
    plan.chosen[i + 1] = plan.chosen[i] + nonzero.chosen + zero.chosen;
  }
  return plan;
}

struct MaskOutputs {
  float* values;
  int32_t* gene_ids;
  int32_t* distinct_index;
  int32_t* masked_ids;
  int32_t* chosen_ids;
  float* chosen_values;
};

// Writes cells begin .. end - 1. `target` holds the true values, row by row as `in`; `depth` (num_cells, 2) the values
// of the tokens T and S, null for none.
inline void mask_cells(const PackedCells& in, const PackedCells& target, const int64_t* rows, const int64_t* cells,
                       const float* depth, int64_t begin, int64_t end, const MaskPlan& plan,
                       const MaskOptions& options, const MaskOutputs& out) {
  using namespace mask_cells_detail;
  CellMasker masker(options);
  csr_pack_detail::FirstOccurrence first_occurrence;
  for (int64_t c = begin; c < end; ++c) {
    const int64_t row = rows ? rows[c] : c;
    const int64_t num_nonzero = in.length(row);
    const int32_t* genes = in.gene_ids + in.cu_seqlens[row];
    const float* values = in.values + in.cu_seqlens[row];
    const int32_t* true_genes = target.gene_ids + target.cu_seqlens[row];
    const float* true_values = target.values + target.cu_seqlens[row];
    const int64_t num_true = target.length(row);
    int64_t token = plan.tokens[c], masked = plan.masked[c], chosen = plan.chosen[c], next = 0, truth = 0;
    first_occurrence.start_row(token, plan.tokens[c + 1] - token);
    const auto write = [&](int32_t gene, float value) {
      out.values[token] = value;
      out.gene_ids[token] = gene;
      out.distinct_index[token] = first_occurrence.find_or_insert(value, token);
      ++token;
    };
    const auto write_unchosen = [&](int32_t before) {
      for (; next < num_nonzero && genes[next] < before; ++next) write(genes[next], values[next]);
    };
    for (const Choice& choice : masker.choose(static_cast<uint64_t>(cells[c]), genes, num_nonzero)) {
      write_unchosen(choice.of.gene);
      if (choice.role == Role::masked)
        out.masked_ids[masked++] = choice.of.gene;
      else if (choice.role == Role::random)
        write(choice.of.gene, values[mix(choice.of.key ^ kDraw) % static_cast<uint64_t>(num_nonzero)]);
      else if (choice.of.index >= 0)
        write(choice.of.gene, values[choice.of.index]);
      next += choice.of.index >= 0;
      while (truth < num_true && true_genes[truth] < choice.of.gene) ++truth;
      out.chosen_ids[chosen] = choice.of.gene;
      out.chosen_values[chosen++] =
          truth < num_true && true_genes[truth] == choice.of.gene ? true_values[truth] : 0.0f;
    }
    write_unchosen(std::numeric_limits<int32_t>::max());
    if (options.depth_tokens)
      for (int64_t t = 0; t < 2; ++t)
        write(static_cast<int32_t>(options.num_genes + t), depth[2 * c + t]);
  }
}

}  // namespace xtg
