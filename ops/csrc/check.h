// Checks that every device's op makes before it touches memory. For torch's stable tensors (CPU) and
// for ATen's (CUDA), of which they use what both have.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>

#include "problem.h"

namespace elsa {

using torch::headeronly::ScalarType;

template <class Tensor>
std::string shape(const Tensor& t) {
  std::ostringstream text;
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "[") << t.size(i);
  text << ']';
  return text.str();
}

template <class Tensor>
Problem check(const Tensor& v, const Tensor& h_attn, const std::optional<Tensor>& ghost_mul,
              const std::optional<Tensor>& ghost_add, int64_t kernel_size, int64_t dilation,
              int64_t stride, std::string_view border) {
  STD_TORCH_CHECK(kernel_size > 0 && kernel_size % 2 == 1,
              "elsa_attention: kernel_size must be odd and positive, got ", kernel_size);
  STD_TORCH_CHECK(dilation > 0 && stride > 0,
              "elsa_attention: dilation and stride must be at least 1, got dilation=", dilation,
              ", stride=", stride);
  STD_TORCH_CHECK(v.dim() == 4 && h_attn.dim() == 5 && h_attn.size(1) > 0 &&
                  v.size(1) % h_attn.size(1) == 0,
              "elsa_attention: v must be (B, C, H, W) and h_attn (B, G, k*k, Ho, Wo) with G "
              "dividing C, got ",
              shape(v), " and ", shape(h_attn));
  STD_TORCH_CHECK(border == "zeros" || border == "shift",
              "elsa_attention: border must be 'zeros' or 'shift', got '", border, "'");
  const Problem p{v.size(0),          v.size(1),          h_attn.size(1), v.size(2),
                  v.size(3),          v.size(2) / stride, v.size(3) / stride, kernel_size,
                  dilation,           stride,             border == "shift"};
  STD_TORCH_CHECK(!p.shift || std::min(p.H, p.W) >= kernel_size * dilation,
              "elsa_attention: border 'shift' needs H and W of at least kernel_size * dilation = ",
              kernel_size * dilation, ", got v ", shape(v));
  STD_TORCH_CHECK(h_attn.size(0) == p.B && h_attn.size(2) == kernel_size * kernel_size &&
                  h_attn.size(3) == p.Ho && h_attn.size(4) == p.Wo,
              "elsa_attention: h_attn must be (B, G, k*k, H // stride, W // stride) for v ",
              shape(v), ", kernel_size ", kernel_size, ", stride ", stride, "; got ",
              shape(h_attn));
  STD_TORCH_CHECK(v.scalar_type() == h_attn.scalar_type(),
              "elsa_attention: v and h_attn must share a dtype, got ", v.scalar_type(), " and ",
              h_attn.scalar_type());
  STD_TORCH_CHECK(v.device() == h_attn.device(),
                  "elsa_attention: v and h_attn are on different devices");
  for (const auto* ghost : {&ghost_mul, &ghost_add}) {
    if (!ghost->has_value()) continue;
    const Tensor& t = **ghost;
    STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == p.C && t.size(1) == kernel_size &&
                    t.size(2) == kernel_size,
                "elsa_attention: a ghost head must be (C, k, k) with k ", kernel_size, " for v ",
                shape(v), ", got ", shape(t));
    STD_TORCH_CHECK(t.device() == v.device(),
                    "elsa_attention: v and a ghost head are on different devices");
    STD_TORCH_CHECK(t.scalar_type() == v.scalar_type() || t.scalar_type() == ScalarType::Float,
                "elsa_attention: a ghost head must have v's dtype or float32, got v ",
                v.scalar_type(), " and ghost head ", t.scalar_type());
  }
  return p;
}

template <class Tensor>
void check_grad(const Problem& p, const Tensor& grad, const Tensor& v) {
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == p.B && grad.size(1) == p.C &&
                      grad.size(2) == p.Ho && grad.size(3) == p.Wo &&
                      grad.scalar_type() == v.scalar_type() && grad.device() == v.device(),
                  "elsa_attention_backward: grad_out must be on the device of v, ",
                  v.scalar_type(), " [", p.B, ", ", p.C, ", ", p.Ho, ", ", p.Wo, "], got ",
                  grad.scalar_type(), " ", shape(grad));
}

template <class Tensor>
ScalarType accumulation_type(const Tensor& v) {
  return v.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace elsa
