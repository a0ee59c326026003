// What the kernels of one ISA look like from outside: argument structs over raw pointers and a table of functions.
// Torch-free: bindings fill the structs, cpu/isa/*.cpp fill one table each, isa.h chooses the table at run time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace xtg {

// Segments up to this length can have their whole backward as one unit of work: more would leave threads idle.
constexpr int64_t kOnePassRows = 16384;

// Rows that one unit of attention work may own, and the multiple that keeps every group of rows in the kernels whole.
constexpr int64_t kMaxBlockRows = 1056, kBlockRowMultiple = 96;

// Rows that one partial sum of favor_attention covers, at most: more parts cost memory, fewer leave threads idle. And rows
// of a unit that sums nothing.
constexpr int64_t kFavorPartRows = 2048, kFavorRows = 512;

// One unit of work of ragged attention: rows [begin + first, begin + first + rows) of a segment, for every head.
struct SegmentBlock {
  int64_t begin;  // first row of the segment
  int64_t length;
  int64_t first;  // offset of the block in the segment
  int64_t rows;

  int64_t cost() const { return length * rows; }  // in scores
};

// Consecutive rows of one segment: one unit of work of favor_attention, for every head.
struct RowChunk {
  int64_t segment;
  int64_t first;  // first row of the chunk in the tensor
  int64_t rows;
};

// (total_nnz, num_heads, head_dim) operand; strides in elements, head_dim contiguous.
struct Operand {
  const void* data;
  int64_t row_stride;
  int64_t head_stride;
};

struct AttentionArgs {
  DType dtype;
  int64_t total_nnz, num_heads, head_dim;
  float softmax_scale;
  Operand q, k, v;
  void* out;           // (total_nnz, num_heads, head_dim) contiguous; read by the backward
  float* softmax_lse;  // (num_heads, total_nnz); read by the backward
  // Backward only.
  Operand grad_out;
  const float* grad_lse;  // (num_heads, total_nnz) or null
  float* delta;           // (num_heads, total_nnz), written by backward_query, read by backward_key
  // (num_heads, total_nnz), written by backward_large where softmax_lse is_large; null where it is so nowhere.
  float *large_max, *large_sum;
  int64_t one_pass_rows;  // longest segment that goes to `attention_backward`
  void *grad_q, *grad_k, *grad_v;  // contiguous
};

// Whether softmax_lse, a float, has too few digits behind the point for the backward. NaN counts.
static inline bool is_large(float softmax_lse) { return !(softmax_lse > -160.0f && softmax_lse < 160.0f); }

struct FavorArgs {
  DType dtype;  // f32 or bf16
  int64_t total_q, num_heads, head_dim, num_features;
  float eps;
  const float* projection;  // (num_features, head_dim) contiguous
  Operand q, k, v;
  void* out;                  // (total_q, num_heads, head_dim) contiguous; read by the backward
  float *context, *key_sum;   // (batch, num_heads, num_features, head_dim), (batch, num_heads, num_features)
  float* key_max;             // (batch, num_heads)
  float *row_max, *row_sum;   // (num_heads, total_q)
  // Backward only.
  Operand grad_out;
  float *grad_context, *grad_key_sum;  // like context and key_sum
  void *grad_q, *grad_k, *grad_v;      // contiguous
};

// A stabiliser as the kernels use it. It is stored as a natural logarithm: what uses the one that was stored, and not the
// one that was found, agrees with the backward to the last bit.
static inline float in_log2(float stabilizer) { return stabilizer * 1.4426950408889634f; }

// What one chunk adds to the sums of its segment and head: to context and key_sum, or to their gradients.
struct FavorPart {
  float* context;  // (num_features, head_dim), rows padded to the vector width
  float* key_sum;  // (num_features,)
  // What eps multiplies: the same for every feature.
  float* context_of_eps;  // (head_dim,), padded
  float key_sum_of_eps;
  float key_max;  // the stabiliser that the sums are relative to, in units of log2
};

