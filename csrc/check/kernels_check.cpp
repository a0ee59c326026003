// Checks the torch-free kernels without Python or torch: every ISA of the machine against plain loops in double.
// `make check-kernels` runs it here, `make check-aarch64` cross-compiled under qemu-user. Exit status 1 on a failure.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../common/distinct.h"
#include "../common/isa.h"
#include "../common/work_list.h"

using namespace xtg;

namespace {

int failures = 0;

void expect(bool ok, const std::string& what) {
  if (!ok) ++failures;
  std::printf("%s  %s\n", ok ? "ok  " : "FAIL", what.c_str());
}

double relative_error(const std::vector<float>& got, const std::vector<double>& want) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(difference / norm);
}

std::mt19937 generator(0);

std::vector<float> normal(size_t n, float scale = 1.0f) {
  std::normal_distribution<float> distribution(0.0f, scale);
  std::vector<float> x(n);
  for (float& v : x) v = distribution(generator);
  return x;
}

// Room that a kernel may use, filled with NaN so that a read of what was never written shows.
std::vector<double> poisoned(size_t bytes) { return std::vector<double>(bytes / sizeof(double) + 8, NAN); }

void* aligned(std::vector<double>& x) {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(x.data()) + 63) / 64 * 64);
}

// Every seventh query is `size` times as large as the others.
void check_attention(const Kernels& kernels, int64_t head_dim, bool one_pass, float size) {
  const std::vector<int32_t> cu_seqlens = {0, 0, 1, 63, 128, 128, 330};
  const int64_t batch = int64_t(cu_seqlens.size()) - 1, heads = 2, total = 333;
  const float scale = 0.3f;
  const int64_t row = 3 * heads * head_dim, n = total * heads * head_dim;
  auto qkv = normal(size_t(total * row));
  for (int64_t t = 0; t < total; t += 7)
    for (int64_t d = 0; d < heads * head_dim; ++d) qkv[size_t(t * row + d)] *= size;
  const auto grad_out = normal(size_t(n));
  std::vector<float> large_max(size_t(heads * total), NAN), large_sum(large_max);
  std::vector<float> out(size_t(n), NAN), lse(size_t(heads * total), NAN), delta(lse), grad_q(out), grad_k(out), grad_v(out);
  AttentionArgs args{};
  args.dtype = DType::f32;
  args.total_nnz = total;
  args.num_heads = heads;
  args.head_dim = head_dim;
  args.softmax_scale = scale;
  args.q = {qkv.data(), row, head_dim};
  args.k = {qkv.data() + heads * head_dim, row, head_dim};
  args.v = {qkv.data() + 2 * heads * head_dim, row, head_dim};
  args.out = out.data();
  args.softmax_lse = lse.data();
  args.grad_out = {grad_out.data(), heads * head_dim, head_dim};
  args.delta = delta.data();
  args.grad_q = grad_q.data();
  args.grad_k = grad_k.data();
  args.grad_v = grad_v.data();
  args.one_pass_rows = one_pass ? 330 : 0;
  args.large_max = size > 1.0f ? large_max.data() : nullptr;
  args.large_sum = large_sum.data();
  auto scratch = poisoned(kernels.attention_scratch(args) + 64);
  const auto blocks = segment_blocks(cu_seqlens.data(), batch, heads, 1);
  const auto run = [&](auto kernel, const std::vector<SegmentBlock>& work) {
    for (const SegmentBlock& block : work)
      for (int64_t h = 0; h < heads; ++h) kernel(args, block, h, aligned(scratch));
  };
  run(kernels.attention_forward, blocks);
  if (args.large_max) run(kernels.attention_backward_large, blocks);
  if (one_pass) {
    run(kernels.attention_backward, whole_segments(cu_seqlens.data(), batch, 1, 330));
  } else {
    run(kernels.attention_backward_query, blocks);
    run(kernels.attention_backward_key, blocks);
  }

  const auto at = [&](int part, int64_t t, int64_t h, int64_t d) {
    return double(qkv[size_t(t * row + (part * heads + h) * head_dim + d)]);
  };
  const auto flat = [&](int64_t t, int64_t h, int64_t d) { return size_t((t * heads + h) * head_dim + d); };
  std::vector<double> want_out(size_t(n), 0.0), want_q(want_out), want_k(want_out), want_v(want_out);
  for (int64_t c = 0; c < batch; ++c)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = cu_seqlens[size_t(c)]; i < cu_seqlens[size_t(c) + 1]; ++i) {
        const int64_t begin = cu_seqlens[size_t(c)], end = cu_seqlens[size_t(c) + 1];
        std::vector<double> probs(size_t(end - begin)), grad_probs(probs);
        double sum = 0, mean = 0, largest = -INFINITY;
        for (int64_t j = begin; j < end; ++j) {
          double& score = probs[size_t(j - begin)] = 0;
          for (int64_t d = 0; d < head_dim; ++d) score += scale * at(0, i, h, d) * at(1, j, h, d);
          largest = max_of(largest, score);
        }
        for (double& p : probs) sum += p = std::exp(p - largest);
        for (int64_t j = begin; j < end; ++j) {
          const double p = probs[size_t(j - begin)] /= sum;
          double& grad = grad_probs[size_t(j - begin)];
          for (int64_t d = 0; d < head_dim; ++d) {
            const double g = grad_out[flat(i, h, d)];
            want_out[flat(i, h, d)] += p * at(2, j, h, d);
            want_v[flat(j, h, d)] += p * g;
            grad += g * at(2, j, h, d);
          }
          mean += p * grad;
        }
        for (int64_t j = begin; j < end; ++j) {
          const double grad_score = scale * probs[size_t(j - begin)] * (grad_probs[size_t(j - begin)] - mean);
          for (int64_t d = 0; d < head_dim; ++d) {
            want_q[flat(i, h, d)] += grad_score * at(1, j, h, d);
            want_k[flat(j, h, d)] += grad_score * at(0, i, h, d);
          }
        }
      }
  const auto used = [&](std::vector<float> x) {  // rows past the last segment are the caller's to clear
    std::fill(x.begin() + int64_t(flat(cu_seqlens.back(), 0, 0)), x.end(), 0.0f);
    return x;
  };
  const std::string name = std::string(kernels.name) + " ragged_attention, head_dim " + std::to_string(head_dim) +
                           (one_pass ? ", backward in one pass" : ", backward in two passes") +
                           (size > 1.0f ? ", large scores" : "");
  expect(relative_error(used(out), want_out) < 2e-6, name + ": out");
  expect(relative_error(used(grad_q), want_q) < 3e-6, name + ": grad_q");
  expect(relative_error(used(grad_k), want_k) < 3e-6, name + ": grad_k");
  expect(relative_error(used(grad_v), want_v) < 3e-6, name + ": grad_v");
}

