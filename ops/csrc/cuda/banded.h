// Tensor-core kernels for halves, stride 1, dilation 1, no ghost_mul, k = 3, 5, 7 or 9 and a head
// depth that is a multiple of 8 up to 64. kernels.h has the general ones.
//
// A segment is 8 pixels of a row. Its part of a window row is a product with a banded matrix:
//
//   out[channel, n] += sum over q < 16 of v[channel, q] * band[q, n],   q from 4 columns before it
//   band[q, n] = h[tap (dy, j), pixel n] where j = q - n - (4 - k / 2) is in 0 .. k - 1, else 0
//
// The ghost head's part is a product of the same kind per channel: segments in place of channels,
// and a band (Toeplitz) of the channel's weights. The gradient of v is the same with the window
// turned round. The gradients of the weights are the bands of the products v * grad over channels
// (h_attn) or over segments (ghost_add). Sums are in float32; a float32 ghost head is split into
// two halves, whose products are added.
//
// A block works on one head of one image, 8 segments wide and high in all: `segments` side by side
// times `strips` of `rows` rows. Its warps do two rows of each strip at a time: warp w those of
// segment w % segments and strip w / segments, or, for the ghost head, of all and of every eighth
// channel. A strip has every strips-th pair of rows, so that 2 * strips rows are done together.
//
// A zero of the band does not silence a NaN or an infinity of v, which would spoil the 8 pixels of
// a segment instead of those whose window covers it. So a block one of whose sums is not finite (a
// ghost weight may also be too large for a half) computes its tile again with kernels.h. Where v
// has a NaN or an infinity, the ghost gradient's k * k sums of that channel may all be NaN.
//
// The images (v, the result, their gradients) are contiguous or, for heads of 32 channels, have a
// pixel's channels side by side: see Planes and Pixels. h and its gradient are contiguous.
//
// Written for one thread, apart from what warp.h offers (warp_on_host.h in the tests). No atomics,
// and every sum has a fixed order.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../problem.h"
#include "block.h"
#include "kernels.h"
#include "layouts.h"
#include "tile.h"

namespace elsa {

inline bool has_banded(const Problem& p) {
  const int64_t k = p.kernel_size, depth = p.C / p.G, area = p.H * p.W;
  return p.stride == 1 && p.dilation == 1 && k % 2 == 1 && k >= 3 && k <= 9 && depth % 8 == 0 &&
         depth > 0 && depth <= 64 && area * (depth > k * k ? depth : k * k) < (int64_t{1} << 31);
}

// The fields of a band's fragment of this lane: element e of the low (high) half is tap
// j = 2 t + e - n - (4 - k / 2) (8 more) of pixel n. For k < 9 only one of the two is in the band.
template <int K>
struct BandLane {
  static constexpr bool kBoth = K > 8;
  uint32_t mask[2] = {0, 0};
  uint32_t pick[2] = {0x3232, 0x3232};  // of words with an element each, masked: for pick_bytes
  int tap[2][2];  // of [half][element], one of 0 .. k - 1 even outside the band
  bool high[2];   // for k < 9: tap[0] and tap[1] are those of the high half
  int first;      // j of element 0 of the low half

