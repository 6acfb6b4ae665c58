// The kernels, written once in GCC/clang vector extensions and compiled per instruction set.
// The including file defines ELSA_ISA, ELSA_VECTOR_BYTES, ELSA_CHANNELS (channels per register
// tile of the forward) and ELSA_TAPS (window columns per register tile of grad_h).
//
// The plan: copy what a task needs into zero-padded rows in the accumulation type, so that
// borders, odd widths, strides, dilations and halves are all settled by the copy and the inner
// loops hold nothing but loads and multiply-adds. The copies cost one pass over the inputs; the
// inner loops touch each element k*k times (v) or C/G times (h_attn).

#define ELSA_INLINE inline __attribute__((always_inline))

namespace elsa {
namespace {

constexpr int64_t kMaxVectors = 2;  // vectors along x per register tile
constexpr int64_t kGhostRows = 7;   // window rows per register tile of the ghost gradient

template <class A>
struct Vec {
  static constexpr int64_t lanes = ELSA_VECTOR_BYTES / sizeof(A);
  typedef A type __attribute__((vector_size(ELSA_VECTOR_BYTES)));
  typedef A unaligned
      __attribute__((vector_size(ELSA_VECTOR_BYTES), aligned(sizeof(A)), may_alias));
};
template <class A>
using V = typename Vec<A>::type;

template <class A>
ELSA_INLINE V<A> load(const A* p) {
  return *reinterpret_cast<const typename Vec<A>::unaligned*>(p);
}
template <class A>
ELSA_INLINE void store(A* p, V<A> x) {
  *reinterpret_cast<typename Vec<A>::unaligned*>(p) = x;
}

// Keeps what was loaded in a register: as an operand in memory it would be loaded by each use.
template <class X>
ELSA_INLINE void in_register(X& x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#endif
}

template <class To, class From>
ELSA_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

ELSA_INLINE float widen(float x) { return x; }
ELSA_INLINE double widen(double x) { return x; }
ELSA_INLINE float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
ELSA_INLINE float widen(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and is exact for denormals too.
  const float scaled = bit_cast<float>(magnitude) * bit_cast<float>(uint32_t(239) << 23);
  const uint32_t special = (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | special | sign);
}

// Rounding to the nearest, ties to even, as torch does.
ELSA_INLINE void narrow(float x, float* y) { *y = x; }
ELSA_INLINE void narrow(double x, double* y) { *y = x; }
ELSA_INLINE void narrow(float x, BFloat16* y) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  y->bits = uint16_t(x != x ? 0x7fc0u : rounded);
}
ELSA_INLINE void narrow(float x, Float16* y) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal: rebias the exponent and round the 13 dropped bits; overflow carries into infinity.
  const uint32_t normal =
      (magnitude - (uint32_t(112) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Denormal: adding 0.5 lets the float adder round to a multiple of 2^-24.
  const uint32_t denormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  uint32_t half = magnitude < (uint32_t(113) << 23) ? denormal : normal;
  half = magnitude >= (uint32_t(143) << 23) ? 0x7c00u : half;
  half = x != x ? 0x7e00u : half;
  y->bits = uint16_t(half | sign);
}

ELSA_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
ELSA_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
ELSA_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class A>
ELSA_INLINE int64_t round_up(int64_t n) {
  return divide_up(n, Vec<A>::lanes) * Vec<A>::lanes;
}

// Rows are short (14 elements in ELSA-Swin's third stage): pieces of fixed size beat a call to
// memcpy and a vector loop's scalar tail. They do not overlap, else each would be done by elements.
template <int N, class T, class A>
ELSA_INLINE void widen_piece(A* __restrict dst, const T* __restrict src) {
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) dst[i] = widen(src[i]);
}
template <class T, class A>
ELSA_INLINE void widen_row(A* dst, const T* src, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) widen_piece<16>(dst + i, src + i);
  if (n & 8) widen_piece<8>(dst + i, src + i), i += 8;
  if (n & 4) widen_piece<4>(dst + i, src + i), i += 4;
  if (n & 2) widen_piece<2>(dst + i, src + i), i += 2;
  if (n & 1) widen_piece<1>(dst + i, src + i);
}
template <int N, class T, class A>
ELSA_INLINE void narrow_piece(T* __restrict dst, const A* __restrict src) {
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) narrow(src[i], dst + i);
}
// n is a multiple of the lanes.
template <class A>
ELSA_INLINE void zero_row(A* dst, int64_t n) {
  for (int64_t i = 0; i < n; i += Vec<A>::lanes) {
    store(dst + i, V<A>{});
    // Keeps the compiler from making this a call to memset.
    __asm__ volatile("" : : : "memory");
  }
}

