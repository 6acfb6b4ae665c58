// What one GPU thread does, as plain functions of its index: a C++ compiler can run them in loops,
// which is how they are tested where there is no GPU (tests/ops/test_cuda_source.py).
//
// T is the storage type, A the accumulation type. v, the result and their gradients may have any
// layout; h and its gradient are contiguous, as are the ghosts, (C, k, k) in A. MUL and ADD say
// which ghost heads there are. Neighbouring indices are neighbouring columns, so that a warp reads
// and writes whole cache lines of contiguous tensors; with channels_last a thread's channels lie
// side by side.
#pragma once

#include "../problem.h"

#ifdef __CUDACC__
#define ELSA_DEVICE __device__ __forceinline__
#define ELSA_SLOW __device__ __noinline__
#define ELSA_BOTH __host__ __device__ inline
#else
#define ELSA_DEVICE inline
#define ELSA_SLOW inline
#define ELSA_BOTH inline
#endif

namespace elsa {

constexpr int kChannels = 8;  // per thread, so that a weight is read once for all of them
constexpr int kTaps = 8;      // of the window, likewise for a value

ELSA_BOTH int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A (batch, channels, rows, columns) tensor: its data, and the steps from element to element.
template <class T>
struct Images {
  T* data;
  int64_t image, channel, row, column;

  ELSA_DEVICE T* at(int64_t b, int64_t c) const { return data + b * image + c * channel; }
  ELSA_DEVICE int64_t pixel(int64_t y, int64_t x) const { return y * row + x * column; }
};

// Threads of `forward` and `grad_v`: (b, g, channels / kChannels, rows, columns).
ELSA_BOTH int64_t channel_threads(const Problem& p, int64_t rows, int64_t columns) {
  return p.B * p.G * divide_up(p.C / p.G, kChannels) * rows * columns;
}

// Threads of `grad_h`: (b, g, taps / kTaps, rows, columns).
ELSA_BOTH int64_t tap_threads(const Problem& p) {
  return p.B * p.G * divide_up(p.kernel_size * p.kernel_size, kTaps) * p.Ho * p.Wo;
}

// The first row (or column) of the window around `centre` in an image of `length`: with the
// border "shift" the window keeps its pixels apart by the dilation and moves inside.
ELSA_DEVICE int window_start(const Problem& p, int centre, int64_t length) {
  const int k = static_cast<int>(p.kernel_size), step = static_cast<int>(p.dilation);
  if (!p.shift) return centre - k / 2 * step;
  const int first = centre % step;
  const int last = (static_cast<int>(length) - 1 - first) / step - (k - 1);
  const int start = centre / step - k / 2;
  return first + (start < 0 ? 0 : start > last ? last : start) * step;
}

// Where in the window that is centred `n` steps of the dilation from `at` that pixel is: 0 to k - 1,
// or -1 if it is not in it or there is no such output.
ELSA_DEVICE int window_place(const Problem& p, int at, int n, int64_t length, int64_t outputs) {
  const int step = static_cast<int>(p.dilation), centre = at + n * step;
  if (centre < 0 || centre % p.stride || centre / p.stride >= outputs) return -1;
  if (!p.shift) return static_cast<int>(p.kernel_size) / 2 - n;
  const int place = (at - window_start(p, centre, length)) / step;
  return place < p.kernel_size ? place : -1;
}

// How many steps of the dilation away the centre of a window that holds a pixel can be.
ELSA_DEVICE int reach(const Problem& p) {
  return static_cast<int>(p.shift ? p.kernel_size - 1 : p.kernel_size / 2);
}

struct Place {
  int64_t b, g, part;
  int y, x;
};

ELSA_DEVICE Place place(const Problem& p, int64_t index, int64_t parts, int64_t rows,
                        int64_t columns) {
  Place at;
  at.x = static_cast<int>(index % columns);
  index /= columns;
  at.y = static_cast<int>(index % rows);
  index /= rows;
  at.part = index % parts;
  index /= parts;
  at.g = index % p.G;
  at.b = index / p.G;
  return at;
}

template <bool MUL, bool ADD, class A>
ELSA_DEVICE A weight(A h, const A* mul, const A* add, int64_t at) {
  A w = h;
  if (MUL) w *= mul[at];
  if (ADD) w += add[at];
  return w;
}

template <bool MUL, bool ADD, class T, class A>
ELSA_DEVICE void forward(const Problem& p, int64_t index, const Images<const T>& v, const T* h,
                         const A* mul, const A* add, const Images<T>& out) {
  const int64_t depth = p.C / p.G, taps = p.kernel_size * p.kernel_size, area = p.Ho * p.Wo;
  const Place at = place(p, index, divide_up(depth, kChannels), p.Ho, p.Wo);
  const int64_t first = at.g * depth + at.part * kChannels;
  const int64_t rest = depth - at.part * kChannels;
  const int count = static_cast<int>(rest < kChannels ? rest : kChannels);
  const int k = static_cast<int>(p.kernel_size), step = static_cast<int>(p.dilation);
  const int y0 = window_start(p, at.y * static_cast<int>(p.stride), p.H);
  const int x0 = window_start(p, at.x * static_cast<int>(p.stride), p.W);
  const T* h_at = h + (at.b * p.G + at.g) * taps * area + at.y * p.Wo + at.x;
  const T* v_at = v.at(at.b, first);
  A sum[kChannels] = {};
  for (int i = 0; i < k; ++i) {
    const int y = y0 + i * step;
    if (y < 0 || y >= p.H) continue;
    for (int j = 0; j < k; ++j) {
      const int x = x0 + j * step;
      if (x < 0 || x >= p.W) continue;
      const A attention = static_cast<A>(h_at[(i * k + j) * area]);
      const T* value = v_at + v.pixel(y, x);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (c < count) {
          const A w = weight<MUL, ADD>(attention, mul, add, (first + c) * taps + i * k + j);
          sum[c] += w * static_cast<A>(value[c * v.channel]);
        }
      }
    }
  }
  T* to = out.at(at.b, first) + out.pixel(at.y, at.x);
#pragma unroll
  for (int c = 0; c < kChannels; ++c)
    if (c < count) to[c * out.channel] = static_cast<T>(sum[c]);
}

