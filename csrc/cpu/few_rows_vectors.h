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

template <int kDistance, int... kLane>
inline Floats across(Floats v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLane ^ kDistance)...);
}

template <int kDistance = kLanes / 2>
inline float sum_of_lanes(Floats v) {
  if constexpr (kDistance == 0) {
    return v[0];
  } else {
    return sum_of_lanes<kDistance / 2>(v + across<kDistance>(v, std::make_integer_sequence<int, kLanes>()));
  }
}

struct FloatSums {
  using Vector = Floats;
  static constexpr int kLanes = cpu::kLanes;
  static Vector load_sum(const float* from) { return load_as<Floats>(from); }
  static void store_sum(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }
  static float sum(Vector v) { return sum_of_lanes(v); }
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