  ELSA_DEVICE explicit BandLane(int lane) {
    first = 2 * (lane % 4) - lane / 4 - (kLeft - K / 2);
    for (int e = 0; e < 2; ++e) {
      bool in[2];
      for (int half = 0; half < 2; ++half) {
        const int j = first + e + 8 * half;
        in[half] = j >= 0 && j < K;
        tap[half][e] = in[half] ? j : 0;
        if (!in[half]) continue;
        mask[half] |= 0xffffu << (16 * e);
        pick[half] ^= (e ? 0x5432u ^ 0x3232u : 0x3210u ^ 0x3232u);
      }
      high[e] = !in[0] && in[1];
      if (!kBoth) tap[0][e] = tap[1][e] = in[0] ? tap[0][e] : tap[1][e];
    }
  }
};

// The ghost head as fragments of bands: (C, parts, k, turn) words, word i the weights of the taps
// i and i + 1 modulo turn of a window row, turned round for the gradient of v. With two parts the
// second is what rounding to T leaves of the first.
template <int K>
constexpr int kTurn = K > 8 ? 16 : 8;

template <class T, int K, bool TURNED>
ELSA_DEVICE void ghost_word(int64_t index, int parts, const float* add, uint32_t* words) {
  constexpr int turn = kTurn<K>;
  const int i = static_cast<int>(index % turn);
  const int dy = static_cast<int>(index / turn % K);
  const int part = static_cast<int>(index / (turn * K) % parts);
  const int64_t c = index / (turn * K * parts);
  const float* weights = add + (c * K + (TURNED ? K - 1 - dy : dy)) * K;
  float w[2];
  for (int e = 0; e < 2; ++e) {
    const int j = (i + e) % turn;
    w[e] = j < K ? weights[TURNED ? K - 1 - j : j] : 0;
    if (part == 1) w[e] -= static_cast<float>(T(w[e]));
  }
  words[index] = pack<T>(w[0], w[1]);
}

// Starts the copy of the weights of 2 * strips rows from y on: (2 * strips, k*k, pitch). For the
// gradient of v, TURNED, those of the outputs that read these rows, taps in reverse.
template <int K, bool TURNED, int N, class S>
ELSA_DEVICE void copy_weights(const Problem& p, const S& t, const uint16_t* head, int y, int x,
                              uint16_t* shared) {
  constexpr int taps = K * K;
  const int H = static_cast<int>(p.H), W = static_cast<int>(p.W);
  const int from = TURNED ? 0 : kLeft, width = TURNED ? t.pitch : t.width();
  for_each_vector(taps, width / N, [&](int tap, int vector) {
    const int at = from + vector * N, from_x = x - kLeft + at;
    const int first_y = y + (TURNED ? tap / K - K / 2 : 0);
    const int plane = (TURNED ? taps - 1 - tap : tap) * H;
    const bool inside = from_x >= 0 && from_x < W;
    uint16_t* to = shared + tap * t.pitch + at;
    for (int row = 0; row < 2 * t.strips; ++row, to += taps * t.pitch) {
      const int from_y = first_y + row;
      const bool valid = inside && static_cast<unsigned>(from_y) < static_cast<unsigned>(H);
      copy_elements<N>(to, head + (valid ? (plane + from_y) * W + from_x : 0), valid);
    }
  });
}

template <int K, bool TURNED, class S>
ELSA_DEVICE void copy_weights(const Problem& p, const S& t, const uint16_t* head, int y, int x,
                              uint16_t* shared) {
  if (t.vector == 4) return copy_weights<K, TURNED, 4>(p, t, head, y, x, shared);
  if (t.vector == 2) return copy_weights<K, TURNED, 2>(p, t, head, y, x, shared);
  copy_weights<K, TURNED, 1>(p, t, head, y, x, shared);
}

// The tile by the functions of kernels.h.
template <class T, bool TURNED, class S>
ELSA_SLOW void plain_tile(const Problem& p, const S& t, const Corner& at,
                          const Images<const T>& source, const T* h, const float* add,
                          const Images<T>& result) {
  const int pixels = t.height() * t.width();
  for (int i = thread_index(); i < t.depth / kChannels * pixels; i += kBlockThreads) {
    const int64_t y = at.y + i % pixels / t.width(), x = at.x + i % t.width();
    if (y >= p.H || x >= p.W) continue;
    const int64_t part = (at.b * p.G + at.g) * (t.depth / kChannels) + i / pixels;
    const int64_t index = (part * p.H + y) * p.W + x;
    const float* none = nullptr;
    if (TURNED) {
      if (add)
        grad_v<false, true>(p, index, source, h, none, add, result);
      else
        grad_v<false, false>(p, index, source, h, none, add, result);
    } else {
      if (add)
        forward<false, true>(p, index, source, h, none, add, result);
      else
        forward<false, false>(p, index, source, h, none, add, result);
    }
  }
}

// Two floats that are stored and loaded at once.
struct alignas(8) FloatPair {
  float first, second;
};

// Where segment `slot` of all segments and strips begins in the pair of rows that begins at 0.
template <class S>
ELSA_DEVICE int place_of(const S& t, int slot) {
  return slot / t.segments * 2 * t.row_pitch + slot % t.segments * kSegment;
}

// The ghost head's part of a pair of rows of every strip for one channel, into `sums` (2, 8, 8).
// `values`: v from the pair's first input row and the channel's first column on.
template <class T, int K, class S>
ELSA_DEVICE void ghost_product(const S& t, const BandLane<K>& band, const uint16_t* values,
                               const uint32_t* words, int parts, float* sums) {
  constexpr int turn = kTurn<K>;
  const int lane = thread_index() % 32, slot = lane / 4;
  // Rows of the matrices that this lane names: of two input rows and two columns.
  const uint16_t* from = values + place_of(t, lane % 8) + lane / 8 % 2 * t.row_pitch +
                         lane / 16 * kSegment;
  uint32_t a[(K + 1) / 2][4];
#pragma unroll
  for (int i = 0; i < (K + 1) / 2; ++i) load_matrices(a[i], from + 2 * i * t.row_pitch);
  const uint32_t* low = one_pointer(words + (band.first & (turn - 1)));
  const int high = ((band.first + 8) & (turn - 1)) - (band.first & (turn - 1));
  float sum[2][4] = {};
  const auto add = [&](int part) {
#pragma unroll
    for (int dy = 0; dy < K; ++dy) {
      const uint32_t b0 = read_only(low + (part * K + dy) * turn);
      const uint32_t b1 =
          BandLane<K>::kBoth ? read_only(low + high + (part * K + dy) * turn) : b0;
      const int i = dy / 2;
      if (dy % 2) {
        const uint32_t rows[4] = {a[i][1], a[i + 1][0], a[i][3], a[i + 1][2]};
        mma<T>(sum[1], rows, b0 & band.mask[0], b1 & band.mask[1]);
      } else {
        mma<T>(sum[0], a[i], b0 & band.mask[0], b1 & band.mask[1]);
      }
    }
  };
  add(0);
  if (parts == 2) add(1);
  FloatPair* to = reinterpret_cast<FloatPair*>(sums + slot * kSegment + 2 * (lane % 4));
#pragma unroll
  for (int row = 0; row < 2; ++row)
    to[row * 32] = {sum[0][2 * row] + sum[1][2 * row], sum[0][2 * row + 1] + sum[1][2 * row + 1]};
}

// The attention's part of a pair of rows for the warp's segment and BLOCKS times 16 channels, added
// to acc[block][row]. `values`: v from the first channel and input row and the segment's first
// column on; `weights`: those of the first row, from the segment's first column on.
template <class T, int K, bool TURNED, int BLOCKS, class S>
ELSA_DEVICE void attention_product(const S& t, const BandLane<K>& band, const uint16_t* values,
                                   const uint16_t* weights, float (&acc)[BLOCKS][2][4]) {
  const int lane = thread_index() % 32, n = lane / 4, quad = lane % 4;
  // Rows of the matrices that this lane names: of 16 channels and two columns.
  const uint16_t* from = values + lane % 16 * t.pitch + lane / 16 * kSegment;
  const uint16_t* at[2][2];  // [half][element]
#pragma unroll
  for (int e = 0; e < 2; ++e) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool upper = BandLane<K>::kBoth ? half == 1 : band.high[e];
      at[half][e] = weights + band.tap[half][e] * t.pitch +
                    (TURNED ? 2 * quad + e + (upper ? 8 : 0) : kLeft + n);
    }
  }
