// The CPU op with the border "shift".
#pragma once

#include <array>
#include <vector>

#include "tensor.h"

namespace elsa {

// The ghost heads are undefined or (C, k, k), in any floating type; inputs have been checked.
Tensor shifted_forward(const Problem& p, const Tensor& v, const Tensor& h,
                           const Tensor& mul, const Tensor& add);

// The gradients of v, h, mul and add that `wanted` asks for, of the type of v (those of the ghost
// heads: of the accumulation type); the others have no elements.
std::array<Tensor, 4> shifted_backward(const Problem& p, const Tensor& grad,
                                           const Tensor& v, const Tensor& h,
                                           const Tensor& mul, const Tensor& add,
                                           const std::vector<bool>& wanted);

}  // namespace elsa
