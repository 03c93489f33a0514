// A block of a CUDA kernel as coroutines of one thread of the CPU: the words of CUDA C++ that csrc/cuda/few_rows.cu is
// written in, and its instructions (csrc/cuda/ptx.h) as the PTX manual defines them.
//
// Asynchronous copies land either at once or as late as can be: when no thread can go on without, one after the other
// in a random order; until then NaNs are where they will be. A kernel is right if it is right with both.
//
// What copies and matrix loads do to shared memory is followed by vector clocks: a thread knows of what happened before
// only through barriers. So a read of a slot before its copy is known to be there, and a copy into a slot that some
// lane may still read, are errors even if the values come out right. Plain loads and stores are not followed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
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
inline Index threadIdx, blockIdx, gridDim;  // of the thread that runs

namespace tiedfused::cuda {
alignas(16) inline char shared[256 << 10];
}

namespace on_host {

constexpr int kBlockThreads = 256, kMaxBarriers = 64;

enum class Landing { early, late };
inline Landing landing = Landing::early;

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  std::printf("block %d, thread %d: ", blockIdx.x, threadIdx.x);
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::puts("");
  std::fflush(stdout);
  std::_Exit(1);
}

// What a thread knows: how far the others were, and how many phases of each barrier are complete.
struct Clock : std::array<int, kBlockThreads + kMaxBarriers> {
  Clock() { fill(0); }
  void learn(const Clock& other) {
    for (size_t i = 0; i < size(); ++i) (*this)[i] = std::max((*this)[i], other[i]);
  }
};

struct Barrier {
  int id, arrivals, missing;
  int64_t missing_bytes;
  int phase;
  int made_by, made_at;
  bool fenced;
  Clock arrived, complete;
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
  int bytes;
  Barrier* barrier;  // null: no barrier tells of it yet
  int phase;
  bool landed;
};

// 16 bytes of shared memory
struct Cell {
  std::shared_ptr<Copy> copy;  // that wrote it
  int stored_by = -1, stored_at;
  std::vector<std::pair<int, int>> reads;  // thread, its time
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 << 10);
  bool done;
  std::function<bool()> ready;
  std::string waits_for;
  Clock clock;
  std::vector<std::shared_ptr<Copy>> copies;  // that no barrier tells of yet
};

// Copies that land together, after which their thread arrives at the barrier if `arrives`.
struct Flight {
  std::vector<std::shared_ptr<Copy>> copies;
  Barrier* barrier;
  bool arrives;
};

// Where a number of threads meet; they learn from each other if the kernel may rely on it.
struct Meeting {
  int threads, here = 0, round = 0;
  Clock clock = {}, last = {};
};

inline std::array<Thread, kBlockThreads> threads;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::map<const void*, Barrier> barriers;
inline std::vector<Flight> flights;
inline std::array<Cell, sizeof tiedfused::cuda::shared / 16> cells;
inline Meeting block{kBlockThreads};
inline std::array<Meeting, kBlockThreads / 32> warp_syncs, warp_instructions;
inline std::mt19937 chance;

inline Thread& self() { return threads[threadIdx.x]; }
inline Clock& my_clock() { return self().clock; }
inline int lane() { return threadIdx.x % 32; }

inline void wait_until(std::function<bool()> ready, std::string waits_for) {
  Thread& thread = self();
  if (ready()) return;
  thread.ready = std::move(ready);
  thread.waits_for = std::move(waits_for);
  swapcontext(&thread.context, &scheduler);
}

inline void meet(Meeting& meeting, const char* where, bool learn) {
  if (learn) meeting.clock.learn(my_clock());
  const int round = meeting.round;
  if (++meeting.here == meeting.threads) {
    meeting.here = 0;
    ++meeting.round;
    meeting.last = meeting.clock;
  } else {
    wait_until([&meeting, round] { return meeting.round != round; }, where);
  }
  if (!learn) return;
  my_clock().learn(meeting.last);
  ++my_clock()[threadIdx.x];
}

