// torch.ops.tiedfused.few_rows and few_rows_stats on CUDA devices. The host compiler builds this file; the kernels know
// nothing of torch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>

#include "cuda/few_rows.h"
#include "operands.h"

// of torch's CUDA build, whose own header of it needs the CUDA toolkit's
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace tiedfused {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_all(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias_enc,
               const std::optional<Tensor>& bias_dec, const std::optional<std::string>& isa) {
  check_operands(x, weight, bias_enc, bias_dec);
  TIEDFUSED_CHECK(x.scalar_type() != ScalarType::Float, "x: on CUDA expected bfloat16 or float16, got float32");
  TIEDFUSED_CHECK(!isa.has_value(), "isa: on CUDA expected none, got '", isa.value_or(""), "'");
}

Tensor run(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias_enc,
           const std::optional<Tensor>& bias_dec, const std::string& activation, const std::string& output_activation,
           LatentStats stats) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto pointer = [](const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); };
  Tensor y = empty(x, {x.size(0), x.size(1)}, x.scalar_type());
  cuda::Problem problem{
      static_cast<int>(x.size(0)),
      static_cast<int>(x.size(1)),
      weight.size(0),
      pointer(x),
      x.stride(0),
      pointer(weight),
      weight.stride(0),
      bias_enc.has_value() ? pointer(*bias_enc) : nullptr,
      bias_dec.has_value() ? pointer(*bias_dec) : nullptr,
      static_cast<uint16_t*>(y.mutable_data_ptr()),
      nullptr,
      activation_of("activation", activation),
      activation_of("output_activation", output_activation),
      stats,
  };
  const char* refusal = tiedfused_few_rows_refuses(&problem);
  TIEDFUSED_CHECK(refusal == nullptr, refusal, ", got x ", shape_of(x), ", weight ", shape_of(weight),
                  " with a stride of ", weight.stride(0));
  const int blocks = tiedfused_few_rows_blocks(&problem);
  Tensor parts = empty(x, {blocks, cuda::part_floats(problem)}, ScalarType::Float);
  problem.parts = static_cast<float*>(parts.mutable_data_ptr());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const int error = tiedfused_few_rows(&problem, x.scalar_type() == ScalarType::BFloat16, blocks, stream);
  TIEDFUSED_CHECK(error == 0, "few_rows on CUDA: ", tiedfused_cuda_error(error));
  return y;
}

Tensor few_rows(Tensor x, Tensor weight, std::optional<Tensor> bias_enc, std::optional<Tensor> bias_dec,
                std::string activation, std::string output_activation, std::optional<std::string> isa) {
  check_all(x, weight, bias_enc, bias_dec, isa);
  return run(x, weight, bias_enc, bias_dec, activation, output_activation, {});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> few_rows_stats(Tensor x, Tensor weight,
                                                                  std::optional<Tensor> bias_enc,
                                                                  std::optional<Tensor> bias_dec,
                                                                  std::string activation, std::string output_activation,
                                                                  std::optional<std::string> isa) {
  check_all(x, weight, bias_enc, bias_dec, isa);
  StatsTensors s(x, weight);
  Tensor y = run(x, weight, bias_enc, bias_dec, activation, output_activation, s.pointers());
  return {y, s.l1, s.l0, s.total, s.fired};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tiedfused, CUDA, m) {
  m.impl("few_rows", TORCH_BOX(&few_rows));
  m.impl("few_rows_stats", TORCH_BOX(&few_rows_stats));
}

}  // namespace tiedfused
