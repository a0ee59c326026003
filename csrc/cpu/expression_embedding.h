// expression_embedding on a CPU: the algorithm, over raw pointers and one vector type V; no torch in here.
//
// A block of distinct values at a time: hidden = LeakyReLU(w1 v + b1), logits = alpha hidden + w2 hidden + b2,
// bin_weights = softmax(logits), row = bin_weights x bin_table; then every token of a value is written once, with its
// gene's row added. The backward recomputes these for its block. No (nnz, bins) array exists.
// The same words as in xtg_kernels/ops/expression_embedding/reference.py and triton_kernel.py.
#pragma once

#include <cmath>

#include "../common/exp.h"
#include "../common/kernels.h"
#include "../common/product.h"
#include "../common/scratch.h"

namespace xtg {

constexpr float kLeakySlope = 0.1f;
constexpr int64_t kValueBlock = 24;  // distinct values whose rows are held at a time: a multiple of every tile height

struct EmbeddingScratch {
  float *hidden, *logits, *rows;                        // (block, bins), (block, bins), (block, dim), padded
  float *grad_rows, *grad_logits, *grad_hidden;         // (block, dim), (block, bins), (block, bins), padded
  float* transposed;                                    // (bins, block)
  float *d_hidden, *d_logits, *d_rows;                  // derivatives of the three with respect to the value
  size_t bytes;

  EmbeddingScratch(const EmbeddingArgs& args, void* base) {
    ScratchCursor cursor{static_cast<char*>(base), 0};
    const int64_t bins = kValueBlock * args.padded_bins, dim = kValueBlock * args.padded_dim;
    hidden = cursor.take<float>(bins);
    logits = cursor.take<float>(bins);
    rows = cursor.take<float>(dim);
    grad_rows = cursor.take<float>(dim);
    grad_logits = cursor.take<float>(bins);
    grad_hidden = cursor.take<float>(bins);
    transposed = cursor.take<float>(bins);
    d_hidden = cursor.take<float>(bins);
    d_logits = cursor.take<float>(bins);
    d_rows = cursor.take<float>(dim);
    bytes = cursor.used;
  }
};

static inline size_t embedding_scratch(const EmbeddingArgs& args) { return EmbeddingScratch(args, nullptr).bytes; }

// hidden and bin_weights (in s.logits) of count distinct values; padded columns are zero in both.
template <class V>
static inline void embed_bins(const EmbeddingArgs& args, const EmbeddingScratch& s, int64_t first, int64_t count) {
  const int64_t bins = args.bins, ld = args.padded_bins;
  for (int64_t u = 0; u < count; ++u) {
    const auto value = V::set1(args.values[args.first_token[first + u]]);
    for (int64_t j = 0; j < ld; j += V::width) {
      const auto pre = V::fma(value, V::load(args.w1 + j), V::load(args.b1 + j));
      V::store(s.hidden + u * ld + j, V::where_greater(pre, V::zero(), pre, V::mul(pre, V::set1(kLeakySlope))));
    }
  }
  product<V, DotFloat<V>>(count, ld, bins, s.hidden, ld, args.w2_transposed, ld, s.logits, ld, false);
  for (int64_t u = 0; u < count; ++u) {
    float* logits = s.logits + u * ld;
    auto maximum = V::set1(-INFINITY);
    for (int64_t j = 0; j < ld; j += V::width) {
      const auto linear = V::add(V::load(logits + j), V::load(args.b2 + j));
      auto x = V::fma(V::set1(args.alpha), V::load(s.hidden + u * ld + j), linear);
      if (j + V::width > bins) x = V::keep_first(x, int(bins - j), -INFINITY);
      V::store(logits + j, x);
      maximum = V::max(maximum, x);
    }
    const auto row_max = V::set1(V::maximum(maximum));
    auto sum = V::zero();
    for (int64_t j = 0; j < ld; j += V::width) {
      const auto p = exp2<V, true>(V::mul(V::sub(V::load(logits + j), row_max), V::set1(kLog2E)));
      sum = V::add(sum, p);
      V::store(logits + j, p);
    }
    store_row<V>(logits, ld, 1.0f / V::sum(sum), logits);
  }
}

// Rows that are visited in an order of their own come from memory one after the other unless somebody asks ahead.
template <class T>
static inline void prefetch_row(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d);
}

