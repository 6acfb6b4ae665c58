// Launches of the kernels in banded.h. h is contiguous, `add` contiguous float32 or undefined.
#pragma once

#include <ATen/ATen.h>

#include <array>

#include "../problem.h"

namespace elsa {

using at::Tensor;

// Whether these kernels can do the call on the current device. `mul` and `add` may be undefined.
bool banded_fits(const Problem& p, const Tensor& v, const Tensor& mul, const Tensor& add);

// The result, in the layout of format_of(v). `exact`: add has no more digits than v's type.
Tensor banded_forward(const Problem& p, const Tensor& v, const Tensor& h, const Tensor& add,
                      bool exact);

// The gradients of v, h and add of which `wanted` asks, the others undefined. That of v is in the
// layout of format_of(v); that of add is in parts whose sum along dimension 0 it is.
std::array<Tensor, 3> banded_backward(const Problem& p, const Tensor& grad, const Tensor& v,
                                      const Tensor& h, const Tensor& add, bool exact,
                                      std::array<bool, 3> wanted);

}  // namespace elsa
