// Storage types and their conversions: round to nearest even, NaN stays NaN, subnormals are kept.
#pragma once

#include <cstdint>
#include <cstring>

namespace tiedfused::cpu {
namespace {  // internal linkage: every instruction set's build keeps its own copy

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline float widen(float v) { return v; }

inline float widen(bfloat16 v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }

inline float widen(float16 v) {
  const uint32_t sign = (v.bits & 0x8000u) << 16, rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest < 0x400u) return float_of(sign | bits_of(static_cast<float>(rest) * 0x1p-24f));
  return float_of(sign | ((rest << 13) + (112u << 23)));
}

template <typename T>
T narrow(float v);

template <>
inline float narrow<float>(float v) {
  return v;
}

template <>
inline bfloat16 narrow<bfloat16>(float v) {
  const uint32_t bits = bits_of(v);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>(v != v ? 0x7fc0u : rounded)};
}

template <>
inline float16 narrow<float16>(float v) {
  const uint32_t bits = bits_of(v), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  uint32_t magnitude;
  if (rest > 0x7f800000u) {
    magnitude = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // rounds to 2¹⁶ or more
    magnitude = 0x7c00u;
  } else if (rest < 0x38800000u) {  // below 2⁻¹⁴: adding 0.5 leaves the subnormal's bits, rounded, at the bottom
    magnitude = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);
  } else {
    magnitude = (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | magnitude)};
}

}  // namespace
}  // namespace tiedfused::cpu
