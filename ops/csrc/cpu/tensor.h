// What the CPU ops use of torch's stable tensors, under the names that ATen has for it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "../check.h"

namespace elsa {

using torch::stable::Tensor;
constexpr auto kCPU = torch::headeronly::DeviceType::CPU;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Contiguous and on the CPU, as all that these ops make.
inline Tensor empty(Sizes sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, kCPU);
}

// What comes back for a gradient that is not asked for. Each its own: results may share no memory.
inline Tensor none(const Tensor& v) { return empty({0}, v.scalar_type()); }

inline Tensor to(const Tensor& t, ScalarType dtype) { return torch::stable::to(t, dtype); }

inline Tensor contiguous(const Tensor& t, ScalarType dtype) {
  return torch::stable::contiguous(to(t, dtype));
}

// A ghost head as the kernels read it; an undefined tensor for one that is not there.
inline Tensor ghost_in(const std::optional<Tensor>& ghost, ScalarType dtype) {
  return ghost.has_value() ? contiguous(*ghost, dtype) : Tensor();
}

template <class T>
T* data(const Tensor& t, int64_t offset = 0) {
  return t.defined() ? static_cast<T*>(t.data_ptr()) + offset : nullptr;
}

}  // namespace elsa
