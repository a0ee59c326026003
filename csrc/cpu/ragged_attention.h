// ragged_attention on a CPU: the algorithm, over raw pointers and one vector type V; no torch in here.
//
// Forward: a query block keeps a running row_max and row_sum (online softmax) while the key blocks of its segment stream
// past; out = acc / row_sum, softmax_lse = row_max + log(row_sum). The backward recomputes probs from scores and
// softmax_lse, without atomics: in one pass that owns a whole segment and head (five products of each pair of blocks), or
// in two that share a long segment among threads (seven products): one owns query blocks and sums grad_q over key blocks,
// the other owns key blocks and sums grad_k and grad_v over query blocks. Scores may have any size. Where softmax_lse has
// too few digits for that, a pass before the others finds row_max, row_sum and delta of these rows once more.
// The same words as in xtg_kernels/ops/ragged_attention/reference.py and triton_kernel.py.
#pragma once

#include <cmath>
#include <initializer_list>
#include <type_traits>

#include "../common/exp.h"
#include "../common/kernels.h"
#include "../common/product.h"
#include "../common/rows.h"
#include "../common/scratch.h"

namespace xtg {

// Blocking. The rows that a unit of work owns stay; the other rows of the segment stream past. A panel of them is packed
// at a time (in L2) and serves every group of stationary rows; a group meets the panel block by block, so that its sums,
// its scores and the block are in L1.
template <class V, class T>
struct AttentionTile {
  using Dot = typename DotFor<V, T>::type;
  static constexpr int64_t max_rows = kMaxBlockRows;                // stationary rows of one unit of work, at most
  static constexpr int64_t rows = Dot::tiles ? 32 : V::score_rows;  // stationary rows of one group
  static constexpr int64_t key_block = Dot::tiles ? 96 : 128;       // rows of a block that streams past
  static constexpr int64_t panel_blocks = Dot::tiles ? 16 : 4;      // blocks of a packed panel
  static constexpr int64_t panel = panel_blocks * key_block;
  // A block's rows are padded to this multiple: whole vectors as columns, whole steps as the inner dimension.
  static constexpr int64_t column_multiple = max_of<int64_t>(V::width, Dot::group * Dot::step_multiple);
};

template <class V, class T>
struct AttentionShape {
  using Dot = typename DotFor<V, T>::type;
  using elem = typename Dot::elem;
  using Tile = AttentionTile<V, T>;
  int64_t dim, steps, padded_dim;
  static constexpr int64_t block_steps = Tile::key_block / Dot::group;  // elements of a row of probs
  explicit AttentionShape(const AttentionArgs& args)
      : dim(args.head_dim),
        steps(round_up(ceil_div(dim, Dot::group), Dot::step_multiple)),  // elements of a row of q
        padded_dim(round_up(dim, V::width)) {}
};

template <class V, class T>
struct AttentionScratch {
  using Tile = AttentionTile<V, T>;
  using Shape = AttentionShape<V, T>;
  using elem = typename Shape::elem;
  elem *left_a, *left_b;  // stationary rows: queries (and grad_out), or keys and values
  elem *right_a, *right_b;  // panel, each block transposed: right operands of scores and grad_probs
  elem *right_c, *right_d;  // panel as it is: right operands of the sums
  float *scores, *grad_probs;
  elem *probs, *grad_scores;
  float* factors;
  float *acc_a, *acc_b;             // (stationary, padded_dim)
  float *row_max, *row_sum;         // (stationary,), (stationary, V::width): the sums stay spread over the lanes
  float *minus_lse, *delta;         // of the queries: stationary or streaming; minus_lse in units of log2
  float* score_base;                // what is taken from the scores of a query before they are scaled
  // One-pass backward only: stationary keys as right operand, and grad_q of the whole segment.
  elem* right_e;
  float* acc_q;
  size_t bytes;

