#if defined(__x86_64__)
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define ELSA_ISA avx2
#define ELSA_VECTOR_BYTES 32
#define ELSA_PIXELS 4
#define ELSA_TAPS 4
#include "kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
