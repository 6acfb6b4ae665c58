// The peer of the benchmark: float32, one thread per output element, nothing tuned.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>

#include <tuple>

namespace {

constexpr int kThreads = 256;

struct Sizes {
  int B, C, G, H, W, k;
};

__device__ int thread() { return blockIdx.x * kThreads + threadIdx.x; }

__device__ bool inside(const Sizes& s, int y, int x) {
  return y >= 0 && y < s.H && x >= 0 && x < s.W;
}

__global__ void forward_kernel(Sizes s, const float* v, const float* h, const float* add,
                               float* out) {
  const int i = thread(), area = s.H * s.W, taps = s.k * s.k;
  if (i >= s.B * s.C * area) return;
  const int x = i % s.W, y = i / s.W % s.H, c = i / area % s.C, b = i / area / s.C;
  const int head = b * s.G + c / (s.C / s.G);
  float sum = 0;
  for (int tap = 0; tap < taps; ++tap) {
    const int from_y = y + tap / s.k - s.k / 2, from_x = x + tap % s.k - s.k / 2;
    if (inside(s, from_y, from_x))
      sum += (h[(head * taps + tap) * area + y * s.W + x] + add[c * taps + tap]) *
             v[(b * s.C + c) * area + from_y * s.W + from_x];
  }
  out[i] = sum;
}

__global__ void grad_v_kernel(Sizes s, const float* grad, const float* h, const float* add,
                              float* result) {
  const int i = thread(), area = s.H * s.W, taps = s.k * s.k;
  if (i >= s.B * s.C * area) return;
  const int x = i % s.W, y = i / s.W % s.H, c = i / area % s.C, b = i / area / s.C;
  const int head = b * s.G + c / (s.C / s.G);
  float sum = 0;
  for (int tap = 0; tap < taps; ++tap) {
    const int from_y = y - tap / s.k + s.k / 2, from_x = x - tap % s.k + s.k / 2;
    if (inside(s, from_y, from_x))
      sum += (h[(head * taps + tap) * area + from_y * s.W + from_x] + add[c * taps + tap]) *
             grad[(b * s.C + c) * area + from_y * s.W + from_x];
  }
  result[i] = sum;
}

__global__ void grad_h_kernel(Sizes s, const float* grad, const float* v, float* result) {
  const int i = thread(), area = s.H * s.W, taps = s.k * s.k, depth = s.C / s.G;
  if (i >= s.B * s.G * taps * area) return;
  const int x = i % s.W, y = i / s.W % s.H, tap = i / area % taps, head = i / area / taps;
  const int from_y = y + tap / s.k - s.k / 2, from_x = x + tap % s.k - s.k / 2;
  float sum = 0;
  if (inside(s, from_y, from_x))
    for (int c = head * depth; c < (head + 1) * depth; ++c)  // of all images' channels
      sum += grad[c * area + y * s.W + x] * v[c * area + from_y * s.W + from_x];
  result[i] = sum;
}

__global__ void grad_add_kernel(Sizes s, const float* grad, const float* v, float* result) {
  const int i = thread(), area = s.H * s.W, taps = s.k * s.k;
  if (i >= s.C * taps) return;
  const int c = i / taps, dy = i % taps / s.k - s.k / 2, dx = i % s.k - s.k / 2;
  float sum = 0;
  for (int b = 0; b < s.B; ++b)
    for (int y = 0; y < s.H; ++y)
      for (int x = 0; x < s.W; ++x)
        if (inside(s, y + dy, x + dx))
          sum += grad[(b * s.C + c) * area + y * s.W + x] *
                 v[(b * s.C + c) * area + (y + dy) * s.W + x + dx];
  result[i] = sum;
}

Sizes sizes(const at::Tensor& v, const at::Tensor& h, const at::Tensor& add, int64_t k) {
  for (const at::Tensor& t : {v, h, add})
    TORCH_CHECK(t.is_cuda() && t.scalar_type() == at::kFloat && t.is_contiguous() &&
                    t.numel() < (int64_t{1} << 31) - kThreads,
                "plain_kernel: contiguous float32 CUDA tensors with indices of 32 bits only");
  TORCH_CHECK(v.dim() == 4 && h.dim() == 5 && h.size(1) > 0 && v.size(1) % h.size(1) == 0 &&
                  h.sizes() ==
                      at::IntArrayRef({v.size(0), h.size(1), k * k, v.size(2), v.size(3)}) &&
                  add.sizes() == at::IntArrayRef({v.size(1), k, k}) && v.numel() > 0,
              "plain_kernel: shapes do not fit");
  const auto size = [](const at::Tensor& t, int d) { return static_cast<int>(t.size(d)); };
  return {size(v, 0), size(v, 1), size(h, 1), size(v, 2), size(v, 3), static_cast<int>(k)};
}

unsigned blocks(const at::Tensor& result) {
  return static_cast<unsigned>((result.numel() + kThreads - 1) / kThreads);
}

at::Tensor forward(const at::Tensor& v, const at::Tensor& h, const at::Tensor& add, int64_t k) {
  const Sizes s = sizes(v, h, add, k);
  const c10::cuda::CUDAGuard guard(v.device());
  at::Tensor out = at::empty_like(v);
  forward_kernel<<<blocks(out), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      s, v.data_ptr<float>(), h.data_ptr<float>(), add.data_ptr<float>(), out.data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& v,
                                                        const at::Tensor& h, const at::Tensor& add,
                                                        int64_t k) {
  const Sizes s = sizes(v, h, add, k);
  TORCH_CHECK(grad.sizes() == v.sizes() && grad.is_cuda() && grad.is_contiguous() &&
                  grad.scalar_type() == at::kFloat,
              "plain_kernel: grad must be like v");
  const c10::cuda::CUDAGuard guard(v.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  at::Tensor grad_v = at::empty_like(v), grad_h = at::empty_like(h), grad_add = at::empty_like(add);
  grad_v_kernel<<<blocks(grad_v), kThreads, 0, stream>>>(
      s, grad.data_ptr<float>(), h.data_ptr<float>(), add.data_ptr<float>(),
      grad_v.data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  grad_h_kernel<<<blocks(grad_h), kThreads, 0, stream>>>(s, grad.data_ptr<float>(),
                                                         v.data_ptr<float>(),
                                                         grad_h.data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  grad_add_kernel<<<blocks(grad_add), kThreads, 0, stream>>>(s, grad.data_ptr<float>(),
                                                             v.data_ptr<float>(),
                                                             grad_add.data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_v, grad_h, grad_add};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("forward", &forward);
  m.def("backward", &backward);
}
