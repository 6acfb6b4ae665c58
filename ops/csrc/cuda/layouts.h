// How images (v, the result, their gradients) lie in global memory, and their way from there to the
// tile in shared memory and back, as banded.h needs it.
#pragma once

#include <cstdint>
#include <cstring>

#include "block.h"
#include "tile.h"

namespace elsa {

// Contiguous images. In shared memory each channel of a head has a slot; here slot i is channel i.
struct Planes {
  static constexpr int kEighth = 8;  // channels from a slot to the eighth after it
  ELSA_DEVICE static int channel(int slot) { return slot; }
};

// A pixel's channels lie side by side, as with channels_last or in a part of such a tensor. A head
// has 32. Four lanes load or store a pixel's 64 bytes, 8 channels each; in between, a warp
// transposes the words that its lanes have at the same place, 2 channels of each lane, as a matrix.
// Its 8 channels are those of slots that follow each other.
struct Pixels {
  static constexpr int kEighth = 2;
  ELSA_DEVICE static int channel(int slot) { return slot % 8 / 2 * 8 + slot / 8 * 2 + slot % 2; }
};

// Whether the 32-bit offsets of Pixels reach all of an image with these steps.
inline bool has_pixels(const Problem& p, int64_t row, int64_t column) {
  return p.C == 32 * p.G && p.H * row + p.W * column < (int64_t{1} << 31);
}

template <class T>
ELSA_DEVICE uint32_t pack(float first, float second) {
  return T(first).x | static_cast<uint32_t>(T(second).x) << 16;
}

template <int N>
ELSA_DEVICE void copy_elements(uint16_t* to, const uint16_t* from, bool inside) {
  if constexpr (N == 1)
    *to = inside ? *from : uint16_t{0};
  else
    copy_async<2 * N>(to, from, inside);
}

template <int N, class S>
ELSA_DEVICE void copy_planes(const Problem& p, const S& t, const uint16_t* head, int rows, int y,
                             int x, int width, uint16_t* shared) {
  const int H = static_cast<int>(p.H), W = static_cast<int>(p.W);
  // A thread has the same channels and columns of every row, so that a row costs two additions.
  for_each_vector(t.depth, width / N, [&](int c, int vector) {
    const int from_x = x + vector * N;
    const bool inside = from_x >= 0 && from_x < W;
    uint16_t* to = shared + c * t.pitch + vector * N;
    int from = (c * H + y) * W + from_x;
    for (int row = 0; row < rows; ++row, from += W, to += t.row_pitch) {
      const bool valid = inside && static_cast<unsigned>(y + row) < static_cast<unsigned>(H);
      copy_elements<N>(to, head + (valid ? from : 0), valid);
    }
  });
}

// Copies `rows` rows of all channels of a head of `from`, from row y and column x on, `width` columns
// (a multiple of 8), with zeros outside the image. Done only after wait_copies.
template <class T, class S>
ELSA_DEVICE void copy_values(Planes, const Problem& p, const S& t, const Images<const T>& from,
                             const Corner& at, int rows, int y, int x, int width,
                             uint16_t* shared) {
  const uint16_t* head =
      one_pointer(reinterpret_cast<const uint16_t*>(from.at(at.b, at.g * t.depth)));
  if (t.vector == 4) return copy_planes<4>(p, t, head, rows, y, x, width, shared);
  if (t.vector == 2) return copy_planes<2>(p, t, head, rows, y, x, width, shared);
  copy_planes<1>(p, t, head, rows, y, x, width, shared);
}

template <class T, class S>
ELSA_DEVICE void copy_values(Pixels, const Problem& p, const S& t, const Images<const T>& from,
                             const Corner& at, int rows, int y, int x, int width,
                             uint16_t* shared) {
  constexpr int kAtOnce = 5;  // segments of a row under way
  const int lane = thread_index() % 32, n = lane / 4, quad = lane % 4;
  const int row_step = static_cast<int>(from.row), step = static_cast<int>(from.column);
  const uint16_t* head =
      one_pointer(reinterpret_cast<const uint16_t*>(from.at(at.b, at.g * t.depth)) + 8 * quad);
  for (int row = thread_index() / 32; row < rows; row += kBlockThreads / 32) {
    const bool row_inside = static_cast<unsigned>(y + row) < static_cast<unsigned>(p.H);
    const int place = (y + row) * row_step + (x + n) * step;
    uint16_t* to = shared + row * t.row_pitch + n * t.pitch + 2 * quad;
#pragma unroll
    for (int first = 0; first < width; first += kAtOnce * kSegment) {
      uint32_t words[kAtOnce][4];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int column = first + i * kSegment;
        const bool inside = row_inside && column < width &&
                            static_cast<unsigned>(x + n + column) < static_cast<unsigned>(p.W);
        load_words(words[i], head + (inside ? place + column * step : 0), inside);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int column = first + i * kSegment;
        if (column >= width) break;
#pragma unroll
        for (int part = 0; part < 4; ++part)
          *reinterpret_cast<uint32_t*>(to + 8 * part * t.pitch + column) =
              transpose(words[i][part]);
      }
    }
  }
}

