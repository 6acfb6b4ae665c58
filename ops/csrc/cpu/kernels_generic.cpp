// Plain C++: 16-byte vectors, which every supported compiler lowers to what the target has.
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"

#define ELSA_ISA generic
#define ELSA_VECTOR_BYTES 16
#define ELSA_PIXELS 4
#define ELSA_TAPS 4
#include "kernels_impl.h"
