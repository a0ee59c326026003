// The kernels for ISA "scalar"; setup.py compiles this file with that ISA's flags.
#include "../../common/vec_scalar.h"
#include "table.h"

namespace xtg {

extern const Kernels kernels_scalar;
constexpr Kernels kernels_scalar = kernel_table<VecScalar>("scalar");

}  // namespace xtg
