// favor_attention on a CPU: the algorithm, over raw pointers and one vector type V; no torch in here.
//
// Everywhere features are rows and tokens are columns: a block of keys or queries, transposed, meets the projection one
// block of features at a time, and the features of that block go into the next product from L1. Forward: keys give parts
// of context and key_sum under a running key_max, which are added up for each segment and head; queries meet the context
// under a running row_max. Backward: queries give grad_q and parts of grad_context and grad_key_sum, keys then grad_k
// and grad_v. Features are recomputed from scores. Scores, maxima and half norms count in units of log2.
// Both maxima pass gradient on: all exponents of a query are relative to row_max, so the feature that is its maximum gets
// the sum of its scores' gradients, negative; key_max likewise, for all keys of a segment and head, or of a segment.
// What eps adds to every feature is never added to a feature: it multiplies sums that all features have in common.
// The same words as in xtg_kernels/ops/favor_attention/reference.py and triton_kernel.py.
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "../common/exp.h"
#include "../common/kernels.h"
#include "../common/product.h"
#include "../common/rows.h"
#include "../common/scratch.h"

namespace xtg {

constexpr float kNoFeature = -INFINITY;  // a half norm, negative: of a block's columns that hold no token

template <class V, class T>
struct FavorTile {
  using Dot = typename DotFor<V, T>::type;
  static constexpr int64_t columns = 64;   // tokens of a block
  static constexpr int64_t features = 96;  // features of a block: a multiple of every tile height
  static constexpr int64_t column_multiple = max_of<int64_t>(V::width, Dot::group * Dot::step_multiple);
  // Tokens that are summed before their sum goes to the rest: one long chain of additions would lose digits.
  static constexpr int64_t chain = 512;
};

template <class V, class T>
struct FavorShape {
  using Dot = typename DotFor<V, T>::type;
  int64_t dim, features;
  int64_t steps, feature_steps;  // elements of a row of dim channels, or of all features, as inner dimension
  int64_t padded_dim;
  double scale;  // on q and k
  explicit FavorShape(const FavorArgs& args)
      : dim(args.head_dim),
        features(args.num_features),
        steps(steps_of(dim)),
        feature_steps(steps_of(features)),
        padded_dim(round_up(dim, V::width)),
        scale(std::pow(double(dim), -0.25)) {}
  static constexpr int64_t steps_of(int64_t n) { return round_up(ceil_div(n, Dot::group), Dot::step_multiple); }
};

// Rows of a left operand or of a product that tile products may touch.
static constexpr int64_t tile_rows_of(int64_t rows) { return round_up(rows, 16); }

template <class V, class T>
struct FavorScratch {
  using Tile = FavorTile<V, T>;
  using elem = typename Tile::Dot::elem;
  elem *projection, *projection_t;  // left operands (features, dim) and (dim, features), the first in units of log2
  elem *context, *context_t;        // the same of context or its gradient
  elem *right_x, *right_y;          // a block of tokens, transposed: (dim, columns)
  elem* right_rows;                 // a block of tokens as it is: (columns, dim)
  float *scores, *grad_features;    // (features of a block, columns)
  elem* left_features;              // the same as left operand
  elem *right_features, *right_grad_scores;  // and as right operands
  float *acc_a, *acc_b;             // (dim, columns)
  float* rows;                      // (columns, padded_dim)
  float* sums;                      // (features, padded_dim): over the tokens of a chain
  float* lanes;                     // (features, V::width): sums over tokens, spread over the lanes
  float* context_sum;               // (padded_dim,): of all features, or over the tokens of a block
  double* wide_sum;                 // (padded_dim,)
  float *half_norms, *row_max, *row_sum, *minus_delta, *grad_sum;  // (columns,); half_norms are negative
  float *largest, *largest_feature;  // (columns,): the largest score so far, and the first feature that has it
  size_t bytes;

