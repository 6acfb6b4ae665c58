// The CUDA ops: launches of the functions in kernels.h, or of banded.h's where those fit. No
// atomics: the same inputs give the same bits on every run.
#include <ATen/AccumulateType.h>
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "../check.h"
#include "banded_ops.h"
#include "kernels.h"
#include "tensors.h"

namespace elsa {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 30;

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>(std::min(divide_up(threads, kThreads), kMaxBlocks));
}

#define ELSA_FOR_EACH(INDEX, COUNT)                                                        \
  for (int64_t INDEX = blockIdx.x * int64_t{kThreads} + threadIdx.x; INDEX < (COUNT);      \
       INDEX += int64_t{gridDim.x} * kThreads)

template <bool MUL, bool ADD, class T, class A>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(Problem p, Images<const T> v, const T* h, const A* mul, const A* add,
                   Images<T> out) {
  ELSA_FOR_EACH(i, channel_threads(p, p.Ho, p.Wo)) forward<MUL, ADD>(p, i, v, h, mul, add, out);
}

template <bool MUL, bool ADD, class T, class A>
__global__ void __launch_bounds__(kThreads)
    grad_v_kernel(Problem p, Images<const T> grad, const T* h, const A* mul, const A* add,
                  Images<T> result) {
  ELSA_FOR_EACH(i, channel_threads(p, p.H, p.W)) grad_v<MUL, ADD>(p, i, grad, h, mul, add, result);
}

template <bool MUL, class T, class A>
__global__ void __launch_bounds__(kThreads)
    grad_h_kernel(Problem p, Images<const T> grad, Images<const T> v, const A* mul, T* result) {
  ELSA_FOR_EACH(i, tap_threads(p)) grad_h<MUL>(p, i, grad, v, mul, result);
}

// Grid (C, taps / kTaps, splits); each split of the pixels sums into its own (C, k, k).
template <class T, class A>
__global__ void __launch_bounds__(kThreads)
    grad_ghost_kernel(Problem p, Images<const T> grad, Images<const T> v, const T* h, A* part_mul,
                      A* part_add) {
  const int64_t taps = p.kernel_size * p.kernel_size, pixels = p.B * p.Ho * p.Wo;
  const int64_t c = blockIdx.x, share = divide_up(pixels, gridDim.z);
  const int first = blockIdx.y * kTaps;
  const int64_t begin = blockIdx.z * share, end = begin + share < pixels ? begin + share : pixels;
  A sums[2 * kTaps] = {};
  grad_ghost(p, c, first, begin + threadIdx.x, end, kThreads, grad, v, h, sums, sums + kTaps);
  __shared__ A shared[kThreads];
  for (int t = 0; t < 2 * kTaps; ++t) {
    shared[threadIdx.x] = sums[t];
    __syncthreads();
    for (int width = kThreads / 2; width > 0; width /= 2) {
      if (threadIdx.x < width) shared[threadIdx.x] += shared[threadIdx.x + width];
      __syncthreads();
    }
    const int tap = first + t % kTaps;
    A* part = t < kTaps ? part_mul : part_add;
    if (threadIdx.x == 0 && tap < taps && part)
      part[(blockIdx.z * p.C + c) * taps + tap] = shared[0];
    __syncthreads();
  }
}

template <class F>
void with_ghosts(const Tensor& mul, const Tensor& add, const F& f) {
  using std::false_type;
  using std::true_type;
  if (mul.defined() && add.defined()) return f(true_type{}, true_type{});
  if (mul.defined()) return f(true_type{}, false_type{});
  if (add.defined()) return f(false_type{}, true_type{});
  f(false_type{}, false_type{});
}

Tensor ghost_in(const std::optional<Tensor>& ghost, at::ScalarType dtype) {
  return ghost.has_value() ? ghost->to(dtype).contiguous() : Tensor();
}

bool ghost_is_exact(const Tensor& v, const std::optional<Tensor>& ghost) {
  return ghost.has_value() && ghost->scalar_type() == v.scalar_type();
}

#define ELSA_DISPATCH(TENSOR, ...)                                                          \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, (TENSOR).scalar_type(),         \
                                  "elsa_attention", __VA_ARGS__)