// Gathered: the outputs whose window covers one element of v, so that no two threads add to it.
template <bool MUL, bool ADD, class T, class A>
ELSA_DEVICE void grad_v(const Problem& p, int64_t index, const Images<const T>& grad, const T* h,
                        const A* mul, const A* add, const Images<T>& result) {
  const int64_t depth = p.C / p.G, taps = p.kernel_size * p.kernel_size, area = p.Ho * p.Wo;
  const Place at = place(p, index, divide_up(depth, kChannels), p.H, p.W);
  const int64_t first = at.g * depth + at.part * kChannels;
  const int64_t rest = depth - at.part * kChannels;
  const int count = static_cast<int>(rest < kChannels ? rest : kChannels);
  const int k = static_cast<int>(p.kernel_size), step = static_cast<int>(p.dilation);
  const int stride = static_cast<int>(p.stride), around = reach(p);
  const T* h_at = h + (at.b * p.G + at.g) * taps * area;
  const T* grad_at = grad.at(at.b, first);
  A sum[kChannels] = {};
  for (int n = around; n >= -around; --n) {
    const int i = window_place(p, at.y, n, p.H, p.Ho), from_y = at.y + n * step;
    if (i < 0) continue;
    for (int m = around; m >= -around; --m) {
      const int j = window_place(p, at.x, m, p.W, p.Wo), from_x = at.x + m * step;
      if (j < 0) continue;
      const int y = from_y / stride, x = from_x / stride;
      const A attention = static_cast<A>(h_at[(i * k + j) * area + y * p.Wo + x]);
      const T* up = grad_at + grad.pixel(y, x);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (c < count) {
          const A w = weight<MUL, ADD>(attention, mul, add, (first + c) * taps + i * k + j);
          sum[c] += w * static_cast<A>(up[c * grad.channel]);
        }
      }
    }
  }
  T* to = result.at(at.b, first) + result.pixel(at.y, at.x);
