// A block of a CUDA kernel as threads of the CPU: the words of CUDA C++ that csrc/cuda/few_rows.cu is written in, and
// its instructions (csrc/cuda/ptx.h) as the PTX manual defines them.
//
// Asynchronous copies run either at once or not before they are waited for, as `copies_wait` says: a kernel is right if
// it is right with both.
#pragma once

#include <pthread.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "../../csrc/cpu/numbers.h"

#define TIEDFUSED_CUDA_ON_HOST
#define __global__
#define __device__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct Index {
  int x;
};
inline thread_local Index threadIdx, blockIdx, gridDim;

namespace on_host {

constexpr int kBlockThreads = 256;
inline bool copies_wait = false;

class Barrier {
 public:
  explicit Barrier(int threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct Warp {
  Barrier barrier{32};
  const void* rows[32];
  uint32_t a[32][4], b[32][2];
};

inline Barrier block(kBlockThreads);
inline Warp warps[kBlockThreads / 32];
inline thread_local std::deque<std::vector<std::function<void()>>> groups;

inline Warp& warp() { return warps[threadIdx.x / 32]; }
inline int lane() { return threadIdx.x % 32; }

inline uint16_t element(uint32_t pair, int which) { return static_cast<uint16_t>(which == 0 ? pair : pair >> 16); }

// Runs `kernel` once a thread, one block after the other.
inline void launch(int blocks, int threads, const std::function<void()>& kernel) {
  for (int b = 0; b < blocks; ++b) {
    std::vector<std::thread> running;
    for (int t = 0; t < threads; ++t) {
      running.emplace_back([=, &kernel] {
        threadIdx.x = t;
        blockIdx.x = b;
        gridDim.x = blocks;
        groups.assign(1, {});
        kernel();
      });
    }
    for (auto& thread : running) thread.join();
  }
}

}  // namespace on_host

inline void __syncthreads() { on_host::block.wait(); }
inline void __syncwarp() { on_host::warp().barrier.wait(); }

namespace tiedfused::cuda {

alignas(16) inline char shared[256 << 10];

struct Bfloat16 {
  static float widen(uint16_t bits) { return cpu::widen(cpu::bfloat16{bits}); }
  static uint16_t narrow(float v) { return cpu::narrow<cpu::bfloat16>(v).bits; }
};

struct Float16 {
  static float widen(uint16_t bits) { return cpu::widen(cpu::float16{bits}); }
  static uint16_t narrow(float v) { return cpu::narrow<cpu::float16>(v).bits; }
};

inline void copy_async(void* to, const void* from, bool valid) {
  const auto copy = [=] {
    if (valid) {
      std::memcpy(to, from, 16);
    } else {
      std::memset(to, 0, 16);
    }
  };
  if (on_host::copies_wait) {
    on_host::groups.back().push_back(copy);
  } else {
    copy();
  }
}

inline void commit_copies() { on_host::groups.emplace_back(); }

template <int kPending>
inline void wait_for_copies() {
  while (on_host::groups.size() > kPending + 1) {  // the last is not committed yet
    for (const auto& copy : on_host::groups.front()) copy();
    on_host::groups.pop_front();
  }
}

template <bool kTransposed>
inline void load_matrices(const void* row, uint32_t (&r)[4]) {
  on_host::Warp& warp = on_host::warp();
  const int lane = on_host::lane();
  warp.rows[lane] = row;
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int m = kTransposed ? lane % 4 * 2 + e : lane / 4, k = kTransposed ? lane / 4 : lane % 4 * 2 + e;
      pair[e] = static_cast<const uint16_t*>(warp.rows[8 * i + m])[k];
    }
    r[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
  __syncwarp();
}

template <typename T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  on_host::Warp& warp = on_host::warp();
  const int lane = on_host::lane();
  std::memcpy(warp.a[lane], a, sizeof a);
  std::memcpy(warp.b[lane], b, sizeof b);
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const int m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t from_a = warp.a[m % 8 * 4 + k % 8 / 2][m / 8 + k / 8 * 2];
      const uint32_t from_b = warp.b[n * 4 + k % 8 / 2][k / 8];
      c[i] += T::widen(on_host::element(from_a, k % 2)) * T::widen(on_host::element(from_b, k % 2));
    }
  }
  __syncwarp();
}

}  // namespace tiedfused::cuda
