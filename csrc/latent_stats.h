// Statistics of the latent h [n, h] as rounded to the weight's dtype.
#pragma once

#include <cstdint>

#include "activations.h"

namespace tiedfused {

// Where they are written: all of them, or none.
struct LatentStats {
  float* l1;       // [n] Σⱼ |hₙⱼ|
  int64_t* l0;     // [n] how many of the row's latents are not 0
  float* total;    // [h] Σₙ hₙⱼ
  int64_t* fired;  // [h] on how many rows the latent is not 0

  TIEDFUSED_HOST_DEVICE bool wanted() const { return l1 != nullptr; }
};

}  // namespace tiedfused
