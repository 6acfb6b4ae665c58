#include "banded.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "banded_ops.h"

namespace elsa {
namespace {

// Dynamic shared memory, aligned for the copies and matrix loads.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

template <class T, int K, bool TURNED>
__global__ void __launch_bounds__(kBandThreads)
    ghost_words_kernel(int64_t count, int parts, const float* add, uint32_t* words) {
  const int64_t i = blockIdx.x * int64_t{kBandThreads} + threadIdx.x;
  if (i < count) ghost_word<T, K, TURNED>(i, parts, add, words);
}

// The sizes are __grid_constant__: a reference to them would else cost every thread a copy.
template <class T, int K, bool TURNED, class S>
__global__ void __launch_bounds__(kBandThreads, 2)
    product_kernel(const __grid_constant__ Problem p, const __grid_constant__ S t, const T* source,
                   const T* h, const uint32_t* words, int parts, const float* add, T* result) {
  banded_product<T, K, TURNED>(p, t, blockIdx.x, shared_memory(), source, h, words, parts, add,
                               result);
}

template <class T, int K, class S>
__global__ void __launch_bounds__(kBandThreads, 2)
    gradient_kernel(const __grid_constant__ Problem p, const __grid_constant__ S t, int64_t step,
                    const T* grad, const T* v, T* grad_h, float* sums) {
  banded_gradient<T, K>(p, t, blockIdx.x, step, shared_memory(), grad, v, grad_h, sums);
}

struct Device {
  int64_t budget, limit;  // shared memory of a block, where two fit a processor and at most
  int major;
};

Device current_device() {
  const int index = c10::cuda::current_device();
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
    return value;
  };
  Device device{};
  device.limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.budget = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 -
                  attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  device.major = attribute(cudaDevAttrComputeCapabilityMajor);
  return device;
}

// The widest copies that suit the rows and every tensor's address.
int vector_for(const Problem& p, std::initializer_list<const Tensor*> tensors) {
  for (int n : {4, 2}) {
    bool fits = p.W % n == 0;
    for (const Tensor* t : tensors)
      fits = fits && (!t->defined() || reinterpret_cast<uintptr_t>(t->data_ptr()) % (2 * n) == 0);
    if (fits) return n;
  }
  return 1;
}

Tile product_tile(const Problem& p, int vector, bool ghost) {
  const Device device = current_device();
  const int k = static_cast<int>(p.kernel_size);
  return choose_tile(p, vector, device.budget, device.limit,
                     [&](const Tile& t) { return product_bytes(t, k, ghost); });
}

Tile gradient_tile(const Problem& p, int vector) {
  const Device device = current_device();
  const int k = static_cast<int>(p.kernel_size);
  return choose_tile(p, vector, device.budget, device.limit,
                     [&](const Tile& t) { return gradient_bytes(t, k); });
}

template <class T>
T* data(const Tensor& t) {
  return t.defined() && t.numel() > 0 ? static_cast<T*>(t.data_ptr()) : nullptr;
}

template <class F>
void with_type_and_size(const Problem& p, const Tensor& v, const F& f) {
  const auto with_size = [&](auto type) {
    switch (p.kernel_size) {
      case 3: return f(type, std::integral_constant<int, 3>{});
      case 5: return f(type, std::integral_constant<int, 5>{});
      case 7: return f(type, std::integral_constant<int, 7>{});
      case 9: return f(type, std::integral_constant<int, 9>{});
    }
  };
  if (v.scalar_type() == at::kBFloat16)
    with_size(c10::BFloat16{});
  else
    with_size(c10::Half{});
}

template <class Kernel>
void allow_shared(const Kernel& kernel, int64_t bytes) {
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(bytes)));
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                      cudaSharedmemCarveoutMaxShared));
}

