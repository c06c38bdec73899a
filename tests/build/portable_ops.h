// Whole kernels of a table against plain loops in double: convolutions, products and attention.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/kernels/kernels.h"

namespace ddpm_fast::check {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

// The largest error in units of the truth's largest element.
inline double error(const Floats& actual, const Doubles& truth) {
  double largest = 0, difference = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    largest = std::max(largest, std::abs(truth[i]));
    const double d = std::abs(actual[i] - truth[i]);
    difference = d <= difference ? difference : d;  // NaN stays
  }
  return difference / largest;
}

// A convolution of `side` × `side` taps with zero padding on (B, H, W, C), and its weight's gradient.
struct Convolution {
  int64_t B, H, W, C, K, side;

  template <typename Visit>
  void each(const Visit& visit) const {
    for (int64_t b = 0; b < B; ++b)
      for (int64_t y = 0; y < H; ++y)
        for (int64_t x = 0; x < W; ++x)
          for (int64_t i = 0; i < side; ++i)
            for (int64_t j = 0; j < side; ++j) {
              const int64_t v = y + i - side / 2, u = x + j - side / 2;
              if (v < 0 || v >= H || u < 0 || u >= W) continue;
              for (int64_t k = 0; k < K; ++k)
                for (int64_t c = 0; c < C; ++c)
                  visit(((b * H + y) * W + x) * K + k, ((b * H + v) * W + u) * C + c,
                        ((k * C + c) * side + i) * side + j);
            }
  }
  Doubles forward(const Floats& x, const Floats& weight, const Floats& bias) const {
    Doubles out(B * H * W * K);
    for (size_t n = 0; n < out.size(); ++n) out[n] = bias[n % K];
    each([&](int64_t to, int64_t from, int64_t tap) { out[to] += double(x[from]) * weight[tap]; });
    return out;
  }
  Doubles weight_gradient(const Floats& x, const Floats& grad) const {
    Doubles dweight(K * C * side * side);
    each([&](int64_t to, int64_t from, int64_t tap) { dweight[tap] += double(x[from]) * grad[to]; });
    return dweight;
  }
};

template <typename Random>
double conv3x3(const Kernels& kernels, const Convolution& s, const Random& random) {
  const Floats x = random(s.B * s.H * s.W * s.C), weight = random(s.K * s.C * 9), bias = random(s.K),
               grad = random(s.B * s.H * s.W * s.K);
  Floats out(grad.size(), NAN), dx(x.size(), NAN), dweight(weight.size(), NAN);
  kernels.conv3x3.forward({.B = s.B,
                           .H = s.H,
                           .W = s.W,
                           .input = {x.data()},
                           .channels = {s.C},
                           .weight = {weight.data(), 9 * s.C, 9, false},
                           .bias = bias.data(),
                           .output = {out.data()},
                           .output_channels = {s.K}});
  kernels.conv3x3.forward({.B = s.B,
                           .H = s.H,
                           .W = s.W,
                           .input = {grad.data()},
                           .channels = {s.K},
                           .weight = {weight.data(), 9, 9 * s.C, true},
                           .output = {dx.data()},
                           .output_channels = {s.C}});
  kernels.conv3x3.weight_gradient({.B = s.B,
                                   .H = s.H,
                                   .W = s.W,
                                   .input = {x.data()},
                                   .channels = {s.C},
                                   .grad = grad.data(),
                                   .K = s.K,
                                   .dweight = dweight.data()});
  Doubles truth_dx(x.size());
  s.each([&](int64_t to, int64_t from, int64_t tap) { truth_dx[from] += double(grad[to]) * weight[tap]; });
  return std::max(
      {error(out, s.forward(x, weight, bias)), error(dx, truth_dx), error(dweight, s.weight_gradient(x, grad))});
}

