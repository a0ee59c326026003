// Carves aligned arrays out of one scratch buffer; with a null base it only measures.
#pragma once

#include <cstddef>

#include "types.h"

namespace xtg {

struct ScratchCursor {
  char* base;
  size_t used;
  template <class E>
  E* take(int64_t count) {
    E* p = base ? reinterpret_cast<E*>(base + used) : nullptr;
    used += size_t(round_up(count * int64_t(sizeof(E)), 64));
    return p;
  }
};

}  // namespace xtg