inline Cell* cells_of(const void* at, int bytes) {
  const auto offset = static_cast<const char*>(at) - tiedfused::cuda::shared;
  if (offset % 16 != 0 || offset < 0 || offset + bytes > static_cast<int>(sizeof tiedfused::cuda::shared)) {
    fail("%d bytes at offset %ld of shared memory: not aligned to 16 bytes, or outside", bytes, long{offset});
  }
  return &cells[offset / 16];
}

inline bool knows(const Copy& copy) {
  return copy.barrier != nullptr && copy.landed && my_clock()[kBlockThreads + copy.barrier->id] > copy.phase;
}

inline Barrier& barrier_at(const uint64_t* at) {
  const auto found = barriers.find(at);
  if (found == barriers.end()) fail("no barrier was made at this address");
  Barrier& barrier = found->second;
  if (my_clock()[barrier.made_by] < barrier.made_at) fail("barrier %d: used before it is known to be made", barrier.id);
  return barrier;
}

inline void complete_if_all_is_there(Barrier& barrier) {
  if (barrier.missing != 0 || barrier.missing_bytes != 0) return;
  barrier.missing = barrier.arrivals;
  barrier.complete = barrier.arrived;
  barrier.complete[kBlockThreads + barrier.id] = barrier.arrived[kBlockThreads + barrier.id] = ++barrier.phase;
}

inline void arrive(Barrier& barrier, int64_t bytes) {
  if (barrier.missing == 0) fail("barrier %d: more than its %d arrivals", barrier.id, barrier.arrivals);
  --barrier.missing;
  barrier.missing_bytes += bytes;
  complete_if_all_is_there(barrier);
}

inline void land(const Flight& flight) {
  for (const auto& copy : flight.copies) {
    if (copy->from != nullptr) {
      std::memcpy(copy->to, copy->from, copy->bytes);
    } else {
      std::memset(copy->to, 0, copy->bytes);
    }
    copy->landed = true;
  }
  if (flight.barrier == nullptr) return;
  if (flight.arrives) {
    arrive(*flight.barrier, 0);
  } else {
    flight.barrier->missing_bytes -= flight.copies[0]->bytes;
    if (flight.barrier->missing_bytes < 0) fail("barrier %d: more bytes than were announced", flight.barrier->id);
    complete_if_all_is_there(*flight.barrier);
  }
}

// Into shared memory, from now on at any time.
inline std::shared_ptr<Copy> start_copy(void* to, const void* from, int bytes, Barrier* barrier) {
  const auto copy = std::make_shared<Copy>(Copy{to, from, bytes, barrier, barrier ? barrier->phase : 0, false});
  Cell* const first = cells_of(to, bytes);
  for (Cell* cell = first; cell != first + bytes / 16; ++cell) {
    if (cell->copy != nullptr && !knows(*cell->copy))
      fail("a copy into a slot that another may still be on its way to");
    if (cell->stored_by >= 0) fail("a copy over what was stored plainly needs a fence");
    for (const auto& [thread, time] : cell->reads) {
      if (my_clock()[thread] < time) fail("a copy into a slot that thread %d may still read", thread);
    }
    cell->reads.clear();
    cell->copy = copy;
  }
  if (landing == Landing::late) std::memset(to, 0xff, bytes);
  return copy;
}

inline void take_off(Flight flight) {
  if (landing == Landing::early) {
    land(flight);
  } else {
    flights.push_back(std::move(flight));
  }
}

inline void run_thread() {
  body();
  self().done = true;
  swapcontext(&self().context, &scheduler);
}

