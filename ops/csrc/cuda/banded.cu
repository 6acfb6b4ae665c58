#include "banded.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "banded_ops.h"
#include "tensors.h"

namespace elsa {
namespace {

// Dynamic shared memory, aligned for the copies and matrix loads.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

template <class T, int K, bool TURNED>
__global__ void __launch_bounds__(kBlockThreads)
    ghost_words_kernel(int64_t count, int parts, const float* add, uint32_t* words) {
  const int64_t i = blockIdx.x * int64_t{kBlockThreads} + threadIdx.x;
  if (i < count) ghost_word<T, K, TURNED>(i, parts, add, words);
}

// The sizes are __grid_constant__: a reference to them would else cost every thread a copy.
template <class T, int K, bool TURNED, class L, class S>
__global__ void __launch_bounds__(kBlockThreads, 2)
    product_kernel(const __grid_constant__ Problem p, const __grid_constant__ S t,
                   const __grid_constant__ Images<const T> source, const T* h,
                   const uint32_t* words, int parts, const float* add,
                   const __grid_constant__ Images<T> result) {
  banded_product<T, K, TURNED>(L{}, p, t, blockIdx.x, shared_memory(), source, h, words, parts,
                               add, result);
}

template <class T, int K, class L, class S>
__global__ void __launch_bounds__(kBlockThreads, 2)
    gradient_kernel(const __grid_constant__ Problem p, const __grid_constant__ S t, int64_t step,
                    const __grid_constant__ Images<const T> grad,
                    const __grid_constant__ Images<const T> v, T* grad_h, float* sums) {
  banded_gradient<T, K>(L{}, p, t, blockIdx.x, step, shared_memory(), grad, v, grad_h, sums);
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

// The widest copies that suit the rows and the addresses of contiguous tensors.
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

// The layout in which the kernels take images and leave results: that of v where they have it.
at::MemoryFormat layout_for(const Problem& p, const Tensor& v) {
  const bool pixels = format_of(v) == at::MemoryFormat::ChannelsLast;
  return pixels && has_pixels(p, p.W * p.C, p.C) ? at::MemoryFormat::ChannelsLast
                                                 : at::MemoryFormat::Contiguous;
}

// Whether Pixels can read t where it lies, 16 bytes at a time.
bool reads_pixels(const Problem& p, const Tensor& t) {
  if (t.stride(1) != 1 || reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 != 0) return false;
  for (int i : {0, 2, 3})
    if (t.size(i) > 1 && t.stride(i) % 8 != 0) return false;
  return has_pixels(p, t.size(2) > 1 ? t.stride(2) : 0, t.size(3) > 1 ? t.stride(3) : 0);
}

// v or a gradient in a layout of the kernels: itself or a copy.
Tensor in_layout(const Problem& p, const Tensor& t, at::MemoryFormat layout) {
  if (layout == at::MemoryFormat::Contiguous) return t.contiguous();
  return reads_pixels(p, t) ? t : t.clone(layout);
}

template <class F>
void with_layout(at::MemoryFormat layout, const F& f) {
  if (layout == at::MemoryFormat::Contiguous)
    f(Planes{});
  else
    f(Pixels{});
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

// `forward`, or with TURNED `grad_v`. `source` is in the layout; so is the result.
template <bool TURNED>
Tensor product(const Problem& p, at::MemoryFormat layout, const Tensor& source, const Tensor& h,
               const Tensor& add, bool exact) {
  const Tensor result = at::empty(source.sizes(), source.options().memory_format(layout));
  const int vector = layout == at::MemoryFormat::Contiguous
                         ? vector_for(p, {&source, &h, &result})
                         : vector_for(p, {&h});
  const Tile t = product_tile(p, vector, add.defined());
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
          <<<static_cast<unsigned>(divide_up(count, kBlockThreads)), kBlockThreads, 0, stream>>>(
              count, parts, data<float>(add), data<uint32_t>(words));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    const auto blocks = static_cast<unsigned>(p.B * p.G * t.across * t.down);
    with_layout(layout, [&](auto images_as) {
      with_tile<k>(t, [&](const auto& tile) {
        using Tile = std::decay_t<decltype(tile)>;
        const auto kernel = product_kernel<T, k, TURNED, decltype(images_as), Tile>;
        allow_shared(kernel, bytes);
        kernel<<<blocks, kBlockThreads, bytes, stream>>>(
            p, tile, images<const T>(source), data<T>(h), data<uint32_t>(words), parts,
            data<float>(add), images<T>(result));
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
    });
  });
  return result;
}

}  // namespace

bool banded_fits(const Problem& p, const Tensor& v, const Tensor& mul, const Tensor& add) {
  if (v.scalar_type() != at::kHalf && v.scalar_type() != at::kBFloat16) return false;
  if (p.shift || mul.defined() || !has_banded(p) || current_device().major < 8) return false;
  for (const Tile& t : {product_tile(p, 1, add.defined()), gradient_tile(p, 1)})
    if (t.rows == 0 || p.B * p.G * t.across * t.down >= (int64_t{1} << 31)) return false;
  return true;
}

Tensor banded_forward(const Problem& p, const Tensor& v, const Tensor& h, const Tensor& add,
                      bool exact) {
  const auto layout = layout_for(p, v);
  return product<false>(p, layout, in_layout(p, v, layout), h, add, exact).contiguous(format_of(v));
}

std::array<Tensor, 3> banded_backward(const Problem& p, const Tensor& grad_in, const Tensor& v_in,
                                      const Tensor& h, const Tensor& add, bool exact,
                                      std::array<bool, 3> wanted) {
  const auto layout = layout_for(p, v_in);
  const Tensor grad = in_layout(p, grad_in, layout);
  Tensor grad_v, grad_h, sums;
  if (wanted[0])
    grad_v = product<true>(p, layout, grad, h, add, exact).contiguous(format_of(v_in));
  if (!wanted[1] && !wanted[2]) return {grad_v, grad_h, sums};
  const Tensor v = in_layout(p, v_in, layout);
  if (wanted[1]) grad_h = at::empty(h.sizes(), h.options());
  const int vector = layout == at::MemoryFormat::Contiguous
                         ? vector_for(p, {&grad, &v, &grad_h})
                         : vector_for(p, {&grad_h});
  const Tile t = gradient_tile(p, vector);
  const int64_t k = p.kernel_size, tiles = int64_t{t.across} * t.down;
  int64_t step = p.B;
  if (wanted[2]) {
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
    with_layout(layout, [&](auto images_as) {
      with_tile<kernel_size>(t, [&](const auto& tile) {
        using Tile = std::decay_t<decltype(tile)>;
        const auto kernel = gradient_kernel<T, kernel_size, decltype(images_as), Tile>;
        allow_shared(kernel, bytes);
        kernel<<<blocks, kBlockThreads, bytes, stream>>>(p, tile, step, images<const T>(grad),
                                                        images<const T>(v), data<T>(grad_h),
                                                        data<float>(sums));
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
    });
  });
  return {grad_v, grad_h, sums};
}

}  // namespace elsa