// What one chunk of keys and one head add to the gradient that goes through key_max.
struct FavorKeyPart {
  float score;           // the largest
  int64_t row, feature;  // and where it comes first, by rows and then by features
  double grad_sum;       // of the gradients of all scores
};

struct EmbeddingArgs {
  DType dtype;  // of gene_table, out and grad_out
  int64_t bins, dim, padded_bins, padded_dim;
  float alpha;
  const float* values;  // (total_nnz,)
  // Float copies, rows padded with zeros to a multiple of the vector width.
  const float *w1, *b1, *b2;    // (padded_bins,)
  const float* w2;              // (bins, padded_bins); backward only
  const float* w2_transposed;   // (bins, padded_bins)
  const float* bin_table;       // (bins, padded_dim)
  const float* bin_table_transposed;  // (dim, padded_bins); backward only
  const int32_t* gene_ids;      // (total_nnz,) or null
  const void* gene_table;       // (rows, dim) contiguous or null
  // Distinct values: value u is values[first_token[u]] and belongs to tokens[offsets[u]..offsets[u + 1]].
  const int32_t *first_token, *offsets, *tokens;
  void* out;  // (total_nnz, dim)
  // Backward only.
  const void* grad_out;  // (total_nnz, dim) contiguous
  float* grad_values;    // (total_nnz,) or null
};

// Sums of the parameter gradients over some of the distinct values.
struct EmbeddingGrads {
  float *w1, *b1, *b2;  // (padded_bins,)
  float* w2;            // (bins, padded_bins)
  float* bin_table;     // (bins, padded_dim)
};

struct GatherArgs {
  DType dtype;
  int64_t batch, num_genes, dim;
  const int32_t *gene_ids, *cu_seqlens;           // ids ascend in each cell, here and below
  const int32_t *masked_ids, *masked_cu_seqlens;  // or null: no gene is masked
  const int32_t *out_genes, *out_cu_seqlens;      // or null: every cell has a row for each gene
  const void *table, *encoded;                    // (num_genes, dim), (total_nnz, dim) contiguous
  const float *zero_row, *mask_row;               // (dim,)
  void* out;                                      // (batch, num_genes, dim) or (total_out, dim)
  // Backward only.
  const void* grad_out;  // as out, contiguous
  void* grad_table;      // (num_genes, dim), or null where units do not own genes
  void* grad_encoded;    // (total_nnz, dim)
};

// One unit of gather work: the rows of some genes in some cells.
struct GatherUnit {
  int64_t first_cell, end_cell, first_gene, end_gene;
};

struct HeadArgs {
  DType dtype;  // of x and grad_x
  int64_t dim, padded_dim;
  float eps;
  const void* x;  // rows of dim contiguous elements
  int64_t row_stride;
  const int64_t* rows;  // (n,), or null: all rows of x in their order
  // Float copies, padded with zeros to a multiple of the vector width.
  const float *norm1_weight, *norm1_bias, *scale;  // scale = weight * norm2_weight
  float mean_scale, offset;                        // offset = weight . norm2_bias + bias
  // Backward only. Row chosen[u] is chosen at positions[offsets[u]..offsets[u + 1]].
  const int64_t* chosen;
  const int32_t *offsets, *positions;
  const float* grad_out;  // (n,), or null with target
  const float* target;    // (n,) or null; grad_out is then loss_factor * (prediction - target)
  float loss_factor;
  void* grad_x;  // (N, dim) contiguous
};

// What the gradients of the head's parameters need, summed over rows.
struct HeadSums {
  double* grad_out;
  float *normed2, *product, *middle;  // (padded_dim,): grad_out normed2, grad_middle normed1, grad_middle
};

