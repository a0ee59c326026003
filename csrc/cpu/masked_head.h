// masked_head and masked_mse on a CPU: the algorithm, over raw pointers and one vector type V; no torch in here.
//
//   normed1 = (x - mean) rstd1               middle = normed1 norm1_weight + norm1_bias
//   normed2 = (middle - mean) rstd2          prediction = weight . (normed2 norm2_weight + norm2_bias) + bias
//
// a row at a time, in float. With scale = weight norm2_weight the prediction is normed2 . scale + offset, and what the
// parameters' gradients need of all rows is three sums, of grad normed2, grad_middle normed1 and grad_middle. A row that
// is chosen again has one gradient times the sum of what comes from above.
// The same words as in xtg_kernels/ops/masked_head/reference.py and triton_kernel.py.
#pragma once

#include <cmath>

#include "../common/kernels.h"
#include "../common/product.h"
#include "../common/scratch.h"

namespace xtg {

constexpr int64_t kHeadBlock = 32;  // rows of one unit of work

template <class V>
struct HeadScratch {
  float *normed1, *normed2, *grad;                // (padded_dim,)
  float *sum_normed2, *sum_product, *sum_middle;  // (padded_dim,) one after the other, sums over one block
  size_t bytes;

  HeadScratch(const HeadArgs& args, void* base) {
    ScratchCursor cursor{static_cast<char*>(base), 0};
    normed1 = cursor.take<float>(args.padded_dim);
    normed2 = cursor.take<float>(args.padded_dim);
    grad = cursor.take<float>(args.padded_dim);
    sum_normed2 = cursor.take<float>(3 * args.padded_dim);
    sum_product = sum_normed2 + args.padded_dim;
    sum_middle = sum_product + args.padded_dim;
    bytes = cursor.used;
  }
};

template <class V>
size_t head_scratch(const HeadArgs& args) {
  return HeadScratch<V>(args, nullptr).bytes;
}

// Sum over n elements of what f(j) gives for V::width of them, in four chains.
template <class V, class F>
static inline float sum_over(int64_t n, F f) {
  typename V::reg sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t j = 0;
  for (; j + 4 * V::width <= n; j += 4 * V::width)
    for (int i = 0; i < 4; ++i) sum[i] = V::add(sum[i], f(j + i * V::width));
  for (; j < n; j += V::width) sum[0] = V::add(sum[0], f(j));
  return V::sum(V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
}

// x <- (x - mean) rstd over dim elements, zero up to padded; returns rstd.
template <class V>
static inline float normalise(float* x, int64_t dim, int64_t padded, float eps) {
  const auto mean = V::set1(sum_over<V>(padded, [&](int64_t j) { return V::load(x + j); }) / float(dim));
  const float variance = sum_over<V>(padded, [&](int64_t j) {
    auto centred = V::sub(V::load(x + j), mean);
    if (j + V::width > dim) centred = V::keep_first(centred, int(dim - j), 0.0f);
    V::store(x + j, centred);
    return V::mul(centred, centred);
  }) / float(dim);
  const float rstd = 1.0f / std::sqrt(variance + eps);
  for (int64_t j = 0; j < padded; j += V::width) V::store(x + j, V::mul(V::load(x + j), V::set1(rstd)));
  return rstd;
}

struct HeadRow {
  float rstd1, rstd2, product, prediction;  // product = normed2 . scale
};

// normed1 and normed2 of one row into s, and its prediction.
template <class V, class T>
static inline HeadRow predict_row(const HeadArgs& args, const HeadScratch<V>& s, int64_t row) {
  const int64_t dim = args.dim, padded = args.padded_dim;
  HeadRow r;
  load_row<V>(static_cast<const T*>(args.x) + row * args.row_stride, dim, s.normed1, padded);
  r.rstd1 = normalise<V>(s.normed1, dim, padded, args.eps);
  for (int64_t j = 0; j < padded; j += V::width)
    V::store(s.normed2 + j, V::fma(V::load(s.normed1 + j), V::load(args.norm1_weight + j), V::load(args.norm1_bias + j)));
  r.rstd2 = normalise<V>(s.normed2, dim, padded, args.eps);
  r.product = sum_over<V>(padded, [&](int64_t j) { return V::mul(V::load(s.normed2 + j), V::load(args.scale + j)); });
  r.prediction = r.product + args.offset;
  return r;
}

// predictions of chosen rows [first, first + count), from predictions[0] on.
template <class V, class T>
void head_forward(const HeadArgs& args, int64_t first, int64_t count, float* predictions, void* scratch) {
  const HeadScratch<V> s(args, scratch);
  for (int64_t i = 0; i < count; ++i)
    predictions[i] = predict_row<V, T>(args, s, args.rows ? args.rows[first + i] : first + i).prediction;
}

template <class V>
static inline void add_to(float* sum, const float* x, int64_t padded) {
  for (int64_t j = 0; j < padded; j += V::width) V::store(sum + j, V::add(V::load(sum + j), V::load(x + j)));
}

// grad_x of different rows [first, first + count), and their share of the sums, one block at a time.
template <class V, class T>
void head_backward(const HeadArgs& args, int64_t first, int64_t count, const HeadSums& sums, void* scratch) {
  const HeadScratch<V> s(args, scratch);
  const int64_t dim = args.dim, padded = args.padded_dim;
  std::memset(s.sum_normed2, 0, size_t(3 * padded) * sizeof(float));
  const auto mean_scale = V::set1(args.mean_scale);
  for (int64_t u = first; u < first + count; ++u) {
    const int64_t row = args.chosen[u];
    const HeadRow r = predict_row<V, T>(args, s, row);
    // What comes from above, summed over the positions at which the row is chosen, in their order.
    float grad_out = 0.0f;
    for (int64_t i = args.offsets[u]; i < args.offsets[u + 1]; ++i) {
      const int64_t position = args.positions[i];
      grad_out += args.target ? args.loss_factor * (r.prediction - args.target[position]) : args.grad_out[position];
    }
    *sums.grad_out += double(grad_out);

    // grad_middle, by way of the second norm.
    const auto factor = V::set1(grad_out * r.rstd2), mean_product = V::set1(r.product / float(dim));
    const float mean_grad = sum_over<V>(padded, [&](int64_t j) {
      const auto normed2 = V::load(s.normed2 + j);
      const auto centred = V::sub(V::sub(V::load(args.scale + j), mean_scale), V::mul(normed2, mean_product));
      const auto grad_middle = V::mul(factor, centred);
      V::store(s.sum_normed2 + j, V::fma(V::set1(grad_out), normed2, V::load(s.sum_normed2 + j)));
      V::store(s.sum_product + j, V::fma(grad_middle, V::load(s.normed1 + j), V::load(s.sum_product + j)));
      V::store(s.sum_middle + j, V::add(grad_middle, V::load(s.sum_middle + j)));
      const auto grad = V::mul(grad_middle, V::load(args.norm1_weight + j));
      V::store(s.grad + j, grad);
      return grad;
    }) / float(dim);
    // grad_x, by way of the first.
    const float mean_grad_product = sum_over<V>(padded, [&](int64_t j) {
      return V::mul(V::load(s.grad + j), V::load(s.normed1 + j));
    }) / float(dim);
    for (int64_t j = 0; j < padded; j += V::width) {
      const auto centred = V::sub(V::load(s.grad + j), V::set1(mean_grad));
      const auto grad_x = V::sub(centred, V::mul(V::load(s.normed1 + j), V::set1(mean_grad_product)));
      V::store(s.grad + j, V::mul(V::set1(r.rstd1), grad_x));
    }
    store_row<V>(s.grad, dim, 1.0f, static_cast<T*>(args.grad_x) + row * dim);
  }
  add_to<V>(sums.normed2, s.sum_normed2, padded);
  add_to<V>(sums.product, s.sum_product, padded);
  add_to<V>(sums.middle, s.sum_middle, padded);
}

}  // namespace xtg
