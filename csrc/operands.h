// What the bindings for CPU and CUDA check before they hand pointers to a kernel.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "activations.h"
#include "cpu/few_rows.h"
#include "latent_stats.h"

namespace tiedfused {

// Throws what PyTorch turns into a RuntimeError of these words; STD_TORCH_CHECK would put the source file before them.
template <typename... Words>
[[noreturn]] void refuse(const Words&... words) {
  std::ostringstream text;
  (text << ... << words);
  throw std::runtime_error(text.str());
}

// A macro, so that the words are not made where all is well: they took a tenth of a small call.
#define TIEDFUSED_CHECK(good, ...) \
  if (!(good)) refuse(__VA_ARGS__)

inline std::string name_of(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline std::string name_of(const torch::stable::Device& device) {
  return device.type() == torch::headeronly::DeviceType::CPU ? "cpu" : "cuda:" + std::to_string(device.index());
}

// [3, 8]
inline std::string shape_of(const torch::stable::Tensor& t) {
  std::string shape;
  for (int64_t i = 0; i < t.dim(); ++i) shape += (i == 0 ? "" : ", ") + std::to_string(t.size(i));
  return "[" + shape + "]";
}

inline Activation activation_of(const char* argument, const std::string& name) {
#define X(known, formula) \
  if (name == #known) return Activation::known;
  TIEDFUSED_ACTIVATIONS(X)
#undef X
  std::string all;
#define X(known, formula) all += all.empty() ? #known : ", " #known;
  TIEDFUSED_ACTIVATIONS(X)
#undef X
  refuse(argument, ": expected one of ", all, ", got '", name, "'");
}

inline void check_operands(const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
                           const std::optional<torch::stable::Tensor>& bias_enc,
                           const std::optional<torch::stable::Tensor>& bias_dec) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = x.scalar_type();
  TIEDFUSED_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "x: expected float32, bfloat16 or float16, got ", name_of(dtype));
  TIEDFUSED_CHECK(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) > 0,
                  "weight: expected shape [H, d], both at least 1, got ", shape_of(weight));
  const int64_t h = weight.size(0), d = weight.size(1);
  TIEDFUSED_CHECK(x.dim() == 2 && x.size(1) == d, "x: expected shape [N, ", d, "], as weight is ", shape_of(weight),
                  ", got ", shape_of(x));
  TIEDFUSED_CHECK(x.size(0) >= 1 && x.size(0) <= cpu::kMaxRows, "x: expected 1 to ", cpu::kMaxRows, " rows, got ",
                  x.size(0));
  const auto check_kind = [&](const char* name, const torch::stable::Tensor& t) {
    TIEDFUSED_CHECK(t.scalar_type() == dtype, name, ": expected ", name_of(dtype), ", as x, got ",
                    name_of(t.scalar_type()));
    TIEDFUSED_CHECK(t.device() == x.device(), name, ": expected on ", name_of(x.device()), ", as x, got ",
                    name_of(t.device()));
  };
  const auto check_last_stride = [](const char* name, const torch::stable::Tensor& t) {
    const int64_t last = t.dim() - 1;
    TIEDFUSED_CHECK(t.stride(last) == 1 || t.size(last) == 1, name, ": expected a last stride of 1, got ",
                    t.stride(last));
  };
  const auto check_bias = [&](const char* name, const std::optional<torch::stable::Tensor>& bias, int64_t size) {
    if (!bias.has_value()) return;
    check_kind(name, *bias);
    TIEDFUSED_CHECK(bias->dim() == 1 && bias->size(0) == size, name, ": expected shape [", size, "], as weight is ",
                    shape_of(weight), ", got ", shape_of(*bias));
    check_last_stride(name, *bias);
  };
  check_last_stride("x", x);
  check_kind("weight", weight);
  check_last_stride("weight", weight);
  check_bias("bias_enc", bias_enc, h);
  check_bias("bias_dec", bias_dec, d);
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