  AttentionScratch(const AttentionArgs& args, void* base) {
    const Shape shape(args);
    ScratchCursor cursor{static_cast<char*>(base), 0};
    const int64_t stationary = round_up(Tile::max_rows, Tile::rows), block = Tile::key_block;
    left_a = cursor.take<elem>(stationary * shape.steps);
    left_b = cursor.take<elem>(stationary * shape.steps);
    right_a = cursor.take<elem>(Tile::panel_blocks * shape.steps * block);
    right_b = cursor.take<elem>(Tile::panel_blocks * shape.steps * block);
    right_c = cursor.take<elem>(Tile::panel_blocks * Shape::block_steps * shape.padded_dim);
    right_d = cursor.take<elem>(Tile::panel_blocks * Shape::block_steps * shape.padded_dim);
    scores = cursor.take<float>(Tile::rows * block);
    grad_probs = cursor.take<float>(Tile::rows * block);
    probs = cursor.take<elem>(Tile::rows * Shape::block_steps);
    grad_scores = cursor.take<elem>(Tile::rows * Shape::block_steps);
    factors = cursor.take<float>(round_up(Tile::rows, V::width));
    acc_a = cursor.take<float>(stationary * shape.padded_dim);
    acc_b = cursor.take<float>(stationary * shape.padded_dim);
    row_max = cursor.take<float>(stationary);
    row_sum = cursor.take<float>(stationary * V::width);
    minus_lse = cursor.take<float>(max_of(Tile::max_rows, Tile::panel));
    delta = cursor.take<float>(max_of(Tile::max_rows, Tile::panel));
    score_base = cursor.take<float>(max_of(Tile::max_rows, Tile::panel));
    right_e = args.one_pass_rows ? cursor.take<elem>(stationary * shape.padded_dim) : nullptr;
    acc_q = args.one_pass_rows ? cursor.take<float>(args.one_pass_rows * shape.padded_dim) : nullptr;
    bytes = cursor.used;
  }
};

template <class V, class T>
size_t attention_scratch(const AttentionArgs& args) {
  return AttentionScratch<V, T>(args, nullptr).bytes;
}

// The next head of a short segment is what a thread does next, and its rows are too far apart for the processor to guess:
// they are asked for while this head computes, a few rows after each slice of a product, since a core can wait for only
// so many lines at once. Longer segments spend too little on packing to gain from it.
template <class V, class T>
class NextHead {
 public:
  static constexpr int64_t longest = 256;
  static constexpr int64_t slice = AttentionTile<V, T>::Dot::tiles ? AttentionTile<V, T>::rows : 2 * V::tile_rows;

  NextHead(const AttentionArgs& args, const SegmentBlock& block, int64_t head) : args_(args), head_(head + 1) {
    if (block.length > longest || head_ == args.num_heads) return;
    row_ = block.begin;
    end_ = block.begin + block.length;
    rows_a_slice_ = ceil_div(block.length, 2 * ceil_div(block.rows, slice));
  }

  // The product of `m` rows, slice by slice.
  void product(int64_t m, int64_t n, int64_t k, const typename AttentionTile<V, T>::Dot::elem* a, int64_t lda,
               const typename AttentionTile<V, T>::Dot::elem* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
    const int64_t rows = row_ < end_ ? slice : m;
    for (int64_t i = 0; i < m; i += rows) {
      xtg::product<V, typename AttentionTile<V, T>::Dot>(min_of(rows, m - i), n, k, a + i * lda, lda, b, ldb,
                                                         c + i * ldc, ldc, accumulate);
      ask();
    }
  }

 private:
  void ask() {
    for (const int64_t end = min_of(row_ + rows_a_slice_, end_); row_ < end; ++row_)
      for (const Operand* x : {&args_.k, &args_.v, &args_.q})
        for (int64_t d = 0; d < args_.head_dim; d += 64 / int64_t(sizeof(T)))
          __builtin_prefetch(rows_of<T>(*x, row_, head_) + d);
  }

