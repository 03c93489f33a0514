// Runs every build of the CPU kernel that this CPU runs over odd shapes, without torch, to be compiled with sanitizers:
// operands are allocated to the byte, so that one step too far is one step out of an allocation.
#include <cmath>
#include <cstdio>
#include <limits>
#include <new>
#include <numeric>
#include <random>
#include <vector>

#include "../../csrc/cpu/few_rows.h"
#include "../../csrc/cpu/numbers.h"

using namespace tiedfused;
using namespace tiedfused::cpu;

namespace {

std::mt19937 generator(0);

template <typename T>
std::vector<T> normal(int64_t count, float scale) {
  constexpr int64_t kDrawn = 99991;  // then the same again, out of step with the rows: drawing is slow
  std::normal_distribution<float> values(0.0f, scale);
  std::vector<T> made(count);
  for (int64_t i = 0; i < count; ++i) made[i] = i < kDrawn ? narrow<T>(values(generator)) : made[i - kDrawn];
  return made;
}

template <typename T>
bool agrees(const Kernel& kernel, Dtype dtype, int64_t n, int64_t d, int64_t h, int64_t parts, bool biases) {
  const int64_t x_stride = d + 3, weight_stride = d + 1;
  const auto x = normal<T>((n - 1) * x_stride + d, 1.0f);
  const auto weight = normal<T>((h - 1) * weight_stride + d, 1.0f / std::sqrt(static_cast<float>(d)));
  const auto bias_enc = normal<T>(h, 0.5f), bias_dec = normal<T>(d, 0.5f);
  std::vector<T> y(n * d);
  std::vector<float> l1(n), total(h);
  std::vector<int64_t> l0(n), fired(h);
  const Problem p{dtype,
                  n,
                  d,
                  h,
                  x.data(),
                  x_stride,
                  weight.data(),
                  weight_stride,
                  biases ? bias_enc.data() : nullptr,
                  biases ? bias_dec.data() : nullptr,
                  y.data(),
                  Activation::silu,
                  Activation::identity,
                  {l1.data(), l0.data(), total.data(), fired.data()}};
  void* workspace = ::operator new(workspace_bytes(n, d, true, parts), std::align_val_t{kAlignment});
  few_rows(kernel, p, parts, workspace, [](int64_t count, Body body, void* context) { body(0, count, context); });
  ::operator delete(workspace, std::align_val_t{kAlignment});

  double error = 0, size = 0, l1_error = 0, total_error = 0;
  int64_t active = 0;  // for sure: what is nearer to 0 may be rounded to it
  std::vector<double> latent(h);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < h; ++j) {
      double a = biases ? widen(bias_enc[j]) : 0;
      for (int64_t k = 0; k < d; ++k) a += double{widen(x[i * x_stride + k])} * widen(weight[j * weight_stride + k]);
      latent[j] = a / (1 + std::exp(-a));
      l1_error += std::abs(latent[j]);
      total_error += latent[j];
      active += std::abs(latent[j]) > 1e-6;
    }
    for (int64_t k = 0; k < d; ++k) {
      double z = biases ? widen(bias_dec[k]) : 0;
      for (int64_t j = 0; j < h; ++j) z += latent[j] * widen(weight[j * weight_stride + k]);
      error += (z - widen(y[i * d + k])) * (z - widen(y[i * d + k]));
      size += z * z;
    }
  }
  const double bound = dtype == Dtype::float32 ? 1e-6 : dtype == Dtype::bfloat16 ? 1e-2 : 1e-3;
  const double l1_size = l1_error;
  const int64_t counted = std::accumulate(l0.begin(), l0.end(), int64_t{0});
  for (const float v : l1) l1_error -= v;
  for (const float v : total) total_error -= v;
  const double sum_bound = 3 * bound * l1_size;  // of thousands of numbers, one after the other
  const bool stats = std::abs(l1_error) <= sum_bound && std::abs(total_error) <= sum_bound && active <= counted &&
                     counted <= n * h && std::accumulate(fired.begin(), fired.end(), int64_t{0}) == counted;
  if (!stats) std::puts("statistics are wrong");
  if (stats && std::sqrt(error) <= bound * std::sqrt(size)) return true;
  std::printf("%s: dtype %d, N %ld, d %ld, H %ld, parts %ld: relative error %g\n", kernel.name, static_cast<int>(dtype),
              long(n), long(d), long(h), long(parts), std::sqrt(error / size));
  return false;
}

// Every float16 and bfloat16 survives widening and narrowing; what lies between two goes to the nearer, or the even
// one.
template <typename T>
bool rounds() {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const T v{static_cast<uint16_t>(bits)}, next{static_cast<uint16_t>(bits + 1)};
    const float wide = widen(v);
    if (wide != wide) {
      const float again = widen(narrow<T>(wide));
      if (again == again) return false;
      continue;
    }
    if (narrow<T>(wide).bits != v.bits) return false;
    if (std::isinf(wide) || std::isinf(widen(next)) || (bits & 0x7fffu) == 0x7fffu) continue;
    const float middle = static_cast<float>((double{wide} + widen(next)) / 2);
    const float above = std::nextafter(middle, widen(next)), below = std::nextafter(middle, wide);
    if (narrow<T>(above).bits != next.bits || narrow<T>(below).bits != v.bits) return false;
    if (narrow<T>(middle).bits != (bits & 1u ? next.bits : v.bits)) return false;
  }
  return std::isinf(widen(narrow<T>(std::numeric_limits<float>::max())));
}

}  // namespace

int main() {
  bool good = rounds<float16>() && rounds<bfloat16>();
  if (!good) std::puts("rounding is wrong");
  const int64_t shapes[][3] = {{1, 1, 1},     {2, 3, 5},     {4, 64, 12},   {5, 65, 13},     {7, 63, 33},
                               {64, 130, 67}, {3, 2117, 35}, {1, 515, 130}, {1, 1279, 3403}, {1, 2690, 1603}};
  int kernels = 0;
  for (const char* name : {"portable", "avx2", "avx512", "avx512_bf16"}) {
    const Kernel* kernel = find_kernel(name);
    if (kernel == nullptr) continue;
    ++kernels;
    for (const auto& [n, d, h] : shapes) {
      // Of 1 and 2 each has 4 MiB of W of the last two shapes, for the way of one row of x; of 40 some have no rows.
      for (const int64_t parts : {1, 2, 40}) {
        good &= agrees<float>(*kernel, Dtype::float32, n, d, h, parts, true);
        good &= agrees<bfloat16>(*kernel, Dtype::bfloat16, n, d, h, parts, parts == 1);
        good &= agrees<float16>(*kernel, Dtype::float16, n, d, h, parts, true);
      }
    }
  }
  std::printf("%d kernels: %s\n", kernels, good ? "good" : "wrong");
  return good ? 0 : 1;
}
