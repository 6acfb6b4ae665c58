// The kernels, written once in GCC/clang vector extensions and compiled per instruction set.
// The including file defines ELSA_ISA, ELSA_VECTOR_BYTES, ELSA_PIXELS (pixels per register tile of
// the window sum) and ELSA_TAPS (window columns per register tile of the gradients of the heads).
//
// The plan: copy what a task needs, padded with zeros, into the accumulation type (only the
// forward's weights may be read as they lie), so that borders, odd widths, strides, dilations and
// halves are all settled by the copy and the inner loops hold nothing but loads and multiply-adds.
// The window sum has one weight per pixel and head: there the copy lays a head's channels beside
// each other, a vector holds channels of one pixel, no load crosses a cache line and no lane is
// idle at the end of a row. The gradient of h_attn sums over the channels: there a vector holds
// pixels.

#define ELSA_INLINE inline __attribute__((always_inline))

namespace elsa {
namespace {

template <class A>
struct Vec {
  static constexpr int64_t lanes = ELSA_VECTOR_BYTES / sizeof(A);
  typedef A type __attribute__((vector_size(ELSA_VECTOR_BYTES)));
  typedef A unaligned
      __attribute__((vector_size(ELSA_VECTOR_BYTES), aligned(sizeof(A)), may_alias));
};
template <class A>
using V = typename Vec<A>::type;

// Channels that lie beside each other: two vectors. A head's last block may have fewer: then zeros
// fill its first vector or its second, and a second vector without channels is left alone.
template <class A>
constexpr int64_t kBlock = 2 * Vec<A>::lanes;

template <class A>
ELSA_INLINE V<A> load(const A* p) {
  return *reinterpret_cast<const typename Vec<A>::unaligned*>(p);
}
template <class A>
ELSA_INLINE void store(A* p, V<A> x) {
  *reinterpret_cast<typename Vec<A>::unaligned*>(p) = x;
}

// Loads and stores of some lanes only: the others are zero, and their memory is not touched.
#if ELSA_VECTOR_BYTES == 64
constexpr bool kMaskedAccess = true;
ELSA_INLINE uint32_t lane_mask(int64_t first, int64_t last) {
  first = first < 0 ? 0 : first > 16 ? 16 : first;
  last = last < 0 ? 0 : last > 16 ? 16 : last;
  return ((1u << last) - 1) & ~((1u << first) - 1);
}
ELSA_INLINE V<float> load_lanes(const float* p, int64_t first, int64_t last) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(lane_mask(first, last)), p);
}
ELSA_INLINE V<double> load_lanes(const double* p, int64_t first, int64_t last) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>(lane_mask(first, last)), p);
}
ELSA_INLINE void store_lanes(float* p, V<float> x, int64_t n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(lane_mask(0, n)), x);
}
ELSA_INLINE void store_lanes(double* p, V<double> x, int64_t n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(lane_mask(0, n)), x);
}
#else
constexpr bool kMaskedAccess = false;
#endif

// Lanes First to First + lanes / 2 of both, in turn.
template <class A, int64_t First, size_t... I>
ELSA_INLINE V<A> interleave(V<A> a, V<A> b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (First + I / 2 + I % 2 * Vec<A>::lanes)...);
#else
  using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef Index Mask __attribute__((vector_size(ELSA_VECTOR_BYTES)));
  return __builtin_shuffle(a, b, Mask{Index(First + I / 2 + I % 2 * Vec<A>::lanes)...});
#endif
}