  const AttentionArgs& args_;
  int64_t head_, row_ = 0, end_ = 0, rows_a_slice_ = 0;
};

// One group of stationary rows against one block of the panel.
struct Step {
  int64_t row, rows;     // the group: first stationary row and how many
  int64_t slot, count;   // the block: its place in the panel and how many rows
  int64_t begin;         // its first row in the segment
  bool first;            // the group has met no block before
};

// Runs pack(first, count) for each panel of the streaming rows, then scores(step), softmax(step) and sums(step) for each
// group and each block of the panel. The scores of the next step come between softmax and sums: what softmax has written
// has then left the store buffer, which a tile load cannot read from.
template <class V, class T, class Pack, class Scores, class Softmax, class Sums>
static inline void for_each_step(int64_t stationary, int64_t streaming, Pack pack, Scores scores, Softmax softmax,
                                 Sums sums) {
  using Tile = AttentionTile<V, T>;
  const typename Tile::Dot::Session session;
  (void)session;
  for (int64_t panel = 0; panel < streaming; panel += Tile::panel) {
    const int64_t panel_rows = min_of(Tile::panel, streaming - panel);
    const int64_t blocks = ceil_div(panel_rows, Tile::key_block), all = ceil_div(stationary, Tile::rows) * blocks;
    const auto step = [&](int64_t i) {
      const int64_t row = i / blocks * Tile::rows, slot = i % blocks;
      return Step{row,
                  min_of(Tile::rows, stationary - row),
                  slot,
                  min_of(Tile::key_block, panel_rows - slot * Tile::key_block),
                  panel + slot * Tile::key_block,
                  panel == 0 && slot == 0};
    };
    pack(panel, panel_rows);
    scores(step(0));
    for (int64_t i = 0; i < all; ++i) {
      softmax(step(i));
      if (i + 1 < all) scores(step(i + 1));
      sums(step(i));
    }
  }
}

// Packs rows [first, first + count) of x, block by block: transposed for the scores, or as they are for the sums.
template <class V, class T>
static inline void pack_panel_transposed(const AttentionShape<V, T>& shape, const Operand& x, int64_t first,
                                         int64_t count, int64_t head, typename AttentionShape<V, T>::elem* dst) {
  using Tile = AttentionTile<V, T>;
  for (int64_t r = 0; r < count; r += Tile::key_block) {
    const int64_t rows = min_of(Tile::key_block, count - r);
    pack_right_transposed(typename Tile::Dot{}, rows_of<T>(x, first + r, head), x.row_stride, rows, shape.dim,
                          shape.steps, dst + r * shape.steps, round_up(rows, Tile::column_multiple));
  }
}

template <class V, class T>
static inline void pack_panel(const AttentionShape<V, T>& shape, const Operand& x, int64_t first, int64_t count,
                              int64_t head, typename AttentionShape<V, T>::elem* dst) {
  using Tile = AttentionTile<V, T>;
  pack_right(typename Tile::Dot{}, rows_of<T>(x, first, head), x.row_stride, count,
             round_up(count, Tile::column_multiple), shape.dim, dst, shape.padded_dim);
}

// Scores times softmax_scale, in units of log2. A score s becomes s * near - row_max with one rounding, where row_max has
// been rounded itself: from kFar on this would leave a remainder that no exponential can take. Scores of that size differ
// by 64 and more where they differ at all, so that only those equal to the largest count, and any larger factor will do: by
// a power of two the product is exact, and no remainder is left.
struct ScoreScale {
  static constexpr float kFar = 1073741824.0f;  // 2^30
  float near, far;
  explicit ScoreScale(float softmax_scale) : near(softmax_scale * kLog2E), far(std::ldexp(1.0f, exponent_of(near))) {
    if (near < 0.0f) far = -far;
  }
  static int exponent_of(float x) {
    int exponent;
    std::frexp(x, &exponent);
    return exponent;
  }
  // The factor of a row, by its row_max.
  float of(float row_max) const { return std::fabs(row_max) >= kFar ? far : near; }
  // row_max by its own factor, in natural units.
  double natural(float row_max) const {
    return kLn2Double * (std::fabs(row_max) >= kFar ? double(row_max) * near / far : double(row_max));
  }
};

// Raw scores of some rows to probs relative to the row_max so far; factors bring each row's older sums to it.
// row_max counts in units of log2. Columns n.. of probs are zero. Row maxima are reduced for V::width rows at once, by a
// transposition: a reduction inside one register would stall every row.
template <class V, class Dot, bool accurate, bool negative_scale, class Columns>
static inline void softmax_rows(const float* scores, int64_t ld, int64_t rows, Columns n, int64_t columns,
                                const ScoreScale& score_scale, bool first, float* row_max, float* row_sum,
                                float* factors, typename Dot::elem* probs, int64_t probs_ld) {
  for (int64_t group = 0; group < rows; group += V::width) {
    const int64_t end = min_of<int64_t>(group + V::width, rows);
    typename V::reg maxima[V::width];
    for (int i = 0; i < V::width; ++i) maxima[i] = V::set1(-INFINITY);
    for (int64_t r = group; r < end; ++r) {
      auto maximum = V::set1(-INFINITY);
      for_each_vector<V>(n, [&](int64_t j, int valid) {
        auto x = V::load(scores + r * ld + j);
        if constexpr (negative_scale) x = V::sub(V::zero(), x);  // its largest score is the smallest product
        if (valid < V::width) x = V::keep_first(x, valid, -INFINITY);
        maximum = V::max(maximum, x);
      });
      maxima[r - group] = maximum;
    }
    V::transpose(maxima);
    for (int step = V::width / 2; step > 0; step /= 2)
      for (int i = 0; i < step; ++i) maxima[i] = V::max(maxima[i], maxima[i + step]);
    const auto near_max = V::mul(maxima[0], V::set1(negative_scale ? -score_scale.near : score_scale.near));
    const auto far_max = V::mul(maxima[0], V::set1(negative_scale ? -score_scale.far : score_scale.far));
    const auto size = V::max(V::sub(V::zero(), near_max), near_max);
    const auto block_max = V::where_greater(V::set1(ScoreScale::kFar), size, near_max, far_max);
    const auto old_max = V::load(row_max + group);
    const auto new_max = first ? block_max : V::max(old_max, block_max);
    V::store(row_max + group, new_max);
    V::store(factors + group, first ? V::set1(1.0f) : exp2<V, true>(V::sub(old_max, new_max)));
    for (int64_t r = group; r < end; ++r) {
      const auto shift = V::set1(-row_max[r]), scale = V::set1(score_scale.of(row_max[r]));
      auto sum = first ? V::zero() : V::mul(V::load(row_sum + r * V::width), V::set1(factors[r]));
      const auto prob = [&](int64_t j) {
        return exp2<V, accurate>(V::fma(V::load(scores + r * ld + j), scale, shift));
      };
      int64_t paired = 0;
      for (; paired + 2 * V::width <= n; paired += 2 * V::width) {
        const auto p = prob(paired), q = prob(paired + V::width);
        sum = V::add(sum, V::add(p, q));
        Dot::store_pair(probs + r * probs_ld, paired, p, q);
      }
      for (int64_t j = paired; j < n; j += V::width) {
        const auto p = V::keep_first(prob(j), int(min_of<int64_t>(n - j, V::width)), 0.0f);
        sum = V::add(sum, p);
        Dot::store(probs + r * probs_ld, j, p);
      }
      V::store(row_sum + r * V::width, sum);
      for (int64_t j = round_up(n, V::width); j < columns; j += V::width)
        Dot::store(probs + r * probs_ld, j, V::zero());
    }
  }
}

template <class V, class T>
void attention_forward(const AttentionArgs& args, const SegmentBlock& block, int64_t head, void* scratch) {
  using Tile = AttentionTile<V, T>;
  using Shape = AttentionShape<V, T>;
  using Dot = typename Shape::Dot;
  constexpr bool accurate = std::is_same_v<T, float>;
  const Shape shape(args);
  const AttentionScratch<V, T> s(args, scratch);
  const ScoreScale scale(args.softmax_scale);
  const int64_t first_row = block.begin + block.first;
  NextHead<V, T> next_head(args, block, head);

  pack_left(Dot{}, rows_of<T>(args.q, first_row, head), args.q.row_stride, block.rows, shape.dim, s.left_a, shape.steps);
  for_each_step<V, T>(
      block.rows, block.length,
      [&](int64_t first, int64_t count) {
        pack_panel_transposed<V, T>(shape, args.k, block.begin + first, count, head, s.right_a);
        pack_panel<V, T>(shape, args.v, block.begin + first, count, head, s.right_c);
      },
      [&](const Step& g) {
        const int64_t columns = round_up(g.count, Tile::column_multiple);
        next_head.product(g.rows, columns, shape.steps, s.left_a + g.row * shape.steps, shape.steps,
                          s.right_a + g.slot * Tile::key_block * shape.steps, columns, s.scores, Tile::key_block, false);
      },
      [&](const Step& g) {
        const int64_t columns = round_up(g.count, Tile::column_multiple);
        const auto softmax = [&](auto negative_scale, auto n) {
          softmax_rows<V, Dot, accurate, decltype(negative_scale)::value>(
              s.scores, Tile::key_block, g.rows, n, columns, scale, g.first, s.row_max + g.row,
              s.row_sum + g.row * V::width, s.factors, s.probs, Shape::block_steps);
        };
        if (scale.near < 0.0f)
          softmax(std::true_type{}, g.count);
        else
          with_columns<Tile::key_block>(g.count, [&](auto n) { softmax(std::false_type{}, n); });
      },
      [&](const Step& g) {
        const int64_t columns = round_up(g.count, Tile::column_multiple);
        float* acc = s.acc_a + g.row * shape.padded_dim;
        for (int64_t r = 0; r < g.rows; ++r)
          if (s.factors[r] != 1.0f)
            store_row<V>(acc + r * shape.padded_dim, shape.padded_dim, s.factors[r],
                         acc + r * shape.padded_dim);
        next_head.product(g.rows, shape.padded_dim, columns / Dot::group, s.probs, Shape::block_steps,
                          s.right_c + g.slot * Shape::block_steps * shape.padded_dim, shape.padded_dim, acc,
                          shape.padded_dim, !g.first);
      });

  T* out = static_cast<T*>(args.out) + (first_row * args.num_heads + head) * shape.dim;
  float* softmax_lse = args.softmax_lse + head * args.total_nnz + first_row;
  for (int64_t r = 0; r < block.rows; ++r) {
    const float row_sum = V::sum(V::load(s.row_sum + r * V::width));
    store_row<V>(s.acc_a + r * shape.padded_dim, shape.dim, 1.0f / row_sum, out + r * args.num_heads * shape.dim);
    softmax_lse[r] = float(scale.natural(s.row_max[r]) + std::log(double(row_sum)));
  }
}

// The two products of the backward: stationary rows of q (or k) and grad_out (or v) with a block of the others.
template <class V, class T>
static inline void scores_and_grad_probs(const AttentionShape<V, T>& shape, const AttentionScratch<V, T>& s, const Step& g) {
  using Tile = AttentionTile<V, T>;
  const int64_t columns = round_up(g.count, Tile::column_multiple), slot = g.slot * Tile::key_block * shape.steps;
  product<V, typename Tile::Dot>(g.rows, columns, shape.steps, s.left_a + g.row * shape.steps, shape.steps,
                                 s.right_a + slot, columns, s.scores, Tile::key_block, false);
  product<V, typename Tile::Dot>(g.rows, columns, shape.steps, s.left_b + g.row * shape.steps, shape.steps,
                                 s.right_b + slot, columns, s.grad_probs, Tile::key_block, false);
}

// delta = rowsum(grad_out * out) - grad_lse of some rows, but for those that attention_backward_large has seen to.
template <class V, class T>
static inline void write_delta(const AttentionArgs& args, int64_t first_row, int64_t rows, int64_t head) {
  const int64_t dim = args.head_dim, lse_row = head * args.total_nnz + first_row;
  for (int64_t r = 0; r < rows; ++r) {
    if (args.large_max && is_large(args.softmax_lse[lse_row + r])) continue;
    const T* a = rows_of<T>(args.grad_out, first_row + r, head);
    const T* b = static_cast<const T*>(args.out) + ((first_row + r) * args.num_heads + head) * dim;
    auto sum = V::zero();
    int64_t d = 0;
    for (; d + V::width <= dim; d += V::width) sum = V::fma(V::load(a + d), V::load(b + d), sum);
    float delta = V::sum(sum);
    for (; d < dim; ++d) delta += to_float(a[d]) * to_float(b[d]);
    args.delta[lse_row + r] = args.grad_lse ? delta - args.grad_lse[lse_row + r] : delta;
  }
}

// s.score_base, s.minus_lse and s.delta of a query.
template <class V, class T>
static inline void load_query(const AttentionArgs& args, const AttentionScratch<V, T>& s, int64_t lse_row, int64_t at) {
  const bool large = args.large_max && is_large(args.softmax_lse[lse_row]);
  s.score_base[at] = large ? args.large_max[lse_row] : 0.0f;
  s.minus_lse[at] = large ? -std::log2(args.large_sum[lse_row]) : -args.softmax_lse[lse_row] * kLog2E;
  s.delta[at] = args.delta[lse_row];
}

// Calls f with whether scores have a base.
template <class F>
static inline void with_base(const AttentionArgs& args, F f) {
  if (args.large_max)
    f(std::true_type{});
  else
    f(std::false_type{});
}

template <class V, bool accurate, bool has_base>
static inline typename V::reg prob_of(typename V::reg score, typename V::reg base, typename V::reg scale,
                                      typename V::reg minus_lse) {
  return exp2<V, accurate>(V::fma(has_base ? V::sub(score, base) : score, scale, minus_lse));
}

// The raw row_max, row_sum and delta of the queries of a block whose softmax_lse is large. A prob of 1 comes out as 1 here
// and later, and the delta beside it as the same number as its grad_prob: their difference is 0, whatever a query or key of
// any size makes of it. So delta is the sum of probs times grad_probs, not that of grad_out times out.
template <class V, class T>
void attention_backward_large(const AttentionArgs& args, const SegmentBlock& block, int64_t head, void* scratch) {
  using Tile = AttentionTile<V, T>;
  using Dot = typename Tile::Dot;
  const AttentionShape<V, T> shape(args);
  const AttentionScratch<V, T> s(args, scratch);
  const int64_t first_row = block.begin + block.first, lse_row = head * args.total_nnz + first_row;
  const auto large = [&](int64_t r) { return is_large(args.softmax_lse[lse_row + r]); };
  bool any = false;
  for (int64_t r = 0; r < block.rows; ++r) any |= large(r);
  if (!any) return;
  const float scale_log2 = args.softmax_scale * kLog2E, sign = scale_log2 < 0.0f ? -1.0f : 1.0f;
  float *largest = args.large_max + lse_row, *row_sum = args.large_sum + lse_row, *delta = args.delta + lse_row;
  pack_left(Dot{}, rows_of<T>(args.q, first_row, head), args.q.row_stride, block.rows, shape.dim, s.left_a, shape.steps);
  pack_left(Dot{}, rows_of<T>(args.grad_out, first_row, head), args.grad_out.row_stride, block.rows, shape.dim, s.left_b,
            shape.steps);
  for_each_step<V, T>(
      block.rows, block.length,
      [&](int64_t first, int64_t count) {
        pack_panel_transposed<V, T>(shape, args.k, block.begin + first, count, head, s.right_a);
        pack_panel_transposed<V, T>(shape, args.v, block.begin + first, count, head, s.right_b);
      },
      [&](const Step& g) { scores_and_grad_probs<V, T>(shape, s, g); },
      [&](const Step& g) {
        for (int64_t r = 0; r < g.rows; ++r) {
          if (!large(g.row + r)) continue;
          const float* scores = s.scores + r * Tile::key_block;
          const float* grad_probs = s.grad_probs + r * Tile::key_block;
          float new_max = g.first ? scores[0] : largest[g.row + r];
          for (int64_t j = 0; j < g.count; ++j)
            if (sign * scores[j] > sign * new_max) new_max = scores[j];
          const float factor = g.first ? 0.0f : std::exp2((largest[g.row + r] - new_max) * scale_log2);
          const auto base = V::set1(new_max), scale = V::set1(scale_log2);
          auto sum = V::zero(), grad_sum = V::zero();
          for_each_vector<V>(g.count, [&](int64_t j, int valid) {
            // The same exponential as in the passes that follow.
            constexpr bool accurate = std::is_same_v<T, float>;
            const auto p = prob_of<V, accurate, true>(V::load(scores + j), base, scale, V::zero());
            sum = V::add(sum, V::keep_first(p, valid, 0.0f));
            grad_sum = V::add(grad_sum, V::keep_first(V::mul(p, V::load(grad_probs + j)), valid, 0.0f));
          });
          row_sum[g.row + r] = (g.first ? 0.0f : row_sum[g.row + r] * factor) + V::sum(sum);
          delta[g.row + r] = (g.first ? 0.0f : delta[g.row + r] * factor) + V::sum(grad_sum);
          largest[g.row + r] = new_max;
        }
      },
      [](const Step&) {});
  for (int64_t r = 0; r < block.rows; ++r)
    if (large(r)) delta[r] = delta[r] / row_sum[r] - (args.grad_lse ? args.grad_lse[lse_row + r] : 0.0f);
}

// grad_q of one query block; also writes delta = rowsum(grad_out * out) - grad_lse of its rows.
template <class V, class T>
void attention_backward_query(const AttentionArgs& args, const SegmentBlock& block, int64_t head, void* scratch) {
  using Tile = AttentionTile<V, T>;
  using Shape = AttentionShape<V, T>;
  using Dot = typename Shape::Dot;
  const Shape shape(args);
  const AttentionScratch<V, T> s(args, scratch);
  const float scale_log2 = args.softmax_scale * kLog2E;
  const int64_t first_row = block.begin + block.first;
  const int64_t out_stride = args.num_heads * shape.dim;
  const int64_t lse_row = head * args.total_nnz + first_row;

  write_delta<V, T>(args, first_row, block.rows, head);
  for (int64_t r = 0; r < block.rows; ++r) load_query(args, s, lse_row + r, r);
  pack_left(Dot{}, rows_of<T>(args.q, first_row, head), args.q.row_stride, block.rows, shape.dim, s.left_a, shape.steps);
  pack_left(Dot{}, rows_of<T>(args.grad_out, first_row, head), args.grad_out.row_stride, block.rows, shape.dim, s.left_b,
            shape.steps);
  for_each_step<V, T>(
      block.rows, block.length,
      [&](int64_t first, int64_t count) {
        pack_panel_transposed<V, T>(shape, args.k, block.begin + first, count, head, s.right_a);
        pack_panel_transposed<V, T>(shape, args.v, block.begin + first, count, head, s.right_b);
        pack_panel<V, T>(shape, args.k, block.begin + first, count, head, s.right_c);
      },
      [&](const Step& g) { scores_and_grad_probs<V, T>(shape, s, g); },
      [&](const Step& g) {
        const int64_t columns = round_up(g.count, Tile::column_multiple);
        const auto scale = V::set1(scale_log2);
        const auto grad_scores = [&](auto n, auto has_base) {
          for (int64_t r = 0; r < g.rows; ++r) {
            const auto minus_lse = V::set1(s.minus_lse[g.row + r]), base = V::set1(s.score_base[g.row + r]);
            const auto delta = V::set1(s.delta[g.row + r]);
            const float* scores = s.scores + r * Tile::key_block;
            const float* grad_probs = s.grad_probs + r * Tile::key_block;
            for_each_vector<V>(n, [&](int64_t j, int) {
              constexpr bool accurate = std::is_same_v<T, float>;
              const auto p =
                  prob_of<V, accurate, decltype(has_base)::value>(V::load(scores + j), base, scale, minus_lse);
              auto ds = V::mul(p, V::sub(V::load(grad_probs + j), delta));
              if (j + V::width > g.count) ds = V::keep_first(ds, int(max_of<int64_t>(g.count - j, 0)), 0.0f);
              Dot::store(s.grad_scores + r * Shape::block_steps, j, ds);
            });
          }
        };
        with_base(args, [&](auto has_base) {
          with_columns<Tile::key_block>(columns, [&](auto n) { grad_scores(n, has_base); });
        });
      },
      [&](const Step& g) {
        const int64_t columns = round_up(g.count, Tile::column_multiple);
        product<V, Dot>(g.rows, shape.padded_dim, columns / Dot::group, s.grad_scores, Shape::block_steps,
                  s.right_c + g.slot * Shape::block_steps * shape.padded_dim, shape.padded_dim, s.acc_a + g.row * shape.padded_dim, shape.padded_dim,
                  !g.first);
      });

  T* grad_q = static_cast<T*>(args.grad_q) + first_row * out_stride + head * shape.dim;
  for (int64_t r = 0; r < block.rows; ++r)
    store_row<V>(s.acc_a + r * shape.padded_dim, shape.dim, args.softmax_scale, grad_q + r * out_stride);
}

// Rows of scores are keys here, columns queries: what the backward over key blocks does before its sums.
template <class V, class T>
static inline void pack_query_panel(const AttentionArgs& args, const AttentionShape<V, T>& shape,
                                    const AttentionScratch<V, T>& s, int64_t begin, int64_t count, int64_t head) {
  pack_panel_transposed<V, T>(shape, args.q, begin, count, head, s.right_a);
  pack_panel_transposed<V, T>(shape, args.grad_out, begin, count, head, s.right_b);
  pack_panel<V, T>(shape, args.q, begin, count, head, s.right_c);
  pack_panel<V, T>(shape, args.grad_out, begin, count, head, s.right_d);
  const int64_t lse_row = head * args.total_nnz + begin;
  for (int64_t j = 0; j < round_up(count, AttentionTile<V, T>::column_multiple); ++j) {
    if (j < count)
      load_query(args, s, lse_row + j, j);
    else
      s.score_base[j] = s.minus_lse[j] = s.delta[j] = 0.0f;
  }
}

template <class V, class T>
static inline void key_softmax(const AttentionArgs& args, const AttentionScratch<V, T>& s, const Step& g) {
  using Tile = AttentionTile<V, T>;
  using Shape = AttentionShape<V, T>;
  using Dot = typename Tile::Dot;
  const auto scale = V::set1(args.softmax_scale * kLog2E);
  const float* minus_lse = s.minus_lse + g.slot * Tile::key_block;
  const float* delta = s.delta + g.slot * Tile::key_block;
  const float* base = s.score_base + g.slot * Tile::key_block;
  const auto probs_and_grad_scores = [&](auto n, auto has_base) {
    for (int64_t r = 0; r < g.rows; ++r) {
      const float* scores = s.scores + r * Tile::key_block;
      const float* grad_probs = s.grad_probs + r * Tile::key_block;
      for_each_vector<V>(n, [&](int64_t j, int) {
        constexpr bool accurate = std::is_same_v<T, float>;
        auto p = prob_of<V, accurate, decltype(has_base)::value>(V::load(scores + j), V::load(base + j), scale,
                                                                 V::load(minus_lse + j));
        auto ds = V::mul(p, V::sub(V::load(grad_probs + j), V::load(delta + j)));
        if (j + V::width > g.count) {
          const int valid = int(max_of<int64_t>(g.count - j, 0));
          p = V::keep_first(p, valid, 0.0f);
          ds = V::keep_first(ds, valid, 0.0f);
        }
        Dot::store(s.probs + r * Shape::block_steps, j, p);
        Dot::store(s.grad_scores + r * Shape::block_steps, j, ds);
      });
    }
  };
  with_base(args, [&](auto has_base) {
    with_columns<Tile::key_block>(round_up(g.count, Tile::column_multiple),
                                  [&](auto n) { probs_and_grad_scores(n, has_base); });
  });
}

template <class V, class T>
static inline void key_sums(const AttentionShape<V, T>& shape, const AttentionScratch<V, T>& s, const Step& g) {
  using Tile = AttentionTile<V, T>;
  using Shape = AttentionShape<V, T>;
  using Dot = typename Tile::Dot;
  const int64_t steps = round_up(g.count, Tile::column_multiple) / Dot::group;
  const int64_t slot = g.slot * Shape::block_steps * shape.padded_dim, acc_row = g.row * shape.padded_dim;
  product<V, Dot>(g.rows, shape.padded_dim, steps, s.grad_scores, Shape::block_steps, s.right_c + slot,
                  shape.padded_dim, s.acc_a + acc_row, shape.padded_dim, !g.first);
  product<V, Dot>(g.rows, shape.padded_dim, steps, s.probs, Shape::block_steps, s.right_d + slot, shape.padded_dim,
                  s.acc_b + acc_row, shape.padded_dim, !g.first);
}

template <class V, class T>
static inline void store_key_gradients(const AttentionArgs& args, const AttentionShape<V, T>& shape,
                                       const AttentionScratch<V, T>& s, int64_t first_row, int64_t rows, int64_t head) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = ((first_row + r) * args.num_heads + head) * shape.dim;
    store_row<V>(s.acc_a + r * shape.padded_dim, shape.dim, args.softmax_scale, static_cast<T*>(args.grad_k) + at);
    store_row<V>(s.acc_b + r * shape.padded_dim, shape.dim, 1.0f, static_cast<T*>(args.grad_v) + at);
  }
}