#pragma unroll
  for (int i = 0; i < K + 1; ++i) {
    uint32_t a[BLOCKS][4];
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block)
      load_matrices(a[block], from + i * t.row_pitch + block * 16 * t.pitch);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int dy = i - row;
      if (dy < 0 || dy >= K) continue;
      const int offset = (row * K + dy) * K * t.pitch;
      const uint32_t low[2] = {at[0][0][offset], at[0][1][offset]};
      uint32_t high[2] = {low[0], low[1]};
      if constexpr (BandLane<K>::kBoth) {
        high[0] = at[1][0][offset];
        high[1] = at[1][1][offset];
      }
      const uint32_t b0 = pick_bytes(low[0], low[1], band.pick[0]);
      const uint32_t b1 = pick_bytes(high[0], high[1], band.pick[1]);
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) mma<T>(acc[block][row], a[block], b0, b1);
    }
  }
}

// Both parts of a pair of rows for the warp's segment and the slots c, ..., BLOCKS * 16 of them or
// as many as the head has. `sums`: the ghost head's part or null. Returns 0, or NaN where a sum is
// not finite.
template <class T, int K, bool TURNED, int BLOCKS, class L, class S>
ELSA_DEVICE float segment_product(L layout, const Problem& p, const S& t, const BandLane<K>& band,
                                  int c, const uint16_t* values, const uint16_t* weights,
                                  const float* sums, const Target<T>& target) {
  const int first = c + thread_index() % 32 / 4;  // this lane has every eighth slot
  float acc[BLOCKS][2][4] = {};
  if (sums) {
#pragma unroll
    for (int i = 0; i < BLOCKS * 2; ++i) {
      if (first + 8 * i >= t.depth) continue;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const FloatPair from = *reinterpret_cast<const FloatPair*>(
            sums + (first + 8 * i) * kSumPitch + row * 64);
        acc[i / 2][row][i % 2 * 2] = from.first;
        acc[i / 2][row][i % 2 * 2 + 1] = from.second;
      }
    }
  }
  attention_product<T, K, TURNED, BLOCKS>(t, band, values + c * t.pitch, weights, acc);
  float spoiled = 0;