// Keys in two parts and queries of another segment's length; the formulas of the reference, term by term.
void check_favor(const Kernels& kernels, int64_t head_dim, int64_t num_features, double eps) {
  const int64_t heads = 2, total_q = 90, total_nnz = 201, split = 140;  // the last rows of k belong to no segment
  const int64_t used = total_nnz - 1, row = heads * head_dim;
  const auto q = normal(size_t(total_q * row)), k = normal(size_t(total_nnz * row)), v = normal(size_t(total_nnz * row));
  const auto grad_out = normal(size_t(total_q * row)), projection = normal(size_t(num_features * head_dim));
  std::vector<float> out(q.size(), NAN), grad_q(q.size(), NAN), grad_k(k.size(), NAN), grad_v(k.size(), NAN);
  std::vector<float> context(size_t(row * num_features), NAN), key_sum(size_t(heads * num_features), NAN);
  std::vector<float> grad_context(context), grad_key_sum(key_sum), key_max(size_t(heads), NAN);
  std::vector<float> row_max(size_t(heads * total_q), NAN), row_sum(row_max);
  FavorArgs args{};
  args.dtype = DType::f32;
  args.total_q = total_q;
  args.num_heads = heads;
  args.head_dim = head_dim;
  args.num_features = num_features;
  args.eps = float(eps);
  args.projection = projection.data();
  args.q = {q.data(), row, head_dim};
  args.k = {k.data(), row, head_dim};
  args.v = {v.data(), row, head_dim};
  args.grad_out = {grad_out.data(), row, head_dim};
  args.out = out.data();
  args.context = context.data();
  args.key_sum = key_sum.data();
  args.key_max = key_max.data();
  args.row_max = row_max.data();
  args.row_sum = row_sum.data();
  args.grad_context = grad_context.data();
  args.grad_key_sum = grad_key_sum.data();
  args.grad_q = grad_q.data();
  args.grad_k = grad_k.data();
  args.grad_v = grad_v.data();
  auto scratch = poisoned(kernels.favor_scratch(args) + 64);
  const int64_t padded_dim = round_up(head_dim, kernels.width), padded_features = round_up(num_features, 16);
  auto sums = poisoned(size_t(2 * (padded_features + 2) * padded_dim + 2 * padded_features) * sizeof(float) + 64);
  float* p = static_cast<float*>(aligned(sums));
  FavorPart parts[2];
  for (FavorPart& part : parts) {
    part = {p, p + padded_features * padded_dim, p + padded_features * (padded_dim + 1), NAN, NAN};
    p = part.context_of_eps + padded_dim;
  }
  std::vector<FavorKeyPart> key_parts(static_cast<size_t>(2 * heads));
  for (int64_t h = 0; h < heads; ++h) {
    float *context_h = &context[size_t(h * num_features * head_dim)], *key_sum_h = &key_sum[size_t(h * num_features)];
    kernels.favor_context(args, {0, 0, split}, h, parts[0], aligned(scratch));
    kernels.favor_context(args, {0, split, used - split}, h, parts[1], aligned(scratch));
    const float largest = max_of(parts[0].key_max, parts[1].key_max);
    kernels.favor_sum(args, parts, 2, 1, largest, context_h, key_sum_h);
    key_max[size_t(h)] = largest * 0.69314718f;
    kernels.favor_query(args, {0, 0, total_q}, h, aligned(scratch));
    kernels.favor_backward_query(args, {0, 0, 64}, h, parts[0], aligned(scratch));
    kernels.favor_backward_query(args, {0, 64, total_q - 64}, h, parts[1], aligned(scratch));
    kernels.favor_sum(args, parts, 2, 1, 0.0f, &grad_context[size_t(h * num_features * head_dim)],
                      &grad_key_sum[size_t(h * num_features)]);
    kernels.favor_backward_key(args, {0, 0, split}, h, key_parts[size_t(h)], aligned(scratch));
    kernels.favor_backward_key(args, {0, split, used - split}, h, key_parts[size_t(heads + h)], aligned(scratch));
    kernels.favor_backward_key_max(args, key_parts.data(), 2, h, 1);
  }

  const double scale = std::pow(double(head_dim), -0.25);
  std::vector<double> want_out(q.size()), want_q(q.size()), want_k(k.size()), want_v(k.size());
  // Relative to the largest score where that is NaN; the feature that has the largest.
  const auto exponentials = [&](const float* x, double* largest, int64_t* largest_feature) {
    std::vector<double> scores(static_cast<size_t>(num_features));
    double half_norm = 0, row_largest = -INFINITY;
    for (int64_t d = 0; d < head_dim; ++d) half_norm += scale * scale * x[d] * x[d] / 2;
    for (int64_t f = 0; f < num_features; ++f) {
      double& score = scores[size_t(f)] = 0;
      for (int64_t d = 0; d < head_dim; ++d) score += scale * x[d] * projection[size_t(f * head_dim + d)];
      if (score > row_largest) *largest_feature = f;
      row_largest = max_of(row_largest, score);
    }
    if (std::isnan(*largest)) *largest = row_largest;
    for (double& score : scores) score = std::exp(score - half_norm - *largest);
    return scores;
  };
  for (int64_t h = 0; h < heads; ++h) {
    const auto at = [&](int64_t t) { return size_t(t * row + h * head_dim); };
    double largest = -INFINITY;
    int64_t largest_row = 0, largest_feature = 0, row_feature = 0;
    for (int64_t j = 0; j < used; ++j) {
      double row_largest = NAN;
      exponentials(&k[at(j)], &row_largest, &row_feature);
      if (!(row_largest > largest)) continue;
      largest = row_largest;
      largest_row = j;
      largest_feature = row_feature;
    }
    std::vector<std::vector<double>> key_features;
    std::vector<double> sums_of(static_cast<size_t>(num_features * (head_dim + 1))), grad_of(sums_of.size());
    for (int64_t j = 0; j < used; ++j) {
      key_features.push_back(exponentials(&k[at(j)], &largest, &row_feature));
      for (int64_t f = 0; f < num_features; ++f)
        for (int64_t d = 0; d <= head_dim; ++d)
          sums_of[size_t(f * (head_dim + 1) + d)] +=
              (key_features.back()[size_t(f)] + eps) * (d < head_dim ? v[at(j) + size_t(d)] : 1.0f);
    }
    // What a maximum passes on: to the score of one feature.
    const auto pass_on = [&](double sum, int64_t feature, double* grad) {
      for (int64_t d = 0; d < head_dim; ++d) grad[d] -= scale * sum * projection[size_t(feature * head_dim + d)];
    };
    // What the gradient of features times projection gives a row of q or k; returns the sum over features.
    const auto project = [&](const std::vector<double>& grad_scores, const float* x, double* grad) {
      double sum = 0;
      for (int64_t f = 0; f < num_features; ++f) {
        sum += grad_scores[size_t(f)];
        for (int64_t d = 0; d < head_dim; ++d)
          grad[d] += scale * grad_scores[size_t(f)] * projection[size_t(f * head_dim + d)];
      }
      for (int64_t d = 0; d < head_dim; ++d) grad[d] -= scale * scale * sum * x[d];
      return sum;
    };
    for (int64_t i = 0; i < total_q; ++i) {
      double row_largest = NAN, denominator = 0, delta = 0;
      auto features = exponentials(&q[at(i)], &row_largest, &row_feature);
      for (int64_t f = 0; f < num_features; ++f)
        denominator += (features[size_t(f)] + eps) * sums_of[size_t(f * (head_dim + 1) + head_dim)];
      for (int64_t d = 0; d < head_dim; ++d) {
        double& y = want_out[at(i) + size_t(d)];
        for (int64_t f = 0; f < num_features; ++f)
          y += (features[size_t(f)] + eps) * sums_of[size_t(f * (head_dim + 1) + d)] / denominator;
        delta += y * grad_out[at(i) + size_t(d)];
      }
      for (int64_t f = 0; f < num_features; ++f) {
        double grad_feature = 0;
        for (int64_t d = 0; d <= head_dim; ++d) {
          const double g = (d < head_dim ? grad_out[at(i) + size_t(d)] : -delta) / denominator;
          grad_feature += g * sums_of[size_t(f * (head_dim + 1) + d)];
          grad_of[size_t(f * (head_dim + 1) + d)] += g * (features[size_t(f)] + eps);
        }
        features[size_t(f)] *= grad_feature;
      }
      pass_on(project(features, &q[at(i)], &want_q[at(i)]), row_feature, &want_q[at(i)]);
    }
    double key_sum_of_grads = 0;
    for (int64_t j = 0; j < used; ++j) {
      auto features = key_features[size_t(j)];
      for (int64_t f = 0; f < num_features; ++f) {
        double grad_feature = grad_of[size_t(f * (head_dim + 1) + head_dim)];
        for (int64_t d = 0; d < head_dim; ++d) {
          grad_feature += grad_of[size_t(f * (head_dim + 1) + d)] * v[at(j) + size_t(d)];
          want_v[at(j) + size_t(d)] += grad_of[size_t(f * (head_dim + 1) + d)] * (features[size_t(f)] + eps);
        }
        features[size_t(f)] *= grad_feature;
      }
      key_sum_of_grads += project(features, &k[at(j)], &want_k[at(j)]);
    }
    pass_on(key_sum_of_grads, largest_feature, &want_k[at(largest_row)]);
  }
  const auto used_rows = [&](std::vector<float> x) {
    std::fill(x.begin() + used * row, x.end(), 0.0f);
    return x;
  };
  const std::string name = std::string(kernels.name) + " favor_attention, head_dim " + std::to_string(head_dim) + ", " +
                           std::to_string(num_features) + " features";
  expect(relative_error(out, want_out) < 2e-6, name + ": out");
  expect(relative_error(grad_q, want_q) < 2e-5, name + ": grad_q");
  expect(relative_error(used_rows(grad_k), want_k) < 2e-5, name + ": grad_k");
  expect(relative_error(used_rows(grad_v), want_v) < 2e-6, name + ": grad_v");
}