// Writes the first n lanes of an accumulator.
template <class A, class T>
ELSA_INLINE void store_lanes(T* dst, V<A> x, int64_t n) {
  if constexpr (sizeof(T) == sizeof(A)) {
    if (n >= Vec<A>::lanes) return store<A>(dst, x);
  }
  A lanes[Vec<A>::lanes];
  store(lanes, x);
  if (n >= Vec<A>::lanes) return narrow_piece<Vec<A>::lanes>(dst, lanes);
  int64_t i = 0;
  if (n & 8) narrow_piece<8>(dst, lanes), i = 8;
  if (n & 4) narrow_piece<4>(dst + i, lanes + i), i += 4;
  if (n & 2) narrow_piece<2>(dst + i, lanes + i), i += 2;
  if (n & 1) narrow_piece<1>(dst + i, lanes + i);
}

template <class T>
ELSA_INLINE const T* row(Planes<T> planes, int64_t plane, int64_t y) {
  return planes.data + plane * planes.plane_pitch + y * planes.row_pitch;
}

// dst[start + step * j] = src[pitch * j] where that lies in [0, length), zero elsewhere.
template <class T, class A>
ELSA_INLINE void place_row(A* dst, int64_t length, const T* src, int64_t pitch, int64_t n,
                           int64_t start, int64_t step) {
  if (step == 1) {
    const int64_t first = least(most(start, 0), length), skipped = first - start;
    const int64_t count = most(least(start + n, length) - first, 0);
    const int64_t head = round_up<A>(first), tail = (first + count) / Vec<A>::lanes * Vec<A>::lanes;
    zero_row(dst, head);
    zero_row(dst + tail, length - tail);
    if (pitch == 1) return widen_row(dst + first, src + skipped, count);
    src += skipped * pitch;
    for (int64_t j = 0; j < count; ++j) dst[first + j] = widen(src[j * pitch]);
    return;
  }
  zero_row(dst, length);
  for (int64_t j = 0; j < n; ++j) {
    const int64_t position = start + step * j;
    if (position >= 0 && position < length) dst[position] = widen(src[j * pitch]);
  }
}

// A task's rows of v (or of the gradient, in grad_v), padded: element (channel, row, window
// column kx, x) of the padded image is at
//   data + channel * channel_pitch + row * row_pitch + column[kx] + x
// With a stride, columns of equal remainder lie together, so that x steps by one element.
template <class A>
struct Padded {
  A* data;
  int64_t channel_pitch, row_pitch, phase_pitch;
  int64_t* column;
};

// Carves aligned pieces out of the scratch; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used;
  template <class E>
  E* take(int64_t n) {
    E* piece = reinterpret_cast<E*>(base + used);
    used += divide_up(n * int64_t(sizeof(E)), 64) * 64;
    return piece;
  }
};

ELSA_INLINE int64_t padding(const Problem& p) { return p.dilation * (p.kernel_size / 2); }
ELSA_INLINE int64_t reach(const Problem& p) { return p.dilation * (p.kernel_size - 1); }

// Room for `rows` output rows of `width` columns at this stride.
template <class A>
Padded<A> take_padded(Arena& arena, const Problem& p, int64_t rows, int64_t width, int64_t stride) {
  Padded<A> out;
  out.phase_pitch = round_up<A>(round_up<A>(width) + reach(p) / stride);
  out.row_pitch = out.phase_pitch * stride;
  out.channel_pitch = ((rows - 1) * stride + reach(p) + 1) * out.row_pitch;
  out.column = arena.take<int64_t>(p.kernel_size);
  out.data = arena.take<A>(p.C / p.G * out.channel_pitch);
  return out;
}

template <class A>
void set_columns(const Padded<A>& padded, const Problem& p, int64_t stride) {
  for (int64_t kx = 0; kx < p.kernel_size; ++kx) {
    const int64_t x = kx * p.dilation;
    padded.column[kx] = x % stride * padded.phase_pitch + x / stride;
  }
}

// v around the output rows [y0, y1).
template <class T, class A>
void fill_values(const Padded<A>& padded, const Problem& p, Planes<T> v, int64_t y0, int64_t y1) {
  const int64_t channels = p.C / p.G, pad = padding(p), s = p.stride;
  const int64_t rows = (y1 - y0 - 1) * s + reach(p) + 1;
  set_columns(padded, p, s);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t r = 0; r < rows; ++r) {
      A* dst = padded.data + c * padded.channel_pitch + r * padded.row_pitch;
      const int64_t y = y0 * s - pad + r;
      if (y < 0 || y >= p.H) {
        zero_row(dst, padded.row_pitch);
      } else if (s == 1) {
        place_row(dst, padded.row_pitch, row(v, c, y), v.pitch, p.W, pad, 1);
      } else {
        zero_row(dst, padded.row_pitch);
        const T* src = row(v, c, y);
        for (int64_t x = 0; x < p.W; ++x) {
          // The last columns may lie beyond every window.
          const int64_t at = (x + pad) / s;
          if (at < padded.phase_pitch) {
            dst[(x + pad) % s * padded.phase_pitch + at] = widen(src[x * v.pitch]);
          }
        }
      }
    }
  }
}

