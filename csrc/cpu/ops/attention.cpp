
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/kernels/kernels.h"
#include "cpu/runtime/maps.h"
#include "cpu/runtime/narrow.h"
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
  return as_type(out, qkv.scalar_type());
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
  return {as_type(dqkv, qkv.scalar_type()), as_type(dmem_kv, mem_kv.scalar_type())};
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
  return as_type(out, x.scalar_type());
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
  return {as_type(dx, x.scalar_type()),
          as_type(dgain_in, gain_in.scalar_type()),
          as_type(dweight_qkv, weight_qkv.scalar_type()),
          as_type(dmem_kv, mem_kv.scalar_type()),
          as_type(dweight, weight.scalar_type()),
          as_type(dbias, bias.scalar_type())};
}

namespace {

// The float32 arguments of both directions of the block with GroupNorm.
struct GroupCall {
  Tensor x, gain, offset, weight_qkv, bias_qkv, weight;
  GroupAttentionInputs block;

  GroupCall(const Tensor& map, const OptionalTensor& norm_gain, const OptionalTensor& norm_offset,
            const Tensor& qkv_weight, const OptionalTensor& qkv_bias, const Tensor& output_weight, int64_t groups,
            int64_t heads, bool by_head, bool folded, bool residual, double output_scale)
      : x(float_map(map, "x")) {
    const int64_t B = x.size(0), C = x.size(1), N = x.size(2) * x.size(3);
    TORCH_CHECK_VALUE(
        heads > 0 && output_weight.dim() > 1 && output_weight.size(1) > 0 && output_weight.size(1) % heads == 0,
        "weight must have shape (", C, ", ", heads, "·D), got ", output_weight.sizes());
    TORCH_CHECK_VALUE(groups >= 0 && (groups == 0 || C % groups == 0), "groups must divide the ", C,
                      " channels of x, got ", groups);
    TORCH_CHECK_VALUE(norm_gain.has_value() == (groups > 0) && norm_offset.has_value() == (groups > 0),
                      "gain and offset must be given with groups > 0, and only then");
    const int64_t hidden = output_weight.size(1);
    TORCH_CHECK_VALUE(!folded || (heads == 1 && hidden == C), "weights are folded for one head of ", C,
                      " channels, got ", heads, " heads of ", hidden / heads);
    gain = float_vector(norm_gain, "gain", C);
    offset = float_vector(norm_offset, "offset", C);
    weight_qkv = float_vector(qkv_weight, "weight_qkv", 3 * hidden * C);
    bias_qkv = float_vector(qkv_bias, "bias_qkv", 3 * hidden);
    weight = float_vector(output_weight, "weight", C * hidden);
    block = {.in = {.B = B, .N = N, .heads = heads, .D = hidden / heads, .M = 0, .mem_kv = nullptr},
             .C = C,
             .groups = groups,
             .by_head = by_head,
             .folded = folded,
             .residual = residual,
             .narrow = multiplies_narrowly(map),
             .output_scale = static_cast<float>(output_scale),
             .x = x.const_data_ptr<float>(),
             .gain = data_or_null(gain),
             .offset = data_or_null(offset),
             .weight_qkv = weight_qkv.const_data_ptr<float>(),
             .bias_qkv = data_or_null(bias_qkv),
             .weight = weight.const_data_ptr<float>()};
  }
  int64_t hidden() const { return block.in.heads * block.in.D; }
  // Of what forward keeps in place of attention's output.
  std::vector<int64_t> attended_sizes() const {
    if (block.folded) return {2, block.C, block.C};
    return {block.in.B, block.in.N, kept_row(hidden())};
  }
};

// What forward kept.
Tensor kept_tensor(const Tensor& tensor, const char* name, at::IntArrayRef sizes) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, name, " must be float32, got ", tensor.scalar_type());
  check_sizes(tensor, name, sizes);
  return tensor.contiguous();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_attention_block(
    const Tensor& x, const OptionalTensor& gain, const OptionalTensor& offset, const Tensor& weight_qkv,
    const OptionalTensor& bias_qkv, const Tensor& weight, const OptionalTensor& bias, int64_t groups, double eps,
    int64_t heads, bool by_head, bool folded, bool residual, double output_scale, bool keep) {
  const GroupCall call(x, gain, offset, weight_qkv, bias_qkv, weight, groups, heads, by_head, folded, residual,
                       output_scale);
  const int64_t B = call.block.in.B, N = call.block.in.N, hidden = call.hidden();
  const Tensor added = float_vector(bias, "bias", call.block.C);
  const Tensor out = empty_tensor_like(call.x), statistics = unpooled_tensor({B, groups, 2});
  const Tensor qkv = keep ? empty_tensor({B, N, kept_row(3 * hidden)}) : no_tensor(at::kFloat);
  const Tensor attended = keep ? empty_tensor(call.attended_sizes()) : no_tensor(at::kFloat);
  kernels().attention.group_block_forward({.block = call.block,
                                           .eps = static_cast<float>(eps),
                                           .bias = data_or_null(added),
                                           .out = out.data_ptr<float>(),
                                           .statistics = statistics.data_ptr<float>(),
                                           .qkv = keep ? qkv.data_ptr<float>() : nullptr,
                                           .attended = keep ? attended.data_ptr<float>() : nullptr});
  return {as_type(out, x.scalar_type()), keep ? statistics : no_tensor(at::kFloat), qkv, attended};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_attention_block_backward(
    const Tensor& grad, const Tensor& x, const OptionalTensor& gain, const OptionalTensor& offset,
    const Tensor& weight_qkv, const OptionalTensor& bias_qkv, const Tensor& weight, const Tensor& statistics,
    const Tensor& qkv, const Tensor& attended, int64_t groups, int64_t heads, bool by_head, bool folded, bool residual,
    double output_scale, bool wants_weights) {
  const GroupCall call(x, gain, offset, weight_qkv, bias_qkv, weight, groups, heads, by_head, folded, residual,
                       output_scale);
  const int64_t C = call.block.C, hidden = call.hidden();
  const Tensor dout = float_map_like(grad, "grad", x, C);
  const int64_t B = call.block.in.B, N = call.block.in.N;
  const Tensor moments = kept_tensor(statistics, "statistics", {B, groups, 2}),
               qkv_map = kept_tensor(qkv, "qkv", {B, N, kept_row(3 * hidden)}),
               attended_map = kept_tensor(attended, "attended", call.attended_sizes());
  // An empty tensor is one of its own: outputs of an operator must not share memory.
  const auto row = [](bool is_wanted, int64_t size) {
    return is_wanted ? unpooled_tensor({size}) : no_tensor(at::kFloat);
  };
  const auto like = [&](const Tensor& given) {
    return wants_weights ? empty_tensor_like(given) : no_tensor(at::kFloat);
  };
  const Tensor dx = empty_tensor_like(call.x), dgain = row(groups > 0, C), doffset = row(groups > 0, C);
  const Tensor dweight_qkv = like(call.weight_qkv), dweight = like(call.weight);
  const Tensor dbias_qkv = row(wants_weights, 3 * hidden), dbias = row(wants_weights, C);
  const auto wanted = [&](const Tensor& tensor) { return wants_weights ? tensor.data_ptr<float>() : nullptr; };
  kernels().attention.group_block_backward({.block = call.block,
                                            .grad = dout.const_data_ptr<float>(),
                                            .statistics = moments.const_data_ptr<float>(),
                                            .qkv = qkv_map.const_data_ptr<float>(),
                                            .attended = attended_map.const_data_ptr<float>(),
                                            .dx = dx.data_ptr<float>(),
                                            .dgain = groups ? dgain.data_ptr<float>() : nullptr,
                                            .doffset = groups ? doffset.data_ptr<float>() : nullptr,
                                            .dweight_qkv = wanted(dweight_qkv),
                                            .dbias_qkv = wanted(dbias_qkv),
                                            .dweight = wanted(dweight),
                                            .dbias = wanted(dbias)});
  const auto result = [&](const Tensor& made, const OptionalTensor& given) {
    return given.has_value() ? as_type(made, given->scalar_type()) : no_tensor(x.scalar_type());
  };
  return {as_type(dx, x.scalar_type()),
          result(dgain, gain),
          result(doffset, offset),
          as_type(dweight_qkv, weight_qkv.scalar_type()),
          result(dbias_qkv, bias_qkv),
          as_type(dweight, weight.scalar_type()),
          dbias};
}

}  // namespace ddpm_fast::cpu