// Lane j of x[i] becomes lane i of x[j].
template <class A>
ELSA_INLINE void transpose(V<A> (&x)[Vec<A>::lanes]) {
  constexpr int64_t L = Vec<A>::lanes;
  using Lanes = std::make_index_sequence<L>;
#pragma GCC unroll 4
  for (int64_t step = 1; step < L; step *= 2) {
    V<A> y[L];
#pragma GCC unroll 8
    for (int64_t i = 0; i < L / 2; ++i) {
      y[2 * i] = interleave<A, 0>(x[i], x[i + L / 2], Lanes{});
      y[2 * i + 1] = interleave<A, L / 2>(x[i], x[i + L / 2], Lanes{});
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i) x[i] = y[i];
  }
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

// Converts n lanes, up to all. Not inlined: at each of the places where vectors end, the conversions
// would be most of the code, and of the time to compile it.
template <class A, class T>
__attribute__((noinline)) void convert_lanes(T* dst, V<A> x, int64_t n) {
  A lanes[Vec<A>::lanes];
  store(lanes, x);
  if (n >= Vec<A>::lanes) return narrow_piece<Vec<A>::lanes>(dst, lanes);
  int64_t i = 0;
  if (n & 8) narrow_piece<8>(dst, lanes), i = 8;
  if (n & 4) narrow_piece<4>(dst + i, lanes + i), i += 4;
  if (n & 2) narrow_piece<2>(dst + i, lanes + i), i += 2;
  if (n & 1) narrow_piece<1>(dst + i, lanes + i);
}

// Writes the first n lanes of an accumulator.
template <class A, class T>
ELSA_INLINE void narrow_lanes(T* dst, V<A> x, int64_t n) {
  if constexpr (sizeof(T) == sizeof(A)) {
    if (n >= Vec<A>::lanes) return store<A>(dst, x);
    if constexpr (kMaskedAccess) return store_lanes(dst, x, n);
  }
  convert_lanes<A>(dst, x, n);
}

template <class T>
ELSA_INLINE const T* row(Planes<T> planes, int64_t plane, int64_t y) {
  return planes.data + plane * planes.plane_pitch + y * planes.row_pitch;
}

// dst[start + step * j] = src[pitch * j] where that lies in [0, length), zero elsewhere.
template <class T, class A>
ELSA_INLINE void place_row(A* dst, int64_t length, const T* src, int64_t pitch, int64_t n,
                           int64_t start, int64_t step) {
  if constexpr (kMaskedAccess && sizeof(T) == sizeof(A)) {
    if (step == 1 && pitch == 1) {
      for (int64_t x = 0; x < length; x += Vec<A>::lanes)
        store(dst + x, load_lanes(src + (x - start), start - x, start + n - x));
      return;
    }
  }
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

// A task's rows of v (or of the output's gradient, in grad_v), padded: for output column x, window
// column kx is at column[kx] + x of its row. With a stride, columns of equal remainder lie
// together, so that x steps by one. `plane_pitch` is that of a channel, whose rows hold pixels
// (grad_h), or that of a block of channels, whose rows hold kBlock channels for each pixel.
template <class A>
struct Padded {
  A* data;
  int64_t plane_pitch, row_pitch, phase_pitch;
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

// Room for `rows` output rows of at least a vector. A row's channels follow each other, for a
// prefetcher to follow the sum over channels.
template <class A>
Padded<A> take_planes(Arena& arena, const Problem& p, int64_t rows) {
  Padded<A> out;
  out.phase_pitch = round_up<A>(most(p.Wo, Vec<A>::lanes) + reach(p) / p.stride);
  out.plane_pitch = out.phase_pitch * p.stride;
  out.row_pitch = p.C / p.G * out.plane_pitch;
  out.column = arena.take<int64_t>(p.kernel_size);
  out.data = arena.take<A>(((rows - 1) * p.stride + reach(p) + 1) * out.row_pitch);
  return out;
}

template <class A>
ELSA_INLINE int64_t blocks(const Problem& p) {
  return divide_up(p.C / p.G, kBlock<A>);
}

// The same in blocks of channels.
template <class A>
Padded<A> take_blocks(Arena& arena, const Problem& p, int64_t rows, int64_t width,
                      int64_t stride) {
  Padded<A> out;
  out.phase_pitch = width + reach(p) / stride;
  out.row_pitch = out.phase_pitch * stride * kBlock<A>;
  out.plane_pitch = ((rows - 1) * stride + reach(p) + 1) * out.row_pitch;
  out.column = arena.take<int64_t>(p.kernel_size);
  out.data = arena.take<A>(blocks<A>(p) * out.plane_pitch);
  return out;
}

template <class A>
void set_columns(const Padded<A>& padded, const Problem& p, int64_t stride) {
  for (int64_t kx = 0; kx < p.kernel_size; ++kx) {
    const int64_t x = kx * p.dilation;
    padded.column[kx] = x % stride * padded.phase_pitch + x / stride;
  }
}

// n elements of a row, converted or apart; likewise not inlined.
template <class T, class A>
__attribute__((noinline)) V<A> gather_lanes(const T* src, int64_t pitch, int64_t n) {
  A lanes[Vec<A>::lanes] = {};
  if (pitch != 1) {
    for (int64_t i = 0; i < n; ++i) lanes[i] = widen(src[i * pitch]);
  } else if (n == Vec<A>::lanes) {
    widen_piece<Vec<A>::lanes>(lanes, src);
  } else {
    widen_row(lanes, src, n);
  }
  return load(lanes);
}

// The first n elements of a row, n up to the lanes, and zeros.
template <class T, class A>
ELSA_INLINE V<A> gather(const T* src, int64_t pitch, int64_t n) {
  if constexpr (sizeof(T) == sizeof(A)) {
    if (pitch == 1 && n == Vec<A>::lanes) return load(src);
    if constexpr (kMaskedAccess)
      if (pitch == 1) return load_lanes(src, 0, n);
  }
  return gather_lanes<T, A>(src, pitch, n);
}

// Rows a plane apart, which no hardware prefetcher follows. Fetched a few at a time, each `parts`th
// from `part` on, so that they arrive without filling the core's queue of misses.
struct Rows {
  const char* at;
  int64_t plane, bytes, count;
  ELSA_INLINE void fetch(int64_t part, int64_t parts) const {
    for (int64_t i = part; i < count; i += parts) {
      const char* begin = at + i * plane;
      const char* line = begin - (reinterpret_cast<uintptr_t>(begin) & 63);
      for (; line < begin + bytes; line += 64) __builtin_prefetch(line, 0, 2);
    }
  }
};

// Row y of `count` planes; none where y is no row. Where pixels are apart (channels_last), planes
// are read together, in order: nothing to fetch.
template <class T>
ELSA_INLINE Rows rows_at(Planes<T> planes, int64_t y, int64_t height, int64_t width,
                         int64_t count) {
  constexpr int64_t size = sizeof(T);
  const bool apart = y < height && planes.pitch == 1 && planes.plane_pitch != 1;
  return {reinterpret_cast<const char*>(apart ? row(planes, 0, y) : nullptr),
          planes.plane_pitch * size, width * size, apart ? count : 0};
}

// A row of n pixels of a block of channels: pixel x to dst[position(x)], a block per pixel, unless
// position(x) is negative.
template <class T, class A, class Position>
void place_pixels(A* dst, Planes<T> planes, int64_t block, int64_t channels, int64_t y,
                  int64_t height, int64_t n, const Position& position) {
  constexpr int64_t L = Vec<A>::lanes;
  const T* src = row(planes, block * kBlock<A>, y);
  channels = least(channels - block * kBlock<A>, kBlock<A>);
  if (planes.plane_pitch == 1) {  // channels_last: as they should lie
    for (int64_t x = 0; x < n; ++x) {
      if (position(x) < 0) continue;
      A* to = dst + position(x) * kBlock<A>;
      if (channels < kBlock<A>) zero_row(to, kBlock<A>);
      widen_row(to, src + x * planes.pitch, channels);
    }
    return;
  }
  rows_at(Planes<T>{src, planes.plane_pitch, planes.row_pitch, planes.pitch}, 1, height - y, n,
          channels)
      .fetch(0, 1);
  for (int64_t c = 0; c < channels; c += L)
    for (int64_t x = 0; x < n; x += L) {
      // The last vector overlaps the one before where there is one.
      const int64_t first = most(least(x, n - L), 0), count = least(n, L);
      V<A> tile[L];
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i)
        tile[i] = c + i < channels ? gather<T, A>(src + (c + i) * planes.plane_pitch +
                                                      first * planes.pitch,
                                                  planes.pitch, count)
                                   : V<A>{};
      transpose<A>(tile);
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i) {
        const int64_t at = i < count ? position(first + i) : -1;
        if (at >= 0) store(dst + at * kBlock<A> + c, tile[i]);
      }
    }
}

// The other way: n pixels of a block to rows of planes.
template <class T, class A>
ELSA_INLINE void store_pixels(T* out, int64_t plane, const A* src, int64_t channels, int64_t n) {
  constexpr int64_t L = Vec<A>::lanes;
  for (int64_t c = 0; c < channels; c += L)
    for (int64_t x = 0; x < n; x += L) {
      const int64_t first = most(least(x, n - L), 0);
      V<A> tile[L];
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i) tile[i] = load(src + (first + i) * kBlock<A> + c);
      transpose<A>(tile);
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i)
        if (c + i < channels) narrow_lanes<A>(out + (c + i) * plane + first, tile[i], n);
    }
}