template <class V, class T>
static inline void pack_keys(const AttentionArgs& args, const AttentionShape<V, T>& shape,
                             const AttentionScratch<V, T>& s, int64_t first_row, int64_t rows, int64_t head) {
  using Dot = typename AttentionTile<V, T>::Dot;
  pack_left(Dot{}, rows_of<T>(args.k, first_row, head), args.k.row_stride, rows, shape.dim, s.left_a, shape.steps);
  pack_left(Dot{}, rows_of<T>(args.v, first_row, head), args.v.row_stride, rows, shape.dim, s.left_b, shape.steps);
}

// grad_k and grad_v of one key block.
template <class V, class T>
void attention_backward_key(const AttentionArgs& args, const SegmentBlock& block, int64_t head, void* scratch) {
  const AttentionShape<V, T> shape(args);
  const AttentionScratch<V, T> s(args, scratch);
  const int64_t first_row = block.begin + block.first;
  pack_keys<V, T>(args, shape, s, first_row, block.rows, head);
  for_each_step<V, T>(
      block.rows, block.length,
      [&](int64_t first, int64_t count) { pack_query_panel<V, T>(args, shape, s, block.begin + first, count, head); },
      [&](const Step& g) { scores_and_grad_probs<V, T>(shape, s, g); }, [&](const Step& g) { key_softmax<V, T>(args, s, g); },
      [&](const Step& g) { key_sums<V, T>(shape, s, g); });
  store_key_gradients<V, T>(args, shape, s, first_row, block.rows, head);
}

