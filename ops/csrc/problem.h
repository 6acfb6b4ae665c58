// The sizes of one call, shared by the kernels of all devices. Includes no ATen: see cpu/kernels.h.
#pragma once

#include <cstdint>

namespace elsa {

// B batch, C channels, G heads, H x W the size of v, Ho x Wo that of the output. `shift`: at the
// border the window is moved inside the image; else it stays centred and meets zeros outside.
struct Problem {
  int64_t B, C, G, H, W, Ho, Wo, kernel_size, dilation, stride;
  bool shift;
};

}  // namespace elsa