// The ghosts of a head, (C/G, taps), as the window sum reads them: (blocks, taps, kBlock). Null
// stays null.
template <class A>
const A* pack_ghost(A* packed, const A* ghost, int64_t channels, int64_t taps, bool turned) {
  if (!ghost) return nullptr;
  for (int64_t first = 0; first < channels; first += kBlock<A>)
    for (int64_t i = 0; i < taps; ++i)
      for (int64_t c = 0; c < kBlock<A>; ++c)
        *packed++ = first + c < channels
                        ? ghost[(first + c) * taps + (turned ? taps - 1 - i : i)]
                        : A(0);
  return packed - divide_up(channels, kBlock<A>) * kBlock<A> * taps;
}

// out[pixel][channel] = sum over the window of (h * mul + add) * v, for PX pixels of a row and CV
// vectors of channels.
template <class A, int PX, int CV, bool Mul, bool Add>
void window_tile(const Padded<A>& padded, int64_t k, int64_t dilation, const A* v, const A* h,
                 int64_t h_pitch, const A* mul, const A* add, A* out, const Rows& reads,
                 const Rows& writes, int64_t part, int64_t parts) {
  constexpr int64_t L = Vec<A>::lanes;
  V<A> acc[PX][CV];
#pragma GCC unroll 8
  for (int p = 0; p < PX; ++p)
#pragma GCC unroll 2
    for (int c = 0; c < CV; ++c) acc[p][c] = V<A>{};
  for (int64_t ky = 0; ky < k; ++ky) {
    reads.fetch(part * k + ky, parts * k);
    writes.fetch(part * k + ky, parts * k);
    const A* line = v + ky * dilation * padded.row_pitch;
    for (int64_t kx = 0; kx < k; ++kx) {
      const A* at = line + padded.column[kx] * kBlock<A>;
      V<A> m[CV], a[CV];
      for (int c = 0; c < CV; ++c) {
        if (Mul) m[c] = load(mul + c * L);
        if (Add) a[c] = load(add + c * L);
        if (Mul) in_register(m[c]);
        if (Add) in_register(a[c]);
      }
#pragma GCC unroll 8
      for (int p = 0; p < PX; ++p) {
        V<A> dynamic = h[p] - V<A>{};  // to all lanes
        in_register(dynamic);
#pragma GCC unroll 2
        for (int c = 0; c < CV; ++c) {
          V<A> weight = dynamic;
          if (Mul) weight = weight * m[c];
          if (Add) weight = weight + a[c];
          acc[p][c] += weight * load(at + p * kBlock<A> + c * L);
        }
      }
      h += h_pitch;
      if (Mul) mul += kBlock<A>;
      if (Add) add += kBlock<A>;
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < PX; ++p)
#pragma GCC unroll 2
    for (int c = 0; c < CV; ++c) store(out + p * kBlock<A> + c * L, acc[p][c]);
}

// Tiles of PX pixels over a row; the last overlaps the one before.
template <class A, int PX, int CV, bool Mul, bool Add>
void window_tiles(const Padded<A>& padded, const Problem& p, const A* v, const A* h,
                  int64_t h_pitch, const A* mul, const A* add, A* out, int64_t width,
                  const Rows& reads, const Rows& writes) {
  const int64_t tiles = divide_up(width, PX);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t x = least(i * PX, width - PX);
    window_tile<A, PX, CV, Mul, Add>(padded, p.kernel_size, p.dilation, v + x * kBlock<A>, h + x,
                                     h_pitch, mul, add, out + x * kBlock<A>, reads, writes, i,
                                     tiles);
  }
}

