// favor_attention and its backward for CPU tensors: arguments, work split, threads.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "../common/exp.h"
#include "../common/isa.h"
#include "arguments.h"
#include "parallel.h"

namespace xtg {
namespace {

// Where the segments with keys and queries lie. The others have zeros everywhere.
struct Segments {
  const int32_t *keys, *queries;
  int64_t batch;

  Segments(const Tensor& cu_seqlens, int64_t total_nnz, const Tensor& cu_seqlens_q, int64_t total_q)
      : keys(checked_cu_seqlens(cu_seqlens, total_nnz)),
        queries(checked_cu_seqlens(cu_seqlens_q, total_q)),
        batch(cu_seqlens.size(0) - 1) {
    STD_TORCH_CHECK(cu_seqlens_q.size(0) == cu_seqlens.size(0), "cu_seqlens_q: expected size ", cu_seqlens.size(0),
                    ", got ", cu_seqlens_q.size(0));
  }
  bool has_both(int64_t c) const { return keys[c] < keys[c + 1] && queries[c] < queries[c + 1]; }

  // Chunks of nearly equal size, each at most limit rows: decided by the lengths alone, as bits must not depend on threads.
  std::vector<RowChunk> chunks(const int32_t* cu_seqlens, int64_t limit) const {
    std::vector<RowChunk> work;
    for (int64_t c = 0; c < batch; ++c) {
      if (!has_both(c)) continue;
      const int64_t begin = cu_seqlens[c], length = cu_seqlens[c + 1] - begin;
      const int64_t rows = round_up(ceil_div(length, ceil_div(length, limit)), 64);
      for (int64_t first = 0; first < length; first += rows)
        work.push_back({c, begin + first, min_of(rows, length - first)});
    }
    return work;
  }

  // Zeros in the rows of x, each of `row` elements, that belong to no segment with both.
  void clear_rest(const Tensor& x, const int32_t* cu_seqlens, int64_t planes, int64_t rows) const {
    const int64_t row = x.numel() / max_of<int64_t>(planes * rows, 1) * int64_t(x.element_size());
    const auto clear = [&](int64_t begin, int64_t end) {
      for (int64_t p = 0; p < planes && begin < end; ++p)
        std::memset(static_cast<char*>(x.data_ptr()) + (p * rows + begin) * row, 0, size_t((end - begin) * row));
    };
    for (int64_t c = 0; c < batch; ++c)
      if (!has_both(c)) clear(cu_seqlens[c], cu_seqlens[c + 1]);
    clear(cu_seqlens[batch], rows);
  }
  // The same where x has one row a segment.
  void clear_rest(const Tensor& x) const {
    const int64_t row = x.numel() / max_of<int64_t>(batch, 1) * int64_t(x.element_size());
    for (int64_t c = 0; c < batch; ++c)
      if (!has_both(c)) std::memset(static_cast<char*>(x.data_ptr()) + c * row, 0, size_t(row));
  }
};

// The parts of the sums of every chunk and head, and the memory that they lie in.
struct Parts {
  std::vector<FavorPart> parts;
  std::unique_ptr<void, AlignedFree> memory;

