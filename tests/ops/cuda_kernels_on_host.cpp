// Runs the functions of ops/csrc/cuda/kernels.h in loops over their thread index, on the CPU.
#include "../../ops/csrc/cuda/kernels.h"

using elsa::Problem;
using Inputs = elsa::Images<const double>;
using Results = elsa::Images<double>;

namespace {

template <bool MUL, bool ADD>
void all(const Problem& p, const Inputs& grad, const Inputs& v, const double* h, const double* mul,
         const double* add, const Results& out, const Results& grad_v, double* grad_h) {
  for (int64_t i = 0; i < elsa::channel_threads(p, p.Ho, p.Wo); ++i)
    elsa::forward<MUL, ADD>(p, i, v, h, mul, add, out);
  for (int64_t i = 0; i < elsa::channel_threads(p, p.H, p.W); ++i)
    elsa::grad_v<MUL, ADD>(p, i, grad, h, mul, add, grad_v);
  for (int64_t i = 0; i < elsa::tap_threads(p); ++i)
    elsa::grad_h<MUL>(p, i, grad, v, mul, grad_h);
}

}  // namespace

// `steps`: four each of grad, v, out and grad_v.
extern "C" void run(const int64_t* sizes, const int64_t* steps, const double* of_grad,
                    const double* of_v, const double* h, const double* mul, const double* add,
                    double* of_out, double* of_grad_v, double* grad_h, double* grad_mul,
                    double* grad_add) {
  const Inputs grad{of_grad, steps[0], steps[1], steps[2], steps[3]};
  const Inputs v{of_v, steps[4], steps[5], steps[6], steps[7]};
  const Results out{of_out, steps[8], steps[9], steps[10], steps[11]};
  const Results grad_v{of_grad_v, steps[12], steps[13], steps[14], steps[15]};
  const Problem p{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
                  sizes[5], sizes[6], sizes[7], sizes[8], sizes[9], sizes[10] != 0};
  const auto chosen = mul ? (add ? all<true, true> : all<true, false>)
                          : (add ? all<false, true> : all<false, false>);
  chosen(p, grad, v, h, mul, add, out, grad_v, grad_h);
  const int64_t taps = p.kernel_size * p.kernel_size, pixels = p.B * p.Ho * p.Wo;
  constexpr int64_t threads = 4;  // of a block; the block's sums are added in their order
  for (int64_t c = 0; c < p.C; ++c) {
    for (int64_t first = 0; first < taps; first += elsa::kTaps) {
      for (int64_t thread = 0; thread < threads; ++thread) {
        double sums[2 * elsa::kTaps] = {};
        elsa::grad_ghost(p, c, static_cast<int>(first), thread, pixels, threads, grad, v, h, sums,
                         sums + elsa::kTaps);
        for (int64_t t = 0; t < elsa::kTaps && first + t < taps; ++t) {
          grad_mul[c * taps + first + t] += sums[t];
          grad_add[c * taps + first + t] += sums[elsa::kTaps + t];
        }
      }
    }
  }
}
