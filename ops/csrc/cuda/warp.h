// The few instructions of a warp or block that banded.h needs. tests/ops/warp_on_host.h has the
// same functions for the CPU.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

// Before sm_80 there is none of this; banded_fits refuses such a device when the op runs.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define ELSA_ASM(...) __trap()
#else
#define ELSA_ASM(...) asm volatile(__VA_ARGS__)
#endif

namespace elsa {

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ void block_sync() { __syncthreads(); }
__device__ __forceinline__ bool block_any(bool value) { return __syncthreads_or(value) != 0; }
__device__ __forceinline__ float shuffle(float value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
// e^x, for results that are stored as T.
template <class T, class A>
__device__ __forceinline__ A exponential(A x) {
  if constexpr (sizeof(T) > 2) {
    return exp(x);
  } else {
    float result;  // two instructions; what is below 2^-126 becomes 0
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.442695041f));
    return result;
  }
}
__device__ __forceinline__ uint32_t read_only(const uint32_t* at) { return __ldg(at); }

// `at`, in global memory, as a value that the compiler takes as it is: of a sum it would add the parts for each use.
template <class T>
__device__ __forceinline__ T* one_pointer(T* at) {
  asm("" : "+l"(at));
  __builtin_assume(__isGlobal(at));
  return at;
}

// The bytes of `first` (0 to 3) and `second` (4 to 7) that the digits of `which` name, lowest first.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t first, uint32_t second, uint32_t which) {
  return __byte_perm(first, second, which);
}

__device__ __forceinline__ unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

// 16 aligned bytes of global memory, or zeros where not `inside`.
__device__ __forceinline__ void load_words(uint32_t (&words)[4], const void* from, bool inside) {
  const uint4 read = inside ? __ldg(static_cast<const uint4*>(from)) : uint4{0, 0, 0, 0};
  words[0] = read.x;
  words[1] = read.y;
  words[2] = read.z;
  words[3] = read.w;
}
__device__ __forceinline__ void store_words(void* to, const uint32_t (&words)[4]) {
  *static_cast<uint4*>(to) = uint4{words[0], words[1], words[2], words[3]};
}

// Copies BYTES (4 or 8) from global to shared memory, or zeros where not `inside`; done only
// after wait_copies.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
  ELSA_ASM("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)),
               "l"(from), "n"(BYTES), "r"(inside ? BYTES : 0)
               : "memory");
}
__device__ __forceinline__ void wait_copies() { ELSA_ASM("cp.async.wait_all;" ::: "memory"); }

// An 8 x 8 matrix of 16-bit elements, of which each lane has (n, 2 t) and (n, 2 t + 1), n = lane / 4,
// t = lane % 4, transposed: the lane's (2 t, n) and (2 t + 1, n).
__device__ __forceinline__ uint32_t transpose(uint32_t elements) {
  uint32_t result;
  ELSA_ASM("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(elements));
  return result;
}

// d += a * b, 16 x 16 times 16 x 8; the fragments are those of PTX's mma.m16n8k16.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    ELSA_ASM("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    ELSA_ASM("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Four 8 x 8 matrices of 16-bit elements: lane 8 i + r gives the address of row r of matrix i, and
// gets of each matrix the elements (n, 2 t) and (n, 2 t + 1), n = lane / 4, t = lane % 4.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  ELSA_ASM("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Four (two) 8 x 8 matrices of 16-bit elements, transposed: lane 8 i + r gives the address of row r
// of matrix i, and gets of each matrix the elements (2 t, n) and (2 t + 1, n), n = lane / 4,
// t = lane % 4.
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], const void* row) {
  ELSA_ASM("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t (&r)[2], const void* row) {
  ELSA_ASM("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

}  // namespace elsa
