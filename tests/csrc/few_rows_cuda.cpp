// Runs the CUDA kernels on the CPU (cuda_on_host.h) and compares with plain loops: the algorithm, its indices, its
// waits and the block's barriers are checked. The machine's instructions are not, nor the warps' barriers: here every
// instruction of a warp is one.
#include "cuda_on_host.h"

#include "../../csrc/cuda/few_rows.cu"

#include <cmath>
#include <cstdio>
#include <limits>
#include <random>

using namespace tiedfused;
using namespace tiedfused::cuda;

namespace {

std::mt19937 generator(0);

template <typename T>
std::vector<uint16_t> normal(int64_t count, float scale) {
  std::normal_distribution<float> values(0.0f, scale);
  std::vector<uint16_t> made(count);
  for (uint16_t& v : made) v = T::narrow(values(generator));
  return made;
}

template <typename T>
bool agrees(int n, int d, int64_t h, int blocks, bool biases) {
  const int64_t x_stride = d + 3, weight_stride = d + 8;
  const auto x = normal<T>(n * x_stride, 1.0f);
  const auto weight = normal<T>(h * weight_stride, 1.0f / std::sqrt(static_cast<float>(d)));
  const auto bias_enc = normal<T>(h, 0.5f), bias_dec = normal<T>(d, 0.5f);
  std::vector<uint16_t> y(n * d, 0xffff);
  std::vector<float> parts(static_cast<size_t>(blocks) * n * d, std::numeric_limits<float>::quiet_NaN());
  std::memset(shared, 0xff, sizeof shared);
  const Problem p{n,
                  d,
                  h,
                  x.data(),
                  x_stride,
                  weight.data(),
                  weight_stride,
                  biases ? bias_enc.data() : nullptr,
                  biases ? bias_dec.data() : nullptr,
                  y.data(),
                  parts.data(),
                  Activation::silu,
                  Activation::tanh};
  const bool taken = with_instance(p, [&](auto chunks, auto groups) {
    if constexpr (chunks.value != 0) {
      static_assert(kSharedBytes<chunks.value, groups.value> <= static_cast<int>(sizeof shared));
      on_host::launch(blocks, kThreads, [&] { few_rows_part<T, chunks.value, groups.value>(p); });
    }
    return chunks.value != 0;
  });
  if (!taken) return false;
  for (int i = 0; i < n * d; ++i) {  // its threads do not meet, so they need not be threads
    threadIdx.x = i % kThreads;
    blockIdx.x = i / kThreads;
    few_rows_combine<T>(p, blocks);
  }

  double error = 0, size = 0;
  std::vector<double> latent(h);
  for (int i = 0; i < n; ++i) {
    for (int64_t j = 0; j < h; ++j) {
      double a = biases ? T::widen(bias_enc[j]) : 0;
      for (int k = 0; k < d; ++k) a += double{T::widen(x[i * x_stride + k])} * T::widen(weight[j * weight_stride + k]);
      latent[j] = a / (1 + std::exp(-a));
    }
    for (int k = 0; k < d; ++k) {
      double z = biases ? T::widen(bias_dec[k]) : 0;
      for (int64_t j = 0; j < h; ++j) z += latent[j] * T::widen(weight[j * weight_stride + k]);
      const double off = std::tanh(z) - T::widen(y[i * d + k]);
      error += off * off;
      size += std::tanh(z) * std::tanh(z);
    }
  }
  const double relative = std::sqrt(error / size);
  if (relative <= 1e-2) return true;
  std::printf("N %d, d %d, H %ld, %d blocks: relative error %g\n", n, d, static_cast<long>(h), blocks, relative);
  return false;
}

// A line for each instance of the kernel: its chunks of columns a warp, groups of 8 rows, bytes of shared memory.
void print_instances() {
  for (int chunks = 1; chunks <= 8; chunks *= 2) {
    for (int groups = 1; groups * chunks <= 8; groups *= 2) {
      Problem p{};
      p.n = 8 * groups;
      p.d = 512 * chunks;
      with_instance(p, [](auto c, auto g) {
        if constexpr (c.value != 0) std::printf("%d %d %d\n", c.value, g.value, kSharedBytes<c.value, g.value>);
        return 0;
      });
    }
  }
}

}  // namespace

int main() {
  print_instances();
  bool good = true;
  for (const bool wait : {false, true}) {
    on_host::copies_wait = wait;
    good &= agrees<Bfloat16>(3, 72, 40, 1, true);   // one chunk for two warps, none for the others; H no multiple of 16
    good &= agrees<Float16>(9, 520, 100, 2, true);  // two chunks for one warp, two groups of rows
    good &= agrees<Bfloat16>(1, 1544, 48, 1, false);  // four chunks: tiles that wrap around the ring
    good &= agrees<Bfloat16>(1, 8, 1, 1, true);
  }
  std::puts(good ? "good" : "wrong");
  return good ? 0 : 1;
}