Tensor elsa_attention(const Tensor& v, const Tensor& h_in, const std::optional<Tensor>& ghost_mul,
                      const std::optional<Tensor>& ghost_add, int64_t kernel_size,
                      int64_t dilation, int64_t stride, c10::string_view border) {
  const Problem p = check(v, h_in, ghost_mul, ghost_add, kernel_size, dilation, stride, border);
  const c10::cuda::CUDAGuard guard(v.device());
  const Tensor h = h_in.contiguous();
  const Tensor mul = ghost_in(ghost_mul, accumulation_type(v));
  const Tensor add = ghost_in(ghost_add, accumulation_type(v));
  const bool empty = v.numel() == 0 || h.numel() == 0;
  if (!empty && banded_fits(p, v, mul, add))
    return banded_forward(p, v, h, add, ghost_is_exact(v, ghost_add));
  Tensor out = at::empty({p.B, p.C, p.Ho, p.Wo}, v.options().memory_format(format_of(v)));
  if (out.numel() == 0) return out;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  ELSA_DISPATCH(v, [&] {
    using T = scalar_t;
    using A = at::acc_type<T, true>;
    with_ghosts(mul, add, [&](auto has_mul, auto has_add) {
      forward_kernel<has_mul.value, has_add.value>
          <<<blocks_for(channel_threads(p, p.Ho, p.Wo)), kThreads, 0, stream>>>(
              p, images<const T>(v), data<T>(h), data<A>(mul), data<A>(add), images<T>(out));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return out;
}

// The gradients by the kernels of kernels.h: of v, h, and in parts whose sum along dimension 0 they
// are of mul and add. Those that `wanted` does not ask for are undefined.
std::array<Tensor, 4> plain_backward(const Problem& p, const Tensor& grad, const Tensor& v,
                                     const Tensor& h, const Tensor& mul, const Tensor& add,
                                     const std::array<bool, 4>& wanted) {
  // Enough blocks to fill the device, each with pixels enough to be worth its reduction.
  const int64_t taps = p.kernel_size * p.kernel_size, blocks = p.C * divide_up(taps, kTaps);
  const int64_t splits = std::clamp<int64_t>(
      std::min(divide_up(4096, std::max<int64_t>(blocks, 1)), p.B * p.Ho * p.Wo / 1024), 1, 1024);
  std::array<Tensor, 4> grads;
  if (wanted[0]) grads[0] = at::empty(v.sizes(), v.options().memory_format(format_of(v)));
  if (wanted[1]) grads[1] = at::empty(h.sizes(), h.options());
  for (int i : {2, 3})
    if (wanted[i])
      grads[i] = at::empty({splits, p.C, p.kernel_size, p.kernel_size},
                           v.options().dtype(accumulation_type(v)));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  ELSA_DISPATCH(v, [&] {
    using T = scalar_t;
    using A = at::acc_type<T, true>;
    const auto up = images<const T>(grad), values = images<const T>(v);
    with_ghosts(mul, add, [&](auto has_mul, auto has_add) {
      if (wanted[0]) {
        grad_v_kernel<has_mul.value, has_add.value>
            <<<blocks_for(channel_threads(p, p.H, p.W)), kThreads, 0, stream>>>(
                p, up, data<T>(h), data<A>(mul), data<A>(add), images<T>(grads[0]));
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      }
      if (wanted[1]) {
        grad_h_kernel<has_mul.value><<<blocks_for(tap_threads(p)), kThreads, 0, stream>>>(
            p, up, values, data<A>(mul), data<T>(grads[1]));
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      }
    });
    if (wanted[2] || wanted[3]) {
      const dim3 grid(static_cast<unsigned>(p.C), static_cast<unsigned>(divide_up(taps, kTaps)),
                      static_cast<unsigned>(splits));
      grad_ghost_kernel<<<grid, kThreads, 0, stream>>>(p, up, values, data<T>(h),
                                                       data<A>(grads[2]), data<A>(grads[3]));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  return grads;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> elsa_attention_backward(
    const Tensor& grad, const Tensor& v, const Tensor& h_in,
    const std::optional<Tensor>& ghost_mul, const std::optional<Tensor>& ghost_add,
    int64_t kernel_size, int64_t dilation, int64_t stride, c10::string_view border,
    std::array<bool, 4> wanted) {
  const Problem p = check(v, h_in, ghost_mul, ghost_add, kernel_size, dilation, stride, border);
  check_grad(p, grad, v);
  const std::array<std::optional<Tensor>, 4> inputs = {v, h_in, ghost_mul, ghost_add};
  for (int i = 0; i < 4; ++i) wanted[i] = wanted[i] && inputs[i].has_value();
  const c10::cuda::CUDAGuard guard(v.device());
  const bool reads_h = wanted[0] || wanted[2] || wanted[3];
  const Tensor h = reads_h ? h_in.contiguous() : h_in;
  const Tensor mul = ghost_in(ghost_mul, accumulation_type(v));
  const Tensor add = ghost_in(ghost_add, accumulation_type(v));
  std::array<Tensor, 4> grads;
  if (grad.numel() == 0) {  // no pixel, or none that the stride leaves
    if (wanted[0]) grads[0] = at::zeros(v.sizes(), v.options()).contiguous(format_of(v));
    if (wanted[1]) grads[1] = at::zeros(h.sizes(), h.options());
    for (int i : {2, 3})
      if (wanted[i]) grads[i] = at::zeros({1, p.C, kernel_size, kernel_size}, v.options());
  } else if (banded_fits(p, v, mul, add)) {
    auto [of_v, of_h, of_add] = banded_backward(p, grad, v, h, add, ghost_is_exact(v, ghost_add),
                                                {wanted[0], wanted[1], wanted[3]});
    grads = {of_v, of_h, Tensor(), of_add};
  } else {
    grads = plain_backward(p, grad, v, h, mul, add, wanted);
  }
  for (int i = 0; i < 4; ++i) {
    if (!wanted[i])
      grads[i] = at::empty({0}, v.options());
    else if (i > 1)
      grads[i] = grads[i].sum(0).to(inputs[i]->scalar_type());
  }
  return {grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(elsa, CUDA, m) {
  m.impl("elsa_attention", elsa_attention);
  m.impl("elsa_attention_backward", elsa_attention_backward);
}

}  // namespace elsa
