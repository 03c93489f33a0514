// y = g(f(x Wᵀ + b_enc) W + b_dec) for a few rows of x on the CPU, W read from memory once. No torch headers.
//
// H is cut into ranges of W's rows, as many for each thread. A thread takes a range a block at a time: the block's
// latents for every row of x, then, while the block is still in cache, the range's part of y. The parts are added up in
// the order of their ranges.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../activations.h"
#include "../latent_stats.h"

namespace tiedfused::cpu {

constexpr int64_t kMaxRows = 64;        // of x
constexpr int64_t kColumns = 64;        // x and y's parts are padded with zeros to a multiple of this
constexpr std::size_t kAlignment = 64;  // bytes

enum class Dtype { float32, bfloat16, float16 };

// Operands in `dtype`, the last dimension contiguous; strides in elements; biases may be null.
struct Problem {
  Dtype dtype;
  int64_t n, d, h;
  const void* x;
  int64_t x_stride;
  const void* weight;
  int64_t weight_stride;
  const void* bias_enc;
  const void* bias_dec;
  void* y;  // [n, d], contiguous
  Activation activation, output_activation;
  LatentStats stats;
};

// Elements from a row of x's copy, or of y's parts, to the next. Not a multiple of 4 KiB, at which all rows would take
// the same few sets of the L1 cache.
inline int64_t row_stride(int64_t d) { return (d + kColumns - 1) / kColumns * kColumns + kColumns / 2; }

// One part: rows [begin, end) of W. `x` is the padded copy of x; `sum` [n, d padded] in fp32 is overwritten
// with its part of y, and if there are statistics, so are its rows of `l1` and `l0`, [n] each, and its latents
// in the problem's; `zeros` is a row of d zeros in `dtype`.
using Part = void (*)(const Problem&, const void* x, const void* zeros, int64_t begin, int64_t end, float* sum,
                      float* l1, int64_t* l0);

// The kernel as built for one instruction set.
struct Kernel {
  const char* name;
  struct {
    Part part;
    bool copies_x_as_float;  // else in the problem's dtype
  } of[3];                   // by Dtype
};

extern const Kernel kPortable;
#if defined(__x86_64__)
extern const Kernel kAvx2, kAvx512, kAvx512Bf16;
#endif

// The best kernel that runs here, or the one of that name; null if there is none such.
const Kernel* find_kernel(const char* name = nullptr);

// How many parts H is cut into for n rows of d and `threads` threads, which take them one after another.
int64_t parts_for(int64_t n, int64_t d, int64_t h, int64_t threads);

// Bytes that `few_rows` needs for n rows of d, with or without statistics, aligned to kAlignment.
std::size_t workspace_bytes(int64_t n, int64_t d, bool stats, int64_t parts);

// Runs f(begin, end) over pieces of [0, count) in any order, on any threads, and waits for all.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t count, Body, void* context);

void few_rows(const Kernel&, const Problem&, int64_t parts, void* workspace, ParallelFor);

}  // namespace tiedfused::cpu
