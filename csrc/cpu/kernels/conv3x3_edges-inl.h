// The transforms of tiles with fewer than 4×4 outputs, at the edges of maps whose height or width is no multiple of 4.
//
// Along an axis of m outputs F(m, 3) takes m + 2 of the six points of winograd-inl.h. The taps at a point are the same
// for every m, so that tiles of all sizes share U. A map of 5×5 takes 81 products per pair of channels where four whole
// tiles take 144, one of 10×10 takes 256 instead of 324.
//
// Every transform is a matrix on each axis, and all follow from the points (Toom and Cook; Lavin & Gray 2016, section
// 4): with u = s·g(a) the taps at a finite point a,
//
//   outputs  y_k = Σ a^k·m_a, and m of infinity to the last of them
//   inputs   v_a = (L_a)·d / s, with the coefficients of L_a(x) = Π (x - b)/(a - b) over the other finite points b,
//            and those of Π (x - b) over all of them for infinity.
#pragma once

#include "winograd-inl.h"

namespace ddpm_fast::DDPM_FAST_ISA {

struct Matrix {
  int rows, columns;
  float of[kAxisPoints][kAxisPoints];
};

// The transforms of an axis with some outputs: its points, and matrices from inputs to points, points to outputs,
// points to sums of two outputs, and gradients of outputs to points.
struct Axis {
  int point[kAxisPoints];
  Matrix inputs, outputs, pooled, gradients;
};

constexpr Axis axis_of(int outputs) {
  constexpr int kInfinity = kAxisPoints - 1;
  constexpr double values[] = {0.0, kP, -kP, kQ, -kQ}, scales[] = {1.0, -2.0 / 3, -2.0 / 3, 1.0 / 6, 1.0 / 6, 1.0};
  Axis axis{};
  int points = 0;
  for (int point = 0; point < kAxisPoints; ++point) {
    if (kUsesPoint[outputs][point]) axis.point[points++] = point;
  }
  axis.inputs.rows = axis.inputs.columns = axis.outputs.columns = axis.pooled.columns = axis.gradients.rows = points;
  axis.outputs.rows = axis.gradients.columns = outputs;
  axis.pooled.rows = outputs / 2;
  for (int i = 0; i < points; ++i) {
    const int point = axis.point[i];
    double polynomial[kAxisPoints] = {1.0 / scales[point]};
    for (int n = 0, degree = 0; n < points; ++n) {
      const int other = axis.point[n];
      if (other == point || other == kInfinity) continue;
      const double by = point == kInfinity ? 1.0 : 1.0 / (values[point] - values[other]);
      ++degree;
      for (int k = degree; k >= 0; --k) {
        polynomial[k] = ((k > 0 ? polynomial[k - 1] : 0.0) - values[other] * polynomial[k]) * by;
      }
    }
    for (int n = 0; n < points; ++n) axis.inputs.of[i][n] = static_cast<float>(polynomial[n]);
    double power = 1.0;
    for (int k = 0; k < outputs; ++k) {
      const bool last = k == outputs - 1;
      const float value = point == kInfinity ? (last ? 1.0f : 0.0f) : static_cast<float>(power);
      axis.outputs.of[k][i] = axis.gradients.of[i][k] = value;
      axis.pooled.of[k / 2][i] += value;
      if (point != kInfinity) power *= values[point];
    }
  }
  return axis;
}
constexpr Axis kAxes[] = {{}, axis_of(1), axis_of(2), axis_of(3), axis_of(4)};

// A tile's values for one vector of channels, row by row.
struct Square {
  vf of[kAxisPoints][kAxisPoints];
};

// matrix · x for `lines` vectors x of kTerms elements: element n of line i at from[i·apart + n·step], and so to `to`.
template <int kTerms>
DDPM_FAST_INLINE void multiply_lines_of(const Matrix& matrix, int lines, const vf* from, vf* to, int apart, int step) {
  for (int i = 0; i < lines; ++i) {
    vf x[kTerms];
#pragma GCC unroll 6
    for (int n = 0; n < kTerms; ++n) x[n] = from[i * apart + n * step];
    for (int row = 0; row < matrix.rows; ++row) {
      vf sum = x[0] * splat(matrix.of[row][0]);
#pragma GCC unroll 6
      for (int n = 1; n < kTerms; ++n) sum += x[n] * splat(matrix.of[row][n]);
      to[i * apart + row * step] = sum;
    }
  }
}
template <int kTerms = 1>
DDPM_FAST_INLINE void multiply_lines(const Matrix& matrix, int lines, const vf* from, vf* to, int apart, int step) {
  if constexpr (kTerms <= kAxisPoints) {
    if (matrix.columns == kTerms) return multiply_lines_of<kTerms>(matrix, lines, from, to, apart, step);
    multiply_lines<kTerms + 1>(matrix, lines, from, to, apart, step);
  }
}

// x = left · x · rightᵀ
DDPM_FAST_NOINLINE void multiply_between(const Matrix& left, const Matrix& right, Square& x) {
  Square half;
  multiply_lines(left, right.columns, x.of[0], half.of[0], 1, kAxisPoints);
  multiply_lines(right, left.rows, half.of[0], x.of[0], kAxisPoints, 1);
}

// The same from read(row, column) to write(row, column, value).
template <typename Read, typename Write>
DDPM_FAST_INLINE void multiply_between(const Matrix& left, const Matrix& right, const Read& read, const Write& write) {
  Square x;
  for (int i = 0; i < left.columns; ++i) {
    for (int j = 0; j < right.columns; ++j) x.of[i][j] = read(i, j);
  }
  multiply_between(left, right, x);
  for (int i = 0; i < left.rows; ++i) {
    for (int j = 0; j < right.rows; ++j) write(i, j, x.of[i][j]);
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
