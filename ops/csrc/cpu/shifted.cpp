// Lays a head's channels beside each other, runs the kernels, and lays the results back.
#include "shifted.h"

#include <ATen/Parallel.h>

#include "../check.h"
#include "instruction_set.h"
#include "kernels.h"

namespace elsa {
namespace {

using at::Tensor;

// A multiple of every instruction set's vector, so that the kernels meet whole vectors only.
int64_t padded_depth(const Problem& p) { return (p.C / p.G + 15) / 16 * 16; }

// (..., channels of a head) filled up with zeros, in the accumulation type.
Tensor fill_up(const Problem& p, const Tensor& t, at::ScalarType dtype) {
  const int64_t missing = padded_depth(p) - p.C / p.G;
  const Tensor wide = t.to(dtype);
  return missing ? at::constant_pad_nd(wide, {0, missing}) : wide.contiguous();
}

// (B, C, H, W) as (B, G, H, W, depth).
Tensor beside(const Problem& p, const Tensor& t, at::ScalarType dtype) {
  return fill_up(p, t.unflatten(1, {p.G, p.C / p.G}).permute({0, 1, 3, 4, 2}), dtype);
}

Tensor apart(const Problem& p, const Tensor& t, at::ScalarType dtype) {
  return t.narrow(4, 0, p.C / p.G).permute({0, 1, 4, 2, 3}).flatten(1, 2).to(dtype).contiguous();
}

// (C, k, k) as (G, k*k, depth).
Tensor ghost_beside(const Problem& p, const Tensor& ghost, at::ScalarType dtype) {
  if (!ghost.defined()) return Tensor();
  return fill_up(p, ghost.reshape({p.G, p.C / p.G, -1}).transpose(1, 2), dtype);
}

template <class A>
const ShiftedKernels<A>& kernels();
template <>
const ShiftedKernels<float>& kernels<float>() {
  return ELSA_CHOOSE(shifted_f32);
}
template <>
const ShiftedKernels<double>& kernels<double>() {
  return ELSA_CHOOSE(shifted_f64);
}

template <class A>
A* data(const Tensor& t, int64_t offset = 0) {
  return t.defined() ? static_cast<A*>(t.data_ptr()) + offset : nullptr;
}

template <class F>
void with_type(at::ScalarType dtype, const F& f) {
  if (dtype == at::kDouble) f(double{});
  else f(float{});
}

}  // namespace

Tensor shifted_forward(const Problem& p, const Tensor& v, const Tensor& h, const Tensor& mul,
                       const Tensor& add) {
  const at::ScalarType dtype = accumulation_type(v);
  const int64_t depth = padded_depth(p), taps = p.kernel_size * p.kernel_size;
  const Tensor values = beside(p, v, dtype), weights = h.to(dtype).contiguous();
  const Tensor head_mul = ghost_beside(p, mul, dtype), head_add = ghost_beside(p, add, dtype);
  const Tensor out = at::empty({p.B, p.G, p.Ho, p.Wo, depth}, values.options());
  with_type(dtype, [&](auto zero) {
    using A = decltype(zero);
    const auto& kernel = kernels<A>();
    at::parallel_for(0, p.B * p.G * p.Ho, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / p.Ho, ghost = n % p.G * taps * depth;
        kernel.forward(p, depth, data<A>(values, n * p.H * p.W * depth),
                       data<A>(weights, n * taps * p.Ho * p.Wo), data<A>(head_mul, ghost),
                       data<A>(head_add, ghost), data<A>(out, n * p.Ho * p.Wo * depth),
                       task % p.Ho);
      }
    });
  });
  return apart(p, out, v.scalar_type());
}

std::array<Tensor, 4> shifted_backward(const Problem& p, const Tensor& grad, const Tensor& v,
                                       const Tensor& h, const Tensor& mul, const Tensor& add,
                                       const std::array<bool, 4>& wanted) {
  const at::ScalarType dtype = accumulation_type(v);
  const int64_t depth = padded_depth(p), taps = p.kernel_size * p.kernel_size;
  const Tensor above = beside(p, grad, dtype), values = beside(p, v, dtype);
  const Tensor weights = wanted[0] || wanted[2] ? h.to(dtype).contiguous() : Tensor();
  const Tensor head_mul = ghost_beside(p, mul, dtype), head_add = ghost_beside(p, add, dtype);
  const auto zeros = [&](bool on, at::IntArrayRef sizes) {
    return on ? at::zeros(sizes, values.options()) : Tensor();
  };
  const Tensor grad_v = zeros(wanted[0], values.sizes());
  const Tensor grad_h = zeros(wanted[1], h.sizes());
  // Every image and head sums into its own, and they are added in one order.
  const Tensor grad_mul = zeros(wanted[2], {p.B, p.G, taps, depth});
  const Tensor grad_add = zeros(wanted[3], {p.B, p.G, taps, depth});
  with_type(dtype, [&](auto zero) {
    using A = decltype(zero);
    const auto& kernel = kernels<A>();
    at::parallel_for(0, p.B * p.G, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t image = n * p.H * p.W * depth, ghost = n % p.G * taps * depth;
        const int64_t map = n * taps * p.Ho * p.Wo, sums = n * taps * depth;
        kernel.backward(p, depth, data<A>(above, n * p.Ho * p.Wo * depth), data<A>(values, image),
                        data<A>(weights, map), data<A>(head_mul, ghost), data<A>(head_add, ghost),
                        data<A>(grad_v, image), data<A>(grad_h, map), data<A>(grad_mul, sums),
                        data<A>(grad_add, sums));
      }
    });
  });
  // One each: an op's results may not share memory.
  const auto none = [&] { return at::empty({0}, v.options()); };
  const auto ghost_apart = [&](const Tensor& t) {
    return t.defined() ? t.sum(0).narrow(2, 0, p.C / p.G).transpose(1, 2).reshape(
                             {p.C, p.kernel_size, p.kernel_size})
                       : none();
  };
  return {grad_v.defined() ? apart(p, grad_v, v.scalar_type()) : none(),
          grad_h.defined() ? grad_h.to(v.scalar_type()) : none(), ghost_apart(grad_mul),
          ghost_apart(grad_add)};
}

}  // namespace elsa
