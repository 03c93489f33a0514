// Few rows of x on a GPU of compute capability 8.0 or more. H is split over the blocks; a block takes 16 rows of W at a
// time, and keeps its part of y in registers.
//
// W comes through a ring of slots in shared memory, each a chunk of 512 columns of 16 rows; a warp has 64 columns of
// every chunk, of W, of x and of y, for both products. Per 16 rows of W:
//
//   encode   aᵀ [16, n] = W_chunk [16, 64] xᵀ [64, n], summed over the warp's chunks as they arrive
//   latents  the warps' sums are added in order, + b_enc, f, rounded: h in shared memory; its statistics
//   decode   yᵀ_chunk [64, n] += W_chunkᵀ [64, 16] hᵀ [16, n]; then the chunk's slot is filled with a later one
//
// Two barriers a slot say that it is full and that every warp has read it. Each warp copies two of a chunk's rows: from
// compute capability 9.0 on with a bulk copy each, of up to 1 KiB, else in pieces of 16 bytes a thread.
//
// Rows of W are the M dimension of the first product and its columns that of the second, so that 8 rows of x fill an
// instruction. A second kernel adds the blocks' parts of y, and of the rows' statistics, in order: results are bitwise
// reproducible on one device.
#include "few_rows.h"

#ifndef TIEDFUSED_CUDA_ON_HOST  // the tests compile this file for the CPU, with these instructions in C++
#include "ptx.h"
#endif

namespace tiedfused::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTileRows = 16;
constexpr int kWarpRows = kTileRows / kWarps;  // that a warp copies
constexpr int kWarpColumns = 64;               // that a warp multiplies
constexpr int kSteps = kWarpColumns / 16;      // of 16 columns, an instruction's worth
constexpr int kChunkColumns = kWarps * kWarpColumns;
constexpr int kRowBytes = kChunkColumns * 2 + 16;  // 16 more: eight rows then start in different banks
constexpr int kSlotBytes = kTileRows * kRowBytes;
constexpr int kLatentStride = kTileRows + 8;  // elements, likewise
constexpr int kRowStatsBytes = 8;             // l1, l0
constexpr int kSlotBarriers = 2;              // full, read

// Shared memory of a block with a ring of `slots`, for kGroups groups of 8 rows of x.
template <int kGroups>
constexpr int shared_bytes(int slots) {
  return slots * (kSlotBytes + kSlotBarriers * 8) +
         8 * kGroups * (kWarps * kTileRows * 4 + kLatentStride * 2 + kRowStatsBytes);
}

// The longest ring that fits: what is on its way while a block computes is what keeps the memory busy.
template <int kGroups>
constexpr int slots_within(int limit) {
  const int slots = (limit - shared_bytes<kGroups>(0)) / (shared_bytes<kGroups>(1) - shared_bytes<kGroups>(0));
  return slots > 0 ? slots : 0;
}

TIEDFUSED_HOST_DEVICE constexpr int chunks_of(int d) { return (d + kChunkColumns - 1) / kChunkColumns; }

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// f(Constant<0>) … f(Constant<kCount − 1>)
template <int kCount, int kFrom = 0, typename F>
__device__ inline void unrolled(F&& f) {
  if constexpr (kFrom < kCount) {
    f(Constant<kFrom>{});
    unrolled<kCount, kFrom + 1>(f);
  }
}

// How a warp copies its rows of a chunk, from `row` and `column` on, into a slot. Rows past H become zeros: their
// latents are 0 too, but what an unfilled slot holds may be no number.
struct AsyncCopies {
  static constexpr int kArrivals = kThreads;  // at the barrier `full`, a chunk

  static __device__ void copy(const Problem& p, int64_t row, int column, int bytes, char* to, uint64_t* full) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      const bool valid = row + i < p.h;
      const uint16_t* from = p.weight + (valid ? (row + i) * p.weight_stride + column : 0);
#pragma unroll
      for (int at = 0; at < kChunkColumns * 2; at += 32 * 16) {
        const int mine = at + lane * 16;
        if (mine < bytes) copy_async(to + i * kRowBytes + mine, from + mine / 2, valid);
      }
    }
    arrive_after_copies(full);
  }

  static __device__ void barriers_made() {}
};

struct BulkCopies {
  static constexpr int kArrivals = kWarps;

