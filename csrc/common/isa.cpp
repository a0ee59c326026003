// Chooses the kernels at run time from what the CPU reports.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace xtg {

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
std::vector<const Kernels*> x86_kernels();  // cpu/isa/x86.cpp
#endif

// Lowest first; asked once, for the answer takes a system call.
static const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> kernels{&kernels_scalar};
#if defined(__x86_64__)
    for (const Kernels* k : x86_kernels()) kernels.push_back(k);
#endif
    return kernels;
  }();
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
