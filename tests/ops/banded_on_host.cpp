// Runs the kernels of ops/csrc/cuda/banded.h block by block on the CPU.
#include "warp_on_host.h"
//
#include "../../ops/csrc/cuda/banded.h"

using namespace elsa;

namespace {

struct Tensors {
  const void *grad, *v, *h;
  const float* add;
  void *out, *grad_v, *grad_h;
  float* grad_add;  // (splits, tiles, C, k, k)
};

struct Setting {
  int64_t vector, segments, rows, parts, splits, reversed;
  int64_t column;  // from pixel to pixel of v and grad where they are Pixels, 0 where Planes
};

template <class T>
Images<T> images(const Problem& p, int64_t column, T* data) {
  if (!column) return {data, p.C * p.H * p.W, p.H * p.W, p.W, 1};
  return {data, p.H * p.W * column, 1, p.W * column, column};
}

template <class F>
void with_layout(const Setting& s, const F& f) {
  if (s.column)
    f(Pixels{});
  else
    f(Planes{});
}

int fixed_tiles = 0;  // kernels of a call whose tile the compiler knew

// Shared memory with a guard behind it; both start as NaN.
class Shared {
 public:
  explicit Shared(int64_t bytes) : bytes_(bytes), words_(bytes / 8 + 64) {}
  unsigned char* fresh() {
    std::memset(words_.data(), 0xff, words_.size() * 8);
    return reinterpret_cast<unsigned char*>(words_.data() + words_.size() % 2);
  }
  void check() {
    for (const auto* at = fresh_end(); at < end(); ++at)
      HostBlock::require(*at == 0xff, "a write behind shared memory");
  }

 private:
  const unsigned char* end() const {
    return reinterpret_cast<const unsigned char*>(words_.data() + words_.size());
  }
  const unsigned char* fresh_end() const {
    return reinterpret_cast<const unsigned char*>(words_.data() + words_.size() % 2) + bytes_;
  }
  int64_t bytes_;
  std::vector<uint64_t> words_;
};

template <class Bytes>
Tile tile_for(const Problem& p, const Setting& s, const Bytes& bytes) {
  Tile t = choose_tile(p, static_cast<int>(s.vector), 115200, 232448, bytes);
  if (s.segments) {
    t.segments = static_cast<int>(s.segments);
    t.strips = 8 / t.segments;
    t.rows = static_cast<int>(s.rows);
    t.pitch = t.width() + 2 * kLeft;
    t.row_pitch = t.depth * t.pitch + row_padding(t.segments);
    t.across = static_cast<int>(divide_up(p.W, t.width()));
    t.down = static_cast<int>(divide_up(p.H, t.height()));
  }
  return t;
}

template <class T, int K, bool TURNED>
void product(const Problem& p, const Setting& s, const Tensors& x, const void* source,
             void* result) {
  const int parts = static_cast<int>(s.parts);
  std::vector<uint32_t> words(x.add ? p.C * K * parts * kTurn<K> : 0);
  for (size_t i = 0; i < words.size(); ++i)
    ghost_word<T, K, TURNED>(static_cast<int64_t>(i), parts, x.add, words.data());
  const auto bytes = [&](const Tile& t) { return product_bytes(t, K, x.add != nullptr); };
  const Tile chosen = tile_for(p, s, bytes);
  Shared shared(bytes(chosen));
  const auto from = images(p, s.column, static_cast<const T*>(source));
  const auto to = images(p, s.column ? p.C : 0, static_cast<T*>(result));
  with_layout(s, [&](auto layout) {
    with_tile<K>(chosen, [&](const auto& t) {
      fixed_tiles += !std::is_same_v<std::decay_t<decltype(t)>, Tile>;
      for (int64_t block = 0; block < p.B * p.G * t.across * t.down; ++block) {
        unsigned char* memory = shared.fresh();
        HostBlock::get().run(
            [&] {
              banded_product<T, K, TURNED>(layout, p, t, block, memory, from,
                                           static_cast<const T*>(x.h),
                                           x.add ? words.data() : nullptr, parts, x.add, to);
            },
            s.reversed);
        shared.check();
      }
    });
  });
}

template <class T, int K>
void all(const Problem& p, const Setting& s, const Tensors& x) {
  product<T, K, false>(p, s, x, x.v, x.out);
  product<T, K, true>(p, s, x, x.grad, x.grad_v);
  const auto bytes = [](const Tile& t) { return gradient_bytes(t, K); };
  const Tile chosen = tile_for(p, s, bytes);
  Shared shared(bytes(chosen));
  const int64_t tiles = chosen.across * chosen.down, sums = p.C * K * K;
  std::vector<float> part(s.splits * tiles * sums, NAN);
  const auto grad = images(p, s.column, static_cast<const T*>(x.grad));
  const auto v = images(p, s.column, static_cast<const T*>(x.v));
  with_layout(s, [&](auto layout) {
    with_tile<K>(chosen, [&](const auto& t) {
      fixed_tiles += !std::is_same_v<std::decay_t<decltype(t)>, Tile>;
      for (int64_t block = 0; block < s.splits * p.G * tiles; ++block) {
        unsigned char* memory = shared.fresh();
        HostBlock::get().run(
            [&] {
              banded_gradient<T, K>(layout, p, t, block, s.splits, memory, grad, v,
                                    static_cast<T*>(x.grad_h), x.add ? part.data() : nullptr);
            },
            s.reversed);
        shared.check();
      }
    });
  });
  if (!x.add) return;
  for (int64_t i = 0; i < sums; ++i) {
    x.grad_add[i] = 0;
    for (int64_t split = 0; split < s.splits * tiles; ++split)
      x.grad_add[i] += part[split * sums + i];
  }
}

template <class T>
void with_kernel_size(const Problem& p, const Setting& s, const Tensors& x) {
  if (p.kernel_size == 3) all<T, 3>(p, s, x);
  if (p.kernel_size == 5) all<T, 5>(p, s, x);
  if (p.kernel_size == 7) all<T, 7>(p, s, x);
  if (p.kernel_size == 9) all<T, 9>(p, s, x);
}

}  // namespace

// Returns how many of the three kernels had a FixedTile.
extern "C" int run_banded(bool bfloat16, const int64_t* sizes, const int64_t* setting,
                           void* const* pointers) {
  const Problem p{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
                  sizes[3], sizes[4], sizes[5], 1,        1};
  HostBlock::require(has_banded(p), "no banded kernel for these sizes");
  const Setting s{setting[0], setting[1], setting[2], setting[3],
                  setting[4], setting[5], setting[6]};
  HostBlock::require(!s.column || has_pixels(p, p.W * s.column, s.column), "no such pixels");
  const Tensors x{pointers[0], pointers[1], pointers[2], static_cast<const float*>(pointers[3]),
                  pointers[4], pointers[5], pointers[6], static_cast<float*>(pointers[7])};
  fixed_tiles = 0;
  MatrixLoads::get() = {};
  if (bfloat16)
    with_kernel_size<c10::BFloat16>(p, s, x);
  else
    with_kernel_size<c10::Half>(p, s, x);
  return fixed_tiles;
}

// Of the last call: turns of shared memory that a load of a matrix took, 1 at the least.
extern "C" double turns_per_matrix() {
  return static_cast<double>(MatrixLoads::get().turns) / MatrixLoads::get().matrices;
}