#pragma unroll
  for (int i = 0; i < BLOCKS * 2; ++i) {
    if (first + 8 * i >= t.depth) continue;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float* value = acc[i / 2][row] + i % 2 * 2;
      spoiled += value[0] * 0.0f;  // also beyond the image: at worst kernels.h does the tile
      spoiled += value[1] * 0.0f;
    }
  }
  store(layout, p, t, target, first, acc);
  return spoiled;
}

// `forward`, or with TURNED `grad_v`, of the block's tile. `words`: of ghost_word, in `parts`
// parts, or null; then `add` is null too.
template <class T, int K, bool TURNED, class L, class S>
ELSA_DEVICE void banded_product(L layout, const Problem& p, const S& t, int64_t block,
                                unsigned char* shared, const Images<const T>& source, const T* h,
                                const uint32_t* words, int parts, const float* add,
                                const Images<T>& result) {
  const Corner at = corner(p, t, block);
  const int64_t area = p.H * p.W;
  const int H = static_cast<int>(p.H);
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  uint16_t* values = reinterpret_cast<uint16_t*>(shared);
  uint16_t* weights = reinterpret_cast<uint16_t*>(shared + value_bytes(t, K));
  float* sums = reinterpret_cast<float*>(shared + value_bytes(t, K) + 2 * weight_bytes(t, K));
  const int64_t head = at.b * p.G + at.g;
  const uint16_t* h_head = one_pointer(reinterpret_cast<const uint16_t*>(h) + head * K * K * area);
  const int words_per_channel = K * parts * kTurn<K>;
  if (words) words += (at.g * t.depth + L::channel(warp)) * words_per_channel;

  copy_weights<K, TURNED>(p, t, h_head, at.y, at.x, weights);
  copy_values(layout, p, t, source, at, t.height() + K - 1, at.y - K / 2, at.x - kLeft, t.pitch,
              values);
  wait_copies();
  block_sync();

  float spoiled = 0;  // NaN where one of this lane's sums is not finite
  const BandLane<K> band(lane);
  const int strip = warp / t.segments * 2, column = warp % t.segments * kSegment;
  const int step = 2 * t.strips;
  Target<T> target = target_of(layout, p, result, at, at.y + strip, at.x + column, lane);
  for (int r = 0; r < t.height() && at.y + r < H; r += step) {
    const uint16_t* current = weights + r / step % 2 * (weight_bytes(t, K) / 2);
    if (r > 0) {
      wait_copies();
      block_sync();
    }
    // A copy that no one waits for must not begin: it could end after the block.
    if (r + step < t.height() && at.y + r + step < H)
      copy_weights<K, TURNED>(p, t, h_head, at.y + r + step, at.x,
                              weights + (r / step + 1) % 2 * (weight_bytes(t, K) / 2));
    if (words) {
      const uint16_t* channel = values + r * t.row_pitch + warp * t.pitch;
      const uint32_t* channel_words = words;
      float* channel_sums = sums + warp * kSumPitch;
#pragma unroll 2
      for (int i = 0; i < t.depth / 8; ++i) {  // slots warp, warp + 8, ...
        ghost_product<T, K>(t, band, channel, channel_words, parts, channel_sums);
        channel += 8 * t.pitch;
        channel_words += L::kEighth * words_per_channel;
        channel_sums += 8 * kSumPitch;
      }
      block_sync();
    }
    const uint16_t* from = values + (strip + r) * t.row_pitch + column;
    const uint16_t* by = current + strip * K * K * t.pitch + column;
    const float* ghost = words ? sums + warp * kSegment + 2 * (lane % 4) : nullptr;
    for (int c = 0; c < t.depth; c += 32) {
      if (t.depth - c > 16)
        spoiled +=
            segment_product<T, K, TURNED, 2>(layout, p, t, band, c, from, by, ghost, target);
      else
        spoiled +=
            segment_product<T, K, TURNED, 1>(layout, p, t, band, c, from, by, ghost, target);
    }
    target.place += step * target.row;
    target.below -= step;
  }
  if (block_any(spoiled != 0)) plain_tile<T, TURNED>(p, t, at, source, h, add, result);
}