  FavorScratch(const FavorArgs& args, void* base) {
    const FavorShape<V, T> shape(args);
    ScratchCursor cursor{static_cast<char*>(base), 0};
    constexpr int64_t columns = Tile::columns, block = Tile::features, group = Tile::Dot::group;
    const int64_t features = tile_rows_of(shape.features), dim = tile_rows_of(shape.padded_dim);
    projection = cursor.take<elem>(features * shape.steps);
    projection_t = cursor.take<elem>(dim * shape.feature_steps);
    context = cursor.take<elem>(features * shape.steps);
    context_t = cursor.take<elem>(dim * shape.feature_steps);
    right_x = cursor.take<elem>(shape.steps * columns);
    right_y = cursor.take<elem>(shape.steps * columns);
    right_rows = cursor.take<elem>(columns / group * shape.padded_dim);
    scores = cursor.take<float>(block * columns);
    grad_features = cursor.take<float>(block * columns);
    left_features = cursor.take<elem>(block * columns / group);
    right_features = cursor.take<elem>(block / group * columns);
    right_grad_scores = cursor.take<elem>(block / group * columns);
    acc_a = cursor.take<float>(dim * columns);
    acc_b = cursor.take<float>(dim * columns);
    rows = cursor.take<float>(columns * shape.padded_dim);
    sums = cursor.take<float>(features * shape.padded_dim);
    lanes = cursor.take<float>(shape.features * V::width);
    context_sum = cursor.take<float>(shape.padded_dim);
    wide_sum = cursor.take<double>(shape.padded_dim);
    half_norms = cursor.take<float>(columns);
    row_max = cursor.take<float>(columns);
    row_sum = cursor.take<float>(columns);
    minus_delta = cursor.take<float>(columns);
    grad_sum = cursor.take<float>(columns);
    largest = cursor.take<float>(columns);
    largest_feature = cursor.take<float>(columns);
    bytes = cursor.used;
  }
};

template <class V, class T>
size_t favor_scratch(const FavorArgs& args) {
  return FavorScratch<V, T>(args, nullptr).bytes;
}

// exp of score - stabilizer - half norm, in this order: the first difference is small, and exact, where it counts.
template <class V, bool accurate>
static inline typename V::reg exponential(typename V::reg score, typename V::reg stabilizer, typename V::reg half_norm) {
  return exp2<V, accurate>(V::add(V::sub(score, stabilizer), half_norm));
}

// Calls f(first, count, columns) for each block of tokens of a chunk.
template <class V, class T, class F>
static inline void for_each_token_block(const RowChunk& chunk, F f) {
  using Tile = FavorTile<V, T>;
  for (int64_t first = 0; first < chunk.rows; first += Tile::columns) {
    const int64_t count = min_of(Tile::columns, chunk.rows - first);
    f(chunk.first + first, count, round_up(count, Tile::column_multiple));
  }
}

template <class V, class T>
static inline void pack_projection(const FavorArgs& args, const FavorShape<V, T>& shape, const FavorScratch<V, T>& s) {
  pack_left_scaled<V, typename FavorTile<V, T>::Dot>(args.projection, shape.dim, shape.features, shape.dim,
                                                     shape.scale * kLog2EDouble, s.projection, shape.steps);
}

template <class V, class T>
static inline void pack_projection_transposed(const FavorArgs& args, const FavorShape<V, T>& shape,
                                              const FavorScratch<V, T>& s) {
  pack_left_transposed<V, typename FavorTile<V, T>::Dot>(args.projection, shape.dim, shape.features, shape.dim,
                                                         shape.scale, s.projection_t, shape.feature_steps);
}

// Tokens [first, first + count) of x as columns.
template <class V, class T>
static inline void pack_columns(const FavorShape<V, T>& shape, const Operand& x, int64_t first, int64_t count,
                                int64_t columns, int64_t head, typename FavorTile<V, T>::Dot::elem* dst) {
  pack_right_transposed(typename FavorTile<V, T>::Dot{}, rows_of<T>(x, first, head), x.row_stride, count, shape.dim,
                        shape.steps, dst, columns);
}

template <class V, class T>
static inline void pack_rows(const FavorShape<V, T>& shape, const Operand& x, int64_t first, int64_t count,
                             int64_t columns, int64_t head, typename FavorTile<V, T>::Dot::elem* dst) {
  pack_right(typename FavorTile<V, T>::Dot{}, rows_of<T>(x, first, head), x.row_stride, count, columns, shape.dim, dst,
             shape.padded_dim);
}

// -|scale x|^2 / 2 of the tokens in s.right_x, in units of log2; columns from count on have no feature.
template <class V, class T>
static inline void half_norms_of_columns(const FavorShape<V, T>& shape, const FavorScratch<V, T>& s, int64_t count,
                                         int64_t columns) {
  using Dot = typename FavorTile<V, T>::Dot;
  const Factor<V> times(-0.5 * shape.scale * shape.scale * kLog2EDouble);
  for (int64_t j = 0; j < columns; j += V::width) {
    // Four sums: a half norm is common to all features of a token, so that its error does not average out.
    typename V::reg sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    for (int64_t p = 0; p < shape.steps; ++p) sums[p % 4] = Dot::square(sums[p % 4], s.right_x + p * columns + j);
    const auto half_norm = times(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
    // Finite where the square overflows, or even its product is NaN: the feature is then 0, unless its score is NaN.
    V::store(s.half_norms + j, V::max(half_norm, V::set1(-FLT_MAX)));
  }
  for (int64_t j = count; j < columns; ++j) s.half_norms[j] = kNoFeature;
}

// dst (features of a block, columns) = left rows [first, first + features) x tokens.
template <class V, class T>
static inline void product_with_columns(const FavorShape<V, T>& shape, int64_t first, int64_t features,
                                        const typename FavorTile<V, T>::Dot::elem* left,
                                        const typename FavorTile<V, T>::Dot::elem* right, int64_t columns, float* dst) {
  product<V, typename FavorTile<V, T>::Dot>(features, columns, shape.steps, left + first * shape.steps, shape.steps,
                                            right, columns, dst, FavorTile<V, T>::columns, false);
}

// acc (dim, columns) (+)= left (dim, features of a block) x right (features of a block, columns).
template <class V, class T>
static inline void product_with_features(const FavorShape<V, T>& shape, int64_t first, int64_t features,
                                         const typename FavorTile<V, T>::Dot::elem* left,
                                         typename FavorTile<V, T>::Dot::elem* right, int64_t columns, float* acc) {
  using Tile = FavorTile<V, T>;
  using Dot = typename Tile::Dot;
  const int64_t steps = FavorShape<V, T>::steps_of(features);
  for (int64_t f = round_up(features, 2); f < steps * Dot::group; f += 2)
    for (int64_t j = 0; j < columns; j += V::width) Dot::store_rows(right, Tile::columns, f, j, V::zero(), V::zero());
  product<V, Dot>(shape.dim, columns, steps, left + first / Dot::group, shape.feature_steps, right, Tile::columns, acc,
                  Tile::columns, first > 0);
}

// s.sums (features of a block, dim) (+)= features x token rows.
template <class V, class T>
static inline void product_with_rows(const FavorShape<V, T>& shape, const FavorScratch<V, T>& s, int64_t first,
                                     int64_t features, int64_t columns, bool accumulate) {
  using Tile = FavorTile<V, T>;
  using Dot = typename Tile::Dot;
  product<V, Dot>(features, shape.padded_dim, columns / Dot::group, s.left_features, Tile::columns / Dot::group,
                  s.right_rows, shape.padded_dim, s.sums + first * shape.padded_dim, shape.padded_dim, accumulate);
}

// s.rows (columns, padded_dim) = the transpose of acc.
template <class V, class T>
static inline void transpose_to_rows(const FavorShape<V, T>& shape, const FavorScratch<V, T>& s, const float* acc,
                                     int64_t columns) {
  for (int64_t d = 0; d < shape.padded_dim; d += V::width)
    for (int64_t j = 0; j < columns; j += V::width) {
      typename V::reg x[V::width];
      for (int i = 0; i < V::width; ++i) x[i] = V::load(acc + (d + i) * FavorTile<V, T>::columns + j);
      V::transpose(x);
      for (int i = 0; i < V::width; ++i) V::store(s.rows + (j + i) * shape.padded_dim + d, x[i]);
    }
}

// dst = a * factor_a + b * factor_b, n elements.
template <class V, class B, class T>
static inline void store_sum(const float* a, float factor_a, const B* b, float factor_b, int64_t n, T* dst) {
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width)
    V::store(dst + i, V::fma(V::load(a + i), V::set1(factor_a), V::mul(V::load(b + i), V::set1(factor_b))));
  for (; i < n; ++i) from_float(a[i] * factor_a + to_float(b[i]) * factor_b, dst + i);
}

// sum (padded) += row * factor, n elements.
template <class V, class T>
static inline void add_row(const T* row, float factor, int64_t n, float* sum) {
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) V::store(sum + i, V::fma(V::load(row + i), V::set1(factor), V::load(sum + i)));
  for (; i < n; ++i) sum[i] += to_float(row[i]) * factor;
}

