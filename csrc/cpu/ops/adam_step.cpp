// Clipping, Adam, the average of weights and their half copies, see ddpm_fast/ops/adam_step/op.py.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/runtime/memory.h"
#include "ops.h"
#include "tile.h"

namespace ddpm_fast::cpu {

namespace {

constexpr int64_t kChunk = 32768;  // elements; fewer make the norm's streams too short
constexpr int64_t kBlock = 8192;   // elements whose average and copy follow while they are in the cache
// Numbers of a group.
enum { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kDecoupled, kNumbers };

// Chunks of all tensors: cut in the same way whatever the number of threads.
class Chunks {
 public:
  explicit Chunks(at::TensorList tensors) : of_thread_(std::max(1, at::get_num_threads())) {
    const int64_t threads = static_cast<int64_t>(of_thread_.size());
    std::vector<int64_t> busy(threads, 0);  // elements
    for (size_t tensor = 0; tensor < tensors.size(); ++tensor) {
      const int64_t elements = tensors[tensor].numel(), count = (elements + kChunk - 1) / kChunk;
      for (int64_t i = 0; i < count; ++i) {
        // The kernels that wrote a gradient and will read its weight cut their rows in the same way. What belongs to
        // two threads, such as a tensor of one chunk, goes to the one with less to do.
        int64_t thread = i * threads / count;
        if (thread != ((i + 1) * threads - 1) / count) {
          thread = std::min_element(busy.begin(), busy.end()) - busy.begin();
        }
        busy[thread] += std::min(kChunk, elements - kChunk * i);
        of_thread_[thread].push_back({total_++, static_cast<int64_t>(tensor), kChunk * i});
      }
    }
  }

  int64_t total() const { return total_; }

  // body(chunk, tensor, first element) on torch's threads.
  template <typename Body>
  void for_each(const Body& body) const {
    at::parallel_for(0, static_cast<int64_t>(of_thread_.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        for (const Chunk& chunk : of_thread_[thread]) body(chunk.index, chunk.tensor, chunk.first);
      }
    });
  }

 private:
  struct Chunk {
    int64_t index, tensor, first;
  };

  std::vector<std::vector<Chunk>> of_thread_;
  int64_t total_ = 0;
};

// Strides of dimensions of one element do not matter.
bool same_layout(const Tensor& tensor, const Tensor& other) {
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != other.stride(dim)) return false;
  }
  return true;
}

void check_alike(const Tensor& tensor, const char* name, const Tensor& param) {
  TORCH_CHECK_VALUE(tensor.device() == param.device() && tensor.sizes() == param.sizes(), name,
                    " must have their parameters' shapes, got ", tensor.sizes(), " for ", param.sizes());
  TORCH_CHECK_VALUE(same_layout(tensor, param), name, " must have their parameters' strides, got ", tensor.strides(),
                    " for ", param.strides());
}

float* state_of(const Tensor& tensor, const char* name, const Tensor& param) {
  check_alike(tensor, name, param);
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, name, " must be float32, got ", tensor.scalar_type());
  return tensor.data_ptr<float>();
}

double number_in(const Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.numel() == 1 && tensor.device().is_cpu(), name, " must be one element on the CPU, got ",
                    tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, name,
                   " must be float32 or float64, got ", tensor.scalar_type());
  return tensor.scalar_type() == at::kFloat ? *tensor.const_data_ptr<float>() : *tensor.const_data_ptr<double>();
}

void copy_to(void* to, at::ScalarType type, const float* from, int64_t first, int64_t count) {
  if (type == at::kHalf) {
    convert(static_cast<c10::Half*>(to) + first, from, count);
  } else {
    convert(static_cast<c10::BFloat16*>(to) + first, from, count);
  }
}

Tensor scalar(double value) {
  const Tensor made = unpooled_tensor({});
  *made.data_ptr<float>() = static_cast<float>(value);
  return made;
}

}  // namespace