template <class A, int CV, bool Mul, bool Add>
auto tiles_for(int64_t width) {
  constexpr int P = ELSA_PIXELS;
  // Seven pixels where that takes no more tiles than eight: 14 and 28 are ELSA-Swin's widths.
  if (width >= P - 1 && divide_up(width, P) * (P - 1) >= width)
    return &window_tiles<A, P - 1, CV, Mul, Add>;
  if (width >= P) return &window_tiles<A, P, CV, Mul, Add>;
  return &window_tiles<A, 1, CV, Mul, Add>;
}

// One output row of all channels of a head: `v` is the padded row of the window's first, `h` that
// row's weights. `line` has room for the row's pixels.
template <class T, class A, bool Mul, bool Add>
void window_row(const Problem& p, const Padded<A>& padded, const A* v, const A* h, int64_t h_pitch,
                const A* mul, const A* add, A* line, T* out, int64_t out_plane, int64_t width,
                const Rows& next) {
  const int64_t taps = p.kernel_size * p.kernel_size;
  for (int64_t b = 0; b < blocks<A>(p); ++b) {
    const int64_t channels = least(p.C / p.G - b * kBlock<A>, kBlock<A>);
    const auto run = channels > Vec<A>::lanes ? tiles_for<A, 2, Mul, Add>(width)
                                              : tiles_for<A, 1, Mul, Add>(width);
    const Rows reads = b == 0 ? next : Rows{};
    T* to = out + b * kBlock<A> * out_plane;
    run(padded, p, v + b * padded.plane_pitch, h, h_pitch,
        Mul ? mul + b * taps * kBlock<A> : nullptr, Add ? add + b * taps * kBlock<A> : nullptr,
        line, width, reads, rows_at(Planes<T>{to, out_plane, width, 1}, 0, 1, width, channels));
    store_pixels(to, out_plane, line, channels, width);
  }
}

template <class T, class A>
void window_row_any(const Problem& p, const Padded<A>& padded, const A* v, const A* h,
                    int64_t h_pitch, const A* mul, const A* add, A* line, T* out,
                    int64_t out_plane, int64_t width, const Rows& next) {
  auto run = &window_row<T, A, false, false>;
  if (mul && add) run = &window_row<T, A, true, true>;
  else if (mul) run = &window_row<T, A, true, false>;
  else if (add) run = &window_row<T, A, false, true>;
  run(p, padded, v, h, h_pitch, mul, add, line, out, out_plane, width, next);
}

