// The kernel for AVX-512 with its bfloat16 extension, whose instruction adds two products of bfloat16 to each fp32
// lane. It takes subnormal numbers for zero and rounds after each of the two products.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
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

struct PairOps : FloatSums, Tiles {
  using Copy = bfloat16;
  using Operand = __m512i;  // 32 bfloat16
  static constexpr int kStep = 32, kPair = 2;

  static Operand load(const bfloat16* from) { return _mm512_loadu_si512(from); }
  static Vector multiply_add(Operand a, Operand b, Vector sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  // two rows, interleaved: lane c holds column k + c of both
  static void columns(const bfloat16* const* rows, int64_t k, Operand* out) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
#pragma GCC unroll 8
    for (int v = 0; v < kColumnVectors; v += 2) {
      const __m512i first = load(rows[0] + k + v * kLanes), second = load(rows[1] + k + v * kLanes);
      out[v] = _mm512_permutex2var_epi16(first, low, second);
      out[v + 1] = _mm512_permutex2var_epi16(first, high, second);
    }
  }
  static Operand broadcast(const Copy* latents) { return _mm512_set1_epi32(load_as<int>(latents)); }
  static Copy latent(float h) { return narrow<bfloat16>(h); }
};

}  // namespace

const Kernel kAvx512Bf16 = {
    "avx512_bf16",
    {{part<Ops<float>, float>, true}, {part<PairOps, bfloat16>, false}, {part<Ops<float16>, float16>, true}}};

}  // namespace tiedfused::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
