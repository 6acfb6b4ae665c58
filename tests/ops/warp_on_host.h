// ops/csrc/cuda/warp.h for the CPU: every thread of a block is a fiber. A warp runs until all its
// lanes wait for the block, so a missing block_sync shows as wrong values, in one order of the
// warps or the other. Copies happen at wait_copies, so a missing wait shows too. The fragments are
// written from the tables of PTX's mma.m16n8k16 and ldmatrix, not from the kernels.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

namespace elsa {

struct HostBlock {
  static constexpr int kThreads = 256;
  static constexpr size_t kStack = 256 * 1024;
  enum State { kRunnable, kAtWarp, kAtBlock, kDone };
  struct Copy {
    void* to;
    const void* from;
    int bytes;
    bool inside;
  };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    State state = kDone;
    int parity = 0;
    bool vote = false;
    std::vector<Copy> copies;
  };
  union Slot {  // what a lane shows its warp
    uint32_t words[6];
    const void* address;
    float value;
  };

  std::vector<Fiber> fibers{kThreads};
  Slot slots[2][kThreads];
  ucontext_t scheduler;
  std::function<void()> body;
  int current = 0;
  bool any = false;

  static HostBlock& get() {
    static HostBlock block;
    return block;
  }

  static void enter() {
    get().body();
    get().leave(kDone);
  }

  void leave(State state) {
    Fiber& fiber = fibers[current];
    fiber.state = state;
    swapcontext(&fiber.context, &scheduler);
  }

  static void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "warp_on_host: %s\n", what);
    std::abort();
  }

  void run(const std::function<void()>& f, bool reversed) {
    body = f;
    for (Fiber& fiber : fibers) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, enter, 0);
      fiber.state = kRunnable;
    }
    while (true) {
      for (int i = 0; i < kThreads / 32; ++i) run_warp(reversed ? kThreads / 32 - 1 - i : i);
      for (const Fiber& fiber : fibers)
        require(fiber.state == fibers[0].state, "some threads wait for others that have ended");
      if (fibers[0].state == kDone) {
        for (const Fiber& fiber : fibers)
          require(fiber.copies.empty(), "a block ends with a copy under way");
        return;
      }
      any = false;
      for (Fiber& fiber : fibers) {
        any = any || fiber.vote;
        fiber.state = kRunnable;
      }
    }
  }

  void run_warp(int warp) {
    const int first = warp * 32;
    while (true) {
      for (current = first; current < first + 32; ++current)
        if (fibers[current].state == kRunnable) swapcontext(&scheduler, &fibers[current].context);
      for (int i = first; i < first + 32; ++i)
        require(fibers[i].state == fibers[first].state, "a warp's lanes diverge");
      if (fibers[first].state != kAtWarp) return;
      for (int i = first; i < first + 32; ++i) fibers[i].state = kRunnable;
    }
  }

  // Shows `mine` to the warp and returns what the warp's lanes show.
  const Slot* exchange(const Slot& mine) {
    Slot* shown = slots[fibers[current].parity ^= 1];
    shown[current] = mine;
    leave(kAtWarp);
    return shown + current / 32 * 32;
  }
};

inline int thread_index() { return HostBlock::get().current; }

inline bool block_any(bool value) {
  HostBlock& block = HostBlock::get();
  block.fibers[block.current].vote = value;
  block.leave(HostBlock::kAtBlock);
  return block.any;
}
inline void block_sync() { block_any(false); }

inline float shuffle(float value, int lane) {
  HostBlock::Slot mine;
  mine.value = value;
  return HostBlock::get().exchange(mine)[lane].value;
}

template <class T>
T* one_pointer(T* at) {
  return at;
}