// out[r][c][n] += (h * mul + add) * v for R output rows, CB channels and NV vectors.
// R is 2 only where stride equals dilation: then window row ky of the first output row is
// window row ky - 1 of the second, and each load of v serves both.
template <class A, int R, int CB, int NV, bool Mul, bool Add, bool First, bool Second>
ELSA_INLINE void window_row(V<A> (&out)[R][CB][NV], const A* const (&v)[CB], int64_t offset,
                            const int64_t* column, const A* h, int64_t h_pitch, int64_t h_row,
                            const A* mul, const A* add, int64_t k, int64_t ky) {
  for (int64_t kx = 0; kx < k; ++kx) {
    const int64_t x = offset + column[kx];
    const int64_t i0 = ky * k + kx, i1 = i0 - k;
    V<A> h0[NV], h1[NV];
    for (int n = 0; n < NV; ++n) {
      if (First) h0[n] = load(h + i0 * h_pitch + n * Vec<A>::lanes);
      if (Second) h1[n] = load(h + h_row + i1 * h_pitch + n * Vec<A>::lanes);
      if (First) in_register(h0[n]);
      if (Second) in_register(h1[n]);
    }
#pragma GCC unroll 8
    for (int c = 0; c < CB; ++c) {
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) {
        V<A> value = load(v[c] + x + n * Vec<A>::lanes);
        if (First && Second) in_register(value);
        if (First) {
          V<A> weight = h0[n];
          if (Mul) weight = weight * mul[i0 * CB + c];
          if (Add) weight = weight + add[i0 * CB + c];
          out[0][c][n] += weight * value;
        }
        if (Second) {
          V<A> weight = h1[n];
          if (Mul) weight = weight * mul[i1 * CB + c];
          if (Add) weight = weight + add[i1 * CB + c];
          out[R - 1][c][n] += weight * value;
        }
      }
    }
  }
}

template <class T, class A, int R, int CB, int NV, bool Mul, bool Add>
void window_tile(const Problem& p, const Padded<A>& padded, const A* v, const A* h,
                 int64_t h_pitch, const A* mul, const A* add, T* out, int64_t out_plane,
                 int64_t out_row, int64_t lanes) {
  const int64_t k = p.kernel_size, step = p.dilation * padded.row_pitch, h_row = k * k * h_pitch;
  V<A> acc[R][CB][NV];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < CB; ++c)
      for (int n = 0; n < NV; ++n) acc[r][c][n] = V<A>{};
  const A* channel[CB];
  for (int c = 0; c < CB; ++c) channel[c] = v + c * padded.channel_pitch;
  const int64_t* column = padded.column;
  if (R == 1) {
    for (int64_t ky = 0; ky < k; ++ky)
      window_row<A, R, CB, NV, Mul, Add, true, false>(acc, channel, ky * step, column, h, h_pitch,
                                                      h_row, mul, add, k, ky);
  } else {
    window_row<A, R, CB, NV, Mul, Add, true, false>(acc, channel, 0, column, h, h_pitch, h_row,
                                                    mul, add, k, 0);
    for (int64_t ky = 1; ky < k; ++ky)
      window_row<A, R, CB, NV, Mul, Add, true, true>(acc, channel, ky * step, column, h, h_pitch,
                                                     h_row, mul, add, k, ky);
    window_row<A, R, CB, NV, Mul, Add, false, true>(acc, channel, k * step, column, h, h_pitch,
                                                    h_row, mul, add, k, k);
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < CB; ++c)
      for (int n = 0; n < NV; ++n) {
        const int64_t left = lanes - n * Vec<A>::lanes;
        if (left > 0)
          store_lanes<A>(out + c * out_plane + r * out_row + n * Vec<A>::lanes, acc[r][c][n], left);
      }
}

template <class T, class A, int R, int CB, bool Mul, bool Add>
void window_channels(const Problem& p, const Padded<A>& padded, const A* v, const A* h,
                     int64_t h_pitch, const A* mul, const A* add, T* out, int64_t out_plane,
                     int64_t width) {
  constexpr int64_t L = Vec<A>::lanes;
  for (int64_t x = 0; x < width; x += kMaxVectors * L) {
    const int64_t lanes = least(width - x, kMaxVectors * L);
    if (lanes > L)
      window_tile<T, A, R, CB, 2, Mul, Add>(p, padded, v + x, h + x, h_pitch, mul, add, out + x,
                                            out_plane, width, lanes);
    else
      window_tile<T, A, R, CB, 1, Mul, Add>(p, padded, v + x, h + x, h_pitch, mul, add, out + x,
                                            out_plane, width, lanes);
  }
}

