// Runs the CUDA kernels on the CPU (cuda_on_host.h) and compares with plain loops: the algorithm, its indices, its
// barriers and its copies are checked, by both ways of copying. The machine's instructions are not.
#include "cuda_on_host.h"

#include "../../csrc/cuda/few_rows.cu"

#include <algorithm>
#include <cmath>
#include <cstdio>
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

// How far results are from the truth, as a part of its length.
class Distance {
 public:
  void add(double result, double truth) {
    error_ += (result - truth) * (result - truth);
    size_ += truth * truth;
  }
  bool near() const { return std::sqrt(error_) <= 1e-2 * std::sqrt(size_); }

 private:
  double error_ = 0, size_ = 0;
};

// `spare`: slots of the ring beyond those of a tile. f is relu with biases, else sigmoid, whose f(0) is not 0.
template <typename T, typename Copies>
bool agrees(int n, int d, int64_t h, int blocks, int spare, bool biases, bool stats) {
  const int64_t x_stride = d + 3, weight_stride = d + 8;
  auto x = normal<T>(n * x_stride, 1.0f);
  if (h == 1) x[0] = T::narrow(INFINITY);  // which meets the zeros of 15 rows past H
  const auto weight = normal<T>(h * weight_stride, 1.0f / std::sqrt(static_cast<float>(d)));
  const auto bias_enc = normal<T>(h, 0.5f), bias_dec = normal<T>(d, 0.5f);
  std::vector<uint16_t> y(n * d, 0xffff);
  std::vector<float> l1(n, NAN), total(h, NAN);
  std::vector<int64_t> l0(n, -1), fired(h, -1);
  Problem p{n,
            d,
            h,
            x.data(),
            x_stride,
            weight.data(),
            weight_stride,
            biases ? bias_enc.data() : nullptr,
            biases ? bias_dec.data() : nullptr,
            y.data(),
            nullptr,
            biases ? Activation::relu : Activation::sigmoid,
            Activation::tanh,
            stats ? LatentStats{l1.data(), l0.data(), total.data(), fired.data()} : LatentStats{}};
  std::vector<float> parts(blocks * part_floats(p), NAN);
  p.parts = parts.data();
  const int slots = chunks_of(d) + spare;
  const bool taken = with_instance(p, [&](auto chunks, auto groups) {
    if constexpr (chunks.value != 0) {
      if (shared_bytes<groups.value>(slots) > static_cast<int>(sizeof shared)) return false;
      on_host::launch(blocks, [&] { part_of_y<T, chunks.value, groups.value, Copies>(p, slots); });
    }
    return chunks.value != 0;
  });
  if (!taken) return false;
  on_host::launch((n * d + kCombineColumns - 1) / kCombineColumns, [&] { few_rows_combine<T>(p, blocks); });

  Distance of_y, of_l1, of_total;
  std::vector<double> latent(h), totals(h);
  std::vector<int64_t> fired_truth(h);
  bool counts = true;
  for (int i = 0; i < n; ++i) {
    double l1_truth = 0;
    int64_t l0_truth = 0;
    for (int64_t j = 0; j < h; ++j) {
      double a = biases ? T::widen(bias_enc[j]) : 0;
      for (int k = 0; k < d; ++k) a += double{T::widen(x[i * x_stride + k])} * T::widen(weight[j * weight_stride + k]);
      latent[j] = biases ? std::max(a, 0.0) : 1 / (1 + std::exp(-a));
      l1_truth += latent[j];
      totals[j] += latent[j];
      l0_truth += latent[j] != 0;
      fired_truth[j] += latent[j] != 0;
    }
    of_l1.add(l1[i], l1_truth);
    counts &= l0[i] == l0_truth;
    for (int k = 0; k < d; ++k) {
      double z = biases ? T::widen(bias_dec[k]) : 0;
      for (int64_t j = 0; j < h; ++j) z += latent[j] * T::widen(weight[j * weight_stride + k]);
      of_y.add(T::widen(y[i * d + k]), std::tanh(z));
    }
  }
  for (int64_t j = 0; j < h; ++j) of_total.add(total[j], totals[j]);
  counts &= fired == fired_truth;
  const bool right_stats = !stats || (of_l1.near() && of_total.near() && counts);
  if (of_y.near() && right_stats) return true;
  std::printf("N %d, d %d, H %ld, %d blocks, %d slots: wrong%s%s\n", n, d, static_cast<long>(h), blocks, slots,
              of_y.near() ? "" : " y", right_stats ? "" : " statistics");
  return false;
}

// A line for each instance of the kernel: its chunks, its groups of 8 rows, and how many slots it has within so many
// bytes of shared memory.
void print_instances(const std::vector<int>& limits) {
  for (int chunks = 1; chunks <= 8; chunks *= 2) {
    for (int groups = 1; groups * chunks <= 8; groups *= 2) {
      Problem p{};
      p.n = 8 * groups;
      p.d = kChunkColumns * chunks;
      with_instance(p, [&](auto c, auto g) {
        std::printf("%d %d", c.value, g.value);
        for (const int limit : limits) std::printf(" %d", slots_within<g.value>(limit));
        std::puts("");
        return 0;
      });
    }
  }
}

template <typename Copies>
bool good() {
  bool good = true;
  for (const auto landing : {on_host::Landing::early, on_host::Landing::late}) {
    on_host::landing = landing;
    good &= agrees<Bfloat16, Copies>(3, 72, 40, 1, 0, true, true);   // warps with no columns; part of a tile; one slot
    good &= agrees<Float16, Copies>(9, 520, 100, 2, 3, true, true);  // a chunk of 8 columns, two groups of rows
    good &= agrees<Bfloat16, Copies>(1, 1544, 70, 1, 1, false, true);  // four chunks: tiles that wrap around the ring
    good &= agrees<Bfloat16, Copies>(1, 8, 1, 1, 4, true, false);
    good &= agrees<Float16, Copies>(2, 64, 20, 3, 2, false, true);  // more blocks than tiles
  }
  return good;
}

}  // namespace

int main(int count, char** limits) {
  std::vector<int> bytes;
  for (int i = 1; i < count; ++i) bytes.push_back(std::atoi(limits[i]));
  print_instances(bytes);
  const bool all_good = good<AsyncCopies>() & good<BulkCopies>();
  std::puts(all_good ? "good" : "wrong");
  return all_good ? 0 : 1;
}