void check_embedding(const Kernels& kernels, int64_t bins, int64_t dim) {
  const int64_t total = 150, genes = 40;
  const double alpha = 0.7;
  std::vector<float> values(static_cast<size_t>(total));
  std::vector<int32_t> gene_ids(static_cast<size_t>(total)), index(static_cast<size_t>(total)), value_of, first_token;
  for (int64_t t = 0; t < total; ++t) {
    values[size_t(t)] = std::log1p(float(generator() % 60));
    gene_ids[size_t(t)] = int32_t(generator() % uint32_t(genes));
  }
  distinct_in_segment(values.data(), 0, total, index.data());
  for (int64_t t = 0; t < total; ++t) {
    if (index[size_t(t)] == t) first_token.push_back(int32_t(t));
    int32_t u = 0;
    while (first_token[size_t(u)] != index[size_t(t)]) ++u;
    value_of.push_back(u);
  }
  const Groups groups = group_by(value_of.data(), total, int64_t(first_token.size()));
  const int64_t count = int64_t(first_token.size());
  const auto w1 = normal(size_t(bins)), b1 = normal(size_t(bins)), b2 = normal(size_t(bins));
  const auto w2 = normal(size_t(bins * bins), 0.1f), table = normal(size_t(bins * dim)), gene_table = normal(size_t(genes * dim));
  const auto grad_out = normal(size_t(total * dim));

  EmbeddingArgs args{};
  args.dtype = DType::f32;
  args.bins = bins;
  args.dim = dim;
  args.padded_bins = round_up(bins, kernels.width);
  args.padded_dim = round_up(dim, kernels.width);
  args.alpha = float(alpha);
  const auto padded = [&](const std::vector<float>& x, int64_t rows, int64_t columns, int64_t ld, bool transposed) {
    std::vector<float> y(size_t((transposed ? columns : rows) * ld), 0.0f);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) y[size_t(transposed ? j * ld + i : i * ld + j)] = x[size_t(i * columns + j)];
    return y;
  };
  const auto p_w1 = padded(w1, 1, bins, args.padded_bins, false), p_b1 = padded(b1, 1, bins, args.padded_bins, false);
  const auto p_b2 = padded(b2, 1, bins, args.padded_bins, false), p_w2 = padded(w2, bins, bins, args.padded_bins, false);
  const auto p_w2_t = padded(w2, bins, bins, args.padded_bins, true);
  const auto p_table = padded(table, bins, dim, args.padded_dim, false);
  const auto p_table_t = padded(table, bins, dim, args.padded_bins, true);
  args.values = values.data();
  args.w1 = p_w1.data();
  args.b1 = p_b1.data();
  args.b2 = p_b2.data();
  args.w2 = p_w2.data();
  args.w2_transposed = p_w2_t.data();
  args.bin_table = p_table.data();
  args.bin_table_transposed = p_table_t.data();
  args.gene_ids = gene_ids.data();
  args.gene_table = gene_table.data();
  args.first_token = first_token.data();
  args.offsets = groups.offsets.data();
  args.tokens = groups.tokens.data();
  std::vector<float> out(size_t(total * dim), NAN), grad_values(size_t(total), NAN);
  args.out = out.data();
  args.grad_out = grad_out.data();
  args.grad_values = grad_values.data();
  std::vector<float> g_w1(p_w1.size()), g_b1(p_b1.size()), g_b2(p_b2.size()), g_w2(p_w2.size()), g_table(p_table.size());
  const EmbeddingGrads grads{g_w1.data(), g_b1.data(), g_b2.data(), g_w2.data(), g_table.data()};
  auto scratch = poisoned(kernels.embedding_scratch(args) + 64);
  for (int64_t u = 0; u < count; u += kernels.value_block) {
    const int64_t block = min_of(kernels.value_block, count - u);
    kernels.embedding_forward(args, u, block, aligned(scratch));
    kernels.embedding_backward(args, u, block, grads, aligned(scratch));
  }

  // The loss is sum(out * grad_out); its derivative by central differences checks every gradient at once.
  using Vector = std::vector<double>;
  const auto forward = [&](const Vector& x, const Vector& u1, const Vector& c1, const Vector& u2, const Vector& c2,
                           const Vector& bin_table, Vector* rows) {
    double loss = 0;
    for (int64_t t = 0; t < total; ++t) {
      Vector hidden(static_cast<size_t>(bins)), weights(static_cast<size_t>(bins));
      for (int64_t j = 0; j < bins; ++j) {
        const double pre = u1[size_t(j)] * x[size_t(t)] + c1[size_t(j)];
        hidden[size_t(j)] = pre > 0 ? pre : 0.1 * pre;
      }
      double sum = 0;
      for (int64_t i = 0; i < bins; ++i) {
        double logit = alpha * hidden[size_t(i)] + c2[size_t(i)];
        for (int64_t j = 0; j < bins; ++j) logit += u2[size_t(i * bins + j)] * hidden[size_t(j)];
        sum += weights[size_t(i)] = std::exp(logit);
      }
      for (int64_t d = 0; d < dim; ++d) {
        double y = gene_table[size_t(gene_ids[size_t(t)] * dim + d)];
        for (int64_t j = 0; j < bins; ++j) y += weights[size_t(j)] / sum * bin_table[size_t(j * dim + d)];
        if (rows) (*rows)[size_t(t * dim + d)] = y;
        loss += y * grad_out[size_t(t * dim + d)];
      }
    }
    return loss;
  };
  std::vector<Vector> x;
  for (const std::vector<float>* v : {&std::as_const(values), &w1, &b1, &w2, &b2, &table})
    x.emplace_back(v->begin(), v->end());
  Vector want(static_cast<size_t>(total * dim));
  forward(x[0], x[1], x[2], x[3], x[4], x[5], &want);
  const std::string name = std::string(kernels.name) + " expression_embedding, bins " + std::to_string(bins) + ", dim " + std::to_string(dim);
  expect(relative_error(out, want) < 2e-6, name + ": out");
  const std::vector<std::vector<float>*> got = {&grad_values, &g_w1, &g_b1, &g_w2, &g_b2, &g_table};
  const char* names[] = {"grad_values", "grad_w1", "grad_b1", "grad_w2", "grad_b2", "grad_bin_table"};
  for (size_t part = 0; part < got.size(); ++part) {
    std::vector<float> sampled;
    Vector slopes;
    for (int sample = 0; sample < 12; ++sample) {
      const size_t i = generator() % x[part].size();
      const double before = x[part][i], step = 1e-5;
      x[part][i] = before + step;
      const double above = forward(x[0], x[1], x[2], x[3], x[4], x[5], nullptr);
      x[part][i] = before - step;
      const double below = forward(x[0], x[1], x[2], x[3], x[4], x[5], nullptr);
      x[part][i] = before;
      slopes.push_back((above - below) / (2 * step));
      const int64_t columns = part == 3 ? bins : part == 5 ? dim : int64_t(x[part].size());
      const int64_t ld = part == 3 ? args.padded_bins : part == 5 ? args.padded_dim : columns;
      sampled.push_back((*got[part])[size_t(int64_t(i) / columns * ld + int64_t(i) % columns)]);
    }
    expect(relative_error(sampled, slopes) < 2e-5, name + ": " + names[part]);
  }
}

