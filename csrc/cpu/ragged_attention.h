// ragged_attention on a CPU: the algorithm, over raw pointers and one vector type V; no torch in here.
//
// Forward: a query block keeps a running row_max and row_sum (online softmax) while the key blocks of its segment stream
// past; out = acc / row_sum, softmax_lse = row_max + log(row_sum). Backward in two passes without atomics: one owns
// query blocks and sums grad_q over key blocks, one owns key blocks and sums grad_k and grad_v over query blocks; both
// recompute probs from scores and softmax_lse.
// The same words as in xtg_kernels/ops/ragged_attention/reference.py and triton_kernel.py.
#pragma once

#include <cmath>
#include <type_traits>

#include "../common/exp.h"
#include "../common/kernels.h"
#include "../common/product.h"
#include "../common/scratch.h"

namespace xtg {

// Blocking. Rows of scores live in L1, the packed block that streams past in L1 or L2, sums of the stationary rows in L2.
template <class V, class T>
struct AttentionTile {
  using Dot = typename DotFor<V, T>::type;
  static constexpr int64_t query_block = 256;                    // stationary rows of one unit of work
  static constexpr int64_t key_block = 128;                      // rows of the operand that streams past, at a time
  static constexpr int64_t rows = Dot::tiles ? 32 : V::score_rows;  // rows whose scores are held at a time
  // A block's rows are padded to this multiple: whole vectors as columns, whole steps as the inner dimension.
  static constexpr int64_t column_multiple = max_of<int64_t>(V::width, Dot::group * Dot::step_multiple);
};

template <class V, class T>
struct AttentionShape {
  using Dot = typename DotFor<V, T>::type;
  using elem = typename Dot::elem;
  using Tile = AttentionTile<V, T>;
  int64_t dim, steps, padded_dim, block_steps;  // steps: elements of a left row of head_dim, block_steps: of a key block
  explicit AttentionShape(const AttentionArgs& args)
      : dim(args.head_dim),
        steps(round_up(ceil_div(dim, Dot::group), Dot::step_multiple)),
        padded_dim(round_up(dim, V::width)),
        block_steps(Tile::key_block / Dot::group) {}
};

template <class V, class T>
struct AttentionScratch {
  using Tile = AttentionTile<V, T>;
  using elem = typename AttentionShape<V, T>::elem;
  elem *left_a, *left_b;    // stationary rows: queries (and grad_out), or keys and values
  elem *right_a, *right_b;  // streaming block, transposed: right operands of scores and of grad_probs
  elem *right_c, *right_d;  // streaming block, plain: right operands of the sums
  float *scores, *grad_probs;
  elem *probs, *grad_scores;
  float *acc_a, *acc_b;  // (query_block, padded_dim)
  float *row_max, *row_sum;  // (query_block,), (query_block, V::width): the sums stay spread over the lanes
  float *minus_lse, *delta;  // minus_lse in units of log2
  size_t bytes;

