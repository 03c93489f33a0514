// f and g by name, as scalar fp32 functions for host and device: the formulas of tiedfused/activations.py.
#pragma once

#include <math.h>

#ifdef __CUDACC__
#define TIEDFUSED_HOST_DEVICE __host__ __device__
#else
#define TIEDFUSED_HOST_DEVICE
#endif

namespace tiedfused {

// X(name, f(a)); an activation is known to Python by `name`. A comparison with a NaN is false: each formula is written
// so that a NaN comes out as a NaN.
#define TIEDFUSED_ACTIVATIONS(X)                                                             \
  X(identity, a)                                                                             \
  X(relu, a < 0.0f ? 0.0f : a)                                                               \
  X(leaky_relu, a > 0.0f ? a : 0.01f * a)                                                    \
  X(elu, a > 0.0f ? a : expm1f(a))                                                           \
  X(selu, 1.0507009873554805f * (a > 0.0f ? a : 1.6732632423543772f * expm1f(a)))            \
  X(gelu, 0.5f * a * (1.0f + erff(a * 0.7071067811865476f)))                                 \
  X(gelu_tanh, 0.5f * a * (1.0f + tanhf(0.7978845608028654f * (a + 0.044715f * a * a * a)))) \
  X(silu, a / (1.0f + expf(-a)))                                                             \
  X(softplus, a > 20.0f ? a : log1pf(expf(a)))                                               \
  X(sigmoid, 1.0f / (1.0f + expf(-a)))                                                       \
  X(tanh, tanhf(a))

enum class Activation {
#define X(name, formula) name,
  TIEDFUSED_ACTIVATIONS(X)
#undef X
};

// Replaces each of `count` values by its activation. Static, since every instruction set's build needs a copy of its
// own.
TIEDFUSED_HOST_DEVICE static inline void activate(Activation activation, float* values, int count) {
  switch (activation) {
#define X(name, formula)              \
  case Activation::name:              \
    for (int i = 0; i < count; ++i) { \
      const float a = values[i];      \
      values[i] = formula;            \
    }                                 \
    break;
    TIEDFUSED_ACTIVATIONS(X)
#undef X
  }
}

}  // namespace tiedfused