void check_gather(const Kernels& kernels, int64_t dim, bool asked) {
  // Cell 0 has a bit of everything, cell 1 nothing, cell 2 is masked throughout.
  const int64_t batch = 3, genes = 70, total = 33;
  const std::vector<int32_t> cu_seqlens = {0, 30, 30, 30};
  std::vector<int32_t> gene_ids(static_cast<size_t>(total), -1), masked_cu_seqlens = {0}, masked_ids, out_cu_seqlens = {0}, out_genes;
  for (int32_t t = 0; t < 30; ++t) gene_ids[size_t(t)] = 2 * t;
  for (int64_t c = 0; c < batch; ++c) {
    for (int32_t g = 0; g < genes; ++g) {
      if (c == 2 || (c == 0 && g % 14 == 1)) masked_ids.push_back(g);
      if (c != 1 && g % 3) out_genes.push_back(g);
    }
    masked_cu_seqlens.push_back(int32_t(masked_ids.size()));
    out_cu_seqlens.push_back(int32_t(out_genes.size()));
  }
  const int64_t rows = asked ? int64_t(out_genes.size()) : batch * genes;
  const auto table = normal(size_t(genes * dim)), zero_row = normal(size_t(dim)), mask_row = normal(size_t(dim));
  const auto encoded = normal(size_t(total * dim)), grad_out = normal(size_t(rows * dim));
  std::vector<float> out(size_t(rows * dim), NAN), grad_table(table.size()), grad_encoded(encoded.size());
  std::vector<float> grad_zero_row(static_cast<size_t>(dim)), grad_mask_row(static_cast<size_t>(dim));
  GatherArgs args{};
  args.dtype = DType::f32;
  args.batch = batch;
  args.num_genes = genes;
  args.dim = dim;
  args.gene_ids = gene_ids.data();
  args.cu_seqlens = cu_seqlens.data();
  args.masked_ids = masked_ids.data();
  args.masked_cu_seqlens = masked_cu_seqlens.data();
  args.out_genes = asked ? out_genes.data() : nullptr;
  args.out_cu_seqlens = asked ? out_cu_seqlens.data() : nullptr;
  args.table = table.data();
  args.encoded = encoded.data();
  args.zero_row = zero_row.data();
  args.mask_row = mask_row.data();
  args.out = out.data();
  args.grad_out = grad_out.data();
  args.grad_table = grad_table.data();
  args.grad_encoded = grad_encoded.data();
  const int64_t block = 16;
  auto scratch = poisoned(kernels.gather_scratch(args, block) + 64);
  for (int64_t g = 0; g < genes; g += block) {
    const GatherUnit unit{0, batch, g, min_of(g + block, genes)};
    kernels.gather_forward(args, unit);
    kernels.gather_backward(args, unit, grad_zero_row.data(), grad_mask_row.data(), aligned(scratch));
  }

  std::vector<double> want_out(out.size()), want_table(table.size()), want_encoded(encoded.size());
  std::vector<double> want_zero(static_cast<size_t>(dim)), want_mask(want_zero);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t c = row / genes, gene = row % genes;
    if (asked) {
      for (c = 0; row >= out_cu_seqlens[size_t(c) + 1];) ++c;
      gene = out_genes[size_t(row)];
    }
    const bool masked = c == 2 || (c == 0 && gene % 14 == 1), token = !masked && c == 0 && gene % 2 == 0 && gene < 60;
    for (int64_t d = 0; d < dim; ++d) {
      const double grad = grad_out[size_t(row * dim + d)];
      const size_t at = size_t(gene / 2 * dim + d);
      want_out[size_t(row * dim + d)] =
          table[size_t(gene * dim + d)] + (token ? encoded[at] : masked ? mask_row[size_t(d)] : zero_row[size_t(d)]);
      want_table[size_t(gene * dim + d)] += grad;
      (token ? want_encoded[at] : masked ? want_mask[size_t(d)] : want_zero[size_t(d)]) += grad;
    }
  }
  const std::string name = std::string(kernels.name) + " masked_decoder_gather, dim " + std::to_string(dim) +
                           (asked ? ", asked genes" : ", all genes");
  expect(relative_error(out, want_out) < 1e-6, name + ": out");
  expect(relative_error(grad_table, want_table) < 1e-6, name + ": grad_table");
  expect(relative_error(grad_zero_row, want_zero) < 1e-6, name + ": grad_zero_row");
  expect(relative_error(grad_mask_row, want_mask) < 1e-6, name + ": grad_mask_row");
  expect(relative_error(grad_encoded, want_encoded) < 1e-6, name + ": grad_encoded");
}

