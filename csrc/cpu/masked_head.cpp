// masked_head, masked_mse and their backwards for CPU tensors: arguments, grouping of rows chosen again, threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <tuple>

#include "../common/isa.h"
#include "../common/work_list.h"
#include "arguments.h"
#include "parallel.h"

namespace xtg {
namespace {

// The parameters' gradients are summed in at most this many parts, split by the chosen rows alone, so that the order of
// the sums does not depend on the number of threads.
constexpr int64_t kHeadParts = 64;

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Floats = std::vector<float>;

struct Parameters {
  const Tensor &norm1_weight, &norm1_bias, &norm2_weight, &norm2_bias, &weight, &bias;
};

struct Head {
  HeadArgs args{};
  std::vector<Tensor> kept;    // contiguous copies that args points into
  DType parameter_dtype;
  Floats norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight, scale;  // padded with zeros
  std::vector<int64_t> rows;
  int64_t count;  // chosen rows
  // Backward only.
  std::vector<int64_t> chosen;
  Groups groups;
};

Head head(const Kernels& kernels, const Tensor& x_in, const std::optional<Tensor>& rows, const Parameters& p,
          double eps) {
  Head h;
  HeadArgs& args = h.args;
  STD_TORCH_CHECK(x_in.dim() == 2 && x_in.size(1) >= 1, "x: expected (N, dim) with at least one channel");
  const int64_t all_rows = x_in.size(0), dim = x_in.size(1);
  h.kept.push_back(last_contiguous(x_in));
  const Tensor& x = h.kept.back();
  args.dtype = element_type(x, "x");
  args.dim = dim;
  args.padded_dim = round_up(dim, kernels.width);
  args.row_stride = x.stride(0);
  args.x = x.data_ptr();
  args.eps = float(eps);

  h.parameter_dtype = element_type(p.norm1_weight, "norm1_weight");
  const auto floats = [&](const Tensor& parameter, const char* name, int64_t size) {
    check_sizes(parameter, name, p.norm1_weight.scalar_type(), {size});
    const Tensor contiguous = torch::stable::contiguous(parameter);
    Floats out(size_t(round_up(size, kernels.width)));
    kernels.load_rows(h.parameter_dtype, contiguous.data_ptr(), 1, size, out.data(), int64_t(out.size()));
    return out;
  };
  h.norm1_weight = floats(p.norm1_weight, "norm1_weight", dim);
  h.norm1_bias = floats(p.norm1_bias, "norm1_bias", dim);
  h.norm2_weight = floats(p.norm2_weight, "norm2_weight", dim);
  h.norm2_bias = floats(p.norm2_bias, "norm2_bias", dim);
  h.weight = floats(p.weight, "weight", dim);
  double offset = floats(p.bias, "bias", 1)[0], sum_scale = 0;
  h.scale.resize(h.weight.size());
  for (size_t j = 0; j < h.weight.size(); ++j) {
    h.scale[j] = h.weight[j] * h.norm2_weight[j];
    sum_scale += h.scale[j];
    offset += double(h.weight[j]) * h.norm2_bias[j];
  }
  args.norm1_weight = h.norm1_weight.data();
  args.norm1_bias = h.norm1_bias.data();
  args.scale = h.scale.data();
  args.mean_scale = float(sum_scale / double(dim));
  args.offset = float(offset);

  h.count = all_rows;
  if (rows) {
    h.count = rows->numel();
    const bool wide = rows->scalar_type() == ScalarType::Long;
    check_sizes(*rows, "rows", wide ? ScalarType::Long : ScalarType::Int, {h.count});
    const Tensor contiguous = torch::stable::contiguous(*rows);
    for (int64_t i = 0; i < h.count; ++i) {
      const int64_t row = wide ? static_cast<const int64_t*>(contiguous.data_ptr())[i]
                               : static_cast<const int32_t*>(contiguous.data_ptr())[i];
      STD_TORCH_CHECK(row >= 0 && row < all_rows, "rows: expected rows of x, [0, ", all_rows, "), got ", row, " at ", i);
      h.rows.push_back(row);
    }
    args.rows = h.rows.data();
  }
  STD_TORCH_CHECK(h.count < INT32_MAX, "rows: expected fewer than 2^31");
  return h;
}

// Calls f(block, first, count, predictions) for every block of chosen rows.
template <class F>
void for_each_block(const Kernels& kernels, const Head& h, F f) {
  const int64_t block = kernels.head_block, scratch_bytes = int64_t(kernels.head_scratch(h.args));
  for_each_unit(ceil_div(h.count, block), size_t(scratch_bytes + block * int64_t(sizeof(float))),
                [&](int64_t unit, void* scratch) {
                  const int64_t first = unit * block, count = min_of(block, h.count - first);
                  auto* predictions = reinterpret_cast<float*>(static_cast<char*>(scratch) + scratch_bytes);
                  kernels.head_forward(h.args, first, count, predictions, scratch);
                  f(unit, first, count, predictions);
                });
}

Tensor masked_head(const Tensor& x, const std::optional<Tensor>& rows, const Tensor& norm1_weight,
                   const Tensor& norm1_bias, const Tensor& norm2_weight, const Tensor& norm2_bias, const Tensor& weight,
                   const Tensor& bias, double eps) {
  const Kernels& kernels = active_kernels();
  const Head h = head(kernels, x, rows, {norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight, bias}, eps);
  Tensor out = torch::stable::new_empty(x, {h.count}, ScalarType::Float);
  auto* p = static_cast<float*>(out.data_ptr());
  for_each_block(kernels, h, [&](int64_t, int64_t first, int64_t count, const float* predictions) {
    std::copy(predictions, predictions + count, p + first);
  });
  return out;
}

const float* checked_target(Head& h, const Tensor& target) {
  check_sizes(target, "target", ScalarType::Float, {h.count});
  h.kept.push_back(torch::stable::contiguous(target));
  return static_cast<const float*>(h.kept.back().data_ptr());
}

Tensor masked_mse(const Tensor& x, const std::optional<Tensor>& rows, const Tensor& target_in,
                  const Tensor& norm1_weight, const Tensor& norm1_bias, const Tensor& norm2_weight,
                  const Tensor& norm2_bias, const Tensor& weight, const Tensor& bias, double eps, bool mean) {
  const Kernels& kernels = active_kernels();
  Head h = head(kernels, x, rows, {norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight, bias}, eps);
  const float* target = checked_target(h, target_in);
  std::vector<double> losses(size_t(ceil_div(h.count, kernels.head_block)));
  for_each_block(kernels, h, [&](int64_t unit, int64_t first, int64_t count, const float* predictions) {
    double loss = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double error = double(predictions[i]) - target[first + i];
      loss += error * error;
    }
    losses[size_t(unit)] = loss;
  });
  const double loss = std::accumulate(losses.begin(), losses.end(), 0.0);
  Tensor out = torch::stable::new_empty(x, std::vector<int64_t>{}, ScalarType::Float);
  *static_cast<float*>(out.data_ptr()) = float(mean ? loss / double(h.count) : loss);
  return out;
}

void zero_bytes(void* p, size_t bytes) {
  constexpr int64_t kSlice = int64_t(1) << 21;
  const auto total = int64_t(bytes);
  for_each_unit(ceil_div(total, kSlice), 0, [&](int64_t unit, void*) {
    std::memset(static_cast<char*>(p) + unit * kSlice, 0, size_t(min_of(kSlice, total - unit * kSlice)));
  });
}

// Needs args.grad_out, or args.target and args.loss_factor.
Grads gradients(const Kernels& kernels, Head& h, const Tensor& x, bool all_rows, const Parameters& parameters) {
  HeadArgs& args = h.args;
  if (all_rows) {
    h.chosen.resize(size_t(h.count));
    std::iota(h.chosen.begin(), h.chosen.end(), int64_t(0));
    h.groups.tokens.assign(h.chosen.begin(), h.chosen.end());
    h.groups.offsets = h.groups.tokens;
    h.groups.offsets.push_back(int32_t(h.count));
  } else {
    // Positions of each row that is chosen, rows ascending; empty groups close up.
    h.groups = group_by(h.rows.data(), h.count, x.size(0));
    size_t kept = 0;
    for (int64_t row = 0; row < x.size(0); ++row)
      if (h.groups.offsets[size_t(row)] < h.groups.offsets[size_t(row) + 1]) {
        h.chosen.push_back(row);
        h.groups.offsets[++kept] = h.groups.offsets[size_t(row) + 1];
      }
  }
  args.chosen = h.chosen.data();
  args.offsets = h.groups.offsets.data();
  args.positions = h.groups.tokens.data();
  const std::vector<int64_t> shape = {x.size(0), args.dim};
  Tensor grad_x = with_large_pages(torch::stable::new_empty(x, shape));
  args.grad_x = grad_x.data_ptr();
  if (!all_rows) zero_bytes(args.grad_x, size_t(grad_x.numel()) * grad_x.element_size());

  const int64_t count = int64_t(h.chosen.size()), block = kernels.head_block, blocks = ceil_div(count, block);
  const int64_t parts = min_of(kHeadParts, max_of<int64_t>(blocks, 1)), padded = args.padded_dim;
  Floats sums(size_t(3 * parts * padded), 0.0f);
  std::vector<double> sums_grad_out(size_t(parts), 0.0);
  for_each_unit(parts, kernels.head_scratch(args), [&](int64_t part, void* scratch) {
    float* p = sums.data() + 3 * part * padded;
    const HeadSums part_sums{&sums_grad_out[size_t(part)], p, p + padded, p + 2 * padded};
    for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; ++b)
      kernels.head_backward(args, b * block, min_of(block, count - b * block), part_sums, scratch);
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t j = 0; j < 3 * padded; ++j) sums[size_t(j)] += sums[size_t(3 * part * padded + j)];
  const auto sum_grad_out = float(std::accumulate(sums_grad_out.begin(), sums_grad_out.end(), 0.0));

  const float *normed2 = sums.data(), *product = normed2 + padded, *middle = product + padded;
  Floats grad_norm2_weight(size_t(args.dim)), grad_norm2_bias(size_t(args.dim)), grad_weight(size_t(args.dim));
  for (size_t j = 0; j < size_t(args.dim); ++j) {
    grad_norm2_weight[j] = h.weight[j] * normed2[j];
    grad_norm2_bias[j] = h.weight[j] * sum_grad_out;
    grad_weight[j] = h.norm2_weight[j] * normed2[j] + h.norm2_bias[j] * sum_grad_out;
  }
  const auto stored = [&](const float* src, int64_t size) {
    Tensor grad = torch::stable::new_empty(parameters.weight, {size});
    kernels.store_rows(h.parameter_dtype, src, size, 1, size, grad.data_ptr());
    return grad;
  };
  return {grad_x,
          stored(product, args.dim),
          stored(middle, args.dim),
          stored(grad_norm2_weight.data(), args.dim),
          stored(grad_norm2_bias.data(), args.dim),
          stored(grad_weight.data(), args.dim),
          stored(&sum_grad_out, 1)};
}

Grads masked_head_backward(const Tensor& grad_out_in, const Tensor& x, const std::optional<Tensor>& rows,
                           const Tensor& norm1_weight, const Tensor& norm1_bias, const Tensor& norm2_weight,
                           const Tensor& norm2_bias, const Tensor& weight, const Tensor& bias, double eps) {
  const Kernels& kernels = active_kernels();
  const Parameters parameters{norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight, bias};
  Head h = head(kernels, x, rows, parameters, eps);
  const Tensor grad_out = torch::stable::contiguous(grad_out_in);
  check_sizes(grad_out, "grad_out", ScalarType::Float, {h.count});
  h.args.grad_out = static_cast<const float*>(grad_out.data_ptr());
  return gradients(kernels, h, x, !rows, parameters);
}

Grads masked_mse_backward(const Tensor& grad_out, const Tensor& x, const std::optional<Tensor>& rows,
                          const Tensor& target, const Tensor& norm1_weight, const Tensor& norm1_bias,
                          const Tensor& norm2_weight, const Tensor& norm2_bias, const Tensor& weight,
                          const Tensor& bias, double eps, bool mean) {
  const Kernels& kernels = active_kernels();
  const Parameters parameters{norm1_weight, norm1_bias, norm2_weight, norm2_bias, weight, bias};
  Head h = head(kernels, x, rows, parameters, eps);
  check_sizes(grad_out, "grad_out", ScalarType::Float, {});
  h.args.target = checked_target(h, target);
  const double grad_loss = *static_cast<const float*>(grad_out.data_ptr());
  h.args.loss_factor = float(2 * grad_loss / double(mean ? max_of<int64_t>(h.count, 1) : 1));
  return gradients(kernels, h, x, !rows, parameters);
}

}  // namespace
}  // namespace xtg

STABLE_TORCH_LIBRARY_IMPL(xtg, CPU, m) {
  m.impl("masked_head", TORCH_BOX(&xtg::masked_head));
  m.impl("masked_head_backward", TORCH_BOX(&xtg::masked_head_backward));
  m.impl("masked_mse", TORCH_BOX(&xtg::masked_mse));
  m.impl("masked_mse_backward", TORCH_BOX(&xtg::masked_mse_backward));
}