std::tuple<Tensor, Tensor> adam_step(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                                     at::TensorList exp_avg_sqs, at::TensorList steps, at::TensorList averages,
                                     at::IntArrayRef averaged, at::TensorList copies, at::IntArrayRef copied,
                                     at::TensorList rates, at::IntArrayRef rated, at::IntArrayRef counts,
                                     at::ArrayRef<double> numbers, std::optional<double> max_grad_norm,
                                     const OptionalTensor& grad_scale, const OptionalTensor& average_weight) {
  const size_t count = params.size();
  TORCH_CHECK_VALUE(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count &&
                        steps.size() == count && averages.size() == averaged.size() && copies.size() == copied.size() &&
                        rates.size() == rated.size() && numbers.size() == kNumbers * counts.size(),
                    "lists must have one entry for each of params, got ", count, " params");
  std::vector<AdamChunk> tensors(count);
  std::vector<Tensor> laid_out(count);  // gradients in the order of their parameters
  std::vector<float*> steps_of(count), average_of(count, nullptr);
  std::vector<void*> copy_of(count, nullptr);
  std::vector<at::ScalarType> copy_type(count, at::kFloat);
  for (size_t i = 0; i < count; ++i) {
    const Tensor& p = params[i];
    TORCH_CHECK_VALUE(p.is_non_overlapping_and_dense(), "params must have no gaps in memory, got strides ",
                      p.strides());
    TORCH_CHECK_TYPE(grads[i].scalar_type() == at::kFloat, "grads must be float32, got ", grads[i].scalar_type());
    TORCH_CHECK_VALUE(grads[i].sizes() == p.sizes() && grads[i].device() == p.device(),
                      "grads must have their parameters' shapes, got ", grads[i].sizes(), " for ", p.sizes());
    laid_out[i] = grads[i];
    if (!same_layout(grads[i], p)) {
      laid_out[i] = empty_tensor_like(p);
      laid_out[i].copy_(grads[i]);
    }
    tensors[i] = {.param = state_of(p, "params", p),
                  .exp_avg = state_of(exp_avgs[i], "exp_avgs", p),
                  .exp_avg_sq = state_of(exp_avg_sqs[i], "exp_avg_sqs", p),
                  .grad = laid_out[i].const_data_ptr<float>(),
                  .count = p.numel()};
    TORCH_CHECK_VALUE(steps[i].numel() == 1 && steps[i].scalar_type() == at::kFloat && steps[i].device().is_cpu(),
                      "steps must be one float32 element each, got ", steps[i].numel(), " of ", steps[i].scalar_type());
    steps_of[i] = steps[i].data_ptr<float>();
  }
  const auto param_at = [&](int64_t place) -> const Tensor& {
    TORCH_CHECK_VALUE(0 <= place && place < static_cast<int64_t>(count), "there is no parameter ", place);
    return params[place];
  };
  for (size_t i = 0; i < averages.size(); ++i) {
    average_of[averaged[i]] = state_of(averages[i], "averages", param_at(averaged[i]));
  }
  for (size_t i = 0; i < copies.size(); ++i) {
    check_alike(copies[i], "copies", param_at(copied[i]));
    copy_type[copied[i]] = copies[i].scalar_type();
    TORCH_CHECK_TYPE(copy_type[copied[i]] == at::kHalf || copy_type[copied[i]] == at::kBFloat16,
                     "copies must be float16 or bfloat16, got ", copy_type[copied[i]]);
    copy_of[copied[i]] = copies[i].data_ptr();
  }
  std::vector<double> values(numbers.begin(), numbers.end());
  for (size_t i = 0; i < rates.size(); ++i) {
    TORCH_CHECK_VALUE(0 <= rated[i] && rated[i] < static_cast<int64_t>(counts.size()), "there is no group ", rated[i]);
    values[kNumbers * rated[i] + kLr] = number_in(rates[i], "a tensor lr");
  }
  const double scale = grad_scale.has_value() ? number_in(*grad_scale, "grad_scale") : 1;
  const double weight = average_weight.has_value() ? number_in(*average_weight, "average_weight") : 1;

  const Chunks chunks(params);
  std::vector<double> sums(chunks.total());
  const auto norm_of_sums = [&] {
    double sum = 0;
    for (const double part : sums) sum += part;
    return static_cast<float>(std::sqrt(sum) / scale);
  };
  // Without a use for the norm before the update, gradients are read once.
  const bool norm_first = max_grad_norm.has_value() || grad_scale.has_value();
  float norm = 0;
  if (norm_first) {
    chunks.for_each([&](int64_t chunk, int64_t tensor, int64_t first) {
      const AdamChunk& of = tensors[tensor];
      sums[chunk] = kernels().adam_step.squares(of.grad + first, std::min(kChunk, of.count - first));
    });
    norm = norm_of_sums();
  }
  const bool skipped = grad_scale.has_value() && !std::isfinite(norm);
  double factor = 1 / scale;
  // NaN stays.
  if (max_grad_norm.has_value() && !(*max_grad_norm / (norm + 1e-6) >= 1)) factor *= *max_grad_norm / (norm + 1e-6);

  // One entry for each tensor, whose steps may differ.
  std::vector<AdamNumbers> settings(count);
  size_t tensor = 0;
  for (size_t group = 0; group < counts.size(); ++group) {
    const double* const of = values.data() + kNumbers * group;
    TORCH_CHECK_VALUE(counts[group] >= 0 && tensor + counts[group] <= count, "counts must be of ", count, " params");
    for (const size_t end = tensor + counts[group]; tensor < end; ++tensor) {
      if (!skipped) *steps_of[tensor] += 1;
      const double t = *steps_of[tensor], decay = of[kWeightDecay];
      const bool decoupled = of[kDecoupled] != 0;
      settings[tensor] = {.beta1 = static_cast<float>(of[kBeta1]),
                          .rest1 = static_cast<float>(1 - of[kBeta1]),
                          .beta2 = static_cast<float>(of[kBeta2]),
                          .rest2 = static_cast<float>(1 - of[kBeta2]),
                          .step_size = static_cast<float>(of[kLr] / (1 - std::pow(of[kBeta1], t))),
                          .inverse_root = static_cast<float>(1 / std::sqrt(1 - std::pow(of[kBeta2], t))),
                          .eps = static_cast<float>(of[kEps]),
                          .kept = static_cast<float>(decoupled ? 1 - of[kLr] * decay : 1),
                          .weight_decay = static_cast<float>(decoupled ? 0 : decay),
                          .factor = static_cast<float>(factor)};
    }
  }
  TORCH_CHECK_VALUE(tensor == count, "counts must be of ", count, " params, got ", tensor);

  chunks.for_each([&](int64_t chunk, int64_t i, int64_t first) {
    const AdamChunk& whole = tensors[i];
    const int64_t end = std::min(first + kChunk, whole.count);
    const bool moves = average_of[i] != nullptr && weight != 0;
    const int64_t block = moves || copy_of[i] != nullptr ? kBlock : kChunk;
    double squares = 0;
    for (; first < end; first += block) {
      const int64_t size = std::min(block, end - first);
      float* const param = whole.param + first;
      if (!skipped) {
        squares += kernels().adam_step.update({.param = param,
                                               .exp_avg = whole.exp_avg + first,
                                               .exp_avg_sq = whole.exp_avg_sq + first,
                                               .grad = whole.grad + first,
                                               .count = size},
                                              settings[i]);
      }
      if (moves) {
        kernels().adam_step.move(average_of[i] + first, param, static_cast<float>(weight), size);
      }
      if (copy_of[i] != nullptr) copy_to(copy_of[i], copy_type[i], param, first, size);
    }
    if (!norm_first) sums[chunk] = squares;
  });
  if (!norm_first) norm = norm_of_sums();
  return {scalar(norm), scalar(skipped)};
}

}  // namespace ddpm_fast::cpu
