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

  bool operator<(const Candidate& other) const { return key < other.key; }
};

// What becomes of a chosen gene.
enum class Role : int8_t { masked, random, kept };

struct Choice {
  int32_t gene;
  int32_t index;
  Role role;
  uint64_t key;
};

class CellMasker {
 public:
  explicit CellMasker(const MaskOptions& options)
      : options_(options), candidates_(static_cast<size_t>(options.num_genes) + 1) {}

  // The chosen genes of both groups, by gene.
  const std::vector<Choice>& choose(uint64_t cell, const int32_t* genes, int64_t num_nonzero) {
    const uint64_t stream = hash_words(options_.seed, options_.epoch, cell);
    choices_.clear();
    const int64_t num_zero = options_.num_genes - num_nonzero;
    const MaskCounts nonzero(num_nonzero, options_.nonzero_rate, options_);
    const MaskCounts zero(num_zero, options_.zero_rate, options_);
    select(nonzero, num_nonzero, num_nonzero > 0, [&](uint64_t limit) {
      int64_t n = 0;
      for (int64_t i = 0; i < num_nonzero; ++i) {
        const uint64_t key = mix(stream + (uint64_t{static_cast<uint32_t>(genes[i])} + 1) * kStep);
        candidates_[n] = {key, genes[i], static_cast<int32_t>(i)};
        n += key <= limit;
      }
      return n;
    });
    select(zero, num_zero, num_nonzero > 0, [&](uint64_t limit) {
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
    std::sort(choices_.begin(), choices_.end(), [](const Choice& a, const Choice& b) { return a.gene < b.gene; });
    return choices_;
  }

 private:
  // Takes the genes of the smallest keys of a group of n. `collect(limit)` puts the genes whose keys are at most the
  // limit into candidates_ and returns how many. Keys are uniform, so a limit a little above the share that is wanted
  // nearly always leaves enough of them, and few to put in order; where it does not, all are taken.
  template <typename Collect>
  void select(const MaskCounts& counts, int64_t n, bool has_values, Collect&& collect) {
    if (counts.chosen == 0) return;
    const double share = (counts.chosen + 3.0 * std::sqrt(static_cast<double>(counts.chosen))) / n;
    constexpr uint64_t everything = std::numeric_limits<uint64_t>::max();
    const uint64_t limit = share < 1.0 ? static_cast<uint64_t>(share * 0x1p64) : everything;
    int64_t found = collect(limit);
    if (found < counts.chosen) found = collect(everything);
    const auto begin = candidates_.begin();
    const auto chosen = begin + counts.chosen, masked = begin + counts.masked, random = masked + counts.random;
    std::nth_element(begin, chosen, begin + found);
    std::nth_element(begin, masked, chosen);
    std::nth_element(masked, random, chosen);
    for (auto it = begin; it != chosen; ++it) {
      const Role role = it < masked ? Role::masked : it < random && has_values ? Role::random : Role::kept;
      choices_.push_back({it->gene, it->index, role, it->key});
    }
  }

  MaskOptions options_;
  std::vector<Candidate> candidates_;  // one more than genes: the last kept one may be written past the end
  std::vector<Choice> choices_;
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
      write_unchosen(choice.gene);
      if (choice.role == Role::masked)
        out.masked_ids[masked++] = choice.gene;
      else if (choice.role == Role::random)
        write(choice.gene, values[mix(choice.key ^ kDraw) % static_cast<uint64_t>(num_nonzero)]);
      else if (choice.index >= 0)
        write(choice.gene, values[choice.index]);
      next += choice.index >= 0;
      while (truth < num_true && true_genes[truth] < choice.gene) ++truth;
      out.chosen_ids[chosen] = choice.gene;
      out.chosen_values[chosen++] =
          truth < num_true && true_genes[truth] == choice.gene ? true_values[truth] : 0.0f;
    }
    write_unchosen(std::numeric_limits<int32_t>::max());
    if (options.depth_tokens)
      for (int64_t t = 0; t < 2; ++t)
        write(static_cast<int32_t>(options.num_genes + t), depth[2 * c + t]);
  }
}

}  // namespace xtg
