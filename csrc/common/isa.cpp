// Chooses the kernels at run time from what the CPU reports.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace xtg {

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512bf16;
#endif

static std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found{&kernels_scalar};
#if defined(__x86_64__)
  __builtin_cpu_init();
  // The builtin also asks the operating system whether it saves the wide registers.
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) return found;
  found.push_back(&kernels_avx2);
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")))
    return found;
  found.push_back(&kernels_avx512);
  if (__builtin_cpu_supports("avx512bf16")) found.push_back(&kernels_avx512bf16);
#endif
  return found;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* k : available()) names.push_back(k->name);
  return names;
}

static const Kernels* find(const std::string& name, const char* source) {
  std::string known;
  for (const Kernels* k : available()) {
    if (name == k->name) return k;
    known += std::string(known.empty() ? "" : ", ") + k->name;
  }
  throw std::invalid_argument(std::string(source) + ": expected one of the ISAs of this machine and build (" + known +
                              "), got \"" + name + "\"");
}

static std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> chosen = [] {
    const char* forced = std::getenv("XTG_CPU_ISA");
    return forced && *forced ? find(forced, "environment variable XTG_CPU_ISA") : available().back();
  }();
  return chosen;
}

const Kernels& active_kernels() { return *active().load(std::memory_order_relaxed); }

void use_isa(const std::string& name) { active().store(find(name, "use_isa")); }

}  // namespace xtg
