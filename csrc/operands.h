// What the bindings for CPU and CUDA check before they hand pointers to a kernel.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
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

// A contiguous tensor of one or two dimensions where `like` is. `torch::stable::new_empty` goes through the dispatcher:
// 30 µs of a call from cold caches, this 7.
inline torch::stable::Tensor empty(const torch::stable::Tensor& like, std::initializer_list<int64_t> sizes,
                                   torch::headeronly::ScalarType dtype) {
  const int64_t strides[] = {sizes.size() == 2 ? sizes.begin()[1] : 1, 1};
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto aoti_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                  aoti_dtype, device_type, like.get_device_index(), &made));
  return torch::stable::Tensor(made);
}

// Room for the latent's statistics.
struct StatsTensors {
  torch::stable::Tensor l1, l0, total, fired;

  StatsTensors(const torch::stable::Tensor& x, const torch::stable::Tensor& weight)
      : l1(empty(x, {x.size(0)}, torch::headeronly::ScalarType::Float)),
        l0(empty(x, {x.size(0)}, torch::headeronly::ScalarType::Long)),
        total(empty(x, {weight.size(0)}, torch::headeronly::ScalarType::Float)),
        fired(empty(x, {weight.size(0)}, torch::headeronly::ScalarType::Long)) {}

  LatentStats pointers() {
    return {static_cast<float*>(l1.mutable_data_ptr()), static_cast<int64_t*>(l0.mutable_data_ptr()),
            static_cast<float*>(total.mutable_data_ptr()), static_cast<int64_t*>(fired.mutable_data_ptr())};
  }
};

}  // namespace tiedfused
