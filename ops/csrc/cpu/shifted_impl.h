// The kernels of the border "shift", included by kernels_impl.h for float and double. One image
// and head, whose channels lie beside each other and fill whole vectors; a window is one run of
// pixels per row wherever it lies, so nothing is padded and no pixel is a special case.

namespace elsa {
namespace {

// The first row (or column) of the window around `centre` in an image of `length`.
ELSA_INLINE int64_t shifted_start(const Problem& p, int64_t centre, int64_t length) {
  const int64_t first = centre % p.dilation, place = centre / p.dilation;
  const int64_t last = (length - 1 - first) / p.dilation - (p.kernel_size - 1);
  return first + most(least(place - p.kernel_size / 2, last), 0) * p.dilation;
}

// Calls body(tap, offset) for the k*k pixels of the window of an output pixel, with their offset
// in (H, W).
template <class Body>
ELSA_INLINE void over_window(const Problem& p, int64_t y, int64_t x, const Body& body) {
  const int64_t top = shifted_start(p, y * p.stride, p.H);
  const int64_t left = shifted_start(p, x * p.stride, p.W);
  for (int64_t i = 0, tap = 0; i < p.kernel_size; ++i) {
    int64_t offset = (top + i * p.dilation) * p.W + left;
    for (int64_t j = 0; j < p.kernel_size; ++j, ++tap, offset += p.dilation) body(tap, offset);
  }
}

template <class A, int N, bool MUL, bool ADD>
ELSA_INLINE void shifted_sum(const Problem& p, int64_t depth, int64_t y, int64_t x, const A* v,
                             const A* h, const A* mul, const A* add, A* out) {
  constexpr int64_t L = Vec<A>::lanes;
  const int64_t area = p.Ho * p.Wo;
  V<A> sum[N] = {};
  over_window(p, y, x, [&](int64_t tap, int64_t offset) {
    const A weight = h[tap * area];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const V<A> value = load(v + offset * depth + n * L);
      if constexpr (MUL || ADD) {
        V<A> all = V<A>{} + weight;
        if constexpr (MUL) all *= load(mul + tap * depth + n * L);
        if constexpr (ADD) all += load(add + tap * depth + n * L);
        sum[n] += all * value;
      } else {
        sum[n] += weight * value;
      }
    }
  });
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) store(out + n * L, sum[n]);
}

template <class A, bool MUL, bool ADD>
void shifted_row(const Problem& p, int64_t depth, const A* v, const A* h, const A* mul,
                 const A* add, A* out, int64_t y) {
  constexpr int64_t L = Vec<A>::lanes;
  for (int64_t x = 0; x < p.Wo; ++x) {
    const int64_t pixel = y * p.Wo + x;
    for (int64_t c = 0; c < depth;) {
      const auto run = [&](auto vectors) {
        constexpr int N = decltype(vectors)::value;
        shifted_sum<A, N, MUL, ADD>(p, depth, y, x, v + c, h + pixel, MUL ? mul + c : nullptr,
                                    ADD ? add + c : nullptr, out + pixel * depth + c);
        c += N * L;
      };
      if (depth - c >= 4 * L) run(std::integral_constant<int, 4>{});
      else if (depth - c >= 2 * L) run(std::integral_constant<int, 2>{});
      else run(std::integral_constant<int, 1>{});
    }
  }
}

template <class A>
void shifted_forward(const Problem& p, int64_t depth, const A* v, const A* h, const A* mul,
                     const A* add, A* out, int64_t y) {
  auto run = mul ? (add ? &shifted_row<A, true, true> : &shifted_row<A, true, false>)
                 : (add ? &shifted_row<A, false, true> : &shifted_row<A, false, false>);
  run(p, depth, v, h, mul, add, out, y);
}

template <class A>
ELSA_INLINE A sum_of_lanes(V<A> x) {
  A lanes[Vec<A>::lanes];
  store(lanes, x);
  for (int64_t half = Vec<A>::lanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

template <class A>
void shifted_backward(const Problem& p, int64_t depth, const A* grad, const A* v, const A* h,
                      const A* mul, const A* add, A* grad_v, A* grad_h, A* grad_mul, A* grad_add) {
  constexpr int64_t L = Vec<A>::lanes;
  const int64_t area = p.Ho * p.Wo;
  for (int64_t y = 0; y < p.Ho; ++y)
    for (int64_t x = 0; x < p.Wo; ++x) {
      const int64_t pixel = y * p.Wo + x;
      const A* up = grad + pixel * depth;
      over_window(p, y, x, [&](int64_t tap, int64_t offset) {
        const A weight = h ? h[tap * area + pixel] : A{};
        const int64_t at = offset * depth, ghost = tap * depth;
        if (grad_v)
          for (int64_t c = 0; c < depth; c += L) {
            V<A> all = V<A>{} + weight;
            if (mul) all *= load(mul + ghost + c);
            if (add) all += load(add + ghost + c);
            store(grad_v + at + c, load(grad_v + at + c) + all * load(up + c));
          }
        if (!grad_h && !grad_mul && !grad_add) return;
        V<A> sum{};
        for (int64_t c = 0; c < depth; c += L) {
          const V<A> product = load(up + c) * load(v + at + c);
          sum += mul ? product * load(mul + ghost + c) : product;
          if (grad_mul) store(grad_mul + ghost + c, load(grad_mul + ghost + c) + weight * product);
          if (grad_add) store(grad_add + ghost + c, load(grad_add + ghost + c) + product);
        }
        if (grad_h) grad_h[tap * area + pixel] = sum_of_lanes<A>(sum);
      });
    }
}

}  // namespace
}  // namespace elsa