// Channels per register tile: one vector per row leaves half of the registers, so take more.
template <class A>
ELSA_INLINE int64_t channel_block(int64_t width) {
  return width <= Vec<A>::lanes ? 2 * ELSA_CHANNELS : ELSA_CHANNELS;
}

// The ghosts of a head, (C/G, taps), in the order of the inner loop: blocks of channels, each
// (taps, block); the channels left over come one by one. Null stays null.
template <class A>
const A* pack_ghost(A* packed, const A* ghost, int64_t channels, int64_t taps, int64_t width,
                    bool turned) {
  if (!ghost) return nullptr;
  for (int64_t c = 0, block; c < channels; c += block) {
    block = channels - c;
    const int64_t widest = channel_block<A>(width);
    if (block >= widest) block = widest;
    else if (block >= ELSA_CHANNELS) block = ELSA_CHANNELS;
    else block = 1;
    for (int64_t i = 0; i < taps; ++i)
      for (int64_t j = 0; j < block; ++j)
        packed[c * taps + i * block + j] = ghost[(c + j) * taps + (turned ? taps - 1 - i : i)];
  }
  return packed;
}

// The rows of h_attn that the next output rows need: taps rows, each a plane apart, which no
// hardware prefetcher follows. Fetched a few per channel block, so that they arrive in time
// without filling the core's queue of misses.
struct Upcoming {
  const char* at;
  int64_t plane, bytes;
  ELSA_INLINE void fetch(int64_t from, int64_t to) const {
    for (int64_t i = from; i < to; ++i)
      for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(at + i * plane + j, 0, 2);
  }
};

// Where pixels are apart (channels_last), a row is read in order: nothing to fetch.
template <class T>
ELSA_INLINE Upcoming upcoming(Planes<T> h, int64_t y, int64_t rows, int64_t width) {
  constexpr int64_t size = sizeof(T);
  const bool close = h.pitch == 1 && rows > 0;
  return {reinterpret_cast<const char*>(close ? row(h, 0, y) : nullptr), h.plane_pitch * size,
          close ? rows * width * size : 0};
}

// All channels of a head over R output rows whose weights are staged in h.
template <class T, class A, int R, bool Mul, bool Add>
void window_rows(const Problem& p, const Padded<A>& padded, const A* v, const A* h,
                 int64_t h_pitch, const A* mul, const A* add, T* out, int64_t out_plane,
                 int64_t width, const Upcoming& next) {
  const int64_t channels = p.C / p.G, taps = p.kernel_size * p.kernel_size;
  int64_t c = 0;
  if (channel_block<A>(width) > ELSA_CHANNELS)
    for (; c + 2 * ELSA_CHANNELS <= channels; c += 2 * ELSA_CHANNELS) {
      next.fetch(c * taps / channels, (c + 2 * ELSA_CHANNELS) * taps / channels);
      window_tile<T, A, R, 2 * ELSA_CHANNELS, 1, Mul, Add>(
          p, padded, v + c * padded.channel_pitch, h, h_pitch, mul + c * taps, add + c * taps,
          out + c * out_plane, out_plane, width, width);
    }
  for (; c + ELSA_CHANNELS <= channels; c += ELSA_CHANNELS) {
    next.fetch(c * taps / channels, (c + ELSA_CHANNELS) * taps / channels);
    window_channels<T, A, R, ELSA_CHANNELS, Mul, Add>(
        p, padded, v + c * padded.channel_pitch, h, h_pitch, mul + c * taps, add + c * taps,
        out + c * out_plane, out_plane, width);
  }
  for (; c < channels; ++c)
    window_channels<T, A, R, 1, Mul, Add>(p, padded, v + c * padded.channel_pitch, h, h_pitch,
                                          mul + c * taps, add + c * taps, out + c * out_plane,
                                          out_plane, width);
}

template <class T, class A, int R>
void window_rows_any(const Problem& p, const Padded<A>& padded, const A* v, const A* h,
                     int64_t h_pitch, const A* mul, const A* add, T* out, int64_t out_plane,
                     int64_t width, const Upcoming& next) {
  auto run = &window_rows<T, A, R, false, false>;
  if (mul && add) run = &window_rows<T, A, R, true, true>;
  else if (mul) run = &window_rows<T, A, R, true, false>;
  else if (add) run = &window_rows<T, A, R, false, true>;
  run(p, padded, v, h, h_pitch, mul, add, out, out_plane, width, next);
}