  static __device__ void copy(const Problem& p, int64_t row, int column, int bytes, char* to, uint64_t* full) {
    const int lane = threadIdx.x % 32;
    const int64_t rows_left = p.h - row;
    const int rows = rows_left >= kWarpRows ? kWarpRows : rows_left > 0 ? static_cast<int>(rows_left) : 0;
    if (rows < kWarpRows) {  // in the last tile only, so that no bulk copy follows these stores
      for (int i = rows; i < kWarpRows; ++i) {
#pragma unroll 1
        for (int at = lane * 16; at < bytes; at += 32 * 16) store_zeros(to + i * kRowBytes + at);
      }
      __syncwarp();
    }
    if (lane != 0) return;
    arrive_expecting(full, rows * bytes);
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      if (i < rows) copy_bulk(to + i * kRowBytes, p.weight + (row + i) * p.weight_stride + column, bytes, full);
    }
  }

  static __device__ void barriers_made() { fence_bulk_copies(); }
};

struct Counted {
  float absolute, total;  // sums of |h| and of h, in order
  int active;             // how many are not 0
};

template <typename T>
__device__ inline Counted count(const uint16_t* latents, int stride, int size) {
  Counted counted{};
#pragma unroll 2  // registers are full
  for (int i = 0; i < size; ++i) {
    const float h = T::widen(latents[i * stride]);
    counted.absolute += fabsf(h);
    counted.total += h;
    counted.active += h != 0.0f;
  }
  return counted;
}

// The blocks' parts of the rows' statistics, which lie behind those of y.
struct RowParts {
  float* l1;  // [blocks, n]
  int* l0;    // [blocks, n]

  __device__ RowParts(const Problem& p, int blocks)
      : l1(p.parts + int64_t{blocks} * p.n * p.d), l0(reinterpret_cast<int*>(l1 + blocks * p.n)) {}
};

