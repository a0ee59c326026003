// The kernels for ISA "avx2"; setup.py compiles this file with that ISA's flags.
#include "../../common/vec_avx2.h"
#include "table.h"

namespace xtg {

extern const Kernels kernels_avx2;
constexpr Kernels kernels_avx2 = kernel_table<VecAvx2>("avx2");

}  // namespace xtg
