// ragged_attention and its backward for CPU tensors: arguments, work split, threads.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../common/isa.h"
#include "../common/work_list.h"
#include "arguments.h"
#include "parallel.h"

namespace xtg {
namespace {

AttentionArgs attention_args(const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale) {
  AttentionArgs args{};
  args.dtype = element_type(q, "q");
  STD_TORCH_CHECK(q.dim() == 3 && q.size(1) >= 1 && q.size(2) >= 1 && q.size(2) <= 256,
                  "q: expected (total_nnz, num_heads, head_dim) with head_dim 1 to 256");
  check_sizes(k, "k", q.scalar_type(), {q.size(0), q.size(1), q.size(2)});
  check_sizes(v, "v", q.scalar_type(), {q.size(0), q.size(1), q.size(2)});
  args.total_nnz = q.size(0);
  args.num_heads = q.size(1);
  args.head_dim = q.size(2);
  args.softmax_scale = float(softmax_scale);
  args.q = operand(q);
  args.k = operand(k);
  args.v = operand(v);
  return args;
}

using BlockKernel = void (*)(const AttentionArgs&, const SegmentBlock&, int64_t, void*);

// The heads of a block lie side by side in memory: where there is work enough to share, a thread takes them one after the
// other, and the kernel asks for the next head's rows ahead. One long cell among short ones is no work to share: its heads
// would keep one thread busy while the others have nothing left.
void run_blocks(const Kernels& kernels, BlockKernel kernel, const AttentionArgs& args,
                const std::vector<SegmentBlock>& blocks) {
  const int64_t threads = torch::stable::get_num_threads();
  int64_t total = 0;
  for (const SegmentBlock& block : blocks) total += block.cost();
  const bool plenty = int64_t(blocks.size()) >= 8 * threads && 2 * threads * blocks.front().cost() <= total;
  for_each_unit(
      int64_t(blocks.size()) * args.num_heads, kernels.attention_scratch(args),
      [&](int64_t unit, void* scratch) {
        kernel(args, blocks[size_t(unit / args.num_heads)], unit % args.num_heads, scratch);
      },
      plenty ? args.num_heads : 1);
}

// Rows past the last segment belong to no cell: their outputs and gradients are zero.
void zero_slack(const Tensor& x, int64_t used) {
  if (used == x.size(0)) return;
  const int64_t row = x.numel() / x.size(0) * int64_t(x.element_size());
  std::memset(static_cast<char*>(x.data_ptr()) + used * row, 0, size_t((x.size(0) - used) * row));
}

std::tuple<Tensor, Tensor> ragged_attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                            const Tensor& cu_seqlens_in, int64_t /*max_seqlen*/,
                                            double softmax_scale) {
  const Tensor q = last_contiguous(q_in), k = last_contiguous(k_in), v = last_contiguous(v_in);
  const Tensor cu_seqlens = torch::stable::contiguous(cu_seqlens_in);
  AttentionArgs args = attention_args(q, k, v, softmax_scale);
  const int32_t* cu = checked_cu_seqlens(cu_seqlens, args.total_nnz);
  const int64_t batch = cu_seqlens.size(0) - 1, used = cu[batch];
  Tensor out = with_large_pages(torch::stable::new_empty(q, {args.total_nnz, args.num_heads, args.head_dim}));
  Tensor lse = torch::stable::new_empty(q, {args.num_heads, args.total_nnz}, ScalarType::Float);
  args.out = out.data_ptr();
  args.softmax_lse = static_cast<float*>(lse.data_ptr());
  zero_slack(out, used);
  for (int64_t h = 0; h < args.num_heads; ++h)
    for (int64_t t = used; t < args.total_nnz; ++t) args.softmax_lse[h * args.total_nnz + t] = 0.0f;
  const Kernels& kernels = active_kernels();
  run_blocks(kernels, kernels.attention_forward, args,
             segment_blocks(cu, batch, args.num_heads, torch::stable::get_num_threads()));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> ragged_attention_backward(
    const Tensor& grad_out_in, const std::optional<Tensor>& grad_lse_in, const Tensor& q_in, const Tensor& k_in,
    const Tensor& v_in, const Tensor& out_in, const Tensor& softmax_lse_in, const Tensor& cu_seqlens_in,
    int64_t /*max_seqlen*/, double softmax_scale) {
  const Tensor q = last_contiguous(q_in), k = last_contiguous(k_in), v = last_contiguous(v_in);
  const Tensor grad_out = last_contiguous(grad_out_in), out = torch::stable::contiguous(out_in);
  const Tensor lse = torch::stable::contiguous(softmax_lse_in), cu_seqlens = torch::stable::contiguous(cu_seqlens_in);
  AttentionArgs args = attention_args(q, k, v, softmax_scale);
  const int32_t* cu = checked_cu_seqlens(cu_seqlens, args.total_nnz);
  const int64_t batch = cu_seqlens.size(0) - 1, used = cu[batch];
  check_sizes(grad_out, "grad_out", q.scalar_type(), {args.total_nnz, args.num_heads, args.head_dim});
  check_sizes(out, "out", q.scalar_type(), {args.total_nnz, args.num_heads, args.head_dim});
  check_sizes(lse, "softmax_lse", ScalarType::Float, {args.num_heads, args.total_nnz});
  std::optional<Tensor> grad_lse;
  if (grad_lse_in) {
    grad_lse = torch::stable::contiguous(*grad_lse_in);
    check_sizes(*grad_lse, "grad_lse", ScalarType::Float, {args.num_heads, args.total_nnz});
    args.grad_lse = static_cast<const float*>(grad_lse->data_ptr());
  }
  const std::initializer_list<int64_t> shape = {args.total_nnz, args.num_heads, args.head_dim};
  Tensor grad_q = torch::stable::new_empty(q, shape), grad_k = torch::stable::new_empty(q, shape),
         grad_v = torch::stable::new_empty(q, shape);
  for (const Tensor& grad : {grad_q, grad_k, grad_v}) zero_slack(with_large_pages(grad), used);
  const auto delta = aligned_scratch(size_t(args.num_heads * args.total_nnz) * sizeof(float));
  args.out = out.data_ptr();
  args.softmax_lse = static_cast<float*>(lse.data_ptr());
  args.grad_out = operand(grad_out);
  args.delta = static_cast<float*>(delta.get());
  args.grad_q = grad_q.data_ptr();
  args.grad_k = grad_k.data_ptr();
  args.grad_v = grad_v.data_ptr();
  const Kernels& kernels = active_kernels();
  std::unique_ptr<void, AlignedFree> large;
  for (int64_t i = 0; i < args.num_heads * args.total_nnz && !large; ++i)
    if (is_large(args.softmax_lse[i])) large = aligned_scratch(size_t(2 * args.num_heads * args.total_nnz) * sizeof(float));
  if (large) {
    args.large_max = static_cast<float*>(large.get());
    args.large_sum = args.large_max + args.num_heads * args.total_nnz;
    run_blocks(kernels, kernels.attention_backward_large, args,
               segment_blocks(cu, batch, args.num_heads, torch::stable::get_num_threads()));
  }
  // Which way a segment goes is decided by its length alone: its bits must not depend on threads or batch mates.
  const int64_t one_pass = kernels.attention_one_pass(args.dtype) ? kOnePassRows : 0;
  const auto segments = whole_segments(cu, batch, 1, one_pass);
  const auto blocks =
      segment_blocks(cu, batch, args.num_heads, torch::stable::get_num_threads(), one_pass + 1);
  run_blocks(kernels, kernels.attention_backward_query, args, blocks);
  run_blocks(kernels, kernels.attention_backward_key, args, blocks);
  for (const SegmentBlock& segment : segments) args.one_pass_rows = max_of(args.one_pass_rows, segment.length);
  run_blocks(kernels, kernels.attention_backward, args, segments);
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace xtg

STABLE_TORCH_LIBRARY_IMPL(xtg, CPU, m) {
  m.impl("ragged_attention", TORCH_BOX(&xtg::ragged_attention));
  m.impl("ragged_attention_backward", TORCH_BOX(&xtg::ragged_attention_backward));
}
