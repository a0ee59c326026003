// The schemas of namespace xtg, in one place. Kernels for CPU tensors bind in cpu/*.cpp; fake kernels, autograd, autocast,
// FLOP formulas and the reference and Triton overloads bind in Python (xtg_kernels/ops/<op>/library.py).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(xtg, m) {
  m.def(
      "ragged_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, float softmax_scale)"
      " -> (Tensor out, Tensor softmax_lse)");
  m.def(
      "ragged_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,"
      " Tensor softmax_lse, Tensor cu_seqlens, SymInt max_seqlen, float softmax_scale)"
      " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def(
      "expression_embedding(Tensor values, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor bin_table, float alpha,"
      " Tensor? gene_ids, Tensor? gene_table, Tensor? distinct_index) -> Tensor");
  m.def(
      "expression_embedding_backward(Tensor grad_out, Tensor values, Tensor w1, Tensor b1, Tensor w2, Tensor b2,"
      " Tensor bin_table, float alpha, Tensor? gene_ids, Tensor? gene_table, Tensor? distinct_index,"
      " bool needs_values_grad) -> (Tensor grad_values, Tensor grad_w1, Tensor grad_b1, Tensor grad_w2,"
      " Tensor grad_b2, Tensor grad_bin_table, Tensor grad_gene_table)");
  m.def(
      "favor_attention(Tensor q, Tensor k, Tensor v, Tensor projection, Tensor cu_seqlens, SymInt max_seqlen,"
      " Tensor cu_seqlens_q, SymInt max_seqlen_q, float eps, bool per_cell) -> (Tensor out, Tensor context,"
      " Tensor key_sum, Tensor key_max, Tensor row_max, Tensor row_sum)");
  m.def(
      "favor_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor projection, Tensor out,"
      " Tensor context, Tensor key_sum, Tensor key_max, Tensor row_max, Tensor row_sum, Tensor cu_seqlens,"
      " SymInt max_seqlen, Tensor cu_seqlens_q, SymInt max_seqlen_q, float eps, bool per_cell)"
      " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def("distinct_index(Tensor values, Tensor cu_seqlens) -> Tensor");
  m.def(
      "masked_decoder_gather(Tensor table, Tensor zero_row, Tensor mask_row, Tensor encoded, Tensor cu_seqlens,"
      " Tensor gene_ids, Tensor? masked_ids, Tensor? masked_cu_seqlens, Tensor? out_genes, Tensor? out_cu_seqlens)"
      " -> Tensor");
  m.def(
      "masked_decoder_gather_backward(Tensor grad_out, Tensor cu_seqlens, Tensor gene_ids, Tensor? masked_ids,"
      " Tensor? masked_cu_seqlens, Tensor? out_genes, Tensor? out_cu_seqlens, SymInt num_genes)"
      " -> (Tensor grad_table, Tensor grad_zero_row, Tensor grad_mask_row, Tensor grad_encoded)");
  m.def(
      "dropout(Tensor x, Tensor? residual, Tensor row_ids, Tensor seed, int place, float p, bool relu) -> Tensor");
  m.def(
      "dropout_backward(Tensor grad_out, Tensor? out, Tensor row_ids, Tensor seed, int place, float p,"
      " ScalarType dtype) -> Tensor");
  m.def(
      "masked_head(Tensor x, Tensor? rows, Tensor norm1_weight, Tensor norm1_bias, Tensor norm2_weight,"
      " Tensor norm2_bias, Tensor weight, Tensor bias, float eps) -> Tensor");
  m.def(
      "masked_head_backward(Tensor grad_out, Tensor x, Tensor? rows, Tensor norm1_weight, Tensor norm1_bias,"
      " Tensor norm2_weight, Tensor norm2_bias, Tensor weight, Tensor bias, float eps)"
      " -> (Tensor grad_x, Tensor grad_norm1_weight, Tensor grad_norm1_bias, Tensor grad_norm2_weight,"
      " Tensor grad_norm2_bias, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "masked_mse(Tensor x, Tensor? rows, Tensor target, Tensor norm1_weight, Tensor norm1_bias, Tensor norm2_weight,"
      " Tensor norm2_bias, Tensor weight, Tensor bias, float eps, bool mean) -> Tensor");
  m.def(
      "masked_mse_backward(Tensor grad_out, Tensor x, Tensor? rows, Tensor target, Tensor norm1_weight,"
      " Tensor norm1_bias, Tensor norm2_weight, Tensor norm2_bias, Tensor weight, Tensor bias, float eps, bool mean)"
      " -> (Tensor grad_x, Tensor grad_norm1_weight, Tensor grad_norm1_bias, Tensor grad_norm2_weight,"
      " Tensor grad_norm2_bias, Tensor grad_weight, Tensor grad_bias)");
}