template <class V, class T>
static inline float dot_rows(const T* a, const T* b, int64_t n) {
  auto sum = V::zero();
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) sum = V::fma(V::load(a + i), V::load(b + i), sum);
  float total = V::sum(sum);
  for (; i < n; ++i) total += to_float(a[i]) * to_float(b[i]);
  return total;
}

static inline void clear(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = 0.0f;
}

template <class V>
static inline void scale_all(float* x, int64_t n, float factor) {
  store_row<V>(x, n, factor, x);
}

// s.context_sum = the sum over all features of a (features, dim) array. With eps in command they are all alike, and
// rounding errors of a sum of equal numbers do not average out.
template <class V, class T>
static inline void sum_over_features(const FavorShape<V, T>& shape, const FavorScratch<V, T>& s, const float* context) {
  for (int64_t d = 0; d < shape.dim; ++d) s.wide_sum[d] = 0.0;
  for (int64_t f = 0; f < shape.features; ++f)
    for (int64_t d = 0; d < shape.dim; ++d) s.wide_sum[d] += context[f * shape.dim + d];
  for (int64_t d = 0; d < shape.dim; ++d) s.context_sum[d] = float(s.wide_sum[d]);
}

template <class V, class T>
void favor_context(const FavorArgs& args, const RowChunk& keys, int64_t head, FavorPart& part, void* scratch) {
  using Tile = FavorTile<V, T>;
  using Dot = typename Tile::Dot;
  constexpr bool accurate = std::is_same_v<T, float>;
  const FavorShape<V, T> shape(args);
  const FavorScratch<V, T> s(args, scratch);
  const typename Dot::Session session;
  (void)session;
  pack_projection(args, shape, s);
  const int64_t sums = shape.features * shape.padded_dim;
  clear(part.context, sums);
  clear(part.context_of_eps, shape.padded_dim);
  clear(s.lanes, shape.features * V::width);
  float key_max = -INFINITY;
  for_each_token_block<V, T>(keys, [&](int64_t first, int64_t count, int64_t columns) {
    const bool chain_starts = (first - keys.first) % Tile::chain == 0;
    if (chain_starts && first != keys.first) add_row<V>(s.sums, 1.0f, sums, part.context);
    pack_columns(shape, args.k, first, count, columns, head, s.right_x);
    pack_rows(shape, args.v, first, count, columns, head, s.right_rows);
    half_norms_of_columns(shape, s, count, columns);
    clear(s.context_sum, shape.padded_dim);
    for (int64_t r = 0; r < count; ++r)
      add_row<V>(rows_of<T>(args.v, first + r, head), 1.0f, shape.dim, s.context_sum);
    add_row<V>(s.context_sum, 1.0f, shape.dim, part.context_of_eps);
    for (int64_t f0 = 0; f0 < shape.features; f0 += Tile::features) {
      const int64_t features = min_of(Tile::features, shape.features - f0);
      product_with_columns(shape, f0, features, s.projection, s.right_x, columns, s.scores);
      // Without eps the stabiliser cancels, and the maximum of scores - half norms keeps the largest feature at 1.
      auto maximum = V::set1(-INFINITY);
      for (int64_t j = 0; j < columns; j += V::width) {
        auto column_max = V::load(s.scores + j);
        for (int64_t f = 1; f < features; ++f) column_max = V::max(column_max, V::load(s.scores + f * Tile::columns + j));
        if (args.eps == 0.0f)
          column_max = V::add(column_max, V::load(s.half_norms + j));
        else if (j + V::width > count)
          column_max = V::keep_first(column_max, int(max_of<int64_t>(count - j, 0)), -INFINITY);
        maximum = V::max(maximum, column_max);
      }
      const float block_max = V::maximum(maximum);
      if (!(block_max <= key_max)) {  // NaN enters too
        const float factor = std::exp2(key_max - block_max);
        scale_all<V>(part.context, sums, factor);
        // At the start of a chain these are the sums of another one, which are about to be overwritten.
        if (!chain_starts || f0) scale_all<V>(s.sums, chain_starts ? f0 * shape.padded_dim : sums, factor);
        scale_all<V>(s.lanes, shape.features * V::width, factor);
        key_max = block_max;
      }
      const auto stabilizer = V::set1(key_max);
      with_columns<Tile::columns>(columns, [&](auto n) {
        for (int64_t f = 0; f < features; ++f) {
          const float* scores = s.scores + f * Tile::columns;
          auto* row = s.left_features + f * (Tile::columns / Dot::group);
          const auto feature = [&](int64_t j) {
            return exponential<V, accurate>(V::load(scores + j), stabilizer, V::load(s.half_norms + j));
          };
          auto sum = V::load(s.lanes + (f0 + f) * V::width);
          int64_t paired = 0;
          for (; paired + 2 * V::width <= n; paired += 2 * V::width) {
            const auto x = feature(paired), y = feature(paired + V::width);
            sum = V::add(sum, V::add(x, y));
            Dot::store_pair(row, paired, x, y);
          }
          for (int64_t j = paired; j < n; j += V::width) {
            const auto x = feature(j);
            sum = V::add(sum, x);
            Dot::store(row, j, x);
          }
          V::store(s.lanes + (f0 + f) * V::width, sum);
        }
      });
      product_with_rows(shape, s, f0, features, columns, !chain_starts);
    }
  });
  add_row<V>(s.sums, 1.0f, sums, part.context);
  for (int64_t f = 0; f < shape.features; ++f) part.key_sum[f] = V::sum(V::load(s.lanes + f * V::width));
  part.key_sum_of_eps = float(keys.rows);
  part.key_max = key_max;
}