// What forward and grad_v work in, for output rows of `width` pixels.
template <class A>
struct Window {
  Padded<A> padded;
  A *h, *mul, *add, *line;
};

template <class A>
Window<A> take_window(Arena& arena, const Problem& p, int64_t rows, int64_t width,
                      int64_t stride) {
  const int64_t taps = p.kernel_size * p.kernel_size, ghost = blocks<A>(p) * kBlock<A> * taps;
  Window<A> out;
  out.padded = take_blocks<A>(arena, p, rows, width, stride);
  out.h = arena.take<A>(taps * round_up<A>(width));
  out.mul = arena.take<A>(ghost);
  out.add = arena.take<A>(ghost);
  out.line = arena.take<A>(most(width, Vec<A>::lanes) * kBlock<A>);
  return out;
}

template <class T>
int64_t forward_scratch(const Problem& p, int64_t rows) {
  Arena arena{nullptr, 0};
  take_window<typename AccOf<T>::type>(arena, p, rows, p.Wo, p.stride);
  return arena.used;
}

template <class T>
void forward(const Problem& p, Planes<T> v, Planes<T> h, const typename AccOf<T>::type* mul,
             const typename AccOf<T>::type* add, T* out, int64_t g, int64_t y0, int64_t y1,
             void* scratch) {
  using A = typename AccOf<T>::type;
  Arena arena{static_cast<char*>(scratch), 0};
  const Window<A> at = take_window<A>(arena, p, y1 - y0, p.Wo, p.stride);
  const Padded<A>& padded = at.padded;
  const int64_t channels = p.C / p.G, taps = p.kernel_size * p.kernel_size, plane = p.Ho * p.Wo;
  const int64_t pad = padding(p), s = p.stride;
  set_columns(padded, p, s);
  // The last columns may lie beyond every window.
  const auto position = [&](int64_t x) {
    if (s == 1) return x + pad;
    const int64_t column = (x + pad) / s;
    return column < padded.phase_pitch ? (x + pad) % s * padded.phase_pitch + column : -1;
  };
  for (int64_t b = 0; b < blocks<A>(p); ++b)
    for (int64_t r = 0; r < (y1 - y0 - 1) * s + reach(p) + 1; ++r) {
      A* dst = padded.data + b * padded.plane_pitch + r * padded.row_pitch;
      const int64_t y = y0 * s - pad + r;
      zero_row(dst, padded.row_pitch);
      if (y >= 0 && y < p.H) place_pixels<T, A>(dst, v, b, channels, y, p.H, p.W, position);
    }
  const A* head_mul =
      pack_ghost(at.mul, mul ? mul + g * channels * taps : nullptr, channels, taps, false);
  const A* head_add =
      pack_ghost(at.add, add ? add + g * channels * taps : nullptr, channels, taps, false);

  for (int64_t y = y0; y < y1; ++y) {
    const A* weights = at.h;
    int64_t pitch = round_up<A>(p.Wo);
    bool staged = true;
    if constexpr (sizeof(T) == sizeof(A)) {
      // As they lie, unless planes a multiple of 1024 bytes apart share few sets of the cache.
      if (h.pitch == 1 && h.plane_pitch * int64_t(sizeof(T)) % 1024 != 0) {
        weights = row(h, 0, y), pitch = h.plane_pitch, staged = false;
      }
    }
    if (staged)
      for (int64_t i = 0; i < taps; ++i)
        place_row(at.h + i * pitch, pitch, row(h, i, y), h.pitch, p.Wo, 0, 1);
    window_row_any<T, A>(p, padded, padded.data + (y - y0) * s * padded.row_pitch, weights, pitch,
                         head_mul, head_add, at.line, out + y * p.Wo, plane, p.Wo,
                         rows_at(h, y + 1, y1, p.Wo, taps));
  }
}

