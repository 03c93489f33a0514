// `Ops<T>` in the compiler's vector types, fp32 operands for every storage type. The includer has defined the lanes of
// a register and the tiles (see few_rows_kernel.h) that its registers hold, and defines `widen_float16`.
#pragma once

#include <utility>

#include "few_rows_kernel.h"

namespace tiedfused::cpu {
namespace {

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

inline Floats widen_float16(const float16* from);

template <typename V>
inline V load_as(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// Lanes of `a` and `b` in groups of four: of each group numbers kA and kB of a and of b, as {a, b, a, b} if kAlternate,
// else {a, a, b, b}.
template <int kA, int kB, bool kAlternate, int... kLane>
inline Floats from_fours(Floats a, Floats b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(
      a, b,
      (kLane / 4 * 4 + (kAlternate ? (kLane % 4 < 2 ? kA : kB) + kLane % 2 * kLanes
                                   : (kLane % 2 == 0 ? kA : kB) + kLane % 4 / 2 * kLanes))...);
}

// The even groups of four of `a`, then those of `b`; the odd ones if kOdd.
template <int kOdd, int... kLane>
inline Floats fours(Floats a, Floats b, std::integer_sequence<int, kLane...>) {
  constexpr int kHalf = kLanes / 2;
  return __builtin_shufflevector(a, b, (kLane / kHalf * kLanes + (kLane % kHalf / 4 * 2 + kOdd) * 4 + kLane % 4)...);
}

// The sums over the lanes of kLanes vectors at once, in their order: a third of the instructions of one after another.
inline Floats sums_of_lanes(Floats* v) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
#pragma GCC unroll 8
  for (int i = 0; i < kLanes / 2; ++i) {
    v[i] =
        from_fours<0, 1, true>(v[2 * i], v[2 * i + 1], lanes) + from_fours<2, 3, true>(v[2 * i], v[2 * i + 1], lanes);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLanes / 4; ++i) {
    v[i] =
        from_fours<0, 1, false>(v[2 * i], v[2 * i + 1], lanes) + from_fours<2, 3, false>(v[2 * i], v[2 * i + 1], lanes);
  }
  if constexpr (kLanes > 4) {
#pragma GCC unroll 8
    for (int count = kLanes / 8; count > 0; count /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < count; ++i) {
        v[i] = fours<0>(v[2 * i], v[2 * i + 1], lanes) + fours<1>(v[2 * i], v[2 * i + 1], lanes);
      }
    }
  }
  return v[0];
}

struct FloatSums {
  using Vector = Floats;
  static constexpr int kLanes = cpu::kLanes;
  static Vector load_sum(const float* from) { return load_as<Floats>(from); }
  static void store_sum(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }
  static void wait() {
#if defined(__x86_64__)
    __builtin_ia32_lfence();
#endif
  }
  // out[i] is the sum of v[i]'s lanes. Always inline: N 64 took 5% longer where the compiler chose otherwise.
  template <int kCount>
  __attribute__((always_inline)) static void sums(const Vector* v, float* out) {
#pragma GCC unroll 8
    for (int done = 0; done < kCount; done += kLanes) {
      Vector group[kLanes] = {};
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (done + i < kCount) group[i] = v[done + i];
      }
      const Vector sums = sums_of_lanes(group);
      std::memcpy(out + done, &sums, sizeof(float) * (kCount - done < kLanes ? kCount - done : kLanes));
    }
  }
};

template <typename T>
struct Ops : FloatSums, Tiles {
  using Copy = float;
  using Operand = Floats;
  static constexpr int kStep = kLanes, kPair = 1;

  static Operand load(const float* from) { return load_as<Floats>(from); }
  static Operand load(const bfloat16* from) {
    const Words bits = __builtin_convertvector(load_as<Halves>(from), Words) << 16;
    return load_as<Floats>(&bits);
  }
  static Operand load(const float16* from) { return widen_float16(from); }
  static Vector multiply_add(Operand a, Operand b, Vector sum) { return sum + a * b; }
  static void columns(const T* const* rows, int64_t k, Operand* out) {
#pragma GCC unroll 8
    for (int v = 0; v < kColumnVectors; ++v) out[v] = load(rows[0] + k + v * kLanes);
  }
  static Operand broadcast(const Copy* latent) { return Floats{} + *latent; }
  static Copy latent(float h) { return widen(narrow<T>(h)); }
};

}  // namespace
}  // namespace tiedfused::cpu