  Parts(const FavorArgs& args, const Kernels& kernels, int64_t count) : parts(size_t(count)) {
    // Tile products write whole tiles of 16 rows.
    const int64_t padded_dim = round_up(args.head_dim, kernels.width);
    const int64_t context = round_up(args.num_features, 16) * padded_dim, key_sum = round_up(args.num_features, 16);
    const int64_t floats = context + key_sum + round_up(padded_dim, 16);
    memory = aligned_scratch(size_t(count * floats) * sizeof(float));
    for (int64_t i = 0; i < count; ++i) {
      float* p = static_cast<float*>(memory.get()) + i * floats;
      parts[size_t(i)] = {p, p + context, p + context + key_sum, 0.0f, 0.0f};
    }
  }
};

// Which chunks are those of the segments that have some: of the i-th, chunks [first[i], first[i + 1]).
std::vector<int64_t> first_chunks(const std::vector<RowChunk>& chunks) {
  std::vector<int64_t> first;
  for (int64_t i = 0; i < int64_t(chunks.size()); ++i)
    if (i == 0 || chunks[size_t(i)].segment != chunks[size_t(i - 1)].segment) first.push_back(i);
  first.push_back(int64_t(chunks.size()));
  return first;
}

// Adds up the parts of each segment and head into sums (batch, num_heads, num_features[, head_dim]), relative to key_max
// (batch, num_heads) in units of log2.
void add_parts(const FavorArgs& args, const Kernels& kernels, const std::vector<RowChunk>& chunks, const Parts& parts,
               const float* key_max, float* context, float* key_sum) {
  const std::vector<int64_t> first = first_chunks(chunks);
  const int64_t heads = args.num_heads;
  for_each_unit((int64_t(first.size()) - 1) * heads, 0, [&](int64_t unit, void*) {
    const int64_t begin = first[size_t(unit / heads)], head = unit % heads;
    const int64_t group = chunks[size_t(begin)].segment * heads + head;
    kernels.favor_sum(args, &parts.parts[size_t(begin * heads + head)], first[size_t(unit / heads) + 1] - begin, heads,
                      key_max ? key_max[group] : 0.0f, context + group * args.num_features * args.head_dim,
                      key_sum + group * args.num_features);
  });
}

FavorArgs favor_args(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& projection, double eps) {
  FavorArgs args{};
  args.dtype = element_type(q, "q");
  STD_TORCH_CHECK(args.dtype != DType::f16, "q: expected float32 or bfloat16");
  STD_TORCH_CHECK(q.dim() == 3 && q.size(1) >= 1 && q.size(2) >= 1 && q.size(2) <= 256,
                  "q: expected (total_q, num_heads, head_dim) with head_dim 1 to 256");
  STD_TORCH_CHECK(k.dim() == 3, "k: expected (total_nnz, num_heads, head_dim)");
  check_sizes(k, "k", q.scalar_type(), {k.size(0), q.size(1), q.size(2)});
  check_sizes(v, "v", q.scalar_type(), {k.size(0), q.size(1), q.size(2)});
  STD_TORCH_CHECK(projection.dim() == 2 && projection.size(0) >= 1,
                  "projection: expected (num_features, head_dim) with num_features >= 1");
  check_sizes(projection, "projection", ScalarType::Float, {projection.size(0), q.size(2)});
  STD_TORCH_CHECK(eps >= 0.0 && std::isfinite(eps), "eps: expected a number in [0, inf), got ", eps);
  args.total_q = q.size(0);
  args.num_heads = q.size(1);
  args.head_dim = q.size(2);
  args.num_features = projection.size(0);
  args.eps = float(eps);
  args.projection = static_cast<const float*>(projection.data_ptr());
  args.q = operand(q);
  args.k = operand(k);
  args.v = operand(v);
  return args;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> favor_attention(
    const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& projection_in,
    const Tensor& cu_seqlens_in, int64_t /*max_seqlen*/, const Tensor& cu_seqlens_q_in, int64_t /*max_seqlen_q*/,
    double eps, bool per_cell) {
  const Tensor q = last_contiguous(q_in), k = last_contiguous(k_in), v = last_contiguous(v_in);
  const Tensor projection = torch::stable::contiguous(projection_in);
  const Tensor cu_seqlens = torch::stable::contiguous(cu_seqlens_in);
  const Tensor cu_seqlens_q = torch::stable::contiguous(cu_seqlens_q_in);
  FavorArgs args = favor_args(q, k, v, projection, eps);
  const Segments segments(cu_seqlens, k.size(0), cu_seqlens_q, q.size(0));
  const int64_t batch = segments.batch, heads = args.num_heads;
  Tensor out = torch::stable::new_empty(q, {args.total_q, heads, args.head_dim});
  Tensor context = torch::stable::new_empty(q, {batch, heads, args.num_features, args.head_dim}, ScalarType::Float);
  Tensor key_sum = torch::stable::new_empty(q, {batch, heads, args.num_features}, ScalarType::Float);
  Tensor key_max = torch::stable::new_empty(q, {batch, heads}, ScalarType::Float);
  Tensor row_max = torch::stable::new_empty(q, {heads, args.total_q}, ScalarType::Float);
  Tensor row_sum = torch::stable::new_empty(q, {heads, args.total_q}, ScalarType::Float);
  segments.clear_rest(out, segments.queries, 1, args.total_q);
  for (const Tensor& x : {row_max, row_sum}) segments.clear_rest(x, segments.queries, heads, args.total_q);
  for (const Tensor& x : {context, key_sum, key_max}) segments.clear_rest(x);
  args.out = out.data_ptr();
  args.context = static_cast<float*>(context.data_ptr());
  args.key_sum = static_cast<float*>(key_sum.data_ptr());
  args.key_max = static_cast<float*>(key_max.data_ptr());
  args.row_max = static_cast<float*>(row_max.data_ptr());
  args.row_sum = static_cast<float*>(row_sum.data_ptr());

  const Kernels& kernels = active_kernels();
  const size_t scratch = kernels.favor_scratch(args);
  const auto keys = segments.chunks(segments.keys, kFavorPartRows);
  {
    Parts parts(args, kernels, int64_t(keys.size()) * heads);
    for_each_unit(int64_t(parts.parts.size()), scratch, [&](int64_t unit, void* space) {
      kernels.favor_context(args, keys[size_t(unit / heads)], unit % heads, parts.parts[size_t(unit)], space);
    });
    std::vector<float> log2_max(size_t(batch * heads), -INFINITY);
    for (size_t unit = 0; unit < parts.parts.size(); ++unit) {
      float& largest = log2_max[size_t(keys[unit / size_t(heads)].segment * heads) + unit % size_t(heads)];
      // Written so that NaN stays.
      if (!(parts.parts[unit].key_max <= largest)) largest = parts.parts[unit].key_max;
    }
    for (int64_t c = 0; c < batch; ++c) {
      if (!segments.has_both(c)) continue;
      float* by_head = &log2_max[size_t(c * heads)];
      if (per_cell && args.eps != 0.0f) {
        float largest = by_head[0];
        for (int64_t h = 1; h < heads; ++h)
          if (!(by_head[h] <= largest)) largest = by_head[h];
        for (int64_t h = 0; h < heads; ++h) by_head[h] = largest;
      }
      for (int64_t h = 0; h < heads; ++h) by_head[h] = in_log2(args.key_max[c * heads + h] = by_head[h] * kLn2);
    }
    add_parts(args, kernels, keys, parts, log2_max.data(), args.context, args.key_sum);
  }
  const auto queries = segments.chunks(segments.queries, kFavorRows);
  for_each_unit(int64_t(queries.size()) * heads, scratch, [&](int64_t unit, void* space) {
    kernels.favor_query(args, queries[size_t(unit / heads)], unit % heads, space);
  });
  return {out, context, key_sum, key_max, row_max, row_sum};
}

std::tuple<Tensor, Tensor, Tensor> favor_attention_backward(
    const Tensor& grad_out_in, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& projection_in,
    const Tensor& out_in, const Tensor& context_in, const Tensor& key_sum_in, const Tensor& key_max_in,
    const Tensor& row_max_in, const Tensor& row_sum_in, const Tensor& cu_seqlens_in, int64_t /*max_seqlen*/,
    const Tensor& cu_seqlens_q_in, int64_t /*max_seqlen_q*/, double eps, bool per_cell) {
  const Tensor q = last_contiguous(q_in), k = last_contiguous(k_in), v = last_contiguous(v_in);
  const Tensor grad_out = last_contiguous(grad_out_in), out = torch::stable::contiguous(out_in);
  const Tensor projection = torch::stable::contiguous(projection_in);
  const Tensor context = torch::stable::contiguous(context_in), key_sum = torch::stable::contiguous(key_sum_in);
  const Tensor key_max = torch::stable::contiguous(key_max_in);
  const Tensor row_max = torch::stable::contiguous(row_max_in), row_sum = torch::stable::contiguous(row_sum_in);
  const Tensor cu_seqlens = torch::stable::contiguous(cu_seqlens_in);
  const Tensor cu_seqlens_q = torch::stable::contiguous(cu_seqlens_q_in);
  FavorArgs args = favor_args(q, k, v, projection, eps);
  const Segments segments(cu_seqlens, k.size(0), cu_seqlens_q, q.size(0));
  const int64_t batch = segments.batch, heads = args.num_heads;
  check_sizes(grad_out, "grad_out", q.scalar_type(), {args.total_q, heads, args.head_dim});
  check_sizes(out, "out", q.scalar_type(), {args.total_q, heads, args.head_dim});
  check_sizes(context, "context", ScalarType::Float, {batch, heads, args.num_features, args.head_dim});
  check_sizes(key_sum, "key_sum", ScalarType::Float, {batch, heads, args.num_features});
  check_sizes(key_max, "key_max", ScalarType::Float, {batch, heads});
  check_sizes(row_max, "row_max", ScalarType::Float, {heads, args.total_q});
  check_sizes(row_sum, "row_sum", ScalarType::Float, {heads, args.total_q});
  Tensor grad_q = torch::stable::new_empty(q, {args.total_q, heads, args.head_dim});
  Tensor grad_k = torch::stable::new_empty(q, {k.size(0), heads, args.head_dim});
  Tensor grad_v = torch::stable::new_empty(q, {k.size(0), heads, args.head_dim});
  segments.clear_rest(grad_q, segments.queries, 1, args.total_q);
  for (const Tensor& x : {grad_k, grad_v}) segments.clear_rest(x, segments.keys, 1, k.size(0));
  args.grad_out = operand(grad_out);
  args.out = out.data_ptr();
  args.context = static_cast<float*>(context.data_ptr());
  args.key_sum = static_cast<float*>(key_sum.data_ptr());
  args.key_max = static_cast<float*>(key_max.data_ptr());
  args.row_max = static_cast<float*>(row_max.data_ptr());
  args.row_sum = static_cast<float*>(row_sum.data_ptr());
  args.grad_q = grad_q.data_ptr();
  args.grad_k = grad_k.data_ptr();
  args.grad_v = grad_v.data_ptr();

  const Kernels& kernels = active_kernels();
  const size_t scratch = kernels.favor_scratch(args);
  const int64_t features = batch * heads * args.num_features;
  const auto grad_sums = aligned_scratch(size_t(features * (args.head_dim + 1)) * sizeof(float));
  args.grad_context = static_cast<float*>(grad_sums.get());
  args.grad_key_sum = args.grad_context + features * args.head_dim;
  {
    const auto queries = segments.chunks(segments.queries, kFavorPartRows);
    Parts parts(args, kernels, int64_t(queries.size()) * heads);
    for_each_unit(int64_t(parts.parts.size()), scratch, [&](int64_t unit, void* space) {
      kernels.favor_backward_query(args, queries[size_t(unit / heads)], unit % heads, parts.parts[size_t(unit)], space);
    });
    add_parts(args, kernels, queries, parts, nullptr, args.grad_context, args.grad_key_sum);
  }
  const auto keys = segments.chunks(segments.keys, kFavorRows);
  std::vector<FavorKeyPart> parts(keys.size() * size_t(heads));
  for_each_unit(int64_t(parts.size()), scratch, [&](int64_t unit, void* space) {
    kernels.favor_backward_key(args, keys[size_t(unit / heads)], unit % heads, parts[size_t(unit)], space);
  });
  // Without eps every stabiliser cancels.
  if (args.eps != 0.0f) {
    const std::vector<int64_t> first = first_chunks(keys);
    const int64_t together = per_cell ? heads : 1;
    for (size_t i = 0; i + 1 < first.size(); ++i)
      for (int64_t h = 0; h < heads; h += together)
        kernels.favor_backward_key_max(args, &parts[size_t(first[i] * heads)], first[i + 1] - first[i], h, together);
  }
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace xtg

STABLE_TORCH_LIBRARY_IMPL(xtg, CPU, m) {
  m.impl("favor_attention", TORCH_BOX(&xtg::favor_attention));
  m.impl("favor_attention_backward", TORCH_BOX(&xtg::favor_attention_backward));
}