inline uint32_t pick_bytes(uint32_t first, uint32_t second, uint32_t which) {
  const uint64_t both = first | static_cast<uint64_t>(second) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(both >> 8 * (which >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

template <class T, class A>
A exponential(A x) {
  return std::exp(x);
}

inline uint32_t read_only(const uint32_t* at) { return *at; }

template <int BYTES>
void copy_async(void* to, const void* from, bool inside) {
  HostBlock::require(reinterpret_cast<uintptr_t>(to) % BYTES == 0 &&
                         reinterpret_cast<uintptr_t>(from) % BYTES == 0,
                     "a misaligned copy");
  HostBlock& block = HostBlock::get();
  block.fibers[block.current].copies.push_back({to, from, BYTES, inside});
}
inline void wait_copies() {
  HostBlock& block = HostBlock::get();
  for (const auto& copy : block.fibers[block.current].copies) {
    if (copy.inside)
      std::memcpy(copy.to, copy.from, copy.bytes);
    else
      std::memset(copy.to, 0, copy.bytes);
  }
  block.fibers[block.current].copies.clear();
}

inline void load_words(uint32_t (&words)[4], const void* from, bool inside) {
  HostBlock::require(reinterpret_cast<uintptr_t>(from) % 16 == 0, "a misaligned load");
  if (inside)
    std::memcpy(words, from, 16);
  else
    std::memset(words, 0, 16);
}
inline void store_words(void* to, const uint32_t (&words)[4]) {
  HostBlock::require(reinterpret_cast<uintptr_t>(to) % 16 == 0, "a misaligned store");
  std::memcpy(to, words, 16);
}

inline uint32_t transpose(uint32_t elements) {
  HostBlock& block = HostBlock::get();
  const auto* lanes = block.exchange({{elements}});
  const int row = block.current % 32 / 4, column = block.current % 4 * 2;  // of the result
  const auto element = [&](int r, int c) { return lanes[4 * r + c / 2].words[0] >> 16 * (c % 2) & 0xffff; };
  return element(column, row) | element(column + 1, row) << 16;
}

template <class T>
float half_of(uint32_t word, int which) {
  return static_cast<float>(T(static_cast<unsigned short>(word >> (16 * which)), T::from_bits()));
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  HostBlock& block = HostBlock::get();
  const auto* lanes = block.exchange({{a[0], a[1], a[2], a[3], b0, b1}});
  const int group = block.current % 32 / 4, quad = block.current % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + (i >= 2 ? 8 : 0), column = 2 * quad + i % 2;
    float sum = d[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = lanes[row % 8 * 4 + k % 8 / 2].words[k / 8 * 2 + row / 8];
      const uint32_t right = lanes[column * 4 + k % 8 / 2].words[4 + k / 8];
      sum += half_of<T>(left, k % 2) * half_of<T>(right, k % 2);
    }
    d[i] = sum;
  }
}

// What loads of matrices have taken since the last reset: the rows of a matrix are read at once
// where they lie in different eighths of the 32 banks of shared memory.
struct MatrixLoads {
  int64_t matrices = 0, turns = 0;
  static MatrixLoads& get() {
    static MatrixLoads loads;
    return loads;
  }
  void count(const HostBlock::Slot* rows) {
    int in[8] = {};
    ++matrices;
    int most = 0;
    for (int i = 0; i < 8; ++i) {
      const auto chunk = reinterpret_cast<uintptr_t>(rows[i].address) / 16;
      bool again = false;  // the same row is read once
      for (int j = 0; j < i; ++j) again = again || rows[j].address == rows[i].address;
      if (!again) most = std::max(most, ++in[chunk % 8]);
    }
    turns += most;
  }
};

// The addresses of N matrices' rows, those of matrix i from 8 * i on.
template <int N>
const HostBlock::Slot* show_rows(const void* row) {
  HostBlock& block = HostBlock::get();
  HostBlock::Slot mine;
  mine.address = row;
  const int lane = block.current % 32;
  if (lane < 8 * N)
    HostBlock::require(reinterpret_cast<uintptr_t>(row) % 16 == 0, "a misaligned matrix row");
  const auto* rows = block.exchange(mine);
  if (lane == 0)
    for (int i = 0; i < N; ++i) MatrixLoads::get().count(rows + 8 * i);
  return rows;
}

inline uint32_t element(const HostBlock::Slot* rows, int row, int column) {
  return static_cast<const uint16_t*>(rows[row].address)[column];
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const int lane = HostBlock::get().current % 32, n = lane / 4, t = lane % 4;
  const auto* rows = show_rows<4>(row);
  for (int i = 0; i < 4; ++i)
    r[i] = element(rows + 8 * i, n, 2 * t) | element(rows + 8 * i, n, 2 * t + 1) << 16;
}

template <int N>
void load_transposed(uint32_t (&r)[N], const void* row) {
  const int lane = HostBlock::get().current % 32, n = lane / 4, t = lane % 4;
  const auto* rows = show_rows<N>(row);
  for (int i = 0; i < N; ++i)
    r[i] = element(rows + 8 * i, 2 * t, n) | element(rows + 8 * i, 2 * t + 1, n) << 16;
}

}  // namespace elsa