// All gradients of one segment and head. Float products only: grad_q reads grad_scores by columns.
template <class V, class T>
void attention_backward(const AttentionArgs& args, const SegmentBlock& segment, int64_t head, void* scratch) {
  using Tile = AttentionTile<V, T>;
  using Dot = typename Tile::Dot;
  const AttentionShape<V, T> shape(args);
  const AttentionScratch<V, T> s(args, scratch);
  write_delta<V, T>(args, segment.begin, segment.length, head);
  for (int64_t i = 0; i < segment.length * shape.padded_dim; ++i) s.acc_q[i] = 0.0f;
  for (int64_t first_key = 0; first_key < segment.length; first_key += Tile::max_rows) {
    const int64_t first_row = segment.begin + first_key, rows = min_of(Tile::max_rows, segment.length - first_key);
    pack_keys<V, T>(args, shape, s, first_row, rows, head);
    pack_panel<V, T>(shape, args.k, first_row, rows, head, s.right_e);
    for_each_step<V, T>(
        rows, segment.length,
        [&](int64_t first, int64_t count) {
          pack_query_panel<V, T>(args, shape, s, segment.begin + first, count, head);
        },
        [&](const Step& g) { scores_and_grad_probs<V, T>(shape, s, g); }, [&](const Step& g) { key_softmax<V, T>(args, s, g); },
        [&](const Step& g) {
          key_sums<V, T>(shape, s, g);
          product<V, Dot, true>(g.count, shape.padded_dim, g.rows, s.grad_scores, Tile::key_block,
                                s.right_e + g.row * shape.padded_dim, shape.padded_dim,
                                s.acc_q + g.begin * shape.padded_dim, shape.padded_dim, true);
        });
    store_key_gradients<V, T>(args, shape, s, first_row, rows, head);
  }
  T* grad_q = static_cast<T*>(args.grad_q) + (segment.begin * args.num_heads + head) * shape.dim;
  for (int64_t r = 0; r < segment.length; ++r)
    store_row<V>(s.acc_q + r * shape.padded_dim, shape.dim, args.softmax_scale, grad_q + r * args.num_heads * shape.dim);
}

}  // namespace xtg
