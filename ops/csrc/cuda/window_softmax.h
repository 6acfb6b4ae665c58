// Softmax over the taps of a window, forward and backward, in one pass over memory. The convolution
// that makes the logits may leave a pixel's taps side by side (channels_last), while the attention
// reads a plane of pixels per tap: on its way through shared memory a tile changes its layout.
//
// A block works on a run of pixels of one head of one image; in between, a thread has a pixel. T is
// the storage type, A that of sums.
#pragma once

#include <cmath>
#include <cstdint>

#include "block.h"

namespace elsa {

// A (batch, heads, taps, pixels) tensor: its data, and the steps from element to element.
template <class T>
struct Taps {
  T* data;
  int64_t image, head, tap, pixel;
};

// The runs of a tensor.
struct Runs {
  int64_t heads, area;  // area: pixels of an image
  int taps, pixels;     // of a run; the last of an image may have fewer
  int pitch;            // elements from tap to tap in shared memory, for few conflicts of banks

  ELSA_BOTH int64_t per_head() const { return divide_up(area, pixels); }
  ELSA_BOTH int64_t elements() const { return int64_t{taps} * pitch; }
};

// The longest runs of which `tiles` tiles fit `limit` bytes; no pixels where none does.
inline Runs choose_runs(int64_t heads, int64_t area, int64_t taps, int64_t tiles, int64_t size,
                        int64_t limit) {
  for (int pixels = kBlockThreads; pixels >= 32; pixels /= 2) {
    const int pitch = pixels + (size == 2 ? 2 : 1);
    if (tiles * taps * pitch * size <= limit)
      return {heads, area, static_cast<int>(taps), pixels, pitch};
  }
  return {};
}

// Pixels of the block's run.
ELSA_DEVICE int run_length(const Runs& r, int64_t block) {
  const int64_t left = r.area - block % r.per_head() * r.pixels;
  return static_cast<int>(left < r.pixels ? left : r.pixels);
}

// Calls f(element, place in the tile) for the elements of the block's run: a thread those of its
// pixel or, where a pixel's taps lie side by side, a warp all of a pixel's.
template <class T, class F>
ELSA_DEVICE void for_each_tap(const Runs& r, int64_t block, const Taps<T>& t, const F& f) {
  const int64_t run = block % r.per_head(), head = block / r.per_head();
  T* first = t.data + head / r.heads * t.image + head % r.heads * t.head + run * r.pixels * t.pixel;
  const int count = run_length(r, block), thread = thread_index();
  if (t.tap == 1) {
#pragma unroll 1
    for (int tap = thread % 32; tap < r.taps; tap += 32) {
#pragma unroll 8
      for (int pixel = thread / 32; pixel < count; pixel += kBlockThreads / 32)
        f(first[pixel * t.pixel + tap], tap * r.pitch + pixel);
    }
  } else if (thread < count) {
#pragma unroll 7
    for (int tap = 0; tap < r.taps; ++tap)
      f(first[tap * t.tap + thread * t.pixel], tap * r.pitch + thread);
  }
}

// `tile`: r.elements() of shared memory.
template <class A, class T>
ELSA_DEVICE void softmax_run(const Runs& r, int64_t block, const Taps<const T>& logits,
                             const Taps<T>& weights, T* tile) {
  for_each_tap(r, block, logits, [&](const T& from, int place) { tile[place] = from; });
  block_sync();
  if (thread_index() < run_length(r, block)) {
    T* of_pixel = tile + thread_index();
    A largest = static_cast<A>(-INFINITY), sum = 0;
    for (int tap = 0; tap < r.taps; ++tap) {
      const A value = static_cast<A>(of_pixel[tap * r.pitch]);
      largest = value > largest ? value : largest;
    }
    for (int tap = 0; tap < r.taps; ++tap)
      sum += exponential<T>(static_cast<A>(of_pixel[tap * r.pitch]) - largest);
    const A scale = 1 / sum;
    for (int tap = 0; tap < r.taps; ++tap) {
      T& value = of_pixel[tap * r.pitch];
      value = static_cast<T>(exponential<T>(static_cast<A>(value) - largest) * scale);
    }
  }
  block_sync();
  for_each_tap(r, block, weights, [&](T& to, int place) { to = tile[place]; });
}

// `weights`: the forward's result, `grad` its gradient. `tiles`: 2 * r.elements().
template <class A, class T>
ELSA_DEVICE void softmax_run_backward(const Runs& r, int64_t block, const Taps<const T>& grad,
                                      const Taps<const T>& weights, const Taps<T>& grad_logits,
                                      T* tiles) {
  T* upstream = tiles + r.elements();
  for_each_tap(r, block, weights, [&](const T& from, int place) { tiles[place] = from; });
  for_each_tap(r, block, grad, [&](const T& from, int place) { upstream[place] = from; });
  block_sync();
  if (thread_index() < run_length(r, block)) {
    const T* weight = tiles + thread_index();
    T* of_pixel = upstream + thread_index();
    A product = 0;
    for (int tap = 0; tap < r.taps; ++tap)
      product += static_cast<A>(weight[tap * r.pitch]) * static_cast<A>(of_pixel[tap * r.pitch]);
    for (int tap = 0; tap < r.taps; ++tap) {
      T& value = of_pixel[tap * r.pitch];
      value = static_cast<T>(static_cast<A>(weight[tap * r.pitch]) *
                             (static_cast<A>(value) - product));
    }
  }
  block_sync();
  for_each_tap(r, block, grad_logits, [&](T& to, int place) { to = upstream[place]; });
}

}  // namespace elsa