template <class T>
int64_t forward_layout(const Problem& p, int64_t rows, Arena& arena,
                       Padded<typename AccOf<T>::type>* padded, typename AccOf<T>::type** h,
                       typename AccOf<T>::type** mul, typename AccOf<T>::type** add) {
  using A = typename AccOf<T>::type;
  *padded = take_padded<A>(arena, p, rows, p.Wo, p.stride);
  const int64_t taps = p.kernel_size * p.kernel_size;
  *h = arena.take<A>(2 * taps * round_up<A>(p.Wo));
  *mul = arena.take<A>(p.C / p.G * taps);
  *add = arena.take<A>(p.C / p.G * taps);
  return arena.used;
}

template <class T>
int64_t forward_scratch(const Problem& p, int64_t rows) {
  using A = typename AccOf<T>::type;
  Arena arena{nullptr, 0};
  Padded<A> padded;
  A *h, *mul, *add;
  return forward_layout<T>(p, rows, arena, &padded, &h, &mul, &add);
}

template <class T>
void forward(const Problem& p, Planes<T> v, Planes<T> h, const typename AccOf<T>::type* mul,
             const typename AccOf<T>::type* add, T* out, int64_t g, int64_t y0, int64_t y1,
             void* scratch) {
  using A = typename AccOf<T>::type;
  Arena arena{static_cast<char*>(scratch), 0};
  Padded<A> padded;
  A *staged, *packed_mul, *packed_add;
  forward_layout<T>(p, y1 - y0, arena, &padded, &staged, &packed_mul, &packed_add);
  fill_values(padded, p, v, y0, y1);

  const int64_t channels = p.C / p.G, taps = p.kernel_size * p.kernel_size;
  const int64_t pitch = round_up<A>(p.Wo), plane = p.Ho * p.Wo;
  const A* head_mul = pack_ghost(packed_mul, mul ? mul + g * channels * taps : nullptr, channels,
                                 taps, p.Wo, false);
  const A* head_add = pack_ghost(packed_add, add ? add + g * channels * taps : nullptr, channels,
                                 taps, p.Wo, false);
  for (int64_t y = y0; y < y1;) {
    const int64_t rows = p.stride == p.dilation && y + 1 < y1 ? 2 : 1;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < taps; ++i)
        place_row(staged + (r * taps + i) * pitch, pitch, row(h, i, y + r), h.pitch, p.Wo, 0, 1);
    const Upcoming next = upcoming(h, y + rows, least(rows, y1 - y - rows), p.Wo);
    const A* at = padded.data + (y - y0) * p.stride * padded.row_pitch;
    T* to = out + y * p.Wo;
    if (rows == 2)
      window_rows_any<T, A, 2>(p, padded, at, staged, pitch, head_mul, head_add, to, plane, p.Wo,
                                next);
    else
      window_rows_any<T, A, 1>(p, padded, at, staged, pitch, head_mul, head_add, to, plane, p.Wo,
                                next);
    y += rows;
  }
}

// The gradient of v is the same sum with the window turned round: over the gradient spread onto
// the grid of v (zeros between where stride > 1), with the weights shifted to where they act.
template <class T>
int64_t grad_v_layout(const Problem& p, int64_t rows, Arena& arena,
                      Padded<typename AccOf<T>::type>* padded, typename AccOf<T>::type** h,
                      typename AccOf<T>::type** mul, typename AccOf<T>::type** add) {
  using A = typename AccOf<T>::type;
  const int64_t taps = p.kernel_size * p.kernel_size;
  *padded = take_padded<A>(arena, p, rows, p.W, 1);
  *h = arena.take<A>(2 * taps * round_up<A>(p.W));
  *mul = arena.take<A>(p.C / p.G * taps);
  *add = arena.take<A>(p.C / p.G * taps);
  return arena.used;
}

template <class T>
int64_t grad_v_scratch(const Problem& p, int64_t rows) {
  using A = typename AccOf<T>::type;
  Arena arena{nullptr, 0};
  Padded<A> padded;
  A *h, *mul, *add;
  return grad_v_layout<T>(p, rows, arena, &padded, &h, &mul, &add);
}