template <class V>
void favor_sum(const FavorArgs& args, const FavorPart* parts, int64_t count, int64_t stride, float key_max,
               float* context, float* key_sum) {
  const int64_t dim = args.head_dim, padded_dim = round_up(dim, V::width);
  clear(context, args.num_features * dim);
  clear(key_sum, args.num_features);
  for (int64_t i = 0; i < count; ++i) {
    const FavorPart& part = parts[i * stride];
    float rest = part.key_max - key_max;
    // key_max was rounded after it was found. Where that is more than its last digits its key's half norm, about its
    // square, leaves nothing of any feature, and the factor must not make NaN of that. Without eps nothing says so.
    if (args.eps != 0.0f && rest > 1.0f) rest = 1.0f;
    const float factor = std::exp2(rest);
    for (int64_t f = 0; f < args.num_features; ++f) {
      add_row<V>(part.context + f * padded_dim, factor, dim, context + f * dim);
      add_row<V>(part.context_of_eps, args.eps, dim, context + f * dim);
      key_sum[f] += part.key_sum[f] * factor + args.eps * part.key_sum_of_eps;
    }
  }
}

template <class V, class T>
void favor_query(const FavorArgs& args, const RowChunk& queries, int64_t head, void* scratch) {
  using Tile = FavorTile<V, T>;
  using Dot = typename Tile::Dot;
  constexpr bool accurate = std::is_same_v<T, float>;
  const FavorShape<V, T> shape(args);
  const FavorScratch<V, T> s(args, scratch);
  const typename Dot::Session session;
  (void)session;
  const int64_t group = queries.segment * args.num_heads + head;
  const float* context = args.context + group * shape.features * shape.dim;
  const float* key_sum = args.key_sum + group * shape.features;
  pack_projection(args, shape, s);
  pack_left_transposed<V, Dot>(context, shape.dim, shape.features, shape.dim, 1.0, s.context_t, shape.feature_steps);
  sum_over_features(shape, s, context);
  double wide_sum = 0.0;
  for (int64_t f = 0; f < shape.features; ++f) wide_sum += key_sum[f];
  const float key_sum_sum = float(wide_sum);
  for_each_token_block<V, T>(queries, [&](int64_t first, int64_t count, int64_t columns) {
    pack_columns(shape, args.q, first, count, columns, head, s.right_x);
    half_norms_of_columns(shape, s, count, columns);
    for (int64_t f0 = 0; f0 < shape.features; f0 += Tile::features) {
      const int64_t features = min_of(Tile::features, shape.features - f0);
      product_with_columns(shape, f0, features, s.projection, s.right_x, columns, s.scores);
      for (int64_t j = 0; j < columns; j += V::width) {
        const float* scores = s.scores + j;
        auto even_max = V::load(scores), odd_max = even_max;
        for (int64_t f = 0; f + 2 <= features; f += 2) {
          even_max = V::max(even_max, V::load(scores + f * Tile::columns));
          odd_max = V::max(odd_max, V::load(scores + (f + 1) * Tile::columns));
        }
        if (features % 2) even_max = V::max(even_max, V::load(scores + (features - 1) * Tile::columns));
        auto row_max = V::max(even_max, odd_max);
        auto even_sum = V::zero(), odd_sum = V::zero();
        if (f0) {
          const auto old_max = V::load(s.row_max + j);
          row_max = V::max(old_max, row_max);
          const auto factor = exp2<V, true>(V::sub(old_max, row_max));
          even_sum = V::mul(V::load(s.row_sum + j), factor);
          for (int64_t d = 0; d < shape.dim; ++d)
            V::store(s.acc_a + d * Tile::columns + j, V::mul(V::load(s.acc_a + d * Tile::columns + j), factor));
        }
        int64_t f = 0;
        for (; f + 2 <= features; f += 2) {
          const auto x = exp2<V, accurate>(V::sub(V::load(scores + f * Tile::columns), row_max));
          const auto y = exp2<V, accurate>(V::sub(V::load(scores + (f + 1) * Tile::columns), row_max));
          even_sum = V::fma(x, V::set1(key_sum[f0 + f]), even_sum);
          odd_sum = V::fma(y, V::set1(key_sum[f0 + f + 1]), odd_sum);
          Dot::store_rows(s.right_features, Tile::columns, f, j, x, y);
        }
        if (f < features) {
          const auto x = exp2<V, accurate>(V::sub(V::load(scores + f * Tile::columns), row_max));
          even_sum = V::fma(x, V::set1(key_sum[f0 + f]), even_sum);
          Dot::store_rows(s.right_features, Tile::columns, f, j, x, V::zero());
        }
        V::store(s.row_max + j, row_max);
        V::store(s.row_sum + j, V::add(even_sum, odd_sum));
      }
      product_with_features(shape, f0, features, s.context_t, s.right_features, columns, s.acc_a);
    }
    transpose_to_rows(shape, s, s.acc_a, columns);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = head * args.total_q + first + r;
      args.row_max[at] = s.row_max[r] * kLn2;
      // Without eps the half norm of a query cancels; left out, it cannot make the feature vanish.
      const float half_norm = args.eps == 0.0f ? 0.0f : s.half_norms[r];
      const float query = std::exp2(half_norm + (s.row_max[r] - in_log2(args.row_max[at])));
      const float row_sum = args.row_sum[at] = query * s.row_sum[r] + args.eps * key_sum_sum;
      store_sum<V>(s.rows + r * shape.padded_dim, query / row_sum, s.context_sum, args.eps / row_sum, shape.dim,
                   static_cast<T*>(args.out) + ((first + r) * args.num_heads + head) * shape.dim);
    }
  });
}