void check_head(const Kernels& kernels, int64_t dim, bool mse) {
  // Of 50 rows every fifth is not chosen, and every third chosen one is chosen twice.
  const int64_t all_rows = 50;
  const double eps = 1e-3, loss_factor = 0.7;
  std::vector<int64_t> rows, chosen;
  std::vector<int32_t> offsets = {0}, positions;
  for (int64_t row = 0; row < all_rows; ++row) {
    if (row % 5 == 4) continue;
    chosen.push_back(row);
    for (int64_t again = 0; again < (row % 3 ? 1 : 2); ++again) {
      positions.push_back(int32_t(rows.size()));
      rows.push_back(row);
    }
    offsets.push_back(int32_t(rows.size()));
  }
  const auto n = int64_t(rows.size());
  const auto x = normal(size_t(all_rows * dim), 2.0f), target = normal(size_t(n)), grad_out = normal(size_t(n));
  const int64_t padded = round_up(dim, kernels.width);
  std::vector<std::vector<float>> parameters;  // norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight; padded
  for (int p = 0; p < 5; ++p) {
    parameters.push_back(normal(size_t(dim)));
    parameters.back().resize(size_t(padded), 0.0f);
  }
  const auto &w1 = parameters[0], &b1 = parameters[1], &w2 = parameters[2], &b2 = parameters[3], &weight = parameters[4];
  const float bias = 0.3f;
  std::vector<float> scale(static_cast<size_t>(padded));
  double offset = bias, sum_scale = 0;
  for (size_t j = 0; j < size_t(dim); ++j) {
    scale[j] = weight[j] * w2[j];
    sum_scale += scale[j];
    offset += weight[j] * b2[j];
  }
  std::vector<float> predictions(size_t(n), NAN), grad_x(x.size()), sums(size_t(3 * padded), 0.0f);
  double sum_grad_out = 0;
  HeadArgs args{};
  args.dtype = DType::f32;
  args.dim = dim;
  args.padded_dim = padded;
  args.eps = float(eps);
  args.x = x.data();
  args.row_stride = dim;
  args.rows = rows.data();
  args.norm1_weight = w1.data();
  args.norm1_bias = b1.data();
  args.scale = scale.data();
  args.mean_scale = float(sum_scale / double(dim));
  args.offset = float(offset);
  args.chosen = chosen.data();
  args.offsets = offsets.data();
  args.positions = positions.data();
  args.grad_out = mse ? nullptr : grad_out.data();
  args.target = mse ? target.data() : nullptr;
  args.loss_factor = float(loss_factor);
  args.grad_x = grad_x.data();
  auto scratch = poisoned(kernels.head_scratch(args) + 64);
  const HeadSums head_sums{&sum_grad_out, sums.data(), sums.data() + padded, sums.data() + 2 * padded};
  for (int64_t i = 0; i < n; i += kernels.head_block)
    kernels.head_forward(args, i, min_of(kernels.head_block, n - i), predictions.data() + i, aligned(scratch));
  const auto count = int64_t(chosen.size());
  for (int64_t u = 0; u < count; u += kernels.head_block)
    kernels.head_backward(args, u, min_of(kernels.head_block, count - u), head_sums, aligned(scratch));

  // The loss is sum(prediction * grad_out) or sum(loss_factor / 2 * error^2); central differences check its gradients.
  using Vector = std::vector<double>;
  const auto loss = [&](const Vector& v, const Vector& u1, const Vector& c1, Vector* predicted) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
      Vector row(v.begin() + rows[size_t(i)] * dim, v.begin() + (rows[size_t(i)] + 1) * dim);
      double prediction = bias;
      for (int norm = 0; norm < 2; ++norm) {
        double mean = 0, variance = 0;
        for (double value : row) mean += value / double(dim);
        for (double value : row) variance += (value - mean) * (value - mean) / double(dim);
        for (size_t j = 0; j < size_t(dim); ++j) {
          row[j] = (row[j] - mean) / std::sqrt(variance + eps);
          row[j] = norm ? row[j] * w2[j] + b2[j] : row[j] * u1[j] + c1[j];
        }
      }
      for (size_t j = 0; j < size_t(dim); ++j) prediction += row[j] * weight[j];
      if (predicted) (*predicted)[size_t(i)] = prediction;
      const double error = prediction - target[size_t(i)];
      total += mse ? loss_factor / 2 * error * error : prediction * grad_out[size_t(i)];
    }
    return total;
  };
  std::vector<Vector> at;
  for (const std::vector<float>* v : {&x, &w1, &b1}) at.emplace_back(v->begin(), v->end());
  Vector want(static_cast<size_t>(n));
  loss(at[0], at[1], at[2], &want);
  const std::string name = std::string(kernels.name) + " masked_" + (mse ? "mse" : "head") + ", dim " + std::to_string(dim);
  expect(relative_error(predictions, want) < 2e-6, name + ": predictions");
  // grad_norm1_weight and grad_norm1_bias are two of the sums as they are.
  const float* got[] = {grad_x.data(), head_sums.product, head_sums.middle};
  const char* names[] = {"grad_x", "grad_norm1_weight", "grad_norm1_bias"};
  for (size_t part = 0; part < 3; ++part) {
    std::vector<float> sampled;
    Vector slopes;
    for (int sample = 0; sample < 12; ++sample) {
      const size_t i = generator() % (part ? size_t(dim) : x.size());
      const double before = at[part][i], step = 1e-5;
      at[part][i] = before + step;
      const double above = loss(at[0], at[1], at[2], nullptr);
      at[part][i] = before - step;
      const double below = loss(at[0], at[1], at[2], nullptr);
      at[part][i] = before;
      slopes.push_back((above - below) / (2 * step));
      sampled.push_back(got[part][i]);
    }
    expect(relative_error(sampled, slopes) < 2e-5, name + ": " + names[part]);
  }
}

