
#include <optional>
#include <tuple>

#include "cpu/kernels/kernels.h"
#include "cpu/runtime/maps.h"
#include "cpu/runtime/narrow.h"
#include "ops.h"

namespace ddpm_fast::cpu {

namespace {

using Forward = std::tuple<Tensor, Tensor, Tensor>;  // out, statistics, sums

// A call's arguments in float32, and the kernels' view of them.
struct Call {
  Tensor map, gain_in, weight_qkv, mem_kv, weight, bias, gain;
  LinearAttentionInputs in;

  // With `block` the map is x, otherwise qkv.
  Call(const Tensor& given, bool block, const Tensor& memory, const Tensor& output_weight, const Tensor& output_bias,
       const Tensor& output_gain, int64_t heads)
      : map(float_map(given, block ? "x" : "qkv")) {
    TORCH_CHECK_VALUE(
        memory.dim() == 4 && memory.size(0) == 2 && memory.size(1) == heads && heads > 0 && memory.size(2) > 0,
        "mem_kv must have shape (2, ", heads, ", D, M), got ", memory.sizes());
    TORCH_CHECK_VALUE(output_weight.dim() >= 2 && output_weight.size(0) > 0, "weight must have shape (C, ",
                      heads * memory.size(2), "), got ", output_weight.sizes());
    const int64_t D = memory.size(2), C = output_weight.size(0);
    const int64_t channels = block ? C : 3 * heads * D;
    TORCH_CHECK_VALUE(map.size(1) == channels, block ? "x" : "qkv", " must have ", channels, " channels, got ",
                      map.size(1));
    mem_kv = float_vector(memory, "mem_kv", 2 * heads * D * memory.size(3));
    weight = float_vector(output_weight, "weight", C * heads * D);
    bias = float_vector(output_bias, "bias", C);
    gain = float_vector(output_gain, "gain", C);
    const float* data = map.const_data_ptr<float>();
    in = {.B = map.size(0),
          .N = map.size(2) * map.size(3),
          .heads = heads,
          .D = D,
          .C = C,
          .M = memory.size(3),
          .qkv = block ? nullptr : data,
          .x = block ? data : nullptr,
          .mem_kv = mem_kv.const_data_ptr<float>(),
          .weight = weight.const_data_ptr<float>(),
          .bias = bias.const_data_ptr<float>(),
          .gain = gain.const_data_ptr<float>(),
          .narrow = multiplies_narrowly(given)};
  }

  void set_input_product(const Tensor& input_gain, const Tensor& qkv_weight) {
    gain_in = float_vector(input_gain, "gain_in", in.C);
    weight_qkv = float_vector(qkv_weight, "weight_qkv", 3 * in.heads * in.D * in.C);
    in.gain_in = gain_in.const_data_ptr<float>();
    in.weight_qkv = weight_qkv.const_data_ptr<float>();
  }