// The static head's gradient at K columns of one window row: adds a row's sum over pixels of v
// times the gradient that lies where the turned window puts it, times h where Weighted.
template <class A, int CV, bool Weighted, int K>
void ghost_columns(const A* v, const A* grad, const int64_t* column, const A* h, int64_t h_pitch,
                   int64_t width, A* sums) {
  constexpr int64_t L = Vec<A>::lanes;
  const A* at[K];
  for (int j = 0; j < K; ++j) at[j] = grad + column[j] * kBlock<A>;
  V<A> acc[K][CV];
  for (int j = 0; j < K; ++j)
    for (int c = 0; c < CV; ++c) acc[j][c] = V<A>{};
  for (int64_t x = 0; x < width; ++x) {
    V<A> value[CV];
    for (int c = 0; c < CV; ++c) {
      value[c] = load(v + x * kBlock<A> + c * L);
      in_register(value[c]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j)
#pragma GCC unroll 2
      for (int c = 0; c < CV; ++c)
        acc[j][c] += (Weighted ? value[c] * h[j * h_pitch + x] : value[c]) *
                     load(at[j] + x * kBlock<A> + c * L);
  }
  for (int j = 0; j < K; ++j)
    for (int c = 0; c < CV; ++c) {
      A* sum = sums + j * kBlock<A> + c * L;
      store(sum, load(sum) + acc[j][c]);
    }
}

template <class A, int CV, bool Weighted, int K = ELSA_TAPS>
ELSA_INLINE void ghost_columns_any(int64_t count, const A* v, const A* grad, const int64_t* column,
                                   const A* h, int64_t h_pitch, int64_t width, A* sums) {
  if (count == K) {
    ghost_columns<A, CV, Weighted, K>(v, grad, column, h, h_pitch, width, sums);
  } else if constexpr (K > 1) {
    ghost_columns_any<A, CV, Weighted, K - 1>(count, v, grad, column, h, h_pitch, width, sums);
  }
}

// The output row at row y of v's grid, -1 where there is none.
ELSA_INLINE int64_t output_row(const Problem& p, int64_t y) {
  return y >= 0 && y % p.stride == 0 && y / p.stride < p.Ho ? y / p.stride : -1;
}

// Adds what row y of v gives: `v` is its block, `grad` the padded row of the turned window's first,
// `sums` (taps, kBlock).
template <class A, int CV, bool Weighted>
void ghost_row(const Problem& p, const Padded<A>& padded, int64_t y, const A* v, const A* grad,
               const A* h, int64_t h_pitch, A* sums) {
  const int64_t k = p.kernel_size, columns = divide_up(k, divide_up(k, ELSA_TAPS));
  for (int64_t ky = 0; ky < k; ++ky) {
    if (output_row(p, y - padding(p) + ky * p.dilation) < 0) continue;
    for (int64_t kx = 0; kx < k; kx += columns)
      ghost_columns_any<A, CV, Weighted>(least(columns, k - kx), v,
                                     grad + ky * p.dilation * padded.row_pitch,
                                     padded.column + kx, h + (ky * k + kx) * h_pitch, h_pitch, p.W,
                                     sums + (ky * k + kx) * kBlock<A>);
  }
}

// The gradients of v and of the ghost head are sums with the window turned round: over the
// output's gradient spread onto the grid of v (zeros between where stride > 1), with the weights
// shifted to where they act.
template <class A>
struct TurnedWindow {
  Window<A> window;
  A *values, *sums_mul, *sums_add;
};

template <class A>
TurnedWindow<A> take_turned_window(Arena& arena, const Problem& p, int64_t rows) {
  const int64_t taps = p.kernel_size * p.kernel_size, ghost = blocks<A>(p) * kBlock<A> * taps;
  TurnedWindow<A> out;
  out.window = take_window<A>(arena, p, rows, p.W, 1);
  out.values = arena.take<A>(p.W * kBlock<A>);
  out.sums_mul = arena.take<A>(ghost);
  out.sums_add = arena.take<A>(ghost);
  return out;
}

template <class T>
int64_t grad_v_scratch(const Problem& p, int64_t rows) {
  Arena arena{nullptr, 0};
  take_turned_window<typename AccOf<T>::type>(arena, p, rows);
  return arena.used;
}

// (blocks, taps, kBlock), turned, to (C/G, taps).
template <class A>
void unpack_ghost(A* ghost, const A* packed, int64_t channels, int64_t taps) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < taps; ++i)
      ghost[c * taps + taps - 1 - i] =
          packed[(c / kBlock<A> * taps + i) * kBlock<A> + c % kBlock<A>];
}

