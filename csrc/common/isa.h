// Which kernels this machine can run, and which are in use.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace xtg {

// Names of the ISAs in this build that the machine has, lowest first.
std::vector<std::string> available_isas();

// The kernels in use: the highest ISA of the machine, or the one XTG_CPU_ISA names.
const Kernels& active_kernels();

// Uses another ISA from now on; throws std::invalid_argument if it is not available.
void use_isa(const std::string& name);

}  // namespace xtg
