// The kernel for AVX2, FMA and F16C: 16 registers of eight floats.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace tiedfused::cpu {
namespace {
constexpr int kLanes = 8;
struct Tiles {
  static constexpr int kEncodeX = 3, kEncodeW = 4, kDecodeX = 4, kColumnVectors = 2;
  static constexpr bool kPacks = true;
};
}  // namespace
}  // namespace tiedfused::cpu

#include "few_rows_vectors.h"

namespace tiedfused::cpu {
namespace {
inline Floats widen_float16(const float16* from) { return _mm256_cvtph_ps(load_as<__m128i>(from)); }
}  // namespace

const Kernel kAvx2 = {
    "avx2",
    {{part<Ops<float>, float>, true}, {part<Ops<bfloat16>, bfloat16>, true}, {part<Ops<float16>, float16>, true}}};

}  // namespace tiedfused::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