  int64_t hidden() const { return in.heads * in.D; }
  int64_t values() const { return in.x != nullptr ? in.C : in.D; }
};

Forward run_forward(const Call& call, const Tensor& given, const OptionalTensor& residual) {
  Tensor added;
  if (residual.has_value()) added = float_map_like(*residual, "residual", given, call.in.C);
  const Tensor out = call.in.x != nullptr ? empty_tensor_like(call.map)
                                          : empty_tensor({given.size(0), call.in.C, given.size(2), given.size(3)},
                                                         at::kFloat, format_of(given));
  const Tensor statistics = empty_tensor({call.in.B, 2, call.hidden()});
  const Tensor sums = empty_tensor({call.in.B, call.hidden(), call.values()});
  kernels().linear_attention.forward({.in = call.in,
                                      .residual = data_or_null(added),
                                      .out = out.data_ptr<float>(),
                                      .statistics = statistics.data_ptr<float>(),
                                      .sums = sums.data_ptr<float>()});
  return {as_type(out, given.scalar_type()), statistics, sums};
}

// The gradients of the map and the parameters, in float32; gain_in and weight_qkv only if the input is x.
struct Gradients {
  Tensor map, gain_in, weight_qkv, mem_kv, weight, bias, gain;
};

Gradients run_backward(const Call& call, const Tensor& grad, const Tensor& statistics, const Tensor& sums) {
  const bool block = call.in.x != nullptr;
  const Tensor dout = float_map_like(grad, "grad", call.map, call.in.C);
  const Tensor kept_statistics = float_vector(statistics, "statistics", call.in.B * 2 * call.hidden());
  const Tensor kept_sums = float_vector(sums, "sums", call.in.B * call.hidden() * call.values());
  const auto empty = [](const Tensor& like) { return like.defined() ? empty_tensor_like(like) : Tensor(); };
  Gradients d{.map = empty(call.map),
              .gain_in = empty(call.gain_in),
              .weight_qkv = empty(call.weight_qkv),
              .mem_kv = empty(call.mem_kv),
              .weight = empty(call.weight),
              .bias = empty(call.bias),
              .gain = empty(call.gain)};
  kernels().linear_attention.backward({.in = call.in,
                                       .grad = dout.const_data_ptr<float>(),
                                       .statistics = kept_statistics.const_data_ptr<float>(),
                                       .sums = kept_sums.const_data_ptr<float>(),
                                       .dqkv = block ? nullptr : d.map.data_ptr<float>(),
                                       .dx = block ? d.map.data_ptr<float>() : nullptr,
                                       .dgain_in = mutable_data_or_null(d.gain_in),
                                       .dweight_qkv = mutable_data_or_null(d.weight_qkv),
                                       .dmem_kv = d.mem_kv.data_ptr<float>(),
                                       .dweight = d.weight.data_ptr<float>(),
                                       .dbias = d.bias.data_ptr<float>(),
                                       .dgain = d.gain.data_ptr<float>()});
  return d;
}

}  // namespace

Forward linear_attention(const Tensor& qkv, const Tensor& mem_kv, const Tensor& weight, const Tensor& bias,
                         const Tensor& gain, const OptionalTensor& residual, int64_t heads) {
  return run_forward(Call(qkv, false, mem_kv, weight, bias, gain, heads), qkv, residual);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_backward(const Tensor& grad, const Tensor& qkv,
                                                                             const Tensor& mem_kv, const Tensor& weight,
                                                                             const Tensor& bias, const Tensor& gain,
                                                                             const Tensor& statistics,
                                                                             const Tensor& sums, int64_t heads) {
  const Gradients d = run_backward(Call(qkv, false, mem_kv, weight, bias, gain, heads), grad, statistics, sums);
  return {as_type(d.map, qkv.scalar_type()), as_type(d.mem_kv, mem_kv.scalar_type()),
          as_type(d.weight, weight.scalar_type()), as_type(d.bias, bias.scalar_type()),
          as_type(d.gain, gain.scalar_type())};
}

Forward linear_attention_block(const Tensor& x, const Tensor& gain_in, const Tensor& weight_qkv, const Tensor& mem_kv,
                               const Tensor& weight, const Tensor& bias, const Tensor& gain,
                               const OptionalTensor& residual, int64_t heads) {
  Call call(x, true, mem_kv, weight, bias, gain, heads);
  call.set_input_product(gain_in, weight_qkv);
  return run_forward(call, x, residual);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_block_backward(
    const Tensor& grad, const Tensor& x, const Tensor& gain_in, const Tensor& weight_qkv, const Tensor& mem_kv,
    const Tensor& weight, const Tensor& bias, const Tensor& gain, const Tensor& statistics, const Tensor& sums,
    int64_t heads) {
  Call call(x, true, mem_kv, weight, bias, gain, heads);
  call.set_input_product(gain_in, weight_qkv);
  const Gradients d = run_backward(call, grad, statistics, sums);
  return {as_type(d.map, x.scalar_type()),
          as_type(d.gain_in, gain_in.scalar_type()),
          as_type(d.weight_qkv, weight_qkv.scalar_type()),
          as_type(d.mem_kv, mem_kv.scalar_type()),
          as_type(d.weight, weight.scalar_type()),
          as_type(d.bias, bias.scalar_type()),
          as_type(d.gain, gain.scalar_type())};
}

}  // namespace ddpm_fast::cpu