// Adds src's rows of tokens[1..count) to dst, in their order; dst holds the first one already.
template <class V, class T>
static inline void add_rows(const T* src, int64_t dim, const int32_t* tokens, int64_t count, float* dst) {
  for (int64_t i = 1; i < count; ++i) {
    if (i + 1 < count) prefetch_row(src + int64_t(tokens[i + 1]) * dim, dim);
    const T* row = src + int64_t(tokens[i]) * dim;
    int64_t d = 0;
    for (; d + V::width <= dim; d += V::width) V::store(dst + d, V::add(V::load(dst + d), V::load(row + d)));
    for (; d < dim; ++d) dst[d] += to_float(row[d]);
  }
}

template <class V, class T>
void embedding_forward(const EmbeddingArgs& args, int64_t first, int64_t count, void* scratch) {
  const EmbeddingScratch s(args, scratch);
  embed_bins<V>(args, s, first, count);
  product<V, DotFloat<V>>(count, args.padded_dim, args.bins, s.logits, args.padded_bins, args.bin_table,
                          args.padded_dim, s.rows, args.padded_dim, false);
  for (int64_t u = 0; u < count; ++u) {
    const float* row = s.rows + u * args.padded_dim;
    const int64_t end = args.offsets[first + count];
    for (int64_t i = args.offsets[first + u]; i < args.offsets[first + u + 1]; ++i) {
      const int64_t token = args.tokens[i];
      T* out = static_cast<T*>(args.out) + token * args.dim;
      if (!args.gene_table) {
        store_row<V>(row, args.dim, 1.0f, out);
        continue;
      }
      const T* gene_table = static_cast<const T*>(args.gene_table);
      const T* gene = gene_table + int64_t(args.gene_ids[token]) * args.dim;
      if (i + 1 < end) prefetch_row(gene_table + int64_t(args.gene_ids[args.tokens[i + 1]]) * args.dim, args.dim);
      int64_t d = 0;
      for (; d + V::width <= args.dim; d += V::width) V::store(out + d, V::add(V::load(row + d), V::load(gene + d)));
      for (; d < args.dim; ++d) from_float(row[d] + to_float(gene[d]), out + d);
    }
  }
}

template <class V>
static inline void transpose(const float* src, int64_t rows, int64_t columns, int64_t ld, float* dst) {
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) dst[j * rows + i] = src[i * ld + j];
}

// x <- bin_weights * (x - sum(x * bin_weights)), the derivative of a softmax applied to one row.
template <class V>
static inline void softmax_derivative(const float* bin_weights, float* x, int64_t n) {
  auto sum = V::zero();
  for (int64_t j = 0; j < n; j += V::width) sum = V::fma(V::load(x + j), V::load(bin_weights + j), sum);
  const auto mean = V::set1(V::sum(sum));
  for (int64_t j = 0; j < n; j += V::width)
    V::store(x + j, V::mul(V::load(bin_weights + j), V::sub(V::load(x + j), mean)));
}

