// Few rows of x on a GPU of compute capability 8.0 or more. H is split over the blocks; a block takes 16 rows of W at a
// time, and keeps its part of y in registers.
//
// Columns are dealt to the warps in chunks of 64: warp w has columns 64 (w + 8 c) … + 63 for c = 0 … kChunks − 1, of W,
// of x and of y, for both products. So a warp reads only what it copied itself, and its ring of chunks in shared memory
// needs no barrier of the block. Per 16 rows of W:
//
//   encode   aᵀ [16, n] = W_chunk [16, 64] xᵀ [64, n], summed over the warp's chunks as they arrive
//   latents  the warps' sums are added in order, + b_enc, f, rounded: h in shared memory
//   decode   yᵀ_chunk [64, n] += W_chunkᵀ [64, 16] hᵀ [16, n]; then the chunk's slot is filled with a later one
//
// Rows of W are the M dimension of the first product and its columns that of the second, so that 8 rows of x fill an
// instruction. A second kernel adds the blocks' parts of y in order: results are bitwise reproducible on one device.
#include "few_rows.h"

#ifndef TIEDFUSED_CUDA_ON_HOST  // the tests compile this file for the CPU, with these instructions in C++
#include "ptx.h"
#endif

namespace tiedfused::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTileRows = 16;
constexpr int kChunkColumns = 64;
constexpr int kSteps = kChunkColumns / 16;         // of 16 columns, an instruction's worth
constexpr int kRowBytes = kChunkColumns * 2 + 16;  // 16 more: eight rows then start in different banks
constexpr int kChunkBytes = kTileRows * kRowBytes;
constexpr int kLatentStride = kTileRows + 8;  // elements, likewise

// Chunks on their way beyond those of the rows in work; less where 16 rows alone nearly fill shared memory.
template <int kChunks>
constexpr int kSlotsOf = kChunks + (kChunks >= 8   ? 0
                                    : kChunks == 4 ? 1
                                                   : 4);

template <int kChunks, int kGroups>
constexpr int kSharedBytes =
    kWarps * kSlotsOf<kChunks> * kChunkBytes + kWarps * kTileRows * 8 * kGroups * 4 + 8 * kGroups * kLatentStride * 2;

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

// kChunks chunks of columns a warp, kGroups groups of 8 rows of x.
template <typename T, int kChunks, int kGroups>
__global__ void __launch_bounds__(kThreads, 1) few_rows_part(const Problem p) {
  constexpr int kSlots = kSlotsOf<kChunks>, kN = 8 * kGroups;
  extern __shared__ __align__(16) char shared[];
  float* const sums = reinterpret_cast<float*>(shared + kWarps * kSlots * kChunkBytes);   // [kWarps][kTileRows][kN]
  uint16_t* const latents = reinterpret_cast<uint16_t*>(sums + kWarps * kTileRows * kN);  // [kN][kLatentStride]

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int quad = lane / 4, pair = lane % 4 * 2;  // where a lane's elements are in a fragment
  char* const ring = shared + warp * kSlots * kChunkBytes;
  const auto first_column = [&](int chunk) { return (chunk * kWarps + warp) * kChunkColumns; };
  int chunks = 0;
  while (chunks < kChunks && first_column(chunks) < p.d) ++chunks;

  const int64_t all_tiles = (p.h + kTileRows - 1) / kTileRows;
  const int64_t first_tile = all_tiles * blockIdx.x / gridDim.x, last_tile = all_tiles * (blockIdx.x + 1) / gridDim.x;

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

  // the copy of one chunk after the other, tile by tile, into one slot of the ring after the other
  int64_t copy_tile = first_tile;
  int copy_chunk = 0, copy_slot = 0;
  const auto copy_next = [&] {
    if (copy_tile < last_tile && chunks > 0) {
#pragma unroll
      for (int i = 0; i < kTileRows * kChunkColumns / 8 / 32; ++i) {
        const int piece = i * 32 + lane, row = piece / 8, at = piece % 8;
        const int64_t j = copy_tile * kTileRows + row;
        const int column = first_column(copy_chunk) + at * 8;
        const bool valid = j < p.h && column < p.d;
        copy_async(ring + copy_slot * kChunkBytes + row * kRowBytes + at * 16,
                   valid ? p.weight + j * p.weight_stride + column : p.weight, valid);
      }
      if (++copy_chunk == chunks) {
        copy_chunk = 0;
        ++copy_tile;
      }
      copy_slot = copy_slot + 1 == kSlots ? 0 : copy_slot + 1;
    }
    commit_copies();  // an empty group at the end, so that the count of groups behind a chunk is always the same
  };
  for (int i = 0; i < kSlots; ++i) copy_next();

  float y[kChunks][kSteps][kGroups][4] = {};
  int slot = 0;  // of the tile's first chunk
  const auto chunk_at = [&](int chunk) { return ring + (slot + chunk) % kSlots * kChunkBytes; };

  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    float a[kGroups][4] = {};
    unrolled<kChunks>([&](auto constant) {
      constexpr int c = decltype(constant)::value;
      if (c >= chunks) return;
      wait_for_copies<kSlots - 1 - c>();  // all but the groups behind this chunk's
      __syncwarp();
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        uint32_t w[4];
        load_matrices<false>(chunk_at(c) + lane % 16 * kRowBytes + s * 32 + lane / 16 * 16, w);
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
      latents[n * kLatentStride + row] = T::narrow(latent);  // rows past H meet zeros in W
    }
    __syncthreads();

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
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        uint32_t w[4];
        load_matrices<true>(chunk_at(c) + (lane % 8 + lane / 16 * 8) * kRowBytes + s * 32 + lane / 8 % 2 * 16, w);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) multiply_add<T>(y[c][s][g], w, h[g]);
      }
      __syncwarp();  // every lane has read the slot that is filled now
      copy_next();
    });
    slot = (slot + chunks) % kSlots;
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

