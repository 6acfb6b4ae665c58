// What the kernels of one instruction set offer to elsa_attention.cpp. Nothing here or in
// kernels_impl.h includes torch or allocates: a file compiled for AVX-512 must emit no function
// that the linker could share with code for an older processor.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace elsa {

// Storage types; arithmetic on them is float32.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};

// One image's planes of one head, in any layout: element (plane, y, x) is at
// data[plane * plane_pitch + y * row_pitch + x * pitch].
template <class T>
struct Planes {
  const T* data;
  int64_t plane_pitch, row_pitch, pitch;
};

// Each call does one image, one head `g` and the rows [y0, y1), and touches no other output. Inputs
// are read where they lie; outputs are contiguous and begin at that image and head; ghosts are
// (C, k, k) in the accumulation type; pointers to absent tensors and unwanted outputs are null.
// `scratch` holds scratch_bytes(...) bytes, aligned to 64.
template <class T>
struct Kernels {
  using A = typename AccOf<T>::type;

  int64_t (*forward_scratch)(const Problem&, int64_t rows);
  void (*forward)(const Problem&, Planes<T> v, Planes<T> h, const A* mul, const A* add, T* out,
                  int64_t g, int64_t y0, int64_t y1, void* scratch);

  // Rows of v: the gradient is gathered, so no two calls write one element. grad_mul and grad_add
  // are this call's own (C/G, k, k) partial sums.
  int64_t (*grad_v_scratch)(const Problem&, int64_t rows);
  void (*grad_v)(const Problem&, Planes<T> grad, Planes<T> v, Planes<T> h, const A* mul,
                 const A* add, T* grad_v, A* grad_mul, A* grad_add, int64_t g, int64_t y0,
                 int64_t y1, void* scratch);

  // Rows of the output.
  int64_t (*grad_h_scratch)(const Problem&, int64_t rows);
  void (*grad_h)(const Problem&, Planes<T> grad, Planes<T> v, const A* mul, T* grad_h, int64_t g,
                 int64_t y0, int64_t y1, void* scratch);
};

// With the border "shift": one image and head whose `depth` channels lie beside each other, a
// multiple of 16. v, grad and out are (rows, columns, depth), h (k*k, Ho, Wo), ghosts (k*k, depth),
// all contiguous; pointers to absent tensors and unwanted gradients are null.
template <class A>
struct ShiftedKernels {
  // The output's row `y`.
  void (*forward)(const Problem&, int64_t depth, const A* v, const A* h, const A* mul,
                  const A* add, A* out, int64_t y);
  // Adds to every gradient but that of h. Without grad_v and grad_mul h may be null.
  void (*backward)(const Problem&, int64_t depth, const A* grad, const A* v, const A* h,
                   const A* mul, const A* add, A* grad_v, A* grad_h, A* grad_mul, A* grad_add);
};

#define ELSA_DECLARE_KERNELS(ISA)                  \
  namespace ISA {                                  \
  extern const Kernels<float> f32;                 \
  extern const Kernels<double> f64;                \
  extern const Kernels<BFloat16> bf16;             \
  extern const Kernels<Float16> f16;               \
  extern const ShiftedKernels<float> shifted_f32;  \
  extern const ShiftedKernels<double> shifted_f64; \
  }

ELSA_DECLARE_KERNELS(generic)
#if defined(__x86_64__)
ELSA_DECLARE_KERNELS(avx2)
ELSA_DECLARE_KERNELS(avx512)
#endif

}  // namespace elsa
