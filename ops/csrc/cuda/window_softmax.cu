// The ops of window_softmax.h.
#include "window_softmax.h"

#include <ATen/AccumulateType.h>
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "tensors.h"

namespace elsa {
namespace {

constexpr int64_t kShared = 48 * 1024;  // bytes that a block may have without asking

template <class T>
__device__ __forceinline__ T* shared_tiles() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

template <class A, class T>
__global__ void __launch_bounds__(kBlockThreads)
    window_softmax_kernel(Runs r, Taps<const T> logits, Taps<T> weights) {
  softmax_run<A>(r, blockIdx.x, logits, weights, shared_tiles<T>());
}

template <class A, class T>
__global__ void __launch_bounds__(kBlockThreads)
    window_softmax_backward_kernel(Runs r, Taps<const T> grad, Taps<const T> weights,
                                   Taps<T> grad_logits) {
  softmax_run_backward<A>(r, blockIdx.x, grad, weights, grad_logits, shared_tiles<T>());
}

// The rows of (B, G, taps, H, W) must follow each other.
template <class T>
Taps<T> taps(const Tensor& t) {
  return {data<std::remove_const_t<T>>(t), t.stride(0), t.stride(1), t.stride(2), t.stride(4)};
}

Tensor with_rows_in_sequence(const Tensor& t) {
  const bool follow = t.size(3) < 2 || t.stride(3) == t.size(4) * t.stride(4);
  return follow ? t : t.contiguous();
}

// (B, G, taps, H, W) with a pixel's taps, and then its heads, side by side.
Tensor empty_with_taps_side_by_side(const Tensor& like) {
  const auto size = like.sizes();
  return at::empty({size[0], size[3], size[4], size[1], size[2]}, like.options())
      .permute({0, 3, 4, 1, 2});
}

Runs runs_of(const Tensor& t, int64_t tiles) {
  return choose_runs(t.size(1), t.size(3) * t.size(4), t.size(2), tiles, t.element_size(), kShared);
}

#define ELSA_DISPATCH(TENSOR, ...)                                                  \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, (TENSOR).scalar_type(), \
                                  "window_softmax", __VA_ARGS__)

Tensor window_softmax(const Tensor& logits_in) {
  TORCH_CHECK(logits_in.dim() == 5, "window_softmax: logits must be (B, G, k*k, H, W), got ",
              logits_in.sizes());
  const c10::cuda::CUDAGuard guard(logits_in.device());
  const Tensor logits = with_rows_in_sequence(logits_in);
  const Tensor weights = at::empty(logits.sizes(), logits.options());
  if (weights.numel() == 0) return weights;
  const Runs runs = runs_of(logits, 1);
  if (runs.pixels == 0) return at::softmax(logits_in, 2).contiguous();
  const auto blocks = static_cast<unsigned>(logits.size(0) * runs.heads * runs.per_head());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  ELSA_DISPATCH(logits, [&] {
    using T = scalar_t;
    window_softmax_kernel<at::acc_type<T, true>>
        <<<blocks, kBlockThreads, runs.elements() * sizeof(T), stream>>>(
            runs, taps<const T>(logits), taps<T>(weights));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return weights;
}

Tensor window_softmax_backward(const Tensor& grad_in, const Tensor& weights, bool side_by_side) {
  TORCH_CHECK(grad_in.sizes() == weights.sizes() && weights.dim() == 5 &&
                  grad_in.scalar_type() == weights.scalar_type() &&
                  grad_in.device() == weights.device(),
              "window_softmax_backward: grad and weights must be alike, got ", grad_in.sizes(),
              " and ", weights.sizes());
  const c10::cuda::CUDAGuard guard(weights.device());
  const Tensor grad = with_rows_in_sequence(grad_in);
  const Tensor grad_logits = side_by_side ? empty_with_taps_side_by_side(weights)
                                          : at::empty(weights.sizes(), weights.options());
  if (weights.numel() == 0) return grad_logits;
  const Runs runs = runs_of(weights, 2);
  if (runs.pixels == 0) {
    grad_logits.copy_(at::_softmax_backward_data(grad, weights, 2, weights.scalar_type()));
    return grad_logits;
  }
  const auto blocks = static_cast<unsigned>(weights.size(0) * runs.heads * runs.per_head());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  ELSA_DISPATCH(weights, [&] {
    using T = scalar_t;
    window_softmax_backward_kernel<at::acc_type<T, true>>
        <<<blocks, kBlockThreads, 2 * runs.elements() * sizeof(T), stream>>>(
            runs, taps<const T>(grad), taps<const T>(weights), taps<T>(grad_logits));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return grad_logits;
}

}  // namespace

TORCH_LIBRARY_IMPL(elsa, CUDA, m) {
  m.impl("window_softmax", window_softmax);
  m.impl("window_softmax_backward", window_softmax_backward);
}

}  // namespace elsa
