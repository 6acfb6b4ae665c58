// The CPU op with the border "shift".
#pragma once

#include <ATen/ATen.h>

#include <array>

#include "../problem.h"

namespace elsa {

// The ghost heads are undefined or (C, k, k), in any floating type; inputs have been checked.
at::Tensor shifted_forward(const Problem& p, const at::Tensor& v, const at::Tensor& h,
                           const at::Tensor& mul, const at::Tensor& add);

// The gradients of v, h, mul and add that `wanted` asks for, of the type of v (those of the ghost
// heads: of the accumulation type); the others have no elements.
std::array<at::Tensor, 4> shifted_backward(const Problem& p, const at::Tensor& grad,
                                           const at::Tensor& v, const at::Tensor& h,
                                           const at::Tensor& mul, const at::Tensor& add,
                                           const std::array<bool, 4>& wanted);

}  // namespace elsa
