// torch.ops.tiedfused.few_rows and few_rows_stats on the CPU, on the LibTorch stable ABI: one shared object for every
// torch ≥ 2.11.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>

#include "cpu/few_rows.h"
#include "operands.h"

namespace tiedfused {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cpu::Dtype cpu_dtype(ScalarType type) {
  return type == ScalarType::Float      ? cpu::Dtype::float32
         : type == ScalarType::BFloat16 ? cpu::Dtype::bfloat16
                                        : cpu::Dtype::float16;
}

// On the CPU; the plan asks for them too.
int64_t few_rows_parts(int64_t n, int64_t d, int64_t h, int64_t threads) { return cpu::parts_for(n, d, h, threads); }

// Bytes.
int64_t few_rows_workspace(int64_t n, int64_t d, bool stats, int64_t parts) {
  return static_cast<int64_t>(cpu::workspace_bytes(n, d, stats, parts));
}

// y [N, d] of x [N, d], N ≤ 64.
Tensor run(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias_enc,
           const std::optional<Tensor>& bias_dec, const std::string& activation, const std::string& output_activation,
           const std::optional<std::string>& isa, LatentStats stats) {
  const cpu::Kernel* kernel = cpu::find_kernel(isa.has_value() ? isa->c_str() : nullptr);
  TIEDFUSED_CHECK(kernel != nullptr, "isa: no kernel '", isa.value_or(""), "' runs on this CPU");
  Tensor y = empty(x, {x.size(0), x.size(1)}, x.scalar_type());
  const cpu::Problem problem{
      cpu_dtype(x.scalar_type()),
      x.size(0),
      x.size(1),
      weight.size(0),
      x.const_data_ptr(),
      x.stride(0),
      weight.const_data_ptr(),
      weight.stride(0),
      bias_enc.has_value() ? bias_enc->const_data_ptr() : nullptr,
      bias_dec.has_value() ? bias_dec->const_data_ptr() : nullptr,
      y.mutable_data_ptr(),
      activation_of("activation", activation),
      activation_of("output_activation", output_activation),
      stats,
  };
  const int64_t parts = few_rows_parts(problem.n, problem.d, problem.h, torch::stable::get_num_threads());
  const int64_t bytes = few_rows_workspace(problem.n, problem.d, stats.wanted(), parts);
  Tensor workspace = empty(x, {bytes}, ScalarType::Byte);
  cpu::few_rows(
      *kernel, problem, parts, workspace.mutable_data_ptr(), [](int64_t count, cpu::Body body, void* context) {
        torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
      });
  return y;
}

// `isa` names the kernel's build, none: the best that runs here.
Tensor few_rows(Tensor x, Tensor weight, std::optional<Tensor> bias_enc, std::optional<Tensor> bias_dec,
                std::string activation, std::string output_activation, std::optional<std::string> isa) {
  check_operands(x, weight, bias_enc, bias_dec);
  return run(x, weight, bias_enc, bias_dec, activation, output_activation, isa, {});
}

// y, l1 [N], l0 [N], total [H], fired [H]
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> few_rows_stats(Tensor x, Tensor weight,
                                                                  std::optional<Tensor> bias_enc,
                                                                  std::optional<Tensor> bias_dec,
                                                                  std::string activation, std::string output_activation,
                                                                  std::optional<std::string> isa) {
  check_operands(x, weight, bias_enc, bias_dec);
  StatsTensors s(x, weight);
  Tensor y = run(x, weight, bias_enc, bias_dec, activation, output_activation, isa, s.pointers());
  return {y, s.l1, s.l0, s.total, s.fired};
}

// What this shared object holds, one "key: value" a line.
std::string native_info() {
  std::string info = "cpu: ";
  info += cpu::find_kernel()->name;
  info += "\ncuda: ";
#ifdef TIEDFUSED_CUDA_ARCHS  // 80,90a
#define TEXT(...) #__VA_ARGS__
#define TEXT_OF(macro) TEXT(macro)
  info += TEXT_OF(TIEDFUSED_CUDA_ARCHS);
#undef TEXT_OF
#undef TEXT
#endif
  info += "\nactivations: ";
#define X(name, formula) info += #name " ";
  TIEDFUSED_ACTIVATIONS(X)
#undef X
  return info;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tiedfused, m) {
  m.def(
      "few_rows(Tensor x, Tensor weight, Tensor? bias_enc, Tensor? bias_dec, str activation, str output_activation, "
      "str? isa=None) -> Tensor");
  m.def(
      "few_rows_stats(Tensor x, Tensor weight, Tensor? bias_enc, Tensor? bias_dec, str activation, "
      "str output_activation, str? isa=None) -> (Tensor y, Tensor l1, Tensor l0, Tensor total, Tensor fired)");
  m.def("few_rows_parts(int n, int d, int h, int threads) -> int");
  m.def("few_rows_workspace(int n, int d, bool stats, int parts) -> int");
  m.def("native_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(tiedfused, CPU, m) {
  m.impl("few_rows", TORCH_BOX(&few_rows));
  m.impl("few_rows_stats", TORCH_BOX(&few_rows_stats));
}

STABLE_TORCH_LIBRARY_IMPL(tiedfused, CompositeExplicitAutograd, m) {
  m.impl("few_rows_parts", TORCH_BOX(&few_rows_parts));
  m.impl("few_rows_workspace", TORCH_BOX(&few_rows_workspace));
  m.impl("native_info", TORCH_BOX(&native_info));
}

}  // namespace tiedfused