// y from the parts, one element a thread; the parts are added in the order of their blocks.
template <typename T>
__global__ void __launch_bounds__(kThreads) few_rows_combine(const Problem p, int blocks) {
  const int i = blockIdx.x * kThreads + threadIdx.x, size = p.n * p.d;
  if (i >= size) return;
  float z = p.bias_dec != nullptr ? T::widen(p.bias_dec[i % p.d]) : 0.0f;
  for (int block = 0; block < blocks; ++block) z += p.parts[block * int64_t{size} + i];
  activate(p.output_activation, &z, 1);
  p.y[i] = T::narrow(z);
}

// f(Constant<kChunks>, Constant<kGroups>) of the smallest instance that takes the problem, zeros if there is none.
template <typename F>
auto with_instance(const Problem& p, F&& f) {
  const int chunks = (p.d + kWarps * kChunkColumns - 1) / (kWarps * kChunkColumns), groups = (p.n + 7) / 8;
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

int shared_bytes_for(const Problem& p) {
  return with_instance(p, [](auto chunks, auto groups) {
    if constexpr (chunks.value == 0) {
      return 0;
    } else {
      return kSharedBytes<chunks.value, groups.value>;
    }
  });
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) return 0;
  return value;
}

template <typename T>
cudaError_t launch(const Problem& p, int blocks, cudaStream_t stream) {
  const cudaError_t error = with_instance(p, [&](auto chunks, auto groups) {
    if constexpr (chunks.value == 0) {
      return cudaErrorInvalidValue;
    } else {
      constexpr int bytes = kSharedBytes<chunks.value, groups.value>;
      const auto kernel = few_rows_part<T, chunks.value, groups.value>;
      const cudaError_t set = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      if (set != cudaSuccess) return set;
      kernel<<<blocks, kThreads, bytes, stream>>>(p);
      return cudaGetLastError();
    }
  });
  if (error != cudaSuccess) return error;
  few_rows_combine<T><<<(p.n * p.d + kThreads - 1) / kThreads, kThreads, 0, stream>>>(p, blocks);
  return cudaGetLastError();
}

}  // namespace

extern "C" {

const char* tiedfused_few_rows_refuses(const Problem* p) {
  const auto unaligned = [](const void* pointer, int64_t stride) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 != 0 || stride % 8 != 0;
  };
  if (p->d % 8 != 0) return "d has to be a multiple of 8";
  if (unaligned(p->weight, p->weight_stride)) return "rows of weight have to start at multiples of 16 bytes";
  const int bytes = shared_bytes_for(*p);
  if (bytes == 0) return "N and d are too large: up to 8 rows for d 4096, 16 for 2048, 32 for 1024, 64 for 512";
  if (bytes > attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) return "d is too large for this GPU's shared memory";
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