template <class T>
void grad_v(const Problem& p, Planes<T> grad, Planes<T> h, const typename AccOf<T>::type* mul,
            const typename AccOf<T>::type* add, T* out, int64_t g, int64_t y0, int64_t y1,
            void* scratch) {
  using A = typename AccOf<T>::type;
  Arena arena{static_cast<char*>(scratch), 0};
  Padded<A> padded;
  A *staged, *packed_mul, *packed_add;
  grad_v_layout<T>(p, y1 - y0, arena, &padded, &staged, &packed_mul, &packed_add);

  const int64_t channels = p.C / p.G, k = p.kernel_size, taps = k * k, s = p.stride;
  const int64_t pad = padding(p), pitch = round_up<A>(p.W);
  set_columns(padded, p, 1);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t r = 0; r < y1 - y0 + reach(p); ++r) {
      A* dst = padded.data + c * padded.channel_pitch + r * padded.row_pitch;
      const int64_t position = y0 - pad + r;
      if (position >= 0 && position % s == 0 && position / s < p.Ho)
        place_row(dst, padded.row_pitch, row(grad, c, position / s), grad.pitch, p.Wo, pad, s);
      else
        zero_row(dst, padded.row_pitch);
    }
  }
  const A* turned_mul = pack_ghost(packed_mul, mul ? mul + g * channels * taps : nullptr,
                                   channels, taps, p.W, true);
  const A* turned_add = pack_ghost(packed_add, add ? add + g * channels * taps : nullptr,
                                   channels, taps, p.W, true);

  for (int64_t y = y0; y < y1;) {
    const int64_t rows = p.dilation == 1 && y + 1 < y1 ? 2 : 1;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < taps; ++i) {
        const int64_t ky = i / k, kx = i % k;
        const int64_t position = y + r - pad + ky * p.dilation;
        A* dst = staged + (r * taps + i) * pitch;
        if (position >= 0 && position % s == 0 && position / s < p.Ho)
          place_row(dst, pitch, row(h, taps - 1 - i, position / s), h.pitch, p.Wo,
                    pad - kx * p.dilation, s);
        else
          zero_row(dst, pitch);
      }
    // Near enough for every window row: the rows used next lie within a window of these.
    const int64_t after = least((y + rows) / s + padding(p), p.Ho - rows);
    const Upcoming next = upcoming(h, most(after, 0), after < 0 ? 0 : rows, p.Wo);
    const A* at = padded.data + (y - y0) * padded.row_pitch;
    T* to = out + y * p.W;
    if (rows == 2)
      window_rows_any<T, A, 2>(p, padded, at, staged, pitch, turned_mul, turned_add, to,
                               p.H * p.W, p.W, next);
    else
      window_rows_any<T, A, 1>(p, padded, at, staged, pitch, turned_mul, turned_add, to,
                               p.H * p.W, p.W, next);
    y += rows;
  }
}

// grad_h for K window columns of one window row: a dot product over the channels. Where Second,
// also for the output row below, whose window row ky - 1 lies on the same row of v (where stride
// equals dilation), so that each load of v serves both.
template <class T, class A, int K, bool Mul, bool First, bool Second>
void channel_dot(const Padded<A>& padded, const A* v, const A* grad, int64_t grad_pitch,
                 int64_t grad_row, const A* mul, int64_t k, int64_t channels,
                 const int64_t* column, T* out, int64_t out_plane, int64_t width, int64_t lanes) {
  V<A> acc[2][K];
  for (int j = 0; j < K; ++j) acc[0][j] = acc[1][j] = V<A>{};
  // To own the lines by the time of the stores.
  for (int j = 0; j < K; ++j) {
    if (First) __builtin_prefetch(out + j * out_plane, 1);
    if (Second) __builtin_prefetch(out + (j - k) * out_plane + width, 1);
  }
  for (int64_t c = 0; c < channels; ++c) {
    const A* at = v + c * padded.channel_pitch;
    V<A> up0, up1;
    if (First) up0 = load(grad + c * grad_pitch);
    if (Second) up1 = load(grad + c * grad_pitch + grad_row);
    if (First) in_register(up0);
    if (Second) in_register(up1);
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      V<A> value = load(at + column[j]);
      if (First && Second) in_register(value);
      if (First) acc[0][j] += (Mul ? value * mul[c * k * k + j] : value) * up0;
      if (Second) acc[1][j] += (Mul ? value * mul[c * k * k + j - k] : value) * up1;
    }
  }
  for (int j = 0; j < K; ++j) {
    if (First) store_lanes<A>(out + j * out_plane, acc[0][j], lanes);
    if (Second) store_lanes<A>(out + (j - k) * out_plane + width, acc[1][j], lanes);
  }
}

template <class T, class A, bool Mul, bool First, bool Second, int K = ELSA_TAPS>
ELSA_INLINE void channel_dots(int64_t count, const Padded<A>& padded, const A* v, const A* grad,
                              int64_t grad_pitch, int64_t grad_row, const A* mul, int64_t k,
                              int64_t channels, const int64_t* column, T* out, int64_t out_plane,
                              int64_t width, int64_t lanes) {
  if (count == K) {
    channel_dot<T, A, K, Mul, First, Second>(padded, v, grad, grad_pitch, grad_row, mul, k,
                                             channels, column, out, out_plane, width, lanes);
  } else if constexpr (K > 1) {
    channel_dots<T, A, Mul, First, Second, K - 1>(count, padded, v, grad, grad_pitch, grad_row,
                                                  mul, k, channels, column, out, out_plane, width,
                                                  lanes);
  }
}

