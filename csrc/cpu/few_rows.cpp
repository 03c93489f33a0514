#include "few_rows.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "numbers.h"

namespace tiedfused::cpu {
namespace {

constexpr std::size_t kItemsize[] = {4, 2, 2};

std::size_t aligned(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// The workspace: a row of zeros, the copy of x, and every thread's part of y and of the rows' statistics.
struct Workspace {
  char* zeros;
  char* x;
  float* parts;
  int64_t* l0;
  float* l1;
  std::size_t bytes;

  Workspace(int64_t n, int64_t d, bool stats, int64_t parts_count, void* memory) {
    const std::size_t row = sizeof(float) * row_stride(d);
    zeros = static_cast<char*>(memory);
    x = zeros + aligned(row);
    parts = reinterpret_cast<float*>(x + n * row);
    l0 = reinterpret_cast<int64_t*>(parts + parts_count * n * row_stride(d));
    l1 = reinterpret_cast<float*>(l0 + parts_count * n);
    bytes = aligned(row) + n * row + parts_count * n * row;
    if (stats) bytes += parts_count * n * (sizeof *l0 + sizeof *l1);
  }
};

template <typename To, typename From>
void copy_x(const Problem& p, void* to) {
  const int64_t width = row_stride(p.d);
  for (int64_t i = 0; i < p.n; ++i) {
    const From* row = static_cast<const From*>(p.x) + i * p.x_stride;
    To* out = static_cast<To*>(to) + i * width;
    for (int64_t k = 0; k < p.d; ++k) {
      if constexpr (sizeof(To) == sizeof(From)) {
        out[k] = row[k];
      } else {
        out[k] = widen(row[k]);
      }
    }
    std::memset(static_cast<void*>(out + p.d), 0, (width - p.d) * sizeof(To));
  }
}

template <typename T>
void combine(const Problem& p, const float* parts, int64_t count, int64_t begin, int64_t end) {
  const int64_t width = row_stride(p.d);
  const T* bias = static_cast<const T*>(p.bias_dec);
  constexpr int kChunk = 256;
  float z[kChunk];
  for (int64_t chunk = begin; chunk < end; ++chunk) {  // chunks of kChunk columns, row after row
    const int64_t chunks = (p.d + kChunk - 1) / kChunk, i = chunk / chunks, k = chunk % chunks * kChunk;
    const int size = static_cast<int>(p.d - k < kChunk ? p.d - k : kChunk);
    for (int c = 0; c < size; ++c) z[c] = bias == nullptr ? 0.0f : widen(bias[k + c]);
    for (int64_t part = 0; part < count; ++part) {
      const float* sum = parts + (part * p.n + i) * width + k;
      for (int c = 0; c < size; ++c) z[c] += sum[c];
    }
    activate(p.output_activation, z, size);
    T* y = static_cast<T*>(p.y) + i * p.d + k;
    for (int c = 0; c < size; ++c) y[c] = narrow<T>(z[c]);
  }
}

}  // namespace

const Kernel* find_kernel(const char* name) {
  struct Candidate {
    const Kernel* kernel;
    bool runs_here;  // asked here, in code for any CPU
  };
#define HAS(feature) (__builtin_cpu_supports(feature) != 0)
  static const Candidate candidates[] = {
#if defined(__x86_64__)
      {&kAvx512Bf16, HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl") && HAS("avx512bf16")},
      {&kAvx512, HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl")},
      {&kAvx2, HAS("avx2") && HAS("fma") && HAS("f16c")},
#endif
      {&kPortable, true},
  };
#undef HAS
  for (const auto& [kernel, runs_here] : candidates) {
    if (runs_here && (name == nullptr || std::strcmp(name, kernel->name) == 0)) return kernel;
  }
  return nullptr;
}

int64_t parts_for(int64_t n, int64_t d, int64_t h, int64_t threads) {
  // Waking a thread takes some µs, in which one core alone does about as many multiply-adds with W in its cache.
  constexpr int64_t kLeastWork = 1 << 15;
  // A part's sums are written, read and added up, which takes as long as some rows of W: (16, 784, 16) in fp32 took 33
  // µs in two parts, 14 in one.
  constexpr int64_t kLeastRows = 32;
  // Cores that share caches and memory are not equally fast, nor all there all the time: threads that take part after
  // part until none is left finish together. Of 8 parts for 2 threads in bf16, N 1 to 16, calls took 0 to 13% less time
  // than of 2, by how unlike the cores were just then; of 16 and 32 no less than of 8.
  constexpr int64_t kPartsOfThread = 4, kLeastWorkOfMany = 1 << 19;
  constexpr int64_t kLeastRowsOfMany = 256;  // for each row of x, whose sums are written once a part and read again
  // A part's terms are added up one after the other, and what is lost of each grows with the sum: with 65536 rows in
  // fp32, N 4, d 4096, y was off by 2.1e-6, PyTorch's by 0.4e-6.
  constexpr int64_t kMostRows = 16384;
  const int64_t work = n * d * h;
  int64_t parts = std::clamp(std::min(work / kLeastWork, h / kLeastRows), int64_t{1}, threads);
  if (parts > 1) {
    const int64_t most = std::min(work / kLeastWorkOfMany, h / (n * kLeastRowsOfMany));
    parts *= std::clamp(most / parts, int64_t{1}, kPartsOfThread);
  }
  return parts * ((h + parts * kMostRows - 1) / (parts * kMostRows));
}

std::size_t workspace_bytes(int64_t n, int64_t d, bool stats, int64_t parts) {
  return Workspace(n, d, stats, parts, nullptr).bytes;
}

void few_rows(const Kernel& kernel, const Problem& p, int64_t parts, void* memory, ParallelFor parallel_for) {
  const int dtype = static_cast<int>(p.dtype);
  const auto& of = kernel.of[dtype];
  const Workspace workspace(p.n, p.d, p.stats.wanted(), parts, memory);
  std::memset(workspace.zeros, 0, kItemsize[dtype] * p.d);
  if (p.dtype == Dtype::float32) copy_x<float, float>(p, workspace.x);
  if (p.dtype == Dtype::bfloat16 && of.copies_x_as_float) copy_x<float, bfloat16>(p, workspace.x);
  if (p.dtype == Dtype::bfloat16 && !of.copies_x_as_float) copy_x<bfloat16, bfloat16>(p, workspace.x);
  if (p.dtype == Dtype::float16) copy_x<float, float16>(p, workspace.x);

  struct Context {
    const Problem& p;
    const Workspace& workspace;
    Part part;
    int64_t parts;
    std::atomic<int64_t> next = 0;  // whoever takes it, a part is the same, and so is the order of the sum
  } context{p, workspace, of.part, parts};

  if (parts == 1) parallel_for = [](int64_t count, Body body, void* pointer) { body(0, count, pointer); };
  parallel_for(
      parts,
      [](int64_t, int64_t, void* pointer) {
        auto& c = *static_cast<Context*>(pointer);
        for (int64_t i; (i = c.next.fetch_add(1, std::memory_order_relaxed)) < c.parts;) {
          const Workspace& w = c.workspace;
          c.part(c.p, w.x, w.zeros, c.p.h * i / c.parts, c.p.h * (i + 1) / c.parts,
                 w.parts + i * c.p.n * row_stride(c.p.d), w.l1 + i * c.p.n, w.l0 + i * c.p.n);
        }
      },
      &context);
  parallel_for(
      p.n * ((p.d + 255) / 256),
      [](int64_t begin, int64_t end, void* pointer) {
        const auto& c = *static_cast<Context*>(pointer);
        const auto combine_of = c.p.dtype == Dtype::float32    ? combine<float>
                                : c.p.dtype == Dtype::bfloat16 ? combine<bfloat16>
                                                               : combine<float16>;
        combine_of(c.p, c.workspace.parts, c.parts, begin, end);
      },
      &context);
  if (!p.stats.wanted()) return;
  for (int64_t i = 0; i < p.n; ++i) {
    p.stats.l1[i] = 0.0f;
    p.stats.l0[i] = 0;
    for (int64_t part = 0; part < parts; ++part) {
      p.stats.l1[i] += workspace.l1[part * p.n + i];
      p.stats.l0[i] += workspace.l0[part * p.n + i];
    }
  }
}

}  // namespace tiedfused::cpu
