// Launches of the kernels in banded.h. Tensors are contiguous, `add` float32 or undefined.
#pragma once

#include <ATen/ATen.h>

#include "../problem.h"

namespace elsa {

using at::Tensor;

// Whether these kernels can do the call on the current device. Any of the tensors may be undefined.
bool banded_fits(const Problem& p, const Tensor& v, const Tensor& mul, const Tensor& add);

// `exact`: add has no more digits than v's type.
void banded_forward(const Problem& p, const Tensor& v, const Tensor& h, const Tensor& add,
                    bool exact, const Tensor& out);

// Gradients that are not asked for are undefined or empty; returns the parts whose sum along
// dimension 0 is the gradient of add, or an undefined tensor where not `wants_add`.
Tensor banded_backward(const Problem& p, const Tensor& grad, const Tensor& v, const Tensor& h,
                       const Tensor& add, bool exact, const Tensor& grad_v, const Tensor& grad_h,
                       bool wants_add);

}  // namespace elsa
