// The choice among the kernels that are compiled once per instruction set.
#pragma once

namespace elsa {

enum class Isa { generic, avx2, avx512 };

// What this process uses: the best of the processor, or what ELSA_OPS_CPU lowers it to.
Isa isa();

#if defined(__x86_64__)
#define ELSA_CHOOSE(NAME)                                               \
  (isa() == Isa::avx512 ? avx512::NAME : isa() == Isa::avx2 ? avx2::NAME : generic::NAME)
#else
#define ELSA_CHOOSE(NAME) generic::NAME
#endif

}  // namespace elsa