  AttentionScratch(const AttentionArgs& args, void* base) {
    const AttentionShape<V, T> shape(args);
    ScratchCursor cursor{static_cast<char*>(base), 0};
    const int64_t stationary = round_up(Tile::query_block, Tile::rows);
    left_a = cursor.take<elem>(stationary * shape.steps);
    left_b = cursor.take<elem>(stationary * shape.steps);
    right_a = cursor.take<elem>(shape.steps * Tile::key_block);
    right_b = cursor.take<elem>(shape.steps * Tile::key_block);
    right_c = cursor.take<elem>(shape.block_steps * shape.padded_dim);
    right_d = cursor.take<elem>(shape.block_steps * shape.padded_dim);
    scores = cursor.take<float>(Tile::rows * Tile::key_block);
    grad_probs = cursor.take<float>(Tile::rows * Tile::key_block);
    probs = cursor.take<elem>(Tile::rows * shape.block_steps);
    grad_scores = cursor.take<elem>(Tile::rows * shape.block_steps);
    acc_a = cursor.take<float>(stationary * shape.padded_dim);
    acc_b = cursor.take<float>(stationary * shape.padded_dim);
    row_max = cursor.take<float>(stationary);
    row_sum = cursor.take<float>(stationary * V::width);
    minus_lse = cursor.take<float>(max_of(Tile::query_block, Tile::key_block));
    delta = cursor.take<float>(max_of(Tile::query_block, Tile::key_block));
    bytes = cursor.used;
  }
};

template <class V, class T>
size_t attention_scratch(const AttentionArgs& args) {
  return AttentionScratch<V, T>(args, nullptr).bytes;
}

template <class T>
static inline const T* rows_of(const Operand& x, int64_t row, int64_t head) {
  return static_cast<const T*>(x.data) + row * x.row_stride + head * x.head_stride;
}

// Calls f(j, valid) for each vector of a row of n columns; valid < width only in the last.
template <class V, class Columns, class F>
static inline void for_each_vector(Columns n, F f) {
  int64_t j = 0;
  for (; j + V::width <= n; j += V::width) f(j, V::width);
  if (j < n) f(j, int(n - j));
}

// Raw scores of some rows to probs relative to the row_max so far; factors bring each row's older sums to it.
// row_max counts in units of log2: scale_log2 = softmax_scale * log2(e). Columns n.. of probs are zero. Row maxima are
// reduced for V::width rows at once, by a transposition: a reduction inside one register would stall every row.
template <class V, class Dot, bool accurate, bool negative_scale, class Columns>
static inline void softmax_rows(const float* scores, int64_t ld, int64_t rows, Columns n, int64_t columns,
                                float scale_log2, bool first, float* row_max, float* row_sum, float* factors,
                                typename Dot::elem* probs, int64_t probs_ld) {
  const auto scale = V::set1(scale_log2);
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
    const auto block_max = V::mul(maxima[0], V::set1(negative_scale ? -scale_log2 : scale_log2));
    const auto old_max = V::load(row_max + group);
    const auto new_max = first ? block_max : V::max(old_max, block_max);
    V::store(row_max + group, new_max);
    V::store(factors + group, first ? V::set1(1.0f) : exp2<V, true>(V::sub(old_max, new_max)));
    for (int64_t r = group; r < end; ++r) {
      const auto shift = V::set1(-row_max[r]);
      auto sum = first ? V::zero() : V::mul(V::load(row_sum + r * V::width), V::set1(factors[r]));
      for_each_vector<V>(n, [&](int64_t j, int valid) {
        auto p = exp2<V, accurate>(V::fma(V::load(scores + r * ld + j), scale, shift));
        if (valid < V::width) p = V::keep_first(p, valid, 0.0f);
        sum = V::add(sum, p);
        Dot::store(probs + r * probs_ld, j, p);
      });
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
  constexpr bool accurate = sizeof(T) == sizeof(float);
  const typename Dot::Session session{};
  (void)session;
  const Shape shape(args);
  const AttentionScratch<V, T> s(args, scratch);
  const float scale_log2 = args.softmax_scale * kLog2E;
  const int64_t first_row = block.begin + block.first;

  pack_left(Dot{}, rows_of<T>(args.q, first_row, head), args.q.row_stride, block.rows, shape.dim, s.left_a, shape.steps);
  for (int64_t key = 0; key < block.length; key += Tile::key_block) {
    const int64_t keys = min_of(Tile::key_block, block.length - key);
    const int64_t columns = round_up(keys, Tile::column_multiple);
    pack_right_transposed(Dot{}, rows_of<T>(args.k, block.begin + key, head), args.k.row_stride, keys, shape.dim,
                          shape.steps, s.right_a, columns);
    pack_right(Dot{}, rows_of<T>(args.v, block.begin + key, head), args.v.row_stride, keys, columns, shape.dim,
               s.right_c, shape.padded_dim);
    for (int64_t row = 0; row < block.rows; row += Tile::rows) {
      const int64_t rows = min_of(Tile::rows, block.rows - row);
      float* acc = s.acc_a + row * shape.padded_dim;
      product<V, Dot>(rows, columns, shape.steps, s.left_a + row * shape.steps, shape.steps, s.right_a, columns,
                      s.scores, Tile::key_block, false);
      float factors[Tile::rows];
      const auto softmax = [&](auto negative_scale, auto n) {
        softmax_rows<V, Dot, accurate, decltype(negative_scale)::value>(
            s.scores, Tile::key_block, rows, n, columns, scale_log2, key == 0, s.row_max + row,
            s.row_sum + row * V::width, factors, s.probs, shape.block_steps);
      };
      if (scale_log2 < 0.0f)
        softmax(std::true_type{}, keys);
      else if (keys == Tile::key_block)  // almost every block: the compiler unrolls
        softmax(std::false_type{}, std::integral_constant<int64_t, Tile::key_block>{});
      else
        softmax(std::false_type{}, keys);
      for (int64_t r = 0; r < rows; ++r)
        if (factors[r] != 1.0f)
          store_row<V>(acc + r * shape.padded_dim, shape.padded_dim, factors[r], acc + r * shape.padded_dim);
      product<V, Dot>(rows, shape.padded_dim, columns / Dot::group, s.probs, shape.block_steps, s.right_c,
                      shape.padded_dim, acc, shape.padded_dim, key > 0);
    }
  }
  T* out = static_cast<T*>(args.out) + (first_row * args.num_heads + head) * shape.dim;
  float* softmax_lse = args.softmax_lse + head * args.total_nnz + first_row;
  for (int64_t r = 0; r < block.rows; ++r) {
    const float row_sum = V::sum(V::load(s.row_sum + r * V::width));
    store_row<V>(s.acc_a + r * shape.padded_dim, shape.dim, 1.0f / row_sum, out + r * args.num_heads * shape.dim);
    softmax_lse[r] = (s.row_max[r] + std::log2(row_sum)) * kLn2;
  }
}

// grad_q of one query block; also writes delta = rowsum(grad_out * out) - grad_lse of its rows.
template <class V, class T>
void attention_backward_query(const AttentionArgs& args, const SegmentBlock& block, int64_t head, void* scratch) {
  using Tile = AttentionTile<V, T>;
  using Shape = AttentionShape<V, T>;
  using Dot = typename Shape::Dot;
  constexpr bool accurate = sizeof(T) == sizeof(float);
  const typename Dot::Session session{};
  (void)session;
  const Shape shape(args);
  const AttentionScratch<V, T> s(args, scratch);
  const float scale_log2 = args.softmax_scale * kLog2E;
  const int64_t first_row = block.begin + block.first;
  const int64_t out_stride = args.num_heads * shape.dim;
  const int64_t lse_row = head * args.total_nnz + first_row;

  const T* grad_out = rows_of<T>(args.grad_out, first_row, head);
  const T* out = static_cast<const T*>(args.out) + first_row * out_stride + head * shape.dim;
  for (int64_t r = 0; r < block.rows; ++r) {
    const T* a = grad_out + r * args.grad_out.row_stride;
    const T* b = out + r * out_stride;
    auto sum = V::zero();
    int64_t d = 0;
    for (; d + V::width <= shape.dim; d += V::width) sum = V::fma(V::load(a + d), V::load(b + d), sum);
    float delta = V::sum(sum);
    for (; d < shape.dim; ++d) delta += to_float(a[d]) * to_float(b[d]);
    if (args.grad_lse) delta -= args.grad_lse[lse_row + r];
    args.delta[lse_row + r] = delta;
    s.delta[r] = delta;
    s.minus_lse[r] = -args.softmax_lse[lse_row + r] * kLog2E;
  }
  pack_left(Dot{}, rows_of<T>(args.q, first_row, head), args.q.row_stride, block.rows, shape.dim, s.left_a, shape.steps);
  pack_left(Dot{}, grad_out, args.grad_out.row_stride, block.rows, shape.dim, s.left_b, shape.steps);

  for (int64_t key = 0; key < block.length; key += Tile::key_block) {
    const int64_t keys = min_of(Tile::key_block, block.length - key);
    const int64_t columns = round_up(keys, Tile::column_multiple);
    const T* k = rows_of<T>(args.k, block.begin + key, head);
    pack_right_transposed(Dot{}, k, args.k.row_stride, keys, shape.dim, shape.steps, s.right_a, columns);
    pack_right_transposed(Dot{}, rows_of<T>(args.v, block.begin + key, head), args.v.row_stride, keys, shape.dim,
                          shape.steps, s.right_b, columns);
    pack_right(Dot{}, k, args.k.row_stride, keys, columns, shape.dim, s.right_c, shape.padded_dim);
    for (int64_t row = 0; row < block.rows; row += Tile::rows) {
      const int64_t rows = min_of(Tile::rows, block.rows - row);
      product<V, Dot>(rows, columns, shape.steps, s.left_a + row * shape.steps, shape.steps, s.right_a, columns,
                      s.scores, Tile::key_block, false);
      product<V, Dot>(rows, columns, shape.steps, s.left_b + row * shape.steps, shape.steps, s.right_b, columns,
                      s.grad_probs, Tile::key_block, false);
      for (int64_t r = 0; r < rows; ++r) {
        const auto minus_lse = V::set1(s.minus_lse[row + r]);
        const auto delta = V::set1(s.delta[row + r]);
        for_each_vector<V>(columns, [&](int64_t j, int) {
          const auto scores = V::load(s.scores + r * Tile::key_block + j);
          const auto p = exp2<V, accurate>(V::fma(scores, V::set1(scale_log2), minus_lse));
          auto ds = V::mul(p, V::sub(V::load(s.grad_probs + r * Tile::key_block + j), delta));
          if (j + V::width > keys) ds = V::keep_first(ds, int(max_of<int64_t>(keys - j, 0)), 0.0f);
          Dot::store(s.grad_scores + r * shape.block_steps, j, ds);
        });
      }
      product<V, Dot>(rows, shape.padded_dim, columns / Dot::group, s.grad_scores, shape.block_steps, s.right_c,
                      shape.padded_dim, s.acc_a + row * shape.padded_dim, shape.padded_dim, key > 0);
    }
  }
  T* grad_q = static_cast<T*>(args.grad_q) + first_row * out_stride + head * shape.dim;
  for (int64_t r = 0; r < block.rows; ++r)
    store_row<V>(s.acc_a + r * shape.padded_dim, shape.dim, args.softmax_scale, grad_q + r * out_stride);
}

// grad_k and grad_v of one key block: rows of scores are keys here, columns queries.
template <class V, class T>
void attention_backward_key(const AttentionArgs& args, const SegmentBlock& block, int64_t head, void* scratch) {
  using Tile = AttentionTile<V, T>;
  using Shape = AttentionShape<V, T>;
  using Dot = typename Shape::Dot;
  constexpr bool accurate = sizeof(T) == sizeof(float);
  const typename Dot::Session session{};
  (void)session;
  const Shape shape(args);
  const AttentionScratch<V, T> s(args, scratch);
  const float scale_log2 = args.softmax_scale * kLog2E;
  const int64_t first_row = block.begin + block.first;
  const int64_t out_stride = args.num_heads * shape.dim;

  pack_left(Dot{}, rows_of<T>(args.k, first_row, head), args.k.row_stride, block.rows, shape.dim, s.left_a, shape.steps);
  pack_left(Dot{}, rows_of<T>(args.v, first_row, head), args.v.row_stride, block.rows, shape.dim, s.left_b, shape.steps);
  for (int64_t query = 0; query < block.length; query += Tile::key_block) {
    const int64_t queries = min_of(Tile::key_block, block.length - query);
    const int64_t columns = round_up(queries, Tile::column_multiple);
    const T* q = rows_of<T>(args.q, block.begin + query, head);
    const T* grad_out = rows_of<T>(args.grad_out, block.begin + query, head);
    const int64_t lse_row = head * args.total_nnz + block.begin + query;
    pack_right_transposed(Dot{}, q, args.q.row_stride, queries, shape.dim, shape.steps, s.right_a, columns);
    pack_right_transposed(Dot{}, grad_out, args.grad_out.row_stride, queries, shape.dim, shape.steps, s.right_b, columns);
    pack_right(Dot{}, q, args.q.row_stride, queries, columns, shape.dim, s.right_c, shape.padded_dim);
    pack_right(Dot{}, grad_out, args.grad_out.row_stride, queries, columns, shape.dim, s.right_d, shape.padded_dim);
    for (int64_t j = 0; j < columns; ++j) {
      s.minus_lse[j] = j < queries ? -args.softmax_lse[lse_row + j] * kLog2E : 0.0f;
      s.delta[j] = j < queries ? args.delta[lse_row + j] : 0.0f;
    }
    for (int64_t row = 0; row < block.rows; row += Tile::rows) {
      const int64_t rows = min_of(Tile::rows, block.rows - row);
      product<V, Dot>(rows, columns, shape.steps, s.left_a + row * shape.steps, shape.steps, s.right_a, columns,
                      s.scores, Tile::key_block, false);
      product<V, Dot>(rows, columns, shape.steps, s.left_b + row * shape.steps, shape.steps, s.right_b, columns,
                      s.grad_probs, Tile::key_block, false);
      for (int64_t r = 0; r < rows; ++r) {
        for_each_vector<V>(columns, [&](int64_t j, int) {
          const auto scores = V::load(s.scores + r * Tile::key_block + j);
          auto p = exp2<V, accurate>(V::fma(scores, V::set1(scale_log2), V::load(s.minus_lse + j)));
          const auto dp = V::load(s.grad_probs + r * Tile::key_block + j);
          auto ds = V::mul(p, V::sub(dp, V::load(s.delta + j)));
          if (j + V::width > queries) {
            const int valid = int(max_of<int64_t>(queries - j, 0));
            p = V::keep_first(p, valid, 0.0f);
            ds = V::keep_first(ds, valid, 0.0f);
          }
          Dot::store(s.probs + r * shape.block_steps, j, p);
          Dot::store(s.grad_scores + r * shape.block_steps, j, ds);
        });
      }
      const int64_t acc_row = row * shape.padded_dim;
      product<V, Dot>(rows, shape.padded_dim, columns / Dot::group, s.grad_scores, shape.block_steps, s.right_c,
                      shape.padded_dim, s.acc_a + acc_row, shape.padded_dim, query > 0);
      product<V, Dot>(rows, shape.padded_dim, columns / Dot::group, s.probs, shape.block_steps, s.right_d,
                      shape.padded_dim, s.acc_b + acc_row, shape.padded_dim, query > 0);
    }
  }
  T* grad_k = static_cast<T*>(args.grad_k) + first_row * out_stride + head * shape.dim;
  T* grad_v = static_cast<T*>(args.grad_v) + first_row * out_stride + head * shape.dim;
  for (int64_t r = 0; r < block.rows; ++r) {
    store_row<V>(s.acc_a + r * shape.padded_dim, shape.dim, args.softmax_scale, grad_k + r * out_stride);
    store_row<V>(s.acc_b + r * shape.padded_dim, shape.dim, 1.0f, grad_v + r * out_stride);
  }
}

}  // namespace xtg
