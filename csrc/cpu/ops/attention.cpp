
#include <optional>
#include <tuple>

#include "cpu/kernels/kernels.h"
#include "cpu/runtime/maps.h"
#include "ops.h"

namespace ddpm_fast::cpu {

namespace {

void check_memory(const Tensor& mem_kv, int64_t heads) {
  TORCH_CHECK_VALUE(
      mem_kv.dim() == 4 && mem_kv.size(0) == 2 && mem_kv.size(1) == heads && heads > 0 && mem_kv.size(3) > 0,
      "mem_kv must have shape (2, ", heads, ", M, D), got ", mem_kv.sizes());
}

AttentionInputs inputs_of(const Tensor& map, const Tensor& memory) {
  return {.B = map.size(0),
          .N = map.size(2) * map.size(3),
          .heads = memory.size(1),
          .D = memory.size(3),
          .M = memory.size(2),
          .mem_kv = memory.const_data_ptr<float>()};
}

// The arguments of a call in float32.
struct Call {
  Tensor qkv, mem_kv;
  AttentionInputs in;

  Call(const Tensor& given, const Tensor& memory, int64_t heads) : qkv(float_map(given, "qkv")) {
    check_memory(memory, heads);
    TORCH_CHECK_VALUE(qkv.size(1) == 3 * heads * memory.size(3), "qkv must have ", 3 * heads * memory.size(3),
                      " channels, got ", qkv.size(1));
    mem_kv = float_vector(memory, "mem_kv", memory.numel());
    in = inputs_of(qkv, mem_kv);
  }
};

}  // namespace

Tensor attention(const Tensor& qkv, const Tensor& mem_kv, int64_t heads) {
  const Call call(qkv, mem_kv, heads);
  const at::MemoryFormat format = at::MemoryFormat::ChannelsLast;
  const Tensor out =
      empty_tensor({qkv.size(0), call.in.heads * call.in.D, qkv.size(2), qkv.size(3)}, at::kFloat, format);
  kernels().attention.forward({.in = call.in, .qkv = call.qkv.const_data_ptr<float>(), .out = out.data_ptr<float>()});
  return out.to(qkv.scalar_type());
}

std::tuple<Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& qkv, const Tensor& mem_kv,
                                              int64_t heads) {
  const Call call(qkv, mem_kv, heads);
  const Tensor dout = float_map_like(grad, "grad", qkv, call.in.heads * call.in.D);
  const Tensor dqkv = empty_tensor_like(call.qkv), dmem_kv = empty_tensor_like(call.mem_kv);
  kernels().attention.backward({.in = call.in,
                                .qkv = call.qkv.const_data_ptr<float>(),
                                .grad = dout.const_data_ptr<float>(),
                                .dqkv = dqkv.data_ptr<float>(),
                                .dmem_kv = dmem_kv.data_ptr<float>()});
  return {dqkv.to(qkv.scalar_type()), dmem_kv.to(mem_kv.scalar_type())};
}

namespace {

struct BlockCall {
  Tensor x, gain_in, weight_qkv, mem_kv, weight;
  AttentionBlockInputs in;

  BlockCall(const Tensor& given, const Tensor& input_gain, const Tensor& qkv_weight, const Tensor& memory,
            const Tensor& output_weight, int64_t heads)
      : x(float_map(given, "x")) {
    check_memory(memory, heads);
    const int64_t C = x.size(1), hidden = heads * memory.size(3);
    gain_in = float_vector(input_gain, "gain_in", C);
    weight_qkv = float_vector(qkv_weight, "weight_qkv", 3 * hidden * C);
    mem_kv = float_vector(memory, "mem_kv", memory.numel());
    weight = float_vector(output_weight, "weight", C * hidden);
    in = {.in = inputs_of(x, mem_kv),
          .C = C,
          .x = x.const_data_ptr<float>(),
          .gain_in = gain_in.const_data_ptr<float>(),
          .weight_qkv = weight_qkv.const_data_ptr<float>(),
          .weight = weight.const_data_ptr<float>()};
  }
};

}  // namespace

Tensor attention_block(const Tensor& x, const Tensor& gain_in, const Tensor& weight_qkv, const Tensor& mem_kv,
                       const Tensor& weight, const Tensor& bias, const OptionalTensor& residual, int64_t heads) {
  const BlockCall call(x, gain_in, weight_qkv, mem_kv, weight, heads);
  const Tensor added_bias = float_vector(bias, "bias", call.in.C);
  Tensor added;
  if (residual.has_value()) added = float_map_like(*residual, "residual", x, call.in.C);
  const Tensor out = empty_tensor_like(call.x);
  kernels().attention.block_forward({.block = call.in,
                                     .bias = added_bias.const_data_ptr<float>(),
                                     .residual = data_or_null(added),
                                     .out = out.data_ptr<float>()});
  return out.to(x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_block_backward(
    const Tensor& grad, const Tensor& x, const Tensor& gain_in, const Tensor& weight_qkv, const Tensor& mem_kv,
    const Tensor& weight, const Tensor& bias, int64_t heads) {
  const BlockCall call(x, gain_in, weight_qkv, mem_kv, weight, heads);
  const Tensor dout = float_map_like(grad, "grad", x, call.in.C);
  const Tensor dx = empty_tensor_like(call.x), dgain_in = empty_tensor_like(call.gain_in);
  const Tensor dweight_qkv = empty_tensor_like(call.weight_qkv), dmem_kv = empty_tensor_like(call.mem_kv);
  const Tensor dweight = empty_tensor_like(call.weight),
               dbias = empty_tensor_like(float_vector(bias, "bias", call.in.C));
  kernels().attention.block_backward({.block = call.in,
                                      .grad = dout.const_data_ptr<float>(),
                                      .dx = dx.data_ptr<float>(),
                                      .dgain_in = dgain_in.data_ptr<float>(),
                                      .dweight_qkv = dweight_qkv.data_ptr<float>(),
                                      .dmem_kv = dmem_kv.data_ptr<float>(),
                                      .dweight = dweight.data_ptr<float>(),
                                      .dbias = dbias.data_ptr<float>()});
  return {
      dx.to(x.scalar_type()),           dgain_in.to(gain_in.scalar_type()), dweight_qkv.to(weight_qkv.scalar_type()),
      dmem_kv.to(mem_kv.scalar_type()), dweight.to(weight.scalar_type()),   dbias.to(bias.scalar_type())};
}

}  // namespace ddpm_fast::cpu