template <class T>
void grad_v(const Problem& p, Planes<T> grad, Planes<T> v, Planes<T> h,
            const typename AccOf<T>::type* mul, const typename AccOf<T>::type* add, T* out,
            typename AccOf<T>::type* grad_mul, typename AccOf<T>::type* grad_add, int64_t g,
            int64_t y0, int64_t y1, void* scratch) {
  using A = typename AccOf<T>::type;
  Arena arena{static_cast<char*>(scratch), 0};
  const TurnedWindow<A> turned = take_turned_window<A>(arena, p, y1 - y0);
  const Window<A>& at = turned.window;
  const Padded<A>& padded = at.padded;
  const int64_t channels = p.C / p.G, k = p.kernel_size, taps = k * k, s = p.stride;
  const int64_t pad = padding(p), pitch = round_up<A>(p.W), ghost = taps * kBlock<A>;
  set_columns(padded, p, 1);
  for (int64_t b = 0; b < blocks<A>(p); ++b)
    for (int64_t r = 0; r < y1 - y0 + reach(p); ++r) {
      A* dst = padded.data + b * padded.plane_pitch + r * padded.row_pitch;
      const int64_t y = output_row(p, y0 - pad + r);
      zero_row(dst, padded.row_pitch);
      if (y >= 0)
        place_pixels<T, A>(dst, grad, b, channels, y, p.Ho, p.Wo,
                           [&](int64_t x) { return pad + x * s; });
    }
  const A* head_mul =
      pack_ghost(at.mul, mul ? mul + g * channels * taps : nullptr, channels, taps, true);
  const A* head_add =
      pack_ghost(at.add, add ? add + g * channels * taps : nullptr, channels, taps, true);
  if (grad_mul) zero_row(turned.sums_mul, blocks<A>(p) * ghost);
  if (grad_add) zero_row(turned.sums_add, blocks<A>(p) * ghost);

  for (int64_t y = y0; y < y1; ++y) {
    const A* from = padded.data + (y - y0) * padded.row_pitch;
    if (out || grad_mul)
      for (int64_t i = 0; i < taps; ++i) {
        const int64_t from_y = output_row(p, y - pad + i / k * p.dilation);
        A* dst = at.h + i * pitch;
        if (from_y >= 0)
          place_row(dst, pitch, row(h, taps - 1 - i, from_y), h.pitch, p.Wo,
                    pad - i % k * p.dilation, s);
        else
          zero_row(dst, pitch);
      }
    if (out) {
      // Near enough for every window row: the rows used next lie within a window of this.
      const int64_t after = least((y + 1) / s + pad, p.Ho - 1);
      window_row_any<T, A>(p, padded, from, at.h, pitch, head_mul, head_add, at.line,
                           out + y * p.W, p.H * p.W, p.W, rows_at(h, after, p.Ho, p.Wo, taps));
    }
    if (!grad_mul && !grad_add) continue;
    for (int64_t b = 0; b < blocks<A>(p); ++b) {
      place_pixels<T, A>(turned.values, v, b, channels, y, p.H, p.W, [](int64_t x) { return x; });
      const A* block = from + b * padded.plane_pitch;
      const bool wide = channels - b * kBlock<A> > Vec<A>::lanes;
      auto plain = wide ? &ghost_row<A, 2, false> : &ghost_row<A, 1, false>;
      auto weighted = wide ? &ghost_row<A, 2, true> : &ghost_row<A, 1, true>;
      if (grad_add)
        plain(p, padded, y, turned.values, block, at.h, pitch, turned.sums_add + b * ghost);
      if (grad_mul)
        weighted(p, padded, y, turned.values, block, at.h, pitch, turned.sums_mul + b * ghost);
    }
  }
  if (grad_mul) unpack_ghost(grad_mul, turned.sums_mul, channels, taps);
  if (grad_add) unpack_ghost(grad_add, turned.sums_add, channels, taps);
}

