// The schemas. Kernels register themselves per device; fake kernels, autograd and vmap rules are
// added in Python (ops/registration.py). The CPU's part includes only what torch keeps stable, so that
// one library loads under every torch since 2.10 (TORCH_TARGET_VERSION in ops/build.py):
// https://docs.pytorch.org/docs/stable/notes/libtorch_stable_abi.html
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(elsa, m) {
  m.def(
      "elsa_attention(Tensor v, Tensor h_attn, Tensor? ghost_mul, Tensor? ghost_add, "
      "int kernel_size, int dilation=1, int stride=1, str border='zeros') -> Tensor");
  // output_mask asks for the gradients of v, h_attn, ghost_mul, ghost_add; a gradient not asked
  // for comes back with no elements.
  m.def(
      "elsa_attention_backward(Tensor grad_out, Tensor v, Tensor h_attn, Tensor? ghost_mul, "
      "Tensor? ghost_add, int kernel_size, int dilation, int stride, str border, "
      "bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
  // CUDA only, see ops/registration.py. `side_by_side`: the gradient has a pixel's taps side by side.
  m.def("window_softmax(Tensor logits) -> Tensor");
  m.def(
      "window_softmax_backward(Tensor grad, Tensor weights, bool side_by_side) -> Tensor");
  m.def("cpu_instruction_set() -> str");
}