#pragma unroll
  for (int c = 0; c < kChannels; ++c)
    if (c < count) to[c * result.channel] = static_cast<T>(sum[c]);
}

template <bool MUL, class T, class A>
ELSA_DEVICE void grad_h(const Problem& p, int64_t index, const Images<const T>& grad,
                        const Images<const T>& v, const A* mul, T* result) {
  const int64_t depth = p.C / p.G, taps = p.kernel_size * p.kernel_size, area = p.Ho * p.Wo;
  const Place at = place(p, index, divide_up(taps, kTaps), p.Ho, p.Wo);
  const int k = static_cast<int>(p.kernel_size), step = static_cast<int>(p.dilation);
  const int y0 = window_start(p, at.y * static_cast<int>(p.stride), p.H);
  const int x0 = window_start(p, at.x * static_cast<int>(p.stride), p.W);
  const int first = static_cast<int>(at.part) * kTaps;
  const int64_t pixel = at.y * p.Wo + at.x;
  int64_t offset[kTaps];  // of the value below a tap; -1 outside the image
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    const int tap = first + t;
    const int y = y0 + tap / k * step, x = x0 + tap % k * step;
    const bool inside = tap < taps && y >= 0 && y < p.H && x >= 0 && x < p.W;
    offset[t] = inside ? v.pixel(y, x) : -1;
  }
  A sum[kTaps] = {};
  for (int64_t c = at.g * depth; c < (at.g + 1) * depth; ++c) {
    const A up = static_cast<A>(grad.at(at.b, c)[grad.pixel(at.y, at.x)]);
    const T* v_at = v.at(at.b, c);
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      if (offset[t] >= 0) {
        const A value = up * static_cast<A>(v_at[offset[t]]);
        sum[t] += MUL ? value * mul[c * taps + first + t] : value;
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTaps; ++t)
    if (first + t < taps)
      result[((at.b * p.G + at.g) * taps + first + t) * area + pixel] = static_cast<T>(sum[t]);
}

// One thread's share of the ghost gradients of channel `c` and the taps from `first` on: the
// pixels begin, begin + every, ... below `end` of the B * Ho * Wo. Adds to both sums, kTaps each.
template <class T, class A>
ELSA_DEVICE void grad_ghost(const Problem& p, int64_t c, int first, int64_t begin, int64_t end,
                            int64_t every, const Images<const T>& grad,
                            const Images<const T>& v, const T* h, A* sum_mul, A* sum_add) {
  const int64_t depth = p.C / p.G, taps = p.kernel_size * p.kernel_size, area = p.Ho * p.Wo;
  const int k = static_cast<int>(p.kernel_size), step = static_cast<int>(p.dilation);
  for (int64_t n = begin; n < end; n += every) {
    const int64_t b = n / area, pixel = n % area, row = pixel / p.Wo, column = pixel % p.Wo;
    const int y0 = window_start(p, static_cast<int>(row * p.stride), p.H);
    const int x0 = window_start(p, static_cast<int>(column * p.stride), p.W);
    const A up = static_cast<A>(grad.at(b, c)[grad.pixel(row, column)]);
    const T* v_at = v.at(b, c);
    const T* h_at = h + (b * p.G + c / depth) * taps * area + pixel;
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      const int tap = first + t;
      const int y = y0 + tap / k * step, x = x0 + tap % k * step;
      if (tap < taps && y >= 0 && y < p.H && x >= 0 && x < p.W) {
        const A value = up * static_cast<A>(v_at[v.pixel(y, x)]);
        sum_add[t] += value;
        sum_mul[t] += value * static_cast<A>(h_at[tap * area]);
      }
    }
  }
}

}  // namespace elsa