// grad_h for K window columns of one window row: a dot product over the channels. Where Second,
// also for the output row below, whose window row ky - 1 lies on the same row of v (where stride
// equals dilation), so that each load of v serves both.
template <class T, class A, int K, bool Mul, bool First, bool Second>
void channel_dot(const Padded<A>& padded, const A* v, const A* grad, int64_t grad_pitch,
                 int64_t grad_row, const A* mul, int64_t k, int64_t channels,
                 const int64_t* column, T* out, int64_t out_plane, int64_t width, int64_t lanes) {
  V<A> acc[2][K];
#pragma GCC unroll 8
  for (int j = 0; j < K; ++j) acc[0][j] = acc[1][j] = V<A>{};
  // So that the lines are here by the time of the stores.
  for (int j = 0; j < K; ++j) {
    if (First) __builtin_prefetch(out + j * out_plane, 1);
    if (Second) __builtin_prefetch(out + (j - k) * out_plane + width, 1);
  }
  for (int64_t c = 0; c < channels; ++c) {
    const A* at = v + c * padded.plane_pitch;
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
#pragma GCC unroll 8
  for (int j = 0; j < K; ++j) {
    if (First) narrow_lanes<A>(out + j * out_plane, acc[0][j], lanes);
    if (Second) narrow_lanes<A>(out + (j - k) * out_plane + width, acc[1][j], lanes);
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

template <class T, bool Mul>
void attention_gradient(const Problem& p, const Padded<typename AccOf<T>::type>& padded,
                        const typename AccOf<T>::type* grad, const typename AccOf<T>::type* mul,
                        T* out, int64_t y0, int64_t y1) {
  using A = typename AccOf<T>::type;
  const int64_t channels = p.C / p.G, k = p.kernel_size;
  const int64_t pitch = round_up<A>(p.Wo), grad_row = channels * pitch, plane = p.Ho * p.Wo;
  const int64_t block = divide_up(k, divide_up(k, ELSA_TAPS));
  for (int64_t y = 0; y < y1 - y0;) {
    const int64_t rows = p.stride == p.dilation && y + 1 < y1 - y0 ? 2 : 1;
    for (int64_t x0 = 0; x0 < p.Wo; x0 += Vec<A>::lanes)
      for (int64_t ky = 0; ky < k + rows - 1; ++ky) {
        // The last vector overlaps the one before where there is one.
        const int64_t x = most(least(x0, p.Wo - Vec<A>::lanes), 0);
        const A* at = padded.data + (y * p.stride + ky * p.dilation) * padded.row_pitch + x;
        auto run = &channel_dots<T, A, Mul, true, false>;
        if (ky == k) run = &channel_dots<T, A, Mul, false, true>;
        else if (rows == 2 && ky > 0) run = &channel_dots<T, A, Mul, true, true>;
        for (int64_t kx = 0; kx < k; kx += block) {
          const int64_t i = ky * k + kx;
          run(least(block, k - kx), padded, at, grad + y * grad_row + x, pitch, grad_row,
              Mul ? mul + i : nullptr, k, channels, padded.column + kx,
              out + i * plane + (y0 + y) * p.Wo + x, plane, p.Wo, p.Wo - x);
        }
      }
    y += rows;
  }
}

template <class T>
int64_t grad_h_scratch(const Problem& p, int64_t rows) {
  using A = typename AccOf<T>::type;
  Arena arena{nullptr, 0};
  take_planes<A>(arena, p, rows);
  arena.take<A>(p.C / p.G * rows * round_up<A>(p.Wo));
  return arena.used;
}

template <class T>
void grad_h(const Problem& p, Planes<T> grad_out, Planes<T> v, const typename AccOf<T>::type* mul,
            T* out, int64_t g, int64_t y0, int64_t y1, void* scratch) {
  using A = typename AccOf<T>::type;
  const int64_t channels = p.C / p.G, taps = p.kernel_size * p.kernel_size, rows = y1 - y0;
  const int64_t pad = padding(p), s = p.stride, pitch = round_up<A>(p.Wo);
  Arena arena{static_cast<char*>(scratch), 0};
  const Padded<A> padded = take_planes<A>(arena, p, rows);
  A* grad = arena.take<A>(channels * rows * pitch);
  set_columns(padded, p, s);
  const int64_t length = padded.plane_pitch;
  for (int64_t r = 0; r < (rows - 1) * s + reach(p) + 1; ++r) {
    const int64_t y = y0 * s - pad + r;
    A* dst = padded.data + r * padded.row_pitch;
    if (y < 0 || y >= p.H) {
      zero_row(dst, padded.row_pitch);
      continue;
    }
    rows_at(v, y + 1, p.H, p.W, channels).fetch(0, 1);
    for (int64_t c = 0; c < channels; ++c, dst += length) {
      const T* src = row(v, c, y);
      if (s == 1) {
        place_row(dst, length, src, v.pitch, p.W, pad, 1);
        continue;
      }
      zero_row(dst, length);
      for (int64_t x = 0; x < p.W; ++x) {
        // The last columns may lie beyond every window.
        const int64_t at = (x + pad) / s;
        if (at < padded.phase_pitch)
          dst[(x + pad) % s * padded.phase_pitch + at] = widen(src[x * v.pitch]);
      }
    }
  }
  for (int64_t y = 0; y < rows; ++y) {
    rows_at(grad_out, y0 + y + 1, y1, p.Wo, channels).fetch(0, 1);
    for (int64_t c = 0; c < channels; ++c)
      place_row(grad + (y * channels + c) * pitch, pitch, row(grad_out, c, y0 + y), grad_out.pitch,
                p.Wo, 0, 1);
  }
  const A* head_mul = mul ? mul + g * channels * taps : nullptr;
  if (mul) attention_gradient<T, true>(p, padded, grad, head_mul, out, y0, y1);
  else attention_gradient<T, false>(p, padded, grad, nullptr, out, y0, y1);
}

}  // namespace
}  // namespace elsa

#include "shifted_impl.h"

namespace elsa {
namespace ELSA_ISA {
#define ELSA_KERNELS(T) \
  {forward_scratch<T>, forward<T>, grad_v_scratch<T>, grad_v<T>, grad_h_scratch<T>, grad_h<T>}
extern const Kernels<float> f32 = ELSA_KERNELS(float);
extern const Kernels<double> f64 = ELSA_KERNELS(double);
extern const Kernels<BFloat16> bf16 = ELSA_KERNELS(BFloat16);
extern const Kernels<Float16> f16 = ELSA_KERNELS(Float16);
extern const ShiftedKernels<float> shifted_f32 = {shifted_forward<float>, shifted_backward<float>};
extern const ShiftedKernels<double> shifted_f64 = {shifted_forward<double>,
                                                   shifted_backward<double>};
}  // namespace ELSA_ISA
}  // namespace elsa
