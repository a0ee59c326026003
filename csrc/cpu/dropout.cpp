// dropout and its backward for CPU tensors: arguments, units of work, threads.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>

#include "../common/isa.h"
#include "arguments.h"
#include "parallel.h"

namespace xtg {
namespace {

// Elements of a unit of work: enough to hide what it takes to hand one out.
constexpr int64_t kUnitElements = 32768;

// Where 16 bits decide, p is a multiple of 2^-16; what is kept is scaled for that p.
constexpr int64_t kSteps = 65536;

bool go_together(DType in, DType out) { return in == out || in == DType::f32 || out == DType::f32; }

Tensor dropped(const Tensor& x_in, const std::optional<Tensor>& residual, const std::optional<Tensor>& kept,
               const Tensor& row_ids_in, const Tensor& seed, int64_t place, double p, bool relu, ScalarType out_type) {
  STD_TORCH_CHECK(x_in.dim() == 2, "x: expected (rows, dim)");
  STD_TORCH_CHECK(p >= 0 && p <= 1, "p: expected a probability, got ", p);
  STD_TORCH_CHECK(place >= 0 && place < int64_t(1) << 32, "place: expected 0 to 2^32 - 1, got ", place);
  const int64_t rows = x_in.size(0), dim = x_in.size(1);
  check_sizes(row_ids_in, "row_ids", ScalarType::Long, {rows});
  check_sizes(seed, "seed", ScalarType::Long, {});
  const Tensor x = torch::stable::contiguous(x_in), row_ids = torch::stable::contiguous(row_ids_in);
  // Not with_large_pages: a layer of the 100m model in float32, which keeps them for its backward, was slower by it.
  Tensor out = torch::stable::new_empty(x, {rows, dim}, out_type);
  DropoutArgs args{};
  args.in = element_type(x, "x");
  args.out = element_type(out, "residual");
  STD_TORCH_CHECK(go_together(args.in, args.out), "residual: expected the dtype of x or float32");
  Tensor other;
  if (residual || kept) {
    check_sizes(residual ? *residual : *kept, residual ? "residual" : "out", out_type, {rows, dim});
    other = torch::stable::contiguous(residual ? *residual : *kept);
    (residual ? args.residual : args.kept) = other.data_ptr();
  }
  args.rows = rows;
  args.dim = dim;
  args.x = x.data_ptr();
  args.dst = out.data_ptr();
  args.row_ids = static_cast<const int64_t*>(row_ids.data_ptr());
  args.seed = uint64_t(*static_cast<const int64_t*>(seed.data_ptr()));
  args.place = uint32_t(place);
  const auto steps = int64_t(std::nearbyint(p * double(kSteps)));
  args.threshold = uint32_t(min_of(steps, kSteps - 1));
  args.scale = steps == kSteps ? 0.0f : float(double(kSteps) / double(kSteps - steps));
  args.relu = relu;
  const Kernels& kernels = active_kernels();
  const int64_t unit_rows = max_of<int64_t>(kUnitElements / max_of<int64_t>(dim, 1), 1);
  for_each_unit(ceil_div(dim ? rows : 0, unit_rows), 0, [&](int64_t unit, void*) {
    kernels.dropout_rows(args, unit * unit_rows, min_of(unit_rows, rows - unit * unit_rows));
  });
  return out;
}

Tensor dropout(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& row_ids, const Tensor& seed,
               int64_t place, double p, bool relu) {
  STD_TORCH_CHECK(!(relu && residual), "relu: expected without residual");
  return dropped(x, residual, std::nullopt, row_ids, seed, place, p, relu,
                 residual ? residual->scalar_type() : x.scalar_type());
}

Tensor dropout_backward(const Tensor& grad_out, const std::optional<Tensor>& out, const Tensor& row_ids,
                        const Tensor& seed, int64_t place, double p, ScalarType dtype) {
  return dropped(grad_out, std::nullopt, out, row_ids, seed, place, p, false, dtype);
}

}  // namespace
}  // namespace xtg

STABLE_TORCH_LIBRARY_IMPL(xtg, CPU, m) {
  m.impl("dropout", TORCH_BOX(&xtg::dropout));
  m.impl("dropout_backward", TORCH_BOX(&xtg::dropout_backward));
}
