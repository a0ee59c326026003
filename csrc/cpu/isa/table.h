// The table of kernels of one vector type: every template instantiated for the three element types.
#pragma once

#include "../dropout.h"
#include "../expression_embedding.h"
#include "../favor_attention.h"
#include "../masked_decoder_gather.h"
#include "../masked_head.h"
#include "../ragged_attention.h"

namespace xtg {

// Calls f with a value of the element type that dtype names.
template <class F>
static inline auto with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
    default:
      return f(float{});
  }
}

// The same without f16, whose range the features of favor_attention overflow.
template <class F>
static inline auto with_feature_type(DType dtype, F f) {
  return dtype == DType::bf16 ? f(bf16{}) : f(float{});
}

// constexpr: the table is data, so loading the library runs no code built for an ISA that the machine may lack.
template <class V>
static constexpr Kernels kernel_table(const char* name) {
  Kernels t{};
  t.name = name;
  t.width = V::width;
  t.attention_scratch = [](const AttentionArgs& args) {
    return with_type(args.dtype, [&](auto e) { return attention_scratch<V, decltype(e)>(args); });
  };
  t.attention_forward = [](const AttentionArgs& args, const SegmentBlock& block, int64_t head, void* scratch) {
    with_type(args.dtype, [&](auto e) { attention_forward<V, decltype(e)>(args, block, head, scratch); });
  };
  t.attention_one_pass = [](DType dtype) {
    return with_type(dtype, [](auto e) { return std::is_same_v<typename DotFor<V, decltype(e)>::type, DotFloat<V>>; });
  };
  t.attention_backward = [](const AttentionArgs& args, const SegmentBlock& segment, int64_t head, void* scratch) {
    with_type(args.dtype, [&](auto e) {
      if constexpr (std::is_same_v<typename DotFor<V, decltype(e)>::type, DotFloat<V>>)
        attention_backward<V, decltype(e)>(args, segment, head, scratch);
    });
  };
  t.attention_backward_large = [](const AttentionArgs& args, const SegmentBlock& block, int64_t head, void* scratch) {
    with_type(args.dtype, [&](auto e) { attention_backward_large<V, decltype(e)>(args, block, head, scratch); });
  };
  t.attention_backward_query = [](const AttentionArgs& args, const SegmentBlock& block, int64_t head, void* scratch) {
    with_type(args.dtype, [&](auto e) { attention_backward_query<V, decltype(e)>(args, block, head, scratch); });
  };
  t.attention_backward_key = [](const AttentionArgs& args, const SegmentBlock& block, int64_t head, void* scratch) {
    with_type(args.dtype, [&](auto e) { attention_backward_key<V, decltype(e)>(args, block, head, scratch); });
  };
  t.favor_scratch = [](const FavorArgs& args) {
    return with_feature_type(args.dtype, [&](auto e) { return favor_scratch<V, decltype(e)>(args); });
  };
  t.favor_context = [](const FavorArgs& args, const RowChunk& keys, int64_t head, FavorPart& part, void* scratch) {
    with_feature_type(args.dtype, [&](auto e) { favor_context<V, decltype(e)>(args, keys, head, part, scratch); });
  };
  t.favor_sum = [](const FavorArgs& args, const FavorPart* parts, int64_t count, int64_t stride, float key_max,
                   float* context, float* key_sum) {
    favor_sum<V>(args, parts, count, stride, key_max, context, key_sum);
  };
  t.favor_query = [](const FavorArgs& args, const RowChunk& queries, int64_t head, void* scratch) {
    with_feature_type(args.dtype, [&](auto e) { favor_query<V, decltype(e)>(args, queries, head, scratch); });
  };
  t.favor_backward_query = [](const FavorArgs& args, const RowChunk& queries, int64_t head, FavorPart& part,
                              void* scratch) {
    with_feature_type(args.dtype,
                      [&](auto e) { favor_backward_query<V, decltype(e)>(args, queries, head, part, scratch); });
  };
  t.favor_backward_key = [](const FavorArgs& args, const RowChunk& keys, int64_t head, FavorKeyPart& part,
                            void* scratch) {
    with_feature_type(args.dtype, [&](auto e) { favor_backward_key<V, decltype(e)>(args, keys, head, part, scratch); });
  };
  t.favor_backward_key_max = [](const FavorArgs& args, const FavorKeyPart* parts, int64_t chunks, int64_t first_head,
                                int64_t heads) {
    with_feature_type(args.dtype, [&](auto e) {
      favor_backward_key_max<V, decltype(e)>(args, parts, chunks, first_head, heads);
    });
  };
  t.value_block = kValueBlock;
  t.embedding_scratch = [](const EmbeddingArgs& args) { return embedding_scratch(args); };
  t.embedding_forward = [](const EmbeddingArgs& args, int64_t first, int64_t count, void* scratch) {
    with_type(args.dtype, [&](auto e) { embedding_forward<V, decltype(e)>(args, first, count, scratch); });
  };
  t.embedding_backward = [](const EmbeddingArgs& args, int64_t first, int64_t count, const EmbeddingGrads& grads,
                            void* scratch) {
    with_type(args.dtype, [&](auto e) { embedding_backward<V, decltype(e)>(args, first, count, grads, scratch); });
  };
  t.sum_rows = [](DType dtype, const void* src, int64_t dim, const int32_t* tokens, int64_t count, float* scratch,
                  void* dst) {
    with_type(dtype, [&](auto e) { sum_rows<V, decltype(e)>(src, dim, tokens, count, scratch, dst); });
  };
  t.gather_forward = [](const GatherArgs& args, const GatherUnit& unit) {
    with_type(args.dtype, [&](auto e) { gather_forward<V, decltype(e)>(args, unit); });
  };
  t.gather_scratch = [](const GatherArgs& args, int64_t genes) { return gather_scratch<V>(args, genes); };
  t.gather_backward = [](const GatherArgs& args, const GatherUnit& unit, float* grad_zero_row, float* grad_mask_row,
                         void* scratch) {
    with_type(args.dtype,
              [&](auto e) { gather_backward<V, decltype(e)>(args, unit, grad_zero_row, grad_mask_row, scratch); });
  };
  t.head_block = kHeadBlock;
  t.head_scratch = [](const HeadArgs& args) { return head_scratch<V>(args); };
  t.head_forward = [](const HeadArgs& args, int64_t first, int64_t count, float* predictions, void* scratch) {
    with_type(args.dtype, [&](auto e) { head_forward<V, decltype(e)>(args, first, count, predictions, scratch); });
  };
  t.head_backward = [](const HeadArgs& args, int64_t first, int64_t count, const HeadSums& sums, void* scratch) {
    with_type(args.dtype, [&](auto e) { head_backward<V, decltype(e)>(args, first, count, sums, scratch); });
  };
  t.dropout_rows = [](const DropoutArgs& args, int64_t first, int64_t count) {
    with_type(args.in, [&](auto in) {
      with_type(args.out, [&](auto out) {
        using In = decltype(in);
        using Out = decltype(out);
        if constexpr (std::is_same_v<In, Out> || std::is_same_v<In, float> || std::is_same_v<Out, float>)
          dropout_rows<V, In, Out>(args, first, count);
      });
    });
  };
  t.load_rows = [](DType dtype, const void* src, int64_t rows, int64_t columns, float* dst, int64_t padded) {
    with_type(dtype, [&](auto e) {
      for (int64_t r = 0; r < rows; ++r)
        load_row<V>(static_cast<const decltype(e)*>(src) + r * columns, columns, dst + r * padded, padded);
    });
  };
  t.store_rows = [](DType dtype, const float* src, int64_t padded, int64_t rows, int64_t columns, void* dst) {
    with_type(dtype, [&](auto e) {
      for (int64_t r = 0; r < rows; ++r)
        store_row<V>(src + r * padded, columns, 1.0f, static_cast<decltype(e)*>(dst) + r * columns);
    });
  };
  return t;
}

}  // namespace xtg
