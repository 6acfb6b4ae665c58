// The CPU ops: input checks, choice of instruction set, tasks for torch's parallel_for.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "../check.h"
#include "instruction_set.h"
#include "kernels.h"
#include "shifted.h"
#include "tensor.h"

namespace elsa {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::generic;
}

}  // namespace

// ELSA_OPS_CPU lowers the choice (for tests and comparisons); it cannot raise it.
Isa isa() {
  static const Isa chosen = [] {
    const char* wish = std::getenv("ELSA_OPS_CPU");
    const std::string name = wish ? wish : "avx512";
    STD_TORCH_CHECK(name == "generic" || name == "avx2" || name == "avx512",
                "ELSA_OPS_CPU must be generic, avx2 or avx512, got ", name);
    const Isa limit = name == "generic" ? Isa::generic : name == "avx2" ? Isa::avx2 : Isa::avx512;
    return std::min(limit, best_isa());
  }();
  return chosen;
}

namespace {

std::string cpu_instruction_set() {
  return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "generic";
}

template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>() {
  return ELSA_CHOOSE(f32);
}
template <>
const Kernels<double>& kernels<double>() {
  return ELSA_CHOOSE(f64);
}
template <>
const Kernels<BFloat16>& kernels<BFloat16>() {
  return ELSA_CHOOSE(bf16);
}
template <>
const Kernels<Float16>& kernels<Float16>() {
  return ELSA_CHOOSE(f16);
}

// Rows per task. A function of the shapes alone, so that sums are split the same way whatever the
// number of threads: small enough for the scratch to stay in a core's cache and for some dozens
// of tasks, large enough that the halo of the window does not dominate.
int64_t rows_per_task(const Problem& p, int64_t rows, int64_t (*scratch)(const Problem&, int64_t)) {
  constexpr int64_t kCacheBytes = 1 << 20, kTasks = 32;
  const int64_t smallest = std::max<int64_t>(8, p.dilation * (p.kernel_size - 1));
  int64_t parts = 1;
  const auto size = [&] { return (rows + parts - 1) / parts; };
  while (size() > smallest &&
         (scratch(p, size()) > kCacheBytes || p.B * p.G * parts < kTasks))
    ++parts;
  // grad_h does rows in pairs.
  return (size() + 1) / 2 * 2;
}

// A task's own memory, on a boundary of cache lines.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(::operator new(bytes, kLine)) {}
  ~Scratch() { ::operator delete(memory_, kLine); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return memory_; }

 private:
  static constexpr std::align_val_t kLine{64};
  void* memory_;
};

// Runs body(b, g, y0, y1, part, scratch) over all images, heads and row ranges.
template <class Body>
void for_tasks(const Problem& p, int64_t rows, int64_t step,
               int64_t (*scratch)(const Problem&, int64_t), const Body& body) {
  const int64_t parts = (rows + step - 1) / step;
  torch::stable::parallel_for(0, p.B * p.G * parts, 1, [&](int64_t begin, int64_t end) {
    const Scratch buffer(scratch(p, std::min(step, rows)));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts, g = task / parts % p.G, b = task / parts / p.G;
      body(b, g, part * step, std::min(rows, (part + 1) * step), part, buffer.get());
    }
  });
}

// The planes of image b and head g of a (B, C, H, W) or (B, G, taps, Ho, Wo) tensor of any strides.
template <class T>
Planes<T> planes(const Tensor& t, int64_t b, int64_t g, int64_t heads) {
  const auto s = t.strides();
  const int64_t head = t.dim() == 5 ? s[1] : s[1] * (t.size(1) / heads);
  const size_t last = s.size();
  return {data<T>(t) + b * s[0] + g * head, s[last - 3], s[last - 2], s[last - 1]};
}

template <class F>
void with_storage(const Tensor& v, const F& f) {
  switch (v.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Float16{});
    default:
      STD_TORCH_CHECK(false, "elsa_attention: v must be float32, bfloat16, float16 or ",
                       "float64, got ", v.scalar_type());
  }
}

Tensor elsa_attention(const Tensor& v, const Tensor& h, const std::optional<Tensor>& ghost_mul,
                      const std::optional<Tensor>& ghost_add, int64_t kernel_size,
                      int64_t dilation, int64_t stride, std::string_view border) {
  const Problem p = check(v, h, ghost_mul, ghost_add, kernel_size, dilation, stride, border);
  if (p.shift)
    return shifted_forward(p, v, h, ghost_mul.value_or(Tensor()), ghost_add.value_or(Tensor()));
  Tensor out = empty({p.B, p.C, p.Ho, p.Wo}, v.scalar_type());
  const Tensor mul = ghost_in(ghost_mul, accumulation_type(v));
  const Tensor add = ghost_in(ghost_add, accumulation_type(v));
  with_storage(v, [&](auto storage) {
    using T = decltype(storage);
    using A = typename AccOf<T>::type;
    if (out.numel() == 0) return;
    const int64_t out_head = p.C / p.G * p.Ho * p.Wo;
    const Kernels<T>& k = kernels<T>();
    const int64_t step = rows_per_task(p, p.Ho, k.forward_scratch);
    for_tasks(p, p.Ho, step, k.forward_scratch,
              [&](int64_t b, int64_t g, int64_t y0, int64_t y1, int64_t, void* scratch) {
                k.forward(p, planes<T>(v, b, g, p.G), planes<T>(h, b, g, p.G), data<A>(mul),
                          data<A>(add), data<T>(out) + (b * p.G + g) * out_head, g, y0, y1, scratch);
              });
  });
  return out;
}