// Where a lane stores its part of a segment of a pair of rows, in 32 bits from the head's first
// element, as has_banded and has_pixels allow.
template <class T>
struct Target {
  T* head;
  int place;           // of its first element in the first row
  int row;             // from there to the second row
  int columns, below;  // pixels and rows before the edge of the image
};

// Of the segment that begins at (y, x).
template <class T>
ELSA_DEVICE Target<T> target_of(Planes, const Problem& p, const Images<T>& result,
                                const Corner& at, int y, int x, int lane) {
  const int H = static_cast<int>(p.H), W = static_cast<int>(p.W);
  x += 2 * (lane % 4);
  return {one_pointer(result.at(at.b, at.g * (p.C / p.G))), y * W + x, W, W - x, H - y};
}

template <class T>
ELSA_DEVICE Target<T> target_of(Pixels, const Problem& p, const Images<T>& result,
                                const Corner& at, int y, int x, int lane) {
  const int H = static_cast<int>(p.H), W = static_cast<int>(p.W);
  const int row = static_cast<int>(result.row), column = static_cast<int>(result.column);
  x += lane / 4;
  return {one_pointer(result.at(at.b, at.g * 32) + 8 * (lane % 4)), y * row + x * column, row,
          W - x, H - y};
}

// Stores a segment of a pair of rows, of which the lane has two pixels of slot `first` and every eighth
// after it.
template <class T, int BLOCKS, class S>
ELSA_DEVICE void store(Planes, const Problem& p, const S& t, const Target<T>& target, int first,
                       const float (&acc)[BLOCKS][2][4]) {
  const int area = static_cast<int>(p.H) * static_cast<int>(p.W);
#pragma unroll
  for (int i = 0; i < BLOCKS * 2; ++i) {
    if (first + 8 * i >= t.depth) continue;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float* value = acc[i / 2][row] + i % 2 * 2;
      T* to = target.head + (target.place + (first + 8 * i) * area + row * target.row);
      if (t.vector > 1) {
        if (row < target.below && target.columns > 0)
          *reinterpret_cast<uint32_t*>(to) = pack<T>(value[0], value[1]);
      } else {
        if (row < target.below && target.columns > 0) to[0] = T(value[0]);
        if (row < target.below && target.columns > 1) to[1] = T(value[1]);
      }
    }
  }
}

// After the transposition the lane has 8 channels of a pixel.
template <class T, int BLOCKS, class S>
ELSA_DEVICE void store(Pixels, const Problem&, const S&, const Target<T>& target, int,
                       const float (&acc)[BLOCKS][2][4]) {
  if constexpr (BLOCKS == 2) {  // 32 channels
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* value = acc[i / 2][row] + i % 2 * 2;
        words[i] = transpose(pack<T>(value[0], value[1]));
      }
      if (row < target.below && target.columns > 0)
        store_words(target.head + (target.place + row * target.row), words);
    }
  }
}

}  // namespace elsa