// Gradients with respect to the scores of a block, times scale and projection, are in acc, their sums in s.grad_sum: the
// gradient of x, to which they come through scores and half norms, is written to dst. If each row has a maximum of its
// own, s.largest_feature has that.
template <class V, class T>
static inline void store_projected(const FavorArgs& args, const FavorShape<V, T>& shape, const FavorScratch<V, T>& s,
                                   const float* acc, const Operand& x, int64_t first, int64_t count, int64_t columns,
                                   int64_t head, bool row_maxima, void* dst) {
  transpose_to_rows(shape, s, acc, columns);
  for (int64_t r = 0; r < count; ++r) {
    if (row_maxima)
      add_row<V>(args.projection + int64_t(s.largest_feature[r]) * shape.dim, float(-shape.scale * s.grad_sum[r]),
                 shape.dim, s.rows + r * shape.padded_dim);
    store_sum<V>(s.rows + r * shape.padded_dim, 1.0f, rows_of<T>(x, first + r, head),
                 float(-shape.scale * shape.scale * double(s.grad_sum[r])), shape.dim,
                 static_cast<T*>(dst) + ((first + r) * args.num_heads + head) * shape.dim);
  }
}

template <class V, class T>
void favor_backward_query(const FavorArgs& args, const RowChunk& queries, int64_t head, FavorPart& part,
                          void* scratch) {
  using Tile = FavorTile<V, T>;
  using Dot = typename Tile::Dot;
  constexpr bool accurate = std::is_same_v<T, float>;
  const FavorShape<V, T> shape(args);
  const FavorScratch<V, T> s(args, scratch);
  const typename Dot::Session session;
  (void)session;
  const int64_t group = queries.segment * args.num_heads + head;
  const float* key_sum = args.key_sum + group * shape.features;
  pack_projection(args, shape, s);
  pack_projection_transposed(args, shape, s);
  pack_left_scaled<V, Dot>(args.context + group * shape.features * shape.dim, shape.dim, shape.features, shape.dim, 1.0f,
                           s.context, shape.steps);
  const int64_t sums = shape.features * shape.padded_dim;
  clear(part.context, sums);
  clear(part.context_of_eps, shape.padded_dim);
  clear(s.lanes, shape.features * V::width);
  double key_sum_of_eps = 0.0;
  for_each_token_block<V, T>(queries, [&](int64_t first, int64_t count, int64_t columns) {
    const bool chain_starts = (first - queries.first) % Tile::chain == 0;
    if (chain_starts && first != queries.first) add_row<V>(s.sums, 1.0f, sums, part.context);
    pack_columns(shape, args.q, first, count, columns, head, s.right_x);
    pack_columns(shape, args.grad_out, first, count, columns, head, s.right_y);
    pack_rows(shape, args.grad_out, first, count, columns, head, s.right_rows);
    half_norms_of_columns(shape, s, count, columns);
    clear(s.context_sum, shape.padded_dim);
    for (int64_t r = 0; r < columns; ++r) {
      s.minus_delta[r] = s.grad_sum[r] = 0.0f;
      s.row_max[r] = s.largest_feature[r] = 0.0f;
      s.largest[r] = -INFINITY;
      if (r >= count) continue;
      const T* grad = rows_of<T>(args.grad_out, first + r, head);
      const T* out = static_cast<const T*>(args.out) + ((first + r) * args.num_heads + head) * shape.dim;
      const int64_t at = head * args.total_q + first + r;
      s.minus_delta[r] = -dot_rows<V>(grad, out, shape.dim);
      s.row_max[r] = in_log2(args.row_max[at]);
      // Every use of a feature divides it by the row's sum.
      s.half_norms[r] = (args.eps == 0.0f ? 0.0f : s.half_norms[r]) - std::log2(args.row_sum[at]);
      add_row<V>(grad, 1.0f / args.row_sum[at], shape.dim, s.context_sum);
      key_sum_of_eps += s.minus_delta[r] / args.row_sum[at];
    }
    add_row<V>(s.context_sum, 1.0f, shape.dim, part.context_of_eps);
    for (int64_t f0 = 0; f0 < shape.features; f0 += Tile::features) {
      const int64_t features = min_of(Tile::features, shape.features - f0);
      product_with_columns(shape, f0, features, s.projection, s.right_x, columns, s.scores);
      product_with_columns(shape, f0, features, s.context, s.right_y, columns, s.grad_features);
      for (int64_t j = 0; j < columns; j += V::width) {
        const auto row_max = V::load(s.row_max + j), half_norm = V::load(s.half_norms + j);
        const auto minus_delta = V::load(s.minus_delta + j);
        auto grad_sum = V::load(s.grad_sum + j);
        auto largest = V::load(s.largest + j), largest_feature = V::load(s.largest_feature + j);
        auto feature = V::set1(float(f0));
        const auto grad_score = [&](int64_t f) {
          const int64_t at = f * Tile::columns + j;
          const auto score = V::load(s.scores + at);
          largest_feature = V::where_greater(score, largest, feature, largest_feature);
          largest = V::max(score, largest);
          feature = V::add(feature, V::set1(1.0f));
          const auto x = exponential<V, accurate>(score, row_max, half_norm);
          const auto grad = V::fma(V::set1(key_sum[f0 + f]), minus_delta, V::load(s.grad_features + at));
          float* lanes = s.lanes + (f0 + f) * V::width;
          V::store(lanes, V::fma(x, minus_delta, V::load(lanes)));
          Dot::store(s.left_features + f * (Tile::columns / Dot::group), j, x);
          const auto product = V::mul(x, grad);
          grad_sum = V::add(grad_sum, product);
          return product;
        };
        int64_t f = 0;
        for (; f + 2 <= features; f += 2) {
          const auto x = grad_score(f), y = grad_score(f + 1);
          Dot::store_rows(s.right_grad_scores, Tile::columns, f, j, x, y);
        }
        if (f < features) Dot::store_rows(s.right_grad_scores, Tile::columns, f, j, grad_score(f), V::zero());
        V::store(s.grad_sum + j, grad_sum);
        V::store(s.largest + j, largest);
        V::store(s.largest_feature + j, largest_feature);
      }
      product_with_rows(shape, s, f0, features, columns, !chain_starts);
      product_with_features(shape, f0, features, s.projection_t, s.right_grad_scores, columns, s.acc_a);
    }
    // Without eps the maximum cancels.
    store_projected(args, shape, s, s.acc_a, args.q, first, count, columns, head, args.eps != 0.0f, args.grad_q);
  });
  add_row<V>(s.sums, 1.0f, sums, part.context);
  part.key_sum_of_eps = float(key_sum_of_eps);
  part.key_max = 0.0f;
  for (int64_t f = 0; f < shape.features; ++f) part.key_sum[f] = V::sum(V::load(s.lanes + f * V::width));
}