// Runs a block until its threads are done: in a random order, each until it has to wait.
inline void run_block() {
  std::memset(tiedfused::cuda::shared, 0xff, sizeof tiedfused::cuda::shared);
  cells.fill({});
  barriers.clear();
  block = Meeting{kBlockThreads};
  warp_syncs.fill(Meeting{32});
  warp_instructions.fill(Meeting{32});
  for (int t = 0; t < kBlockThreads; ++t) {
    Thread& thread = threads[t];
    thread.done = false;
    thread.ready = [] { return true; };
    thread.clock = {};
    thread.clock[t] = 1;
    thread.copies.clear();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    makecontext(&thread.context, run_thread, 0);
  }
  std::array<int, kBlockThreads> order;
  std::iota(order.begin(), order.end(), 0);
  for (;;) {
    std::shuffle(order.begin(), order.end(), chance);
    bool all_done = true, any_ran = false;
    for (const int t : order) {
      if (threads[t].done) continue;
      all_done = false;
      if (!threads[t].ready()) continue;
      any_ran = true;
      threadIdx.x = t;
      swapcontext(&scheduler, &threads[t].context);
    }
    if (all_done) break;
    if (any_ran) continue;
    if (flights.empty()) {
      threadIdx.x = *std::find_if(order.begin(), order.end(), [](int t) { return !threads[t].done; });
      fail("waits for ever, for %s", self().waits_for.c_str());
    }
    const size_t chosen = chance() % flights.size();
    const Flight flight = flights[chosen];
    flights.erase(flights.begin() + static_cast<long>(chosen));
    land(flight);
  }
  if (!flights.empty()) fail("the block ended before its copies");
}

// Runs `kernel` once a thread, one block after the other.
inline void launch(int blocks, const std::function<void()>& kernel) {
  body = kernel;
  for (int b = 0; b < blocks; ++b) {
    blockIdx.x = b;
    gridDim.x = blocks;
    run_block();
  }
}

inline uint16_t element(uint32_t pair, int which) { return static_cast<uint16_t>(which == 0 ? pair : pair >> 16); }

// Where the lanes of a warp leave what an instruction of all of them reads.
struct Registers {
  const void* rows[32];
  uint32_t a[32][4], b[32][2];
};
inline std::array<Registers, kBlockThreads / 32> registers;

inline Registers& warp_registers() { return registers[threadIdx.x / 32]; }
inline void warp_instruction() { meet(warp_instructions[threadIdx.x / 32], "an instruction of the warp", false); }

}  // namespace on_host

inline void __syncthreads() { on_host::meet(on_host::block, "__syncthreads", true); }
inline void __syncwarp() { on_host::meet(on_host::warp_syncs[threadIdx.x / 32], "__syncwarp", true); }

namespace tiedfused::cuda {

struct Bfloat16 {
  static float widen(uint16_t bits) { return cpu::widen(cpu::bfloat16{bits}); }
  static uint16_t narrow(float v) { return cpu::narrow<cpu::bfloat16>(v).bits; }
};

struct Float16 {
  static float widen(uint16_t bits) { return cpu::widen(cpu::float16{bits}); }
  static uint16_t narrow(float v) { return cpu::narrow<cpu::float16>(v).bits; }
};

inline void make_barrier(uint64_t* at, int arrivals) {
  using namespace on_host;
  if (reinterpret_cast<uintptr_t>(at) % 8 != 0) fail("a barrier that is not aligned to 8 bytes");
  const int id = static_cast<int>(barriers.size());
  if (id == kMaxBarriers) fail("more than %d barriers", kMaxBarriers);
  const Barrier made{id, arrivals, arrivals, 0, 0, threadIdx.x, my_clock()[threadIdx.x], false, {}, {}};
  if (!barriers.emplace(at, made).second) fail("a barrier made twice");
}

inline void fence_bulk_copies() {
  for (auto& [at, barrier] : on_host::barriers) barrier.fenced |= barrier.made_by == threadIdx.x;
}

inline void arrive_expecting(uint64_t* at, int bytes) {
  on_host::Barrier& barrier = on_host::barrier_at(at);
  barrier.arrived.learn(on_host::my_clock());
  ++on_host::my_clock()[threadIdx.x];
  on_host::arrive(barrier, bytes);
}

inline void arrive(uint64_t* at) { arrive_expecting(at, 0); }

inline void wait_for(uint64_t* at, uint32_t parity) {
  on_host::Barrier& barrier = on_host::barrier_at(at);
  if (parity > 1) on_host::fail("parity %u", parity);
  on_host::wait_until([&barrier, parity] { return static_cast<uint32_t>(barrier.phase % 2) != parity; },
                      "barrier " + std::to_string(barrier.id) + " in its phase " + std::to_string(barrier.phase));
  on_host::my_clock().learn(barrier.complete);
}

inline void copy_async(void* to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) on_host::fail("copy_async from an address that is not aligned");
  on_host::self().copies.push_back(on_host::start_copy(to, valid ? from : nullptr, 16, nullptr));
}

