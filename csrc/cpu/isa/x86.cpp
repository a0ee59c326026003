// Which x86 kernels this machine can run. Built on x86-64 only.
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <vector>

#include "../../common/kernels.h"

namespace xtg {

extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512bf16, kernels_amx;

// The tile registers are large, so Linux gives them only to a process that asks.
static bool may_use_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool has_tiles = d & (1u << 24), has_bf16 = d & (1u << 22);
  if (!has_tiles || !has_bf16) return false;
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Lowest first. The builtins also ask whether the operating system saves the wide registers.
std::vector<const Kernels*> x86_kernels() {
  std::vector<const Kernels*> found;
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) return found;
  found.push_back(&kernels_avx2);
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")))
    return found;
  found.push_back(&kernels_avx512);
  if (!__builtin_cpu_supports("avx512bf16")) return found;
  found.push_back(&kernels_avx512bf16);
  if (may_use_amx()) found.push_back(&kernels_amx);
  return found;
}

}  // namespace xtg