// At every second pixel of the convolution that keeps height and width.
template <typename Random>
double strided_conv(const Kernels& kernels, const Convolution& s, const Random& random) {
  const Floats x = random(s.B * s.H * s.W * s.C), weight = random(s.K * s.C * 9), bias = random(s.K);
  const int64_t out_H = (s.H + 1) / 2, out_W = (s.W + 1) / 2;
  Floats out(s.B * out_H * out_W * s.K, NAN);
  kernels.strided_conv.forward({.B = s.B,
                                .H = s.H,
                                .W = s.W,
                                .padding = 1,
                                .out_H = out_H,
                                .out_W = out_W,
                                .input = x.data(),
                                .C = s.C,
                                .weight = {weight.data(), 9 * s.C, 9, false},
                                .bias = bias.data(),
                                .output = out.data(),
                                .K = s.K});
  const Doubles whole = s.forward(x, weight, bias);
  Doubles truth;
  for (int64_t row = 0; row < s.B * out_H; ++row) {
    for (int64_t i = 0; i < out_W * s.K; ++i) {
      const int64_t line = row / out_H * s.H + row % out_H * 2;
      truth.push_back(whole[(line * s.W + i / s.K * 2) * s.K + i % s.K]);
    }
  }
  return error(out, truth);
}

template <typename Random>
double stem_conv(const Kernels& kernels, const Convolution& s, const Random& random) {
  const Floats x = random(s.B * s.H * s.W * s.C), weight = random(s.K * s.C * s.side * s.side), bias = random(s.K),
               grad = random(s.B * s.H * s.W * s.K);
  Floats out(grad.size(), NAN), dweight(weight.size(), NAN);
  const StemConvSizes sizes{s.B, s.H, s.W, s.C, s.K, s.side};
  const StemConvMaps maps{{{x.data(), s.C, s.H * s.W * s.C, 1, s.W * s.C, s.C}}};
  kernels.stem_conv.forward({sizes, maps, weight.data(), bias.data(), out.data()});
  kernels.stem_conv.weight_gradient({sizes, maps, grad.data(), dweight.data(), nullptr});
  return std::max(error(out, s.forward(x, weight, bias)), error(dweight, s.weight_gradient(x, grad)));
}

template <typename Random>
double linear(const Kernels& kernels, int64_t rows, int64_t C, int64_t K, const Random& random) {
  const Floats x = random(rows * C), weight = random(K * C), bias = random(K), grad = random(rows * K);
  Floats out(rows * K, NAN), dx(rows * C, NAN), dweight(K * C, NAN);
  kernels.linear.forward({.input = {x.data()},
                          .channels = {C},
                          .rows = rows,
                          .K = K,
                          .weight = weight.data(),
                          .bias = bias.data(),
                          .out = out.data()});
  kernels.linear.data_gradient(
      {.grad = grad.data(), .weight = weight.data(), .rows = rows, .K = K, .dinput = {dx.data()}, .channels = {C}});
  kernels.linear.weight_gradient(
      {.grad = grad.data(), .input = {x.data()}, .channels = {C}, .rows = rows, .K = K, .dweight = dweight.data()});
  Doubles truth(rows * K), truth_dx(rows * C), truth_dweight(K * C);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < K; ++k) {
      truth[r * K + k] += bias[k];
      for (int64_t c = 0; c < C; ++c) {
        truth[r * K + k] += double(x[r * C + c]) * weight[k * C + c];
        truth_dx[r * C + c] += double(grad[r * K + k]) * weight[k * C + c];
        truth_dweight[k * C + c] += double(grad[r * K + k]) * x[r * C + c];
      }
    }
  return std::max({error(out, truth), error(dx, truth_dx), error(dweight, truth_dweight)});
}

