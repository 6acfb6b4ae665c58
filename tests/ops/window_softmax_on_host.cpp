// Runs the kernels of ops/csrc/cuda/window_softmax.h block by block on the CPU.
#include "warp_on_host.h"
//
#include "../../ops/csrc/cuda/window_softmax.h"

using namespace elsa;

namespace {

template <class T>
Taps<T> taps(const int64_t* steps, void* data) {
  return {static_cast<T*>(data), steps[0], steps[1], steps[2], steps[3]};
}

template <class A, class T>
void all(const int64_t* sizes, const int64_t* steps, void* const* data) {
  const int64_t batch = sizes[0], heads = sizes[1], count = sizes[2], area = sizes[3];
  for (int tiles : {1, 2}) {
    const Runs r = choose_runs(heads, area, count, tiles, sizeof(T), sizes[4]);
    HostBlock::require(r.pixels > 0, "no run fits");
    for (int64_t block = 0; block < batch * heads * r.per_head(); ++block) {
      std::vector<T> shared(tiles * r.elements() + 1, T(NAN));
      HostBlock::get().run(
          [&] {
            if (tiles == 1)
              softmax_run<A>(r, block, taps<const T>(steps, data[0]), taps<T>(steps + 4, data[1]),
                             shared.data());
            else
              softmax_run_backward<A>(r, block, taps<const T>(steps + 8, data[2]),
                                      taps<const T>(steps + 4, data[1]),
                                      taps<T>(steps + 12, data[3]), shared.data());
          },
          block % 2);
      HostBlock::require(std::isnan(static_cast<double>(shared.back())), "a write behind shared memory");
    }
  }
}

}  // namespace

// `sizes`: batch, heads, taps, pixels, bytes of shared memory. `data`, with four steps each: logits,
// weights, the gradients of weights and of logits.
extern "C" void run_softmax(int dtype, const int64_t* sizes, const int64_t* steps,
                            void* const* data) {
  if (dtype == 0) all<double, double>(sizes, steps, data);
  if (dtype == 1) all<float, float>(sizes, steps, data);
  if (dtype == 2) all<float, c10::BFloat16>(sizes, steps, data);
  if (dtype == 3) all<float, c10::Half>(sizes, steps, data);
}