inline void arrive_after_copies(uint64_t* at) {
  on_host::Barrier& barrier = on_host::barrier_at(at);
  for (auto& copy : on_host::self().copies) {
    copy->barrier = &barrier;
    copy->phase = barrier.phase;
  }
  on_host::take_off({std::exchange(on_host::self().copies, {}), &barrier, true});
}

inline void copy_bulk(void* to, const void* from, int bytes, uint64_t* at) {
  on_host::Barrier& barrier = on_host::barrier_at(at);
  if (!barrier.fenced) on_host::fail("barrier %d: copy_bulk before a fence", barrier.id);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) on_host::fail("copy_bulk from an address that is not aligned");
  if (bytes <= 0 || bytes % 16 != 0) on_host::fail("copy_bulk of %d bytes", bytes);
  on_host::take_off({{on_host::start_copy(to, from, bytes, &barrier)}, &barrier, false});
}

inline void store_zeros(void* to) {
  on_host::Cell& cell = *on_host::cells_of(to, 16);
  if (cell.copy != nullptr && !on_host::knows(*cell.copy)) on_host::fail("zeros where a copy may be on its way to");
  for (const auto& [thread, time] : cell.reads) {
    if (on_host::my_clock()[thread] < time) on_host::fail("zeros into a slot that thread %d may still read", thread);
  }
  cell.reads.clear();
  cell.copy = nullptr;
  cell.stored_by = threadIdx.x;
  cell.stored_at = on_host::my_clock()[threadIdx.x];
  std::memset(to, 0, 16);
}

template <bool kTransposed>
inline void load_matrices(const void* row, uint32_t (&r)[4]) {
  on_host::Cell& cell = *on_host::cells_of(row, 16);
  if (cell.copy != nullptr && !on_host::knows(*cell.copy)) on_host::fail("reads a slot before it knows it to be full");
  if (cell.stored_by >= 0 && on_host::my_clock()[cell.stored_by] < cell.stored_at) {
    on_host::fail("reads a slot before it knows of the zeros there");
  }
  cell.reads.emplace_back(threadIdx.x, on_host::my_clock()[threadIdx.x]);
  on_host::Registers& warp = on_host::warp_registers();
  const int lane = on_host::lane();
  warp.rows[lane] = row;
  on_host::warp_instruction();
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int m = kTransposed ? lane % 4 * 2 + e : lane / 4, k = kTransposed ? lane / 4 : lane % 4 * 2 + e;
      pair[e] = static_cast<const uint16_t*>(warp.rows[8 * i + m])[k];
    }
    r[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
  on_host::warp_instruction();
}

template <typename T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  on_host::Registers& warp = on_host::warp_registers();
  const int lane = on_host::lane();
  std::memcpy(warp.a[lane], a, sizeof a);
  std::memcpy(warp.b[lane], b, sizeof b);
  on_host::warp_instruction();
  for (int i = 0; i < 4; ++i) {
    const int m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t from_a = warp.a[m % 8 * 4 + k % 8 / 2][m / 8 + k / 8 * 2];
      const uint32_t from_b = warp.b[n * 4 + k % 8 / 2][k / 8];
      c[i] += T::widen(on_host::element(from_a, k % 2)) * T::widen(on_host::element(from_b, k % 2));
    }
  }
  on_host::warp_instruction();
}

}  // namespace tiedfused::cuda
