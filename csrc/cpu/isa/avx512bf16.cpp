// The kernels for ISA "avx512bf16"; setup.py compiles this file with that ISA's flags.
#include "../../common/dot_avx512bf16.h"
#include "table.h"

namespace xtg {

extern const Kernels kernels_avx512bf16;
constexpr Kernels kernels_avx512bf16 = kernel_table<VecAvx512Bf16>("avx512bf16");

}  // namespace xtg