// The gradient of h of a pair of rows for the warp's segment, into `band_rows` (2, k*k, pitch),
// from the segment's first column on. `values`, `upstream`: from the first channel, the first input
// (output) row and the segment's first column on; `spare`: where a lane may write what no one
// reads, from band_rows on. BLOCKS times 16 channels, or 8 less.
template <class T, int K, int BLOCKS, class S>
ELSA_DEVICE void weight_gradient(const S& t, const uint16_t* values, const uint16_t* upstream,
                                 uint16_t* band_rows, int spare) {
  const int lane = thread_index() % 32;
  // Of a last block of 8 channels the other 8 are read again, as zeros.
  const bool cut = t.depth % 16 != 0;
  const uint32_t keep = cut ? 0 : 0xffffffffu;
  // Rows of the matrices that this lane names.
  const uint16_t* from = values + lane % 8 * t.pitch + lane / 8 % 2 * 8;
  const uint16_t* up = upstream + lane % 8 * t.pitch;
  const int from_second = lane / 16 * 8 * t.pitch, up_second = lane / 8 % 2 * 8 * t.pitch;
  uint32_t b[2][BLOCKS][2];
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) {
    const bool last = block == BLOCKS - 1;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      load_transposed(b[row][block], up + row * t.row_pitch + block * 16 * t.pitch +
                                         (last && cut ? 0 : up_second));
      if (last) b[row][block][1] &= keep;
    }
  }
  // Fragment d: element (q, n) with q = lane / 4 (8 more for 2, 3), n = 2 (lane % 4) (+ 1).
  const int q = lane / 4, n = 2 * (lane % 4);
  const int pitch = band_pitch(t);
  bool low[2], high[2];
  int place[2][2];  // in a window row's bands, of [low, high][e]; for k < 9 [0] is of either
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int j = q - n - e - (kLeft - K / 2);
    low[e] = j >= 0 && j < K;
    high[e] = j + 8 >= 0 && j + 8 < K;
    place[0][e] = low[e] ? j * pitch + n + e : spare + (n + e) % 4;
    place[1][e] = high[e] ? (j + 8) * pitch + n + e : spare + (n + e) % 4;
    if (!BandLane<K>::kBoth && high[e]) place[0][e] = place[1][e];
  }
