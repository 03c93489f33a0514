// The instructions that few_rows.cu is written in, each as one function.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace tiedfused::cuda {

struct Bfloat16 {
  static __device__ float widen(uint16_t bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); }
  static __device__ uint16_t narrow(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
};

struct Float16 {
  static __device__ float widen(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  static __device__ uint16_t narrow(float v) { return __half_as_ushort(__float2half_rn(v)); }
};

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, asynchronously; zeros where `valid` is false (`from` is not read then).
__device__ inline void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

// Once more arrived at `barrier` when this thread's earlier copy_async are in shared memory.
__device__ inline void arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// `bytes`, a multiple of 16, from global to shared memory, asynchronously; `barrier` counts them when they are there.
// Both addresses are multiples of 16. Needs compute capability 9.0.
__device__ inline void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// What this thread wrote is there for copy_bulk too: such copies reach memory by a way of their own. Needs 9.0.
__device__ inline void fence_bulk_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 16 bytes of zeros to shared memory.
__device__ inline void store_zeros(void* to) { *static_cast<uint4*>(to) = uint4{0, 0, 0, 0}; }

// A barrier in shared memory: a phase of it is complete after `arrivals` of arrive…, and when the bytes that these
// announced are there. Phases have parities 0, 1, 0, …
__device__ inline void make_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and announces `bytes` of copy_bulk. Needs 9.0.
__device__ inline void arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Until the barrier's phase of this parity is complete; it must be the phase in progress or the one before.
__device__ inline void wait_for(uint64_t* barrier, uint32_t parity) {
  uint32_t complete = 0;
  while (complete == 0) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900  // with a pause in hardware
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(complete)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
#else
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(complete)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
#endif
  }
}

// Four 8 × 8 matrices of 16-bit elements: lanes 8i…8i+7 give the rows of matrix i, and this lane gets in r[i] elements
// (lane / 4, lane % 4 · 2) and the next; of the transposed matrices if kTransposed.
template <bool kTransposed>
__device__ inline void load_matrices(const void* row, uint32_t (&r)[4]) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// c [16, 8] += a [16, 16] b [16, 8], fragments as the PTX manual lays out mma.m16n8k16.
template <typename T>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ inline void multiply_add<Bfloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ inline void multiply_add<Float16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace tiedfused::cuda