struct DropoutArgs {
  DType in, out;         // of x, and of residual and out
  int64_t rows, dim;
  const void* x;         // (rows, dim) contiguous, as are the others
  const void* residual;  // or null
  const void* kept;      // of out's type or null; where it is given x passes where it is positive, and no mask is drawn
  void* dst;
  const int64_t* row_ids;
  uint64_t seed;
  uint32_t place;
  uint32_t threshold;  // a channel whose 16 bits are below is dropped
  float scale;         // of what is kept
  bool relu;
};

struct Kernels {
  const char* name;
  int width;  // floats in a vector register: rows handed to the kernels are padded to a multiple of it
  size_t (*attention_scratch)(const AttentionArgs&);
  void (*attention_forward)(const AttentionArgs&, const SegmentBlock&, int64_t head, void* scratch);
  // Whether attention_backward takes this type; the other two always do.
  bool (*attention_one_pass)(DType);
  void (*attention_backward)(const AttentionArgs&, const SegmentBlock& segment, int64_t head, void* scratch);
  // What the others need of queries with a large softmax_lse: runs before them.
  void (*attention_backward_large)(const AttentionArgs&, const SegmentBlock&, int64_t head, void* scratch);
  void (*attention_backward_query)(const AttentionArgs&, const SegmentBlock&, int64_t head, void* scratch);
  void (*attention_backward_key)(const AttentionArgs&, const SegmentBlock&, int64_t head, void* scratch);
  size_t (*favor_scratch)(const FavorArgs&);
  void (*favor_context)(const FavorArgs&, const RowChunk& keys, int64_t head, FavorPart& part, void* scratch);
  // Adds up parts, in their order, relative to key_max; the first factor of eps multiplies into every feature.
  void (*favor_sum)(const FavorArgs&, const FavorPart* parts, int64_t count, int64_t stride, float key_max,
                    float* context, float* key_sum);
  void (*favor_query)(const FavorArgs&, const RowChunk& queries, int64_t head, void* scratch);
  void (*favor_backward_query)(const FavorArgs&, const RowChunk& queries, int64_t head, FavorPart& part, void* scratch);
  void (*favor_backward_key)(const FavorArgs&, const RowChunk& keys, int64_t head, FavorKeyPart& part, void* scratch);
  // Gives grad_k what goes through the key_max of some heads; parts[chunk * num_heads + head] are those of one segment.
  void (*favor_backward_key_max)(const FavorArgs&, const FavorKeyPart* parts, int64_t chunks, int64_t first_head,
                                 int64_t heads);
  int64_t value_block;  // distinct values of one unit of embedding work
  size_t (*embedding_scratch)(const EmbeddingArgs&);
  void (*embedding_forward)(const EmbeddingArgs&, int64_t first, int64_t count, void* scratch);
  void (*embedding_backward)(const EmbeddingArgs&, int64_t first, int64_t count, const EmbeddingGrads&, void* scratch);
  // Row of the gene table's gradient: the sum of grad_out over the given tokens, in their order.
  void (*sum_rows)(DType, const void* src, int64_t dim, const int32_t* tokens, int64_t count, float* scratch, void* dst);
  void (*gather_forward)(const GatherArgs&, const GatherUnit&);
  size_t (*gather_scratch)(const GatherArgs&, int64_t genes);
  void (*gather_backward)(const GatherArgs&, const GatherUnit&, float* grad_zero_row, float* grad_mask_row,
                          void* scratch);
  int64_t head_block;  // chosen rows of one unit of work
  size_t (*head_scratch)(const HeadArgs&);
  void (*head_forward)(const HeadArgs&, int64_t first, int64_t count, float* predictions, void* scratch);
  void (*head_backward)(const HeadArgs&, int64_t first, int64_t count, const HeadSums&, void* scratch);
  void (*dropout_rows)(const DropoutArgs&, int64_t first, int64_t count);
  void (*load_rows)(DType, const void* src, int64_t rows, int64_t columns, float* dst, int64_t padded);
  void (*store_rows)(DType, const float* src, int64_t padded, int64_t rows, int64_t columns, void* dst);
};

}  // namespace xtg
