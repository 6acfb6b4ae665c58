// Lays a head's channels beside each other, runs the kernels, and lays the results back.
#include "shifted.h"

#include "instruction_set.h"
#include "kernels.h"

namespace elsa {
namespace {

// A multiple of every instruction set's vector, so that the kernels meet whole vectors only.
int64_t padded_depth(const Problem& p) { return (p.C / p.G + 15) / 16 * 16; }

// (..., channels of a head) filled up with zeros, in the accumulation type.
Tensor fill_up(const Problem& p, const Tensor& t, ScalarType dtype) {
  const int64_t missing = padded_depth(p) - p.C / p.G;
  return missing ? torch::stable::pad(to(t, dtype), {0, missing}) : contiguous(t, dtype);
}

// (B, C, H, W) as (B, G, H, W, depth).
Tensor beside(const Problem& p, const Tensor& t, ScalarType dtype) {
  const Tensor heads = torch::stable::reshape(
      t, {t.size(0), p.G, p.C / p.G, t.size(2), t.size(3)});
  return fill_up(p, transpose(transpose(heads, 2, 3), 3, 4), dtype);
}

Tensor apart(const Problem& p, const Tensor& t, ScalarType dtype) {
  Tensor all = t;
  const Tensor heads = transpose(transpose(narrow(all, 4, 0, p.C / p.G), 3, 4), 2, 3);
  return contiguous(
      torch::stable::reshape(heads, {t.size(0), p.C, t.size(2), t.size(3)}), dtype);
}

// (C, k, k) as (G, k*k, depth).
Tensor ghost_beside(const Problem& p, const Tensor& ghost, ScalarType dtype) {
  if (!ghost.defined()) return Tensor();
  const Tensor heads = torch::stable::reshape(
      ghost, {p.G, p.C / p.G, p.kernel_size * p.kernel_size});
  return fill_up(p, transpose(heads, 1, 2), dtype);
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

template <class F>
void with_type(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Double) f(double{});
  else f(float{});
}

}  // namespace

Tensor shifted_forward(const Problem& p, const Tensor& v, const Tensor& h, const Tensor& mul,
                       const Tensor& add) {
  const ScalarType dtype = accumulation_type(v);
  const int64_t depth = padded_depth(p), taps = p.kernel_size * p.kernel_size;
  const Tensor values = beside(p, v, dtype), weights = contiguous(h, dtype);
  const Tensor head_mul = ghost_beside(p, mul, dtype), head_add = ghost_beside(p, add, dtype);
  const Tensor out = empty({p.B, p.G, p.Ho, p.Wo, depth}, dtype);
  with_type(dtype, [&](auto zero) {
    using A = decltype(zero);
    const auto& kernel = kernels<A>();
    torch::stable::parallel_for(0, p.B * p.G * p.Ho, 1, [&](int64_t begin, int64_t end) {
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
                                       const std::vector<bool>& wanted) {
  const ScalarType dtype = accumulation_type(v);
  const int64_t depth = padded_depth(p), taps = p.kernel_size * p.kernel_size;
  const Tensor above = beside(p, grad, dtype), values = beside(p, v, dtype);
  const Tensor weights = wanted[0] || wanted[2] ? contiguous(h, dtype) : Tensor();
  const Tensor head_mul = ghost_beside(p, mul, dtype), head_add = ghost_beside(p, add, dtype);
  const auto zeros = [&](bool on, Sizes sizes) {
    return on ? torch::stable::new_zeros(values, sizes) : Tensor();
  };
  const Tensor grad_v = zeros(wanted[0], values.sizes());
  const Tensor grad_h = zeros(wanted[1], h.sizes());
  // Every image and head sums into its own, and they are added in one order.
  const Tensor grad_mul = zeros(wanted[2], {p.B, p.G, taps, depth});
  const Tensor grad_add = zeros(wanted[3], {p.B, p.G, taps, depth});
  with_type(dtype, [&](auto zero) {
    using A = decltype(zero);
    const auto& kernel = kernels<A>();
    torch::stable::parallel_for(0, p.B * p.G, 1, [&](int64_t begin, int64_t end) {
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
  const auto ghost_apart = [&](const Tensor& t) {
    if (!t.defined()) return none(v);
    Tensor sums = torch::stable::sum(t, Sizes({0}));
    return torch::stable::reshape(transpose(narrow(sums, 2, 0, p.C / p.G), 1, 2),
                                  {p.C, p.kernel_size, p.kernel_size});
  };
  return {grad_v.defined() ? apart(p, grad_v, v.scalar_type()) : none(v),
          grad_h.defined() ? to(grad_h, v.scalar_type()) : none(v), ghost_apart(grad_mul),
          ghost_apart(grad_add)};
}

}  // namespace elsa