// Brings part up to date with the scores (features of a block, columns) of a block of tokens. The largest one is looked
// for where it can be larger than what was found before, which is seldom.
template <class V, class T>
static inline void update_largest(const FavorScratch<V, T>& s, int64_t first, int64_t count, int64_t first_feature,
                                  int64_t features, FavorKeyPart& part) {
  using Tile = FavorTile<V, T>;
  auto maximum = V::set1(-INFINITY);
  for (int64_t j = 0; j < count; j += V::width) {
    auto column_max = V::load(s.scores + j);
    for (int64_t f = 1; f < features; ++f) column_max = V::max(column_max, V::load(s.scores + f * Tile::columns + j));
    maximum = V::max(maximum, V::keep_first(column_max, int(min_of<int64_t>(count - j, V::width)), -INFINITY));
  }
  const float largest = V::maximum(maximum);
  if (!(largest >= part.score)) return;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t f = 0; f < features; ++f)
      if (s.scores[f * Tile::columns + r] == largest) {
        // An equal score of an earlier block of features comes first unless its row is a later one.
        if (largest > part.score || first + r < part.row) part = {largest, first + r, first_feature + f, part.grad_sum};
        return;
      }
}

template <class V, class T>
void favor_backward_key(const FavorArgs& args, const RowChunk& keys, int64_t head, FavorKeyPart& part, void* scratch) {
  using Tile = FavorTile<V, T>;
  using Dot = typename Tile::Dot;
  constexpr bool accurate = std::is_same_v<T, float>;
  const FavorShape<V, T> shape(args);
  const FavorScratch<V, T> s(args, scratch);
  const typename Dot::Session session;
  (void)session;
  const int64_t group = keys.segment * args.num_heads + head;
  const float* grad_context = args.grad_context + group * shape.features * shape.dim;
  const float* grad_key_sum = args.grad_key_sum + group * shape.features;
  const auto key_max = V::set1(in_log2(args.key_max[group]));
  pack_projection(args, shape, s);
  pack_projection_transposed(args, shape, s);
  pack_left_scaled<V, Dot>(grad_context, shape.dim, shape.features, shape.dim, 1.0, s.context, shape.steps);
  pack_left_transposed<V, Dot>(grad_context, shape.dim, shape.features, shape.dim, 1.0, s.context_t,
                               shape.feature_steps);
  sum_over_features(shape, s, grad_context);
  part = {-INFINITY, keys.first, 0, 0.0};
  for_each_token_block<V, T>(keys, [&](int64_t first, int64_t count, int64_t columns) {
    pack_columns(shape, args.k, first, count, columns, head, s.right_x);
    pack_columns(shape, args.v, first, count, columns, head, s.right_y);
    half_norms_of_columns(shape, s, count, columns);
    clear(s.grad_sum, columns);
    for (int64_t f0 = 0; f0 < shape.features; f0 += Tile::features) {
      const int64_t features = min_of(Tile::features, shape.features - f0);
      product_with_columns(shape, f0, features, s.projection, s.right_x, columns, s.scores);
      product_with_columns(shape, f0, features, s.context, s.right_y, columns, s.grad_features);
      if (args.eps != 0.0f) update_largest(s, first, count, f0, features, part);
      for (int64_t j = 0; j < columns; j += V::width) {
        const auto half_norm = V::load(s.half_norms + j);
        auto grad_sum = V::load(s.grad_sum + j);
        const auto feature = [&](int64_t f) {
          return exponential<V, accurate>(V::load(s.scores + f * Tile::columns + j), key_max, half_norm);
        };
        const auto grad_feature = [&](int64_t f) {
          return V::add(V::load(s.grad_features + f * Tile::columns + j), V::set1(grad_key_sum[f0 + f]));
        };
        int64_t f = 0;
        for (; f < features; f += 2) {
          const bool has_odd = f + 1 < features;
          const auto x = feature(f), y = has_odd ? feature(f + 1) : V::zero();
          const auto grad_x = V::mul(x, grad_feature(f)), grad_y = has_odd ? V::mul(y, grad_feature(f + 1)) : V::zero();
          grad_sum = V::add(grad_sum, V::add(grad_x, grad_y));
          Dot::store_rows(s.right_features, Tile::columns, f, j, x, y);
          Dot::store_rows(s.right_grad_scores, Tile::columns, f, j, grad_x, grad_y);
        }
        V::store(s.grad_sum + j, grad_sum);
      }
      product_with_features(shape, f0, features, s.context_t, s.right_features, columns, s.acc_a);
      product_with_features(shape, f0, features, s.projection_t, s.right_grad_scores, columns, s.acc_b);
    }
    for (int64_t r = 0; r < count; ++r) part.grad_sum += s.grad_sum[r];
    store_projected(args, shape, s, s.acc_b, args.k, first, count, columns, head, false, args.grad_k);
    transpose_to_rows(shape, s, s.acc_a, columns);
    for (int64_t r = 0; r < count; ++r)
      store_sum<V>(s.rows + r * shape.padded_dim, 1.0f, s.context_sum, args.eps, shape.dim,
                   static_cast<T*>(args.grad_v) + ((first + r) * args.num_heads + head) * shape.dim);
  });
}

template <class V, class T>
void favor_backward_key_max(const FavorArgs& args, const FavorKeyPart* parts, int64_t chunks, int64_t first_head,
                            int64_t heads) {
  const FavorShape<V, T> shape(args);
  const FavorKeyPart* largest = parts + first_head;
  int64_t largest_head = first_head;
  double grad_sum = 0.0;
  for (int64_t h = first_head; h < first_head + heads; ++h)
    for (int64_t i = 0; i < chunks; ++i) {
      const FavorKeyPart& part = parts[i * args.num_heads + h];
      grad_sum += part.grad_sum;
      if (!(part.score > largest->score)) continue;
      largest = &part;
      largest_head = h;
    }
  T* row = static_cast<T*>(args.grad_k) + (largest->row * args.num_heads + largest_head) * shape.dim;
  store_sum<V>(args.projection + largest->feature * shape.dim, float(-shape.scale * grad_sum), row, 1.0f, shape.dim,
               row);
}

}  // namespace xtg