#pragma unroll
  for (int i = 0; i < K + 1; ++i) {
    uint32_t a[BLOCKS][4];
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
      const bool last = block == BLOCKS - 1;
      load_transposed(a[block], from + i * t.row_pitch + block * 16 * t.pitch +
                                    (last && cut ? 0 : from_second));
      if (last) {
        a[block][2] &= keep;
        a[block][3] &= keep;
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int dy = i - row;
      if (dy < 0 || dy >= K) continue;
      float d[4] = {};
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block)
        mma<T>(d, a[block], b[row][block][0], b[row][block][1]);
      uint16_t* to = band_rows + (row * K + dy) * K * pitch;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if constexpr (BandLane<K>::kBoth) {
          to[place[0][e]] = T(d[e]).x;
          to[place[1][e]] = T(d[2 + e]).x;
        } else {
          to[place[0][e]] = T(low[e] ? d[e] : d[2 + e]).x;
        }
      }
    }
  }
}

// The ghost gradient of one channel over the tile: the sum for tap (dy, m) into `result` by the
// lanes 4 m. `values`, `upstream`: from the channel's first column and the first row on.
template <class T, int K, class S>
ELSA_DEVICE void ghost_gradient(const S& t, const uint16_t* values, const uint16_t* upstream,
                                bool first, float* result) {
  const int lane = thread_index() % 32, place = place_of(t, lane % 8);
  // Rows of the matrices that this lane names: of two columns and two input rows, of two rows.
  const uint16_t* from = values + place + lane / 16 * t.row_pitch + lane / 8 % 2 * 8;
  const uint16_t* up = upstream + place + lane / 8 % 2 * t.row_pitch;
  float acc[K][4] = {};
  for (int r = 0; r < t.height(); r += 2 * t.strips) {
    uint32_t b[2], a[(K + 1) / 2][4];
    load_transposed(b, up + r * t.row_pitch);
#pragma unroll
    for (int i = 0; i < K + 1; i += 2) load_transposed(a[i / 2], from + (r + i) * t.row_pitch);
#pragma unroll
    for (int dy = 0; dy < K; ++dy) {
      const int u = dy + 1;
      const uint32_t rows[4] = {a[dy / 2][dy % 2 * 2], a[dy / 2][dy % 2 * 2 + 1],
                                a[u / 2][u % 2 * 2], a[u / 2][u % 2 * 2 + 1]};
      mma<T>(acc[dy], rows, b[0], b[1]);
    }
  }
  // The sums along the diagonals q - n. Lane 4 m + i gathers those of tap m with n = 2 i, 2 i + 1
  // from the lanes that hold them; the four add up.
  constexpr int shift = kLeft - K / 2;
  const int m = lane / 4, quad = lane % 4;
#pragma unroll
  for (int dy = 0; dy < K; ++dy) {
#pragma unroll
    for (int turn = 0; turn < K; turn += 8) {
      float sum = 0;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int j = lane / 4 - 2 * quad - e - shift;  // of this lane's element
        const bool low = j >= turn && j < turn + 8, high = j + 8 >= turn && j + 8 < turn + 8;
        const float mine = low ? acc[dy][e] : high ? acc[dy][2 + e] : 0;
        sum += shuffle(mine, (m + 2 * quad + e + shift) % 8 * 4 + quad);
      }
      sum += shuffle(sum, lane ^ 1);
      sum += shuffle(sum, lane ^ 2);
      if (quad == 0 && turn + m < K) {
        float* to = result + dy * K + turn + m;
        *to = first ? sum : *to + sum;
      }
    }
  }
}

