// What the threads of a block share out among them. Written for one thread, with thread_index of
// warp.h (warp_on_host.h in the tests).
#pragma once

#ifdef __CUDACC__
#include "warp.h"
#endif

#include "kernels.h"

namespace elsa {

constexpr int kBlockThreads = 256;

// Calls f(line, vector) for every vector of every line, shared out over the block's threads.
template <class F>
ELSA_DEVICE void for_each_vector(int lines, int vectors, const F& f) {
  int line = thread_index() / vectors, vector = thread_index() % vectors;
  const int more_lines = kBlockThreads / vectors, more_vectors = kBlockThreads % vectors;
  while (line < lines) {
    f(line, vector);
    line += more_lines;
    vector += more_vectors;
    if (vector >= vectors) {
      vector -= vectors;
      ++line;
    }
  }
}

}  // namespace elsa
