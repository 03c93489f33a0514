// The kernel for any CPU: vectors of four floats, as SSE2 and NEON have them.
#include <cstdint>

namespace tiedfused::cpu {
namespace {
constexpr int kLanes = 4;
struct Tiles {
  static constexpr int kEncodeX = 2, kEncodeW = 4, kDecodeX = 2, kColumnVectors = 4;
  static constexpr bool kPacks = true;
};
}  // namespace
}  // namespace tiedfused::cpu

#include "few_rows_vectors.h"

namespace tiedfused::cpu {
namespace {
inline Floats widen_float16(const float16* from) {
  return Floats{widen(from[0]), widen(from[1]), widen(from[2]), widen(from[3])};
}
}  // namespace

const Kernel kPortable = {
    "portable",
    {{part<Ops<float>, float>, true}, {part<Ops<bfloat16>, bfloat16>, true}, {part<Ops<float16>, float16>, true}}};

}  // namespace tiedfused::cpu
