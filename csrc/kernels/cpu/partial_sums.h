// Softmax-weighted sums over a part of the tokens, and putting the parts together.
#pragma once

#include <cstdint>
#include <type_traits>

#include "arena.h"
#include "softmax.h"
#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// Of one part or of several, one after the other: weights are relative to 2^maximum, and not yet
// divided by their sum.
template <typename T>
struct PartialSums {
  T* out;      // (rows, width)
  T* maximum;  // (rows), log2
  T* sum;      // (rows)
};

template <typename T>
PartialSums<T> take_sums(int64_t rows, int64_t width, Arena& arena) {
  return {arena.take<T>(rows * width), arena.take<T>(rows), arena.take<T>(rows)};
}

// Those of the rows from `row` on.
template <typename T>
X_ROPE_CLS_INLINE PartialSums<T> sums_from(const PartialSums<T>& s, int64_t row, int64_t width) {
  return {s.out + row * width, s.maximum + row, s.sum + row};
}

// Before the first weights; `out` is left as it is.
template <typename T>
X_ROPE_CLS_INLINE void start_sums(const PartialSums<T>& s, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    s.maximum[r] = -kInfinity<T>;
    s.sum[r] = T{0};
  }
}
template <typename T>
X_ROPE_CLS_INLINE void clear_sums(const PartialSums<T>& s, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows * width; ++i) s.out[i] = T{0};
  start_sums(s, rows);
}

// out = the weighted mean of rows 0, step, 2 * step, ... of `parts`, `count` of them, whose sums of
// weights are used up. Returns the natural logarithm of the sum of all weights.
template <typename T>
T merge_sums(const PartialSums<T>& parts, int64_t step, int64_t count, int64_t width, T* out) {
  T maximum = -kInfinity<T>;
  for (int64_t i = 0; i < count; ++i) maximum = max_of(parts.maximum[i * step], maximum);
  T sum{0};
  for (int64_t i = 0; i < count; ++i) {
    T& part = parts.sum[i * step];
    const T factor =
        part == T{0} ? T{0} : exp2<T>(broadcast<T>(parts.maximum[i * step] - maximum))[0];
    sum += part * factor;
    part = factor;
  }
  const T inverse = sum == T{0} ? T{0} : T{1} / sum;
  const auto merge = [&](int64_t c, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    Vec<T> acc[kVectors] = {};
    for (int64_t i = 0; i < count; ++i) {
      const T factor = parts.sum[i * step];
      if (factor == T{0}) continue;
      const T* const from = parts.out + i * step * width + c;
      X_ROPE_CLS_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[v] += load<T>(from + v * kLanes<T>) * factor;
    }
    X_ROPE_CLS_UNROLL
    for (int v = 0; v < kVectors; ++v) store<T>(out + c + v * kLanes<T>, acc[v] * inverse);
  };
  constexpr int kMany = 8;
  int64_t c = 0;
  for (; c + kMany * kLanes<T> <= width; c += kMany * kLanes<T>) {
    merge(c, std::integral_constant<int, kMany>{});
  }
  for (; c < width; c += kLanes<T>) merge(c, std::integral_constant<int, 1>{});
  return log_sum(maximum, sum);
}

// Divides row 0 by the sum of its weights; returns the natural logarithm of that sum.
template <typename T>
T finish_sums(const PartialSums<T>& s, int64_t width) {
  const T inverse = s.sum[0] == T{0} ? T{0} : T{1} / s.sum[0];
  for (int64_t c = 0; c < width; ++c) s.out[c] *= inverse;
  return log_sum(s.maximum[0], s.sum[0]);
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
