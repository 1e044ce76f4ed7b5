// Softmax-weighted sums over a part of the tokens, and putting the parts together.
#pragma once

#include <cstdint>

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

template <typename T>
X_ROPE_CLS_INLINE void clear_sums(const PartialSums<T>& s, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows * width; ++i) s.out[i] = T{0};
  for (int64_t r = 0; r < rows; ++r) {
    s.maximum[r] = -kInfinity<T>;
    s.sum[r] = T{0};
  }
}

// Adds up rows 0, step, 2 * step, ... of `parts`, `count` of them, into row 0 of `to`.
template <typename T>
void merge_sums(const PartialSums<T>& parts, int64_t step, int64_t count, int64_t width,
                const PartialSums<T>& to) {
  clear_sums(to, 1, width);
  for (int64_t i = 0; i < count; ++i) {
    const T maximum = parts.maximum[i * step];
    to.maximum[0] = maximum > to.maximum[0] ? maximum : to.maximum[0];
  }
  for (int64_t i = 0; i < count; ++i) {
    if (parts.sum[i * step] == T{0}) continue;
    const T factor = exp2<T>(broadcast<T>(parts.maximum[i * step] - to.maximum[0]))[0];
    to.sum[0] += parts.sum[i * step] * factor;
    const T* from = parts.out + i * step * width;
    for (int64_t c = 0; c < width; ++c) to.out[c] += from[c] * factor;
  }
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