// Philox4x32-7, a counter at a time.
std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 7; ++round) {
    const uint64_t first = uint64_t(0xD2511F53u) * c[0], second = uint64_t(0xCD9E8D57u) * c[2];
    c = {uint32_t(second >> 32) ^ c[1] ^ key0, uint32_t(second), uint32_t(first >> 32) ^ c[3] ^ key1, uint32_t(first)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

void check_dropout(const Kernels& kernels, int64_t dim) {
  const int64_t rows = 7;
  const uint64_t seed = 0x0123456789ABCDEFu;
  const auto x = normal(size_t(rows * dim)), residual = normal(size_t(rows * dim));
  std::vector<int64_t> ids;
  for (int64_t row = 0; row < rows; ++row) ids.push_back((row - 3) * 0x123456789ABC);
  DropoutArgs args{};
  args.in = args.out = DType::f32;
  args.rows = rows;
  args.dim = dim;
  args.x = x.data();
  args.row_ids = ids.data();
  args.seed = seed;
  args.place = 5;
  args.threshold = 20000;
  args.scale = 1.5f;
  std::vector<float> alone(x.size(), NAN), sum(alone), relu(alone), grad(alone);
  args.dst = alone.data();
  kernels.dropout_rows(args, 0, 3);
  kernels.dropout_rows(args, 3, rows - 3);
  args.residual = residual.data();
  args.dst = sum.data();
  kernels.dropout_rows(args, 0, rows);
  args.residual = nullptr;
  args.relu = true;
  args.dst = relu.data();
  kernels.dropout_rows(args, 0, rows);
  args.relu = false;
  args.kept = relu.data();
  args.dst = grad.data();
  kernels.dropout_rows(args, 0, rows);
  int wrong = 0;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t d = 0; d < dim; ++d) {
      const auto id = uint64_t(ids[size_t(row)]);
      const uint32_t group = uint32_t(d / 128 * 16 + d % 16);
      const auto words = philox({group, 5, uint32_t(id), uint32_t(id >> 32)}, uint32_t(seed), uint32_t(seed >> 32));
      const uint32_t word = words[size_t(d % 64 / 16)], bits = d % 128 < 64 ? word & 0xffffu : word >> 16;
      const size_t at = size_t(row * dim + d);
      const float dropped = bits >= 20000 ? x[at] * 1.5f : 0.0f;
      wrong += alone[at] != dropped || sum[at] != residual[at] + dropped || relu[at] != (x[at] > 0 ? dropped : 0.0f) ||
               grad[at] != (x[at] > 0 ? dropped : 0.0f);
    }
  expect(wrong == 0, std::string(kernels.name) + " dropout, dim " + std::to_string(dim));
}

void check_half_types() {
  int wrong = 0;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    f16 half{uint16_t(bits)}, half_back;
    bf16 brain{uint16_t(bits)}, brain_back;
    from_float(to_float(half), &half_back);
    from_float(to_float(brain), &brain_back);
    const bool half_nan = (bits & 0x7fffu) > 0x7c00u, brain_nan = (bits & 0x7fffu) > 0x7f80u;
    wrong += half_nan ? !std::isnan(to_float(half_back)) : half_back.bits != bits;
    wrong += brain_nan ? !std::isnan(to_float(brain_back)) : brain_back.bits != bits;
  }
  f16 tie;
  from_float(1.0f + 1.0f / 2048.0f, &tie);  // halfway between two halves: ties to even
  wrong += tie.bits != 0x3c00u;
  expect(wrong == 0, "every f16 and bf16 survives a round trip through float");
}

}  // namespace

