// The part of an image that a block of banded.h works on, and its shared memory.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "kernels.h"

namespace elsa {

constexpr int kSegment = 8;  // pixels
constexpr int kLeft = 4;     // columns before a segment that its products read

// A block's tile, with sizes that are chosen when the op runs.
struct Tile {
  int depth;     // channels of a head
  int segments;  // side by side: 1, 2, 4 or 8
  int strips;    // 8 / segments
  int rows;      // of a strip, even
  int pitch;     // elements of a channel's row in shared memory, 8 more than the segments' pixels
  int row_pitch; // elements of a row of all channels, and of what is left free behind it
  int vector;    // elements per copy: 4, 2 or 1, a divisor of W
  int across, down;  // tiles

  ELSA_BOTH int width() const { return segments * kSegment; }
  ELSA_BOTH int height() const { return strips * rows; }
};

// Free elements behind a row of all channels: the same channel in all segments and strips, which a
// matrix of the ghost head has as its rows, then lies in all banks of shared memory. Matrix rows
// begin at multiples of 8 elements.
ELSA_BOTH constexpr int row_padding(int segments) {
  return segments == 8 ? 0 : segments == 1 ? 8 : 4 * segments;
}

// The same with sizes that the compiler knows: for the tiles of ELSA-Swin's stages.
template <int DEPTH, int SEGMENTS, int ROWS, int VECTOR>
struct FixedTile {
  static constexpr int depth = DEPTH, segments = SEGMENTS, strips = 8 / SEGMENTS, rows = ROWS;
  static constexpr int pitch = SEGMENTS * kSegment + 2 * kLeft;
  static constexpr int row_pitch = DEPTH * pitch + row_padding(SEGMENTS), vector = VECTOR;
  int across, down;

  ELSA_BOTH static constexpr int width() { return segments * kSegment; }
  ELSA_BOTH static constexpr int height() { return strips * rows; }
  // Whether it is `t`.
  static bool is(const Tile& t) {
    return t.depth == depth && t.segments == segments && t.rows == rows && t.pitch == pitch &&
           t.row_pitch == row_pitch && t.vector == vector;
  }
};

// Calls f with the tile, as a FixedTile where it is one of those of ELSA-Swin at 224 px (on a GPU
// with 228 KB of shared memory: stages 1, 2 and 3).
template <int K, class F>
void with_tile(const Tile& t, const F& f) {
  if constexpr (K == 7) {
    using First = FixedTile<32, 8, 8, 4>;
    using Second = FixedTile<32, 4, 8, 4>;
    using Third = FixedTile<32, 2, 4, 2>;
    if (First::is(t)) return f(First{t.across, t.down});
    if (Second::is(t)) return f(Second{t.across, t.down});
    if (Third::is(t)) return f(Third{t.across, t.down});
  }
  f(t);
}

constexpr int kSumPitch = 2 * 8 * kSegment + 8;  // floats of a channel's sums for a pair of rows

// Shared memory of a block, in order: v, h twice for a pair of rows, the ghost head's sums.
template <class S>
ELSA_BOTH int64_t value_bytes(const S& t, int k) {
  return 2 * int64_t{t.height() + k - 1} * t.row_pitch;
}
template <class S>
ELSA_BOTH int64_t weight_bytes(const S& t, int k) {
  return int64_t{4} * t.strips * k * k * t.pitch;
}
template <class S>
ELSA_BOTH int64_t product_bytes(const S& t, int k, bool ghost) {
  const int64_t sums = ghost ? int64_t{4} * t.depth * kSumPitch : 0;
  return value_bytes(t, k) + 2 * weight_bytes(t, k) + sums;
}

// The same for the gradients of weights: v, grad, the gradient of h for a pair of rows.
template <class S>
ELSA_BOTH int64_t upstream_bytes(const S& t) { return int64_t{2} * t.height() * t.row_pitch; }
template <class S>
ELSA_BOTH int band_pitch(const S& t) { return t.width() + 4; }
template <class S>
ELSA_BOTH int64_t gradient_bytes(const S& t, int k) {
  return value_bytes(t, k) + upstream_bytes(t) + int64_t{4} * t.strips * k * k * band_pitch(t);
}

// The tile with the least copying and arithmetic of those that fit. Two blocks fit a processor
// within `budget` bytes each; beyond that a tile has to be much better. No rows: none fits `limit`.
template <class Bytes>
Tile choose_tile(const Problem& p, int vector, int64_t budget, int64_t limit, const Bytes& bytes) {
  Tile best{};
  double least = 0;
  const int k = static_cast<int>(p.kernel_size);
  for (int segments = 8; segments > 0; segments /= 2) {
    for (int rows = 2; rows <= 16; rows += 2) {
      Tile t{};
      t.depth = static_cast<int>(p.C / p.G);
      t.segments = segments;
      t.strips = 8 / segments;
      t.rows = rows;
      t.pitch = t.width() + 2 * kLeft;
      t.row_pitch = t.depth * t.pitch + row_padding(segments);
      t.vector = vector;
      t.across = static_cast<int>(divide_up(p.W, t.width()));
      t.down = static_cast<int>(divide_up(p.H, t.height()));
      const int64_t size = bytes(t);
      if (size > limit) continue;
      const double copied = double(t.height() + k - 1) * t.depth * t.pitch;
      const double computed = 64.0 * rows * (k * k + 2 * t.depth);
      const double cost = t.across * t.down * (copied + computed) * (size > budget ? 1.5 : 1);
      if (best.rows == 0 || cost < least) {
        best = t;
        least = cost;
      }
    }
  }
  return best;
}

// Where a block works. The tile's first row and column may be the last of the image.
struct Corner {
  int64_t b, g;
  int y, x;
};

template <class S>
ELSA_DEVICE Corner corner(const Problem& p, const S& t, int64_t block) {
  // In 32 bits, as banded_fits allows: a division of 64 takes several times as long.
  unsigned rest = static_cast<unsigned>(block);
  const unsigned across = t.across, down = t.down, heads = static_cast<unsigned>(p.G);
  Corner at;
  at.x = static_cast<int>(rest % across) * t.width();
  rest /= across;
  at.y = static_cast<int>(rest % down) * t.height();
  rest /= down;
  at.g = rest % heads;
  at.b = rest / heads;
  return at;
}

}  // namespace elsa
