// Tensors as the kernels see them.
#pragma once

#include <ATen/ATen.h>

#include <type_traits>

#include "kernels.h"

namespace elsa {

using at::Tensor;

template <class T>
T* data(const Tensor& t) {
  return t.defined() && t.numel() > 0 ? static_cast<T*>(t.data_ptr()) : nullptr;
}

// Of a defined tensor (B, C, H, W) in any layout.
template <class T>
Images<T> images(const Tensor& t) {
  return {data<std::remove_const_t<T>>(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// The layout of what is computed from v: channels_last where v's channels lie side by side, as in
// a part of the channels of such a tensor. ops/registration.py has the same rule.
inline at::MemoryFormat format_of(const Tensor& v) {
  return v.size(1) > 1 && v.stride(1) == 1 ? at::MemoryFormat::ChannelsLast
                                           : at::MemoryFormat::Contiguous;
}

}  // namespace elsa