// The gradients of h (where `grad_h`) and of ghost_add (where `sums`) of the block's tile in the
// images b, b + step, ... The sums are (C, k, k) per tile and first image; a block writes its
// head's share of them.
template <class T, int K, class L, class S>
ELSA_DEVICE void banded_gradient(L layout, const Problem& p, const S& t, int64_t block,
                                 int64_t step, unsigned char* shared, const Images<const T>& grad,
                                 const Images<const T>& v, T* grad_h, float* sums) {
  Corner at = corner(p, t, block);
  const int64_t area = p.H * p.W;
  const int H = static_cast<int>(p.H), W = static_cast<int>(p.W);
  const int warp = thread_index() / 32;
  uint16_t* values = reinterpret_cast<uint16_t*>(shared);
  uint16_t* upstream = reinterpret_cast<uint16_t*>(shared + value_bytes(t, K));
  uint16_t* bands =
      reinterpret_cast<uint16_t*>(shared + value_bytes(t, K) + upstream_bytes(t));
  const int strip = warp / t.segments * 2, column = warp % t.segments * kSegment;
  const int64_t tile_index = block % (int64_t{t.across} * t.down);
  if (sums)
    sums += ((at.b * t.across * t.down + tile_index) * p.C + at.g * t.depth) * K * K;

  for (const int64_t first_image = at.b; at.b < p.B; at.b += step) {
    copy_values(layout, p, t, v, at, t.height() + K - 1, at.y - K / 2, at.x - kLeft, t.pitch,
                values);
    copy_values(layout, p, t, grad, at, t.height(), at.y, at.x, t.width(), upstream);
    wait_copies();
    block_sync();
    if (sums)
      for (int c = warp; c < t.depth; c += 8)
        ghost_gradient<T, K>(t, values + c * t.pitch, upstream + c * t.pitch,
                             at.b == first_image, sums + L::channel(c) * K * K);
    if (grad_h) {
      const int64_t head = at.b * p.G + at.g;
      uint16_t* to = one_pointer(reinterpret_cast<uint16_t*>(grad_h) + head * K * K * area);
      const int pitch = band_pitch(t);
      for (int r = 0; r < t.height() && at.y + r < H; r += 2 * t.strips) {
        const int first = (strip + r) * t.row_pitch + column;
        uint16_t* band = bands + strip * K * K * pitch + column;
        const int spare = t.width() - column;
        switch ((t.depth + 15) / 16) {
          case 1:
            weight_gradient<T, K, 1>(t, values + first, upstream + first, band, spare);
            break;
          case 2:
            weight_gradient<T, K, 2>(t, values + first, upstream + first, band, spare);
            break;
          case 3:
            weight_gradient<T, K, 3>(t, values + first, upstream + first, band, spare);
            break;
          default:
            weight_gradient<T, K, 4>(t, values + first, upstream + first, band, spare);
        }
        block_sync();
        const int vector = t.vector;
        for_each_vector(K * K, t.width() / vector, [&](int tap, int i) {
          const int x = at.x + i * vector;
          if (x >= W) return;
          const uint16_t* from = bands + tap * pitch + i * vector;
          for (int row = 0; row < 2 * t.strips; ++row, from += K * K * pitch) {
            const int y = at.y + r + row;
            if (y >= H) continue;
            uint16_t* target = to + (tap * H + y) * W + x;
            if (vector == 4)
              *reinterpret_cast<uint64_t*>(target) = *reinterpret_cast<const uint64_t*>(from);
            else if (vector == 2)
              *reinterpret_cast<uint32_t*>(target) = *reinterpret_cast<const uint32_t*>(from);
            else
              *target = *from;
          }
        });
        block_sync();
      }
    }
    block_sync();  // before the next image's copies
  }
}

}  // namespace elsa