// One block's part of y; up to kChunks chunks of columns, kGroups groups of 8 rows of x.
template <typename T, int kChunks, int kGroups, typename Copies>
__device__ inline void part_of_y(const Problem& p, int slots) {
  constexpr int kN = 8 * kGroups;
  extern __shared__ __align__(16) char shared[];
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared + slots * kSlotBytes);
  uint64_t* const read = full + slots;
  float* const sums = reinterpret_cast<float*>(read + slots);                             // [kWarps][kTileRows][kN]
  uint16_t* const latents = reinterpret_cast<uint16_t*>(sums + kWarps * kTileRows * kN);  // [kN][kLatentStride]
  float* const l1 = reinterpret_cast<float*>(latents + kN * kLatentStride);               // [kN]
  int* const l0 = reinterpret_cast<int*>(l1 + kN);                                        // [kN]

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int quad = lane / 4, pair = lane % 4 * 2;  // where a lane's elements are in a fragment
  const auto first_column = [&](int chunk) { return (chunk * kWarps + warp) * kWarpColumns; };
  const int chunks = chunks_of(p.d);

  const int64_t all_tiles = (p.h + kTileRows - 1) / kTileRows;
  const int64_t first_tile = all_tiles * blockIdx.x / gridDim.x, last_tile = all_tiles * (blockIdx.x + 1) / gridDim.x;

  if (threadIdx.x == 0) {
    for (int slot = 0; slot < slots; ++slot) {
      make_barrier(full + slot, Copies::kArrivals);
      make_barrier(read + slot, kWarps);
    }
    Copies::barriers_made();
  }
  __syncthreads();

  // the copy of one chunk after the other, tile by tile, into one slot of the ring after the other
  int64_t copy_tile = first_tile;
  int copy_chunk = 0;
  const auto copy_next = [&](int slot) {
    const int column = copy_chunk * kChunkColumns;
    const int bytes = (p.d - column < kChunkColumns ? p.d - column : kChunkColumns) * 2;
    Copies::copy(p, copy_tile * kTileRows + warp * kWarpRows, column, bytes,
                 shared + slot * kSlotBytes + warp * kWarpRows * kRowBytes, full + slot);
    if (++copy_chunk == chunks) {
      copy_chunk = 0;
      ++copy_tile;
    }
  };
  for (int slot = 0; slot < slots && copy_tile < last_tile; ++slot) copy_next(slot);

  // x as the second operand of the encode product, for the whole run
  uint32_t x[kChunks][kSteps][kGroups][2];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = g * 8 + quad, column = first_column(c) + s * 16 + half * 8 + pair;
          const uint16_t* from = p.x + row * p.x_stride + column;
          x[c][s][g][half] = row < p.n && column < p.d ? from[0] | static_cast<uint32_t>(from[1]) << 16 : 0u;
        }
      }
    }
  }

  if (threadIdx.x < kN) {
    l1[threadIdx.x] = 0.0f;
    l0[threadIdx.x] = 0;
  }

  float y[kChunks][kSteps][kGroups][4] = {};
  struct Place {
    int slot;
    uint32_t parity;  // of the phase that both barriers of the slot are in
  };
  Place first{0, 0};  // of the tile's first chunk
  const auto place_of = [&](int chunk) {
    const int slot = first.slot + chunk;
    return slot < slots ? Place{slot, first.parity} : Place{slot - slots, first.parity ^ 1};
  };

  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    float a[kGroups][4] = {};
    unrolled<kChunks>([&](auto constant) {
      constexpr int c = decltype(constant)::value;
      if (c >= chunks) return;
      const Place place = place_of(c);
      wait_for(full + place.slot, place.parity);
      if (first_column(c) >= p.d) return;
      const char* rows =
          shared + place.slot * kSlotBytes + lane % 16 * kRowBytes + (warp * kWarpColumns + lane / 16 * 8) * 2;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        uint32_t w[4];
        load_matrices<false>(rows + s * 32, w);
        const int column = first_column(c) + s * 16;  // past d nothing was copied: what is there may be no number
        if (column >= p.d) w[0] = w[1] = 0;
        if (column + 8 >= p.d) w[2] = w[3] = 0;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) multiply_add<T>(a[g], w, x[c][s][g]);
      }
    });
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[(warp * kTileRows + quad + i / 2 * 8) * kN + g * 8 + pair + i % 2] = a[g][i];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTileRows * kN; i += kThreads) {
      const int row = i / kN, n = i % kN;
      const int64_t j = tile * kTileRows + row;
      float latent = j < p.h && p.bias_enc != nullptr ? T::widen(p.bias_enc[j]) : 0.0f;
      for (int w = 0; w < kWarps; ++w) latent += sums[(w * kTileRows + row) * kN + n];
      activate(p.activation, &latent, 1);
      latents[n * kLatentStride + row] = j < p.h ? T::narrow(latent) : 0;
    }
    __syncthreads();

    if (p.stats.wanted()) {
      const int rows = tile + 1 < all_tiles ? kTileRows : static_cast<int>(p.h - tile * kTileRows);
      const int n = threadIdx.x, row = n - kN;  // that this thread counts
      if (n < p.n) {
        const Counted counted = count<T>(latents + n * kLatentStride, 1, rows);
        l1[n] += counted.absolute;
        l0[n] += counted.active;
      } else if (row >= 0 && row < rows) {
        const Counted counted = count<T>(latents + row, kLatentStride, p.n);
        p.stats.total[tile * kTileRows + row] = counted.total;
        p.stats.fired[tile * kTileRows + row] = counted.active;
      }
    }

    uint32_t h[kGroups][2];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint16_t* from = latents + (g * 8 + quad) * kLatentStride + half * 8 + pair;
        h[g][half] = from[0] | static_cast<uint32_t>(from[1]) << 16;
      }
    }
    unrolled<kChunks>([&](auto constant) {
      constexpr int c = decltype(constant)::value;
      if (c >= chunks) return;
      const Place place = place_of(c);
      if (first_column(c) < p.d) {
        const char* rows = shared + place.slot * kSlotBytes + (lane % 8 + lane / 16 * 8) * kRowBytes +
                           (warp * kWarpColumns + lane / 8 % 2 * 8) * 2;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          uint32_t w[4];
          load_matrices<true>(rows + s * 32, w);
#pragma unroll
          for (int g = 0; g < kGroups; ++g) multiply_add<T>(y[c][s][g], w, h[g]);
        }
      }
      if (copy_tile == last_tile) return;
      __syncwarp();
      if (lane == 0) arrive(read + place.slot);
      wait_for(read + place.slot, place.parity);
      copy_next(place.slot);
    });
    first = place_of(chunks);
  }

  if (p.stats.wanted() && threadIdx.x < p.n) {
    const RowParts rows(p, gridDim.x);
    rows.l1[blockIdx.x * p.n + threadIdx.x] = l1[threadIdx.x];
    rows.l0[blockIdx.x * p.n + threadIdx.x] = l0[threadIdx.x];
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = g * 8 + pair + i % 2, column = first_column(c) + s * 16 + quad + i / 2 * 8;
          if (n < p.n && column < p.d) p.parts[(blockIdx.x * int64_t{p.n} + n) * p.d + column] = y[c][s][g][i];
        }
      }
    }
  }
}

template <typename T, int kChunks, int kGroups>
__global__ void __launch_bounds__(kThreads, 1) few_rows_part(const Problem p, int slots) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  part_of_y<T, kChunks, kGroups, BulkCopies>(p, slots);
#else
  part_of_y<T, kChunks, kGroups, AsyncCopies>(p, slots);
#endif
}

constexpr int kCombineColumns = 32;  // elements of y that a block makes
constexpr int kCombineBytes = kWarps * kCombineColumns * 4;