// Forward, of D channels and M memory entries; (B, N, 3, heads, D) → (B, N, heads, D).
template <typename Random>
double attention(const Kernels& kernels, const AttentionInputs& in, const Random& random) {
  const int64_t B = in.B, N = in.N, heads = in.heads, D = in.D, M = in.M;
  const Floats qkv = random(B * N * 3 * heads * D), memory = random(2 * heads * M * D);
  Floats out(B * N * heads * D, NAN);
  kernels.attention.forward({{B, N, heads, D, M, memory.data()}, qkv.data(), out.data()});
  Doubles truth(out.size());
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < heads; ++h) {
      // Element d of the key (part 1) or value (part 2) of entry j, the memory's entries first.
      const auto entry = [&](int64_t part, int64_t j, int64_t d) -> double {
        return j < M ? memory[((part - 1) * heads * M + h * M + j) * D + d]
                     : qkv[(((b * N + j - M) * 3 + part) * heads + h) * D + d];
      };
      for (int64_t n = 0; n < N; ++n) {
        double sum = 0;
        double* to = &truth[((b * N + n) * heads + h) * D];
        for (int64_t j = 0; j < M + N; ++j) {
          double score = 0;
          for (int64_t d = 0; d < D; ++d) score += qkv[((b * N + n) * 3 * heads + h) * D + d] * entry(1, j, d);
          const double weight = std::exp(score / std::sqrt(double(D)));
          sum += weight;
          for (int64_t d = 0; d < D; ++d) to[d] += weight * entry(2, j, d);
        }
        for (int64_t d = 0; d < D; ++d) to[d] /= sum;
      }
    }
  return error(out, truth);
}

// Forward from qkv, as in ops/linear_attention/reference.py.
template <typename Random>
double linear_attention(const Kernels& kernels, const LinearAttentionInputs& in, const Random& random) {
  const int64_t B = in.B, N = in.N, heads = in.heads, D = in.D, C = in.C, M = in.M;
  const Floats qkv = random(B * N * 3 * heads * D), memory = random(2 * heads * D * M), weight = random(C * heads * D),
               bias = random(C), gain = random(C);
  Floats out(B * N * C, NAN), statistics(B * 2 * heads * D), sums(B * heads * D * D);
  LinearAttentionInputs inputs = in;
  inputs.qkv = qkv.data(), inputs.mem_kv = memory.data(), inputs.weight = weight.data();
  inputs.bias = bias.data(), inputs.gain = gain.data();
  kernels.linear_attention.forward({inputs, nullptr, out.data(), statistics.data(), sums.data()});
  Doubles truth(out.size());
  for (int64_t b = 0; b < B; ++b) {
    Doubles context(heads * D * D);  // (heads, D, E)
    for (int64_t h = 0; h < heads; ++h) {
      const auto entry = [&](int64_t part, int64_t j, int64_t d) -> double {
        return j < M ? memory[(((part - 1) * heads + h) * D + d) * M + j]
                     : qkv[(((b * N + j - M) * 3 + part) * heads + h) * D + d];
      };
      for (int64_t d = 0; d < D; ++d) {
        double sum = 0;
        for (int64_t j = 0; j < M + N; ++j) sum += std::exp(entry(1, j, d));
        for (int64_t j = 0; j < M + N; ++j)
          for (int64_t e = 0; e < D; ++e)
            context[(h * D + d) * D + e] += std::exp(entry(1, j, d)) / sum * entry(2, j, e) / std::sqrt(double(D));
      }
    }
    for (int64_t n = 0; n < N; ++n) {
      double* to = &truth[(b * N + n) * C];
      double square = 0;
      for (int64_t c = 0; c < C; ++c) to[c] = bias[c];
      for (int64_t h = 0; h < heads; ++h) {
        const float* q = &qkv[((b * N + n) * 3 * heads + h) * D];
        double sum = 0;
        for (int64_t d = 0; d < D; ++d) sum += std::exp(double(q[d]));
        for (int64_t d = 0; d < D; ++d)
          for (int64_t e = 0; e < D; ++e)
            for (int64_t c = 0; c < C; ++c)
              to[c] += std::exp(double(q[d])) / sum * context[(h * D + d) * D + e] * weight[(c * heads + h) * D + e];
      }
      for (int64_t c = 0; c < C; ++c) square += to[c] * to[c];
      for (int64_t c = 0; c < C; ++c) to[c] *= gain[c] * std::sqrt(double(C)) / std::sqrt(square);
    }
  }
  return error(out, truth);
}

}  // namespace ddpm_fast::check
