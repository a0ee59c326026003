// The kernels for ISA "amx"; setup.py compiles this file with that ISA's flags.
#include "../../common/dot_amx.h"
#include "table.h"

namespace xtg {

extern const Kernels kernels_amx;
constexpr Kernels kernels_amx = kernel_table<VecAmx>("amx");

}  // namespace xtg