template <class A>
ELSA_INLINE A sum_lanes(V<A> x) {
  A total = A(0);
  for (int64_t i = 0; i < Vec<A>::lanes; ++i) total += x[i];
  return total;
}

// K window rows of the static head's gradient at one window column: v row r meets the gradient
// rows r - ky, all from one load of v. Adds to out[ky * k].
template <class A, int K>
ELSA_INLINE void ghost_rows(V<A> (&acc)[K], const A* v, const A* grad, int64_t grad_row,
                       int64_t width) {
  for (int64_t x = 0; x < width; x += Vec<A>::lanes) {
    const V<A> value = load(v + x);
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) acc[j] += value * load(grad - j * grad_row + x);
  }
}

template <class A, int K>
void ghost_column(const Problem& p, const Padded<A>& padded, const A* v, const A* grad,
                  int64_t grad_row, int64_t rows, int64_t ky0, int64_t width, A* out) {
  V<A> acc[K];
  for (int j = 0; j < K; ++j) acc[j] = V<A>{};
  const int64_t step = p.stride * padded.row_pitch;
  if (p.stride == p.dilation) {
    // r counts output rows from window row ky0. Where r - j is no row of this task, `grad` has
    // rows of zeros.
    for (int64_t r = 0; r < rows + K - 1; ++r)
      ghost_rows<A, K>(acc, v + (ky0 + r) * step, grad + r * grad_row, grad_row, width);
  } else {
    for (int64_t y = 0; y < rows; ++y)
      for (int64_t x = 0; x < width; x += Vec<A>::lanes) {
        const V<A> up = load(grad + y * grad_row + x);
        for (int j = 0; j < K; ++j)
          acc[j] += up * load(v + y * step + (ky0 + j) * p.dilation * padded.row_pitch + x);
      }
  }
  for (int j = 0; j < K; ++j) out[(ky0 + j) * p.kernel_size] = sum_lanes<A>(acc[j]);
}

template <class A>
void ghost_gradient(const Problem& p, const Padded<A>& padded, const A* v, const A* grad,
                    int64_t grad_row, int64_t rows, int64_t width, A* out) {
  const int64_t k = p.kernel_size;
  for (int64_t kx = 0; kx < k; ++kx) {
    const A* at = v + padded.column[kx];
    int64_t ky = 0;
    for (; ky + kGhostRows <= k; ky += kGhostRows)
      ghost_column<A, kGhostRows>(p, padded, at, grad, grad_row, rows, ky, width, out + kx);
    for (; ky + 3 <= k; ky += 3)
      ghost_column<A, 3>(p, padded, at, grad, grad_row, rows, ky, width, out + kx);
    for (; ky < k; ++ky)
      ghost_column<A, 1>(p, padded, at, grad, grad_row, rows, ky, width, out + kx);
  }
}

template <class T>
int64_t grad_h_layout(const Problem& p, int64_t rows, Arena& arena,
                      Padded<typename AccOf<T>::type>* padded, typename AccOf<T>::type** grad,
                      typename AccOf<T>::type** h) {
  using A = typename AccOf<T>::type;
  const int64_t pitch = round_up<A>(p.Wo);
  *padded = take_padded<A>(arena, p, rows, p.Wo, p.stride);
  // Rows of zeros between the channels, for ghost_column to run over.
  *grad = arena.take<A>((p.C / p.G * (rows + kGhostRows) + kGhostRows) * pitch);
  *h = arena.take<A>(pitch);
  return arena.used;
}

template <class T>
int64_t grad_h_scratch(const Problem& p, int64_t rows) {
  using A = typename AccOf<T>::type;
  Arena arena{nullptr, 0};
  Padded<A> padded;
  A *grad, *h;
  return grad_h_layout<T>(p, rows, arena, &padded, &grad, &h);
}

