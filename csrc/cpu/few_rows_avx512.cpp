// The kernel for AVX-512: 32 registers of sixteen floats.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif

namespace tiedfused::cpu {
namespace {
constexpr int kLanes = 16;
struct Tiles {
  static constexpr int kEncodeX = 6, kEncodeW = 4, kDecodeX = 8, kColumnVectors = 2;
  static constexpr bool kPacks = false;
};
}  // namespace
}  // namespace tiedfused::cpu

#include "few_rows_vectors.h"

namespace tiedfused::cpu {
namespace {
inline Floats widen_float16(const float16* from) { return _mm512_maskz_cvtph_ps(0xffff, load_as<__m256i>(from)); }
}  // namespace

const Kernel kAvx512 = {
    "avx512",
    {{part<Ops<float>, float>, true}, {part<Ops<bfloat16>, bfloat16>, true}, {part<Ops<float16>, float16>, true}}};

}  // namespace tiedfused::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