template <bool TURNED>
void product(const Problem& p, const Tensor& source, const Tensor& h, const Tensor& add, bool exact,
             const Tensor& result) {
  const Tile t = product_tile(p, vector_for(p, {&source, &h, &result}), add.defined());
  const int64_t bytes = product_bytes(t, static_cast<int>(p.kernel_size), add.defined());
  const int parts = exact ? 1 : 2;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  with_type_and_size(p, source, [&](auto type, auto size) {
    using T = decltype(type);
    constexpr int k = size.value;
    Tensor words;
    if (add.defined()) {
      const int64_t count = p.C * k * parts * kTurn<k>;
      words = at::empty({count}, add.options().dtype(at::kInt));
      ghost_words_kernel<T, k, TURNED>
          <<<static_cast<unsigned>(divide_up(count, kBandThreads)), kBandThreads, 0, stream>>>(
              count, parts, data<float>(add), data<uint32_t>(words));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    const auto blocks = static_cast<unsigned>(p.B * p.G * t.across * t.down);
    with_tile<k>(t, [&](const auto& tile) {
      const auto kernel = product_kernel<T, k, TURNED, std::decay_t<decltype(tile)>>;
      allow_shared(kernel, bytes);
      kernel<<<blocks, kBandThreads, bytes, stream>>>(p, tile, data<T>(source), data<T>(h),
                                                      data<uint32_t>(words), parts,
                                                      data<float>(add), data<T>(result));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
}

}  // namespace

bool banded_fits(const Problem& p, const Tensor& v, const Tensor& mul, const Tensor& add) {
  if (v.scalar_type() != at::kHalf && v.scalar_type() != at::kBFloat16) return false;
  if (p.shift || mul.defined() || !has_banded(p) || current_device().major < 8) return false;
  for (const Tile& t : {product_tile(p, 1, add.defined()), gradient_tile(p, 1)})
    if (t.rows == 0 || p.B * p.G * t.across * t.down >= (int64_t{1} << 31)) return false;
  return true;
}

void banded_forward(const Problem& p, const Tensor& v, const Tensor& h, const Tensor& add,
                    bool exact, const Tensor& out) {
  product<false>(p, v, h, add, exact, out);
}

Tensor banded_backward(const Problem& p, const Tensor& grad, const Tensor& v, const Tensor& h,
                       const Tensor& add, bool exact, const Tensor& grad_v, const Tensor& grad_h,
                       bool wants_add) {
  const bool wants_h = grad_h.defined() && grad_h.numel() > 0;
  if (grad_v.defined() && grad_v.numel() > 0) product<true>(p, grad, h, add, exact, grad_v);
  Tensor sums;
  if (!wants_h && !wants_add) return sums;
  const Tile t = gradient_tile(p, vector_for(p, {&grad, &v, &grad_h}));
  const int64_t k = p.kernel_size, tiles = int64_t{t.across} * t.down;
  int64_t step = p.B;
  if (wants_add) {
    // As many images at a time as keep the sums under a tenth of the inputs, outputs and
    // gradients, as evenly as that allows.
    const int64_t each = tiles * p.C * k * k * 4, most = 2 * (v.numel() + h.numel()) / 5;
    const int64_t images = divide_up(p.B, std::clamp<int64_t>(most / each, 1, p.B));
    step = divide_up(p.B, images);
    sums = at::empty({step * tiles, p.C, k, k}, v.options().dtype(at::kFloat));
  }
  const int64_t bytes = gradient_bytes(t, static_cast<int>(k));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  with_type_and_size(p, v, [&](auto type, auto size) {
    using T = decltype(type);
    constexpr int kernel_size = size.value;
    const auto blocks = static_cast<unsigned>(step * p.G * tiles);
    with_tile<kernel_size>(t, [&](const auto& tile) {
      const auto kernel = gradient_kernel<T, kernel_size, std::decay_t<decltype(tile)>>;
      allow_shared(kernel, bytes);
      kernel<<<blocks, kBandThreads, bytes, stream>>>(p, tile, step, data<T>(grad), data<T>(v),
                                                      data<T>(grad_h), data<float>(sums));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return sums;
}

}  // namespace elsa
