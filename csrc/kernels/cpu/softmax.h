// One row of scores in units of log2: its maximum, and powers of two with their sum.
#pragma once

#include <cstdint>

#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// Growth of a row's maximum that is worth a rescale of what was summed before: weights relative to
// the old maximum stay below 2^8.
constexpr int kRescaleAbove = 8;

template <typename T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

// columns: a multiple of the lanes.
template <typename T>
X_ROPE_CLS_INLINE T row_maximum(const T* row, int64_t columns) {
  constexpr int kChains = 4;
  Vec<T> best[kChains];
  for (auto& v : best) v = broadcast<T>(-kInfinity<T>);
  int64_t j = 0;
  for (; j + kChains * kLanes<T> <= columns; j += kChains * kLanes<T>) {
    X_ROPE_CLS_UNROLL
    for (int i = 0; i < kChains; ++i) {
      best[i] = max_or_second<T>(best[i], load<T>(row + j + i * kLanes<T>));
    }
  }
  for (; j < columns; j += kLanes<T>) best[0] = max_or_second<T>(best[0], load<T>(row + j));
  return max_lanes<T>(
      max_or_second<T>(max_or_second<T>(best[0], best[1]), max_or_second<T>(best[2], best[3])));
}

// row[j] = 2^(row[j] - shift); returns the sum.
template <typename T>
X_ROPE_CLS_INLINE T exponentiate(T* row, int64_t columns, T shift) {
  constexpr int kChains = 4;
  const Vec<T> by = broadcast<T>(shift);
  Vec<T> sum[kChains] = {};
  int64_t j = 0;
  for (; j + kChains * kLanes<T> <= columns; j += kChains * kLanes<T>) {
    X_ROPE_CLS_UNROLL
    for (int i = 0; i < kChains; ++i) {
      const Vec<T> e = exp2<T>(load<T>(row + j + i * kLanes<T>) - by);
      store<T>(row + j + i * kLanes<T>, e);
      sum[i] += e;
    }
  }
  for (; j < columns; j += kLanes<T>) {
    const Vec<T> e = exp2<T>(load<T>(row + j) - by);
    store<T>(row + j, e);
    sum[0] += e;
  }
  return sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Scores of one row become weights relative to the row's reference maximum; `sum` and `out` are
// rescaled only if the maximum has grown by more than 2^kRescaleAbove can bear. Before the first
// call: maximum -infinity, sum 0. largest: the maximum of the scores.
template <typename T>
X_ROPE_CLS_INLINE void soften_row(T* row, int64_t columns, T largest, T& maximum, T& sum, T* out,
                                  int64_t channels) {
  if (largest > maximum + T{kRescaleAbove}) {
    const T before = maximum;
    maximum = largest;
    if (sum != T{0}) {
      const T factor = exp2<T>(broadcast<T>(before - largest))[0];
      sum *= factor;
      for (int64_t c = 0; c < channels; ++c) out[c] *= factor;
    }
  }
  sum += exponentiate(row, columns, maximum == -kInfinity<T> ? T{0} : maximum);
}
template <typename T>
X_ROPE_CLS_INLINE void soften_row(T* row, int64_t columns, T& maximum, T& sum, T* out,
                                  int64_t channels) {
  soften_row(row, columns, row_maximum(row, columns), maximum, sum, out, channels);
}

// The natural logarithm of sum * 2^maximum, where that is finite; -infinity where sum is 0.
template <typename T>
X_ROPE_CLS_INLINE T log_sum(T maximum, T sum) {
  if (sum == T{0}) return -kInfinity<T>;
  return static_cast<T>((static_cast<double>(maximum) + __builtin_log2(static_cast<double>(sum))) *
                        kLn2);
}

// The same for each lane; sums are 0 or no smaller than 2^-100.
X_ROPE_CLS_INLINE FloatVec log_sums(FloatVec maximum, FloatVec sum) {
  // sum = 2^exponent * m, sqrt(1/2) <= m < sqrt(2); ln(m) = 2 artanh((m - 1) / (m + 1)).
  constexpr int32_t kHalfRoot = 0x3f3504f3;
  const Int32Vec from = reinterpret_cast<Int32Vec>(sum) - kHalfRoot;
  const Int32Vec exponent = from >> 23;
  const FloatVec m = reinterpret_cast<FloatVec>((from & 0x7fffff) + kHalfRoot);
  const FloatVec s = (m - 1.0F) / (m + 1.0F);
  const FloatVec z = s * s;
  FloatVec y = z * (1.0F / 9) + 1.0F / 7;
  y = y * z + 1.0F / 5;
  y = y * z + 1.0F / 3;
  const FloatVec log_m = 2.0F * s + 2.0F * s * z * y;
  const FloatVec log =
      (maximum + __builtin_convertvector(exponent, FloatVec)) * static_cast<float>(kLn2) + log_m;
  const FloatVec usual = sum == sum ? log : sum;
  return sum == 0.0F ? broadcast<float>(-kInfinity<float>) : usual;
}
X_ROPE_CLS_INLINE DoubleVec log_sums(DoubleVec maximum, DoubleVec sum) {
  DoubleVec logs;
  for (int i = 0; i < kLanes<double>; ++i) logs[i] = log_sum(maximum[i], sum[i]);
  return logs;
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