// y from the parts: each warp adds a range of them, in the order of their blocks, and the warps' sums are added in
// order. A warp waits for 17 of 132 parts, 8 at a time; one thread an element would wait for 132.
template <typename T>
__global__ void __launch_bounds__(kThreads) few_rows_combine(const Problem p, int blocks) {
  if (p.stats.wanted() && blockIdx.x == 0 && threadIdx.x < p.n) {
    const RowParts rows(p, blocks);
    float l1 = 0.0f;
    int64_t l0 = 0;
#pragma unroll 8
    for (int block = 0; block < blocks; ++block) {
      l1 += rows.l1[block * p.n + threadIdx.x];
      l0 += rows.l0[block * p.n + threadIdx.x];
    }
    p.stats.l1[threadIdx.x] = l1;
    p.stats.l0[threadIdx.x] = l0;
  }

  extern __shared__ __align__(16) char shared[];
  float* const sums = reinterpret_cast<float*>(shared);  // [kWarps][kCombineColumns]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int i = blockIdx.x * kCombineColumns + lane, size = p.n * p.d;
  float sum = 0.0f;
  if (i < size) {
#pragma unroll 8
    for (int block = blocks * warp / kWarps; block < blocks * (warp + 1) / kWarps; ++block) {
      sum += p.parts[block * int64_t{size} + i];
    }
  }
  sums[warp * kCombineColumns + lane] = sum;
  __syncthreads();
  if (warp != 0 || i >= size) return;
  float z = p.bias_dec != nullptr ? T::widen(p.bias_dec[i % p.d]) : 0.0f;
  for (int w = 0; w < kWarps; ++w) z += sums[w * kCombineColumns + lane];
  activate(p.output_activation, &z, 1);
  p.y[i] = T::narrow(z);
}

// f(Constant<kChunks>, Constant<kGroups>) of the smallest instance that takes the problem, zeros if there is none.
template <typename F>
auto with_instance(const Problem& p, F&& f) {
  const int chunks = chunks_of(p.d), groups = (p.n + 7) / 8;
  // clang-format off
#define INSTANCE(c, g) if (chunks <= c && groups <= g) return f(Constant<c>{}, Constant<g>{});
  INSTANCE(1, 1) INSTANCE(1, 2) INSTANCE(1, 4) INSTANCE(1, 8)
  INSTANCE(2, 1) INSTANCE(2, 2) INSTANCE(2, 4)
  INSTANCE(4, 1) INSTANCE(4, 2)
  INSTANCE(8, 1)
// clang-format on
#undef INSTANCE
      return f(Constant<0>{}, Constant<0>{});
}

}  // namespace tiedfused::cuda

#ifndef TIEDFUSED_CUDA_ON_HOST

namespace {

using namespace tiedfused::cuda;

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) return 0;
  return value;
}

int shared_limit() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

template <typename T>
cudaError_t launch(const Problem& p, int blocks, cudaStream_t stream) {
  const cudaError_t error = with_instance(p, [&](auto chunks, auto groups) {
    if constexpr (chunks.value == 0) {
      return cudaErrorInvalidValue;
    } else {
      const int slots = slots_within<groups.value>(shared_limit()), bytes = shared_bytes<groups.value>(slots);
      const auto kernel = few_rows_part<T, chunks.value, groups.value>;
      const cudaError_t set = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      if (set != cudaSuccess) return set;
      kernel<<<blocks, kThreads, bytes, stream>>>(p, slots);
      return cudaGetLastError();
    }
  });
  if (error != cudaSuccess) return error;
  const int combining = (p.n * p.d + kCombineColumns - 1) / kCombineColumns;
  few_rows_combine<T><<<combining, kThreads, kCombineBytes, stream>>>(p, blocks);
  return cudaGetLastError();
}

}  // namespace

extern "C" {

const char* tiedfused_few_rows_refuses(const Problem* p) {
  const auto unaligned = [](const void* pointer, int64_t stride) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 != 0 || stride % 8 != 0;
  };
  if (p->d % 8 != 0) return "x and weight: expected a d that is a multiple of 8";
  if (unaligned(p->weight, p->weight_stride)) return "weight: expected rows that start at multiples of 16 bytes";
  const int slots = with_instance(
      *p, [](auto chunks, auto groups) { return chunks.value == 0 ? -1 : slots_within<groups.value>(shared_limit()); });
  if (slots == -1) return "x: expected up to 8 rows for d to 4096, 16 for d to 2048, 32 for d to 1024, 64 for d to 512";
  if (slots < chunks_of(p->d)) return "weight: expected 16 rows that fit this GPU's shared memory";
  return nullptr;
}

int tiedfused_few_rows_blocks(const Problem* p) {
  const int64_t tiles = (p->h + kTileRows - 1) / kTileRows;
  const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  return static_cast<int>(tiles < multiprocessors ? tiles : multiprocessors);
}

int tiedfused_few_rows(const Problem* p, bool bfloat16, int blocks, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return bfloat16 ? launch<Bfloat16>(*p, blocks, s) : launch<Float16>(*p, blocks, s);
}

const char* tiedfused_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // extern "C"

#endif