template <class T, bool Mul>
void attention_gradient(const Problem& p, const Padded<typename AccOf<T>::type>& padded,
                        const typename AccOf<T>::type* grad, int64_t grad_pitch,
                        const typename AccOf<T>::type* mul, T* out, int64_t y0, int64_t y1) {
  using A = typename AccOf<T>::type;
  const int64_t channels = p.C / p.G, k = p.kernel_size;
  const int64_t pitch = round_up<A>(p.Wo), plane = p.Ho * p.Wo;
  const int64_t block = divide_up(k, divide_up(k, ELSA_TAPS));
  for (int64_t y = 0; y < y1 - y0;) {
    const int64_t rows = p.stride == p.dilation && y + 1 < y1 - y0 ? 2 : 1;
    for (int64_t x = 0; x < p.Wo; x += Vec<A>::lanes)
      for (int64_t ky = 0; ky < k + rows - 1; ++ky) {
        const A* at = padded.data + (y * p.stride + ky * p.dilation) * padded.row_pitch + x;
        auto run = &channel_dots<T, A, Mul, true, false>;
        if (ky == k) run = &channel_dots<T, A, Mul, false, true>;
        else if (rows == 2 && ky > 0) run = &channel_dots<T, A, Mul, true, true>;
        for (int64_t kx = 0; kx < k; kx += block) {
          const int64_t i = ky * k + kx;
          run(least(block, k - kx), padded, at, grad + y * pitch + x, grad_pitch, pitch,
              Mul ? mul + i : nullptr, k, channels, padded.column + kx,
              out + i * plane + (y0 + y) * p.Wo + x, plane, p.Wo, p.Wo - x);
        }
      }
    y += rows;
  }
}

template <class T>
void grad_h(const Problem& p, Planes<T> grad_out, Planes<T> v, Planes<T> h,
            const typename AccOf<T>::type* mul, T* out, typename AccOf<T>::type* grad_mul,
            typename AccOf<T>::type* grad_add, int64_t g, int64_t y0, int64_t y1, void* scratch) {
  using A = typename AccOf<T>::type;
  Arena arena{static_cast<char*>(scratch), 0};
  Padded<A> padded;
  A *grad, *weights;
  grad_h_layout<T>(p, y1 - y0, arena, &padded, &grad, &weights);
  fill_values(padded, p, v, y0, y1);

  const int64_t channels = p.C / p.G, k = p.kernel_size, taps = k * k, rows = y1 - y0;
  const int64_t pitch = round_up<A>(p.Wo);
  const int64_t grad_pitch = (rows + kGhostRows) * pitch;
  zero_row(grad, kGhostRows * pitch);
  grad += kGhostRows * pitch;
  for (int64_t c = 0; c < channels; ++c) {
    zero_row(grad + c * grad_pitch + rows * pitch, kGhostRows * pitch);
    for (int64_t y = 0; y < rows; ++y)
      place_row(grad + c * grad_pitch + y * pitch, pitch, row(grad_out, c, y0 + y),
                grad_out.pitch, p.Wo, 0, 1);
  }

  if (out) {
    const A* head_mul = mul ? mul + g * channels * taps : nullptr;
    if (mul) attention_gradient<T, true>(p, padded, grad, grad_pitch, head_mul, out, y0, y1);
    else attention_gradient<T, false>(p, padded, grad, grad_pitch, nullptr, out, y0, y1);
  }
  if (grad_add)
    for (int64_t c = 0; c < channels; ++c)
      ghost_gradient(p, padded, padded.data + c * padded.channel_pitch, grad + c * grad_pitch,
                     pitch, rows, pitch, grad_add + c * taps);
  if (grad_mul) {
    // Only with ghost_mul (lam > 0): one window position at a time, its weights staged by row.
    for (int64_t i = 0; i < channels * taps; ++i) grad_mul[i] = A(0);
    for (int64_t i = 0; i < taps; ++i)
      for (int64_t y = 0; y < rows; ++y) {
        place_row(weights, pitch, row(h, i, y0 + y), h.pitch, p.Wo, 0, 1);
        const A* at = padded.data + (y * p.stride + i / k * p.dilation) * padded.row_pitch +
                      padded.column[i % k];
        for (int64_t c = 0; c < channels; ++c) {
          V<A> acc{};
          for (int64_t x = 0; x < pitch; x += Vec<A>::lanes)
            acc += load(at + c * padded.channel_pitch + x) * load(weights + x) *
                   load(grad + c * grad_pitch + y * pitch + x);
          grad_mul[c * taps + i] += sum_lanes<A>(acc);
        }
      }
  }
}

}  // namespace

namespace ELSA_ISA {
#define ELSA_KERNELS(T) \
  {forward_scratch<T>, forward<T>, grad_v_scratch<T>, grad_v<T>, grad_h_scratch<T>, grad_h<T>}
extern const Kernels<float> f32 = ELSA_KERNELS(float);
extern const Kernels<double> f64 = ELSA_KERNELS(double);
extern const Kernels<BFloat16> bf16 = ELSA_KERNELS(BFloat16);
extern const Kernels<Float16> f16 = ELSA_KERNELS(Float16);
}  // namespace ELSA_ISA
}  // namespace elsa
