// y = g(f(x Wᵀ + b_enc) W + b_dec) for a few rows of x on a GPU, W read from memory once. No torch headers.
#pragma once

#include <cstdint>

#include "../activations.h"
#include "../latent_stats.h"

namespace tiedfused::cuda {

// bfloat16 or float16, the last dimension contiguous; strides in elements; biases may be null.
struct Problem {
  int n, d;
  int64_t h;
  const uint16_t* x;
  int64_t x_stride;
  const uint16_t* weight;
  int64_t weight_stride;
  const uint16_t* bias_enc;
  const uint16_t* bias_dec;
  uint16_t* y;   // [n, d], contiguous
  float* parts;  // of `part_floats` a block, workspace
  Activation activation, output_activation;
  LatentStats stats;
};

// A block's part of y [n, d], and of the rows' l1 and l0 [n], the latter of 4 bytes each too.
inline int64_t part_floats(const Problem& p) { return int64_t{p.n} * (p.d + (p.stats.wanted() ? 2 : 0)); }

}  // namespace tiedfused::cuda

extern "C" {
// Why the problem is not for this kernel, or null: a static string that names the argument and what was expected.
const char* tiedfused_few_rows_refuses(const tiedfused::cuda::Problem*);
// How many blocks the current device should run for it.
int tiedfused_few_rows_blocks(const tiedfused::cuda::Problem*);
// Launches on `stream`; returns a cudaError_t.
int tiedfused_few_rows(const tiedfused::cuda::Problem*, bool bfloat16, int blocks, void* stream);
const char* tiedfused_cuda_error(int);
}
