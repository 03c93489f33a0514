// What the bindings for CPU and CUDA check before they hand pointers to a kernel.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "activations.h"
#include "cpu/few_rows.h"
#include "latent_stats.h"

namespace tiedfused {

inline Activation activation_of(const char* argument, const std::string& name) {
#define X(known, formula) \
  if (name == #known) return Activation::known;
  TIEDFUSED_ACTIVATIONS(X)
#undef X
  STD_TORCH_CHECK(false, argument, ": '", name, "' is not one that the native op has");
}

inline void check_operands(const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
                           const std::optional<torch::stable::Tensor>& bias_enc,
                           const std::optional<torch::stable::Tensor>& bias_dec) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "x: expected float32, bfloat16 or float16");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) > 0,
                  "weight: expected shape [H, d], both at least 1");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == weight.size(1), "x: expected shape [N, ", weight.size(1),
                  "], as weight has ", weight.size(1), " columns");
  STD_TORCH_CHECK(x.size(0) >= 1 && x.size(0) <= cpu::kMaxRows, "x: expected 1 to ", cpu::kMaxRows, " rows, got ",
                  x.size(0));
  STD_TORCH_CHECK(x.stride(1) == 1 || x.size(1) == 1, "x: expected a last stride of 1, got ", x.stride(1));
  STD_TORCH_CHECK(weight.stride(1) == 1 || weight.size(1) == 1, "weight: expected a last stride of 1, got ",
                  weight.stride(1));
  const auto check = [&](const char* name, const torch::stable::Tensor& t) {
    STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected the dtype of x");
    STD_TORCH_CHECK(t.device() == x.device(), name, ": expected on the device of x");
  };
  check("weight", weight);
  const auto check_bias = [&](const char* name, const std::optional<torch::stable::Tensor>& bias, int64_t size) {
    if (!bias.has_value()) return;
    check(name, *bias);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == size && (size == 1 || bias->stride(0) == 1), name,
                    ": expected shape [", size, "], contiguous");
  };
  check_bias("bias_enc", bias_enc, weight.size(0));
  check_bias("bias_dec", bias_dec, weight.size(1));
}

// Room for the latent's statistics.
struct StatsTensors {
  torch::stable::Tensor l1, l0, total, fired;

  StatsTensors(const torch::stable::Tensor& x, const torch::stable::Tensor& weight)
      : l1(torch::stable::new_empty(x, {x.size(0)}, torch::headeronly::ScalarType::Float)),
        l0(torch::stable::new_empty(x, {x.size(0)}, torch::headeronly::ScalarType::Long)),
        total(torch::stable::new_empty(x, {weight.size(0)}, torch::headeronly::ScalarType::Float)),
        fired(torch::stable::new_empty(x, {weight.size(0)}, torch::headeronly::ScalarType::Long)) {}

  LatentStats pointers() {
    return {static_cast<float*>(l1.mutable_data_ptr()), static_cast<int64_t*>(l0.mutable_data_ptr()),
            static_cast<float*>(total.mutable_data_ptr()), static_cast<int64_t*>(fired.mutable_data_ptr())};
  }
};

}  // namespace tiedfused