// Sums the tasks' partial ghost gradients, (B, G, parts, C/G, k, k), in one fixed order.
template <class A>
Tensor sum_parts(const Problem& p, const Tensor& partial) {
  Tensor total = empty({p.C, p.kernel_size, p.kernel_size}, partial.scalar_type());
  const int64_t parts = partial.size(2), row = p.C / p.G * p.kernel_size * p.kernel_size;
  const A* from = data<A>(partial);
  A* to = data<A>(total);
  torch::stable::parallel_for(0, p.G * row, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / row, at_row = i % row;
      double sum = 0;
      for (int64_t b = 0; b < p.B; ++b)
        for (int64_t part = 0; part < parts; ++part)
          sum += from[((b * p.G + g) * parts + part) * row + at_row];
      to[i] = static_cast<A>(sum);
    }
  });
  return total;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> elsa_attention_backward(
    const Tensor& grad, const Tensor& v, const Tensor& h,
    const std::optional<Tensor>& ghost_mul, const std::optional<Tensor>& ghost_add,
    int64_t kernel_size, int64_t dilation, int64_t stride, std::string_view border,
    std::vector<bool> output_mask) {
  const Problem p = check(v, h, ghost_mul, ghost_add, kernel_size, dilation, stride, border);
  check_grad(p, grad, v);
  output_mask[2] = output_mask[2] && ghost_mul.has_value();
  output_mask[3] = output_mask[3] && ghost_add.has_value();
  if (p.shift) {
    auto grads = shifted_backward(p, grad, v, h, ghost_mul.value_or(Tensor()),
                                  ghost_add.value_or(Tensor()), output_mask);
    if (output_mask[2]) grads[2] = to(grads[2], ghost_mul->scalar_type());
    if (output_mask[3]) grads[3] = to(grads[3], ghost_add->scalar_type());
    return {grads[0], grads[1], grads[2], grads[3]};
  }
  const Tensor mul = ghost_in(ghost_mul, accumulation_type(v));
  const Tensor add = ghost_in(ghost_add, accumulation_type(v));
  std::array<Tensor, 4> grads;
  grads[0] = output_mask[0] ? empty(v.sizes(), v.scalar_type()) : none(v);
  grads[1] = output_mask[1] ? empty(h.sizes(), v.scalar_type()) : none(v);

  with_storage(v, [&](auto storage) {
    using T = decltype(storage);
    using A = typename AccOf<T>::type;
    const Kernels<T>& k = kernels<T>();
    const bool nothing = grad.numel() == 0;
    if (nothing) {
      torch::stable::zero_(grads[0]);
      torch::stable::zero_(grads[1]);
    }
    const int64_t step = nothing ? 1 : rows_per_task(p, p.H, k.grad_v_scratch);
    const int64_t parts = nothing ? 0 : (p.H + step - 1) / step;
    const int64_t row = p.C / p.G * kernel_size * kernel_size;
    const int64_t v_head = p.C / p.G * p.H * p.W, h_head = kernel_size * kernel_size * p.Ho * p.Wo;
    Tensor partial[2];
    for (int i : {0, 1})
      if (output_mask[2 + i])
        partial[i] = empty({p.B, p.G, parts, row}, accumulation_type(v));
    if ((output_mask[0] || output_mask[2] || output_mask[3]) && !nothing) {
      for_tasks(p, p.H, step, k.grad_v_scratch,
                [&](int64_t b, int64_t g, int64_t y0, int64_t y1, int64_t part, void* scratch) {
                  const int64_t at = ((b * p.G + g) * parts + part) * row;
                  T* grad_v = output_mask[0] ? data<T>(grads[0]) + (b * p.G + g) * v_head : nullptr;
                  A* grad_mul = output_mask[2] ? data<A>(partial[0]) + at : nullptr;
                  A* grad_add = output_mask[3] ? data<A>(partial[1]) + at : nullptr;
                  k.grad_v(p, planes<T>(grad, b, g, p.G), planes<T>(v, b, g, p.G),
                           planes<T>(h, b, g, p.G), data<A>(mul), data<A>(add), grad_v, grad_mul,
                           grad_add, g, y0, y1, scratch);
                });
    }
    if (output_mask[1] && !nothing) {
      for_tasks(p, p.Ho, rows_per_task(p, p.Ho, k.grad_h_scratch), k.grad_h_scratch,
                [&](int64_t b, int64_t g, int64_t y0, int64_t y1, int64_t, void* scratch) {
                  k.grad_h(p, planes<T>(grad, b, g, p.G), planes<T>(v, b, g, p.G), data<A>(mul),
                           data<T>(grads[1]) + (b * p.G + g) * h_head, g, y0, y1, scratch);
                });
    }
    for (int i : {0, 1}) {
      const auto& ghost = i == 0 ? ghost_mul : ghost_add;
      grads[2 + i] = output_mask[2 + i] ? to(sum_parts<A>(p, partial[i]), ghost->scalar_type())
                                        : none(v);
    }
  });
  return {grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(elsa, CPU, m) {
  m.impl("elsa_attention", TORCH_BOX(&elsa_attention));
  m.impl("elsa_attention_backward", TORCH_BOX(&elsa_attention_backward));
}

STABLE_TORCH_LIBRARY_IMPL(elsa, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&cpu_instruction_set));
}

}  // namespace elsa
