// The kernels for ISA "avx512"; setup.py compiles this file with that ISA's flags.
#include "../../common/vec_avx512.h"
#include "table.h"

namespace xtg {

extern const Kernels kernels_avx512;
constexpr Kernels kernels_avx512 = kernel_table<VecAvx512>("avx512");

}  // namespace xtg