// Adds the parameter gradients of count distinct values to grads, and writes grad_values of their tokens.
template <class V, class T>
void embedding_backward(const EmbeddingArgs& args, int64_t first, int64_t count, const EmbeddingGrads& grads,
                        void* scratch) {
  using Dot = DotFloat<V>;
  const EmbeddingScratch s(args, scratch);
  const int64_t bins = args.bins, dim = args.dim, ld = args.padded_bins, ld_dim = args.padded_dim;
  const T* grad_out = static_cast<const T*>(args.grad_out);
  embed_bins<V>(args, s, first, count);
  const float* bin_weights = s.logits;

  // Tokens of one value share a row: their gradients are summed, in token order, before the parameters see them.
  for (int64_t u = 0; u < count; ++u) {
    float* grad_row = s.grad_rows + u * ld_dim;
    const int32_t* tokens = args.tokens + args.offsets[first + u];
    load_row<V>(grad_out + int64_t(tokens[0]) * dim, dim, grad_row, ld_dim);
    add_rows<V>(grad_out, dim, tokens, args.offsets[first + u + 1] - args.offsets[first + u], grad_row);
  }
  transpose<V>(bin_weights, count, bins, ld, s.transposed);
  product<V, Dot>(bins, ld_dim, count, s.transposed, count, s.grad_rows, ld_dim, grads.bin_table, ld_dim, true);
  product<V, Dot>(count, ld, dim, s.grad_rows, ld_dim, args.bin_table_transposed, ld, s.grad_logits, ld, false);
  for (int64_t u = 0; u < count; ++u) {
    softmax_derivative<V>(bin_weights + u * ld, s.grad_logits + u * ld, ld);
    for (int64_t j = 0; j < ld; j += V::width)
      V::store(grads.b2 + j, V::add(V::load(grads.b2 + j), V::load(s.grad_logits + u * ld + j)));
  }
  transpose<V>(s.grad_logits, count, bins, ld, s.transposed);
  product<V, Dot>(bins, ld, count, s.transposed, count, s.hidden, ld, grads.w2, ld, true);
  product<V, Dot>(count, ld, bins, s.grad_logits, ld, args.w2, ld, s.grad_hidden, ld, false);
  for (int64_t u = 0; u < count; ++u) {
    const auto value = V::set1(args.values[args.first_token[first + u]]);
    for (int64_t j = 0; j < ld; j += V::width) {
      const auto grad_logits = V::load(s.grad_logits + u * ld + j);
      const auto grad_hidden = V::fma(V::set1(args.alpha), grad_logits, V::load(s.grad_hidden + u * ld + j));
      // hidden has the sign of its argument, so it tells the slope.
      const auto hidden = V::load(s.hidden + u * ld + j);
      const auto grad_pre = V::where_greater(hidden, V::zero(), grad_hidden, V::mul(grad_hidden, V::set1(kLeakySlope)));
      V::store(grads.b1 + j, V::add(V::load(grads.b1 + j), grad_pre));
      V::store(grads.w1 + j, V::fma(value, grad_pre, V::load(grads.w1 + j)));
    }
  }
  if (!args.grad_values) return;

  // d row / d value, pushed forward once per distinct value, then one dot product per token.
  for (int64_t u = 0; u < count; ++u)
    for (int64_t j = 0; j < ld; j += V::width) {
      const auto w1 = V::load(args.w1 + j);
      const auto hidden = V::load(s.hidden + u * ld + j);
      V::store(s.d_hidden + u * ld + j, V::where_greater(hidden, V::zero(), w1, V::mul(w1, V::set1(kLeakySlope))));
    }
  product<V, Dot>(count, ld, bins, s.d_hidden, ld, args.w2_transposed, ld, s.d_logits, ld, false);
  for (int64_t u = 0; u < count; ++u) {
    for (int64_t j = 0; j < ld; j += V::width) {
      const auto d_hidden = V::load(s.d_hidden + u * ld + j);
      V::store(s.d_logits + u * ld + j, V::fma(V::set1(args.alpha), d_hidden, V::load(s.d_logits + u * ld + j)));
    }
    softmax_derivative<V>(bin_weights + u * ld, s.d_logits + u * ld, ld);
  }
  product<V, Dot>(count, ld_dim, bins, s.d_logits, ld, args.bin_table, ld_dim, s.d_rows, ld_dim, false);
  for (int64_t u = 0; u < count; ++u)
    for (int64_t i = args.offsets[first + u]; i < args.offsets[first + u + 1]; ++i) {
      const T* row = grad_out + int64_t(args.tokens[i]) * dim;
      auto sum = V::zero();
      int64_t d = 0;
      for (; d + V::width <= dim; d += V::width) sum = V::fma(V::load(row + d), V::load(s.d_rows + u * ld_dim + d), sum);
      float grad_value = V::sum(sum);
      for (; d < dim; ++d) grad_value += to_float(row[d]) * s.d_rows[u * ld_dim + d];
      args.grad_values[args.tokens[i]] = grad_value;
    }
}

// dst = sum over tokens, in their order, of src[token]; scratch holds dim floats.
template <class V, class T>
void sum_rows(const void* src, int64_t dim, const int32_t* tokens, int64_t count, float* scratch, void* dst) {
  const T* rows = static_cast<const T*>(src);
  load_row<V>(rows + int64_t(tokens[0]) * dim, dim, scratch, dim);
  add_rows<V>(rows, dim, tokens, count, scratch);
  store_row<V>(scratch, dim, 1.0f, static_cast<T*>(dst));
}

}  // namespace xtg