int main() {
  check_half_types();
  // A known answer of the authors' library, Random123.
  expect(philox({0, 0, 0, 0}, 0, 0) == std::array<uint32_t, 4>{0x5F6FB709u, 0x0D893F64u, 0x4F121F81u, 0x4F730A48u},
         "Philox4x32-7 gives the published words");
  for (const std::string& isa : available_isas()) {
    use_isa(isa);
    for (int64_t head_dim : {8, 20, 64})
      for (bool one_pass : {false, true})
        for (float size : {1.0f, 1e9f}) check_attention(active_kernels(), head_dim, one_pass, size);
    check_favor(active_kernels(), 16, 44, 1e-4);
    check_favor(active_kernels(), 20, 101, 1e-2);
    check_favor(active_kernels(), 64, 266, 1e-4);
    check_embedding(active_kernels(), 100, 24);
    check_embedding(active_kernels(), 5, 3);
    for (int64_t dim : {24, 5})
      for (bool other : {false, true}) {
        check_gather(active_kernels(), dim, other);
        check_head(active_kernels(), dim, other);
      }
    for (int64_t dim : {3, 128, 205}) check_dropout(active_kernels(), dim);
  }
  std::printf("%s\n", failures ? "some kernels are wrong" : "all kernels agree with plain loops in double");
  return failures != 0;
}
