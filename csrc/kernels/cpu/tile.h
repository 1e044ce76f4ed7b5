// Matrix products of small blocks: C (+)= A B with C in registers, a tile of rows by one or two
// vectors at a time. Both attention passes are built of these. A and B are of operands U
// (operands.h), C of what their products are summed in; depths and strides are counted in operands.
#pragma once

#include <cstdint>
#include <type_traits>

#include "operands.h"
#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// How the left operand lies in memory: element (row, k) at row * stride + k, or at k * stride +
// row.
enum class Left { kByRow, kByColumn };

// Offsets of the rows of a tile from two running pointers, so that all of them fit x86 addressing.
template <typename U, Left kLeft, int kRows>
struct LeftRows {
  const U* low;
  const U* high;  // row 6
  int64_t stride, stride3, stride5;

  X_ROPE_CLS_INLINE LeftRows make(const U* a, int64_t stride) {
    return {a, kLeft == Left::kByRow ? a + 6 * stride : a, stride, 3 * stride, 5 * stride};
  }
  // Element k of row `row`, k counted from where the pointers are.
  __attribute__((always_inline)) U at(int row, int64_t k) const {
    if constexpr (kLeft == Left::kByColumn) return low[k * stride + row];
    const U* base = row < 6 ? low : high;
    switch (row % 6) {
      case 0:
        return base[k];
      case 1:
        return base[k + stride];
      case 2:
        return base[k + 2 * stride];
      case 3:
        return base[k + stride3];
      case 4:
        return base[k + 4 * stride];
      default:
        return base[k + stride5];
    }
  }
  __attribute__((always_inline)) void advance(int64_t k) {
    const int64_t step = kLeft == Left::kByColumn ? k * stride : k;
    low += step;
    high += step;
  }
};

// acc[row][v] += sum over k < depth of A(row, k) * B(k, v); B's rows are `b_stride` apart.
template <typename U, Left kLeft, int kRows, int kVectors>
X_ROPE_CLS_INLINE void multiply_tile(Accumulator<U> (&acc)[kRows][kVectors], const U* a,
                                     int64_t a_stride, const U* b, int64_t b_stride,
                                     int64_t depth) {
  using Ops = OperandTraits<U>;
  auto rows = LeftRows<U, kLeft, kRows>::make(a, a_stride);
  for (int64_t k = 0; k < depth; ++k) {
    typename Ops::Vector right[kVectors];
    X_ROPE_CLS_UNROLL
    for (int v = 0; v < kVectors; ++v) right[v] = Ops::load_vector(b + v * kLanes<Sum<U>>);
    X_ROPE_CLS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const typename Ops::Vector left = Ops::broadcast_one(rows.at(r, 0));
      X_ROPE_CLS_UNROLL
      for (int v = 0; v < kVectors; ++v) Ops::add_products(acc[r][v], left, right[v]);
    }
    rows.advance(1);
    b += b_stride;
  }
}

// What becomes of a tile of sums, whose first row is row `r` of C: it is written there.
struct Written {
  template <typename T, int kRows, int kVectors>
  __attribute__((always_inline)) void operator()(const Vec<T> (&acc)[kRows][kVectors], int64_t r,
                                                 T* c, int64_t c_stride) const {
    c += r * c_stride;
    X_ROPE_CLS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      X_ROPE_CLS_UNROLL
      for (int v = 0; v < kVectors; ++v) store<T>(c + i * c_stride + v * kLanes<T>, acc[i][v]);
    }
  }
};

// Rows [r, r + kRows) of C.
template <typename U, Left kLeft, bool kAccumulate, int kRows, int kVectors, typename E>
static __attribute__((noinline)) void tile(const U* a, int64_t a_stride, const U* b,
                                           int64_t b_stride, int64_t depth, int64_t r, Sum<U>* c,
                                           int64_t c_stride, const E& finish) {
  using T = Sum<U>;
  Accumulator<U> acc[kRows][kVectors] = {};
  multiply_tile<U, kLeft, kRows, kVectors>(acc, a + r * (kLeft == Left::kByRow ? a_stride : 1),
                                           a_stride, b, b_stride, depth);
  if constexpr (kAccumulate) {  // last: long sums are more accurate in parts
    X_ROPE_CLS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      X_ROPE_CLS_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        acc[i][v] += load<T>(c + (r + i) * c_stride + v * kLanes<T>);
      }
    }
  }
  finish(acc, r, c, c_stride);
}

struct Nothing {
  void operator()() const {}
};

// One column panel (kVectors wide) of C, all rows: full tiles, perhaps 6 rows, and the rest at
// once. `beside` is called once a full tile, `finish` with the sums of every tile.
template <typename U, Left kLeft, bool kAccumulate, int kVectors, typename F = Nothing,
          typename E = Written>
X_ROPE_CLS_INLINE void multiply_panel(int64_t rows, int64_t depth, const U* a, int64_t a_stride,
                                      const U* b, int64_t b_stride, Sum<U>* c, int64_t c_stride,
                                      F&& beside = {}, const E& finish = {}) {
  constexpr int kRows = VecTraits<Sum<U>>::kTileRows;
  int64_t r = 0;
  const auto rows_at_once = [&](auto count) __attribute__((always_inline)) {
    tile<U, kLeft, kAccumulate, decltype(count)::value, kVectors>(a, a_stride, b, b_stride, depth,
                                                                  r, c, c_stride, finish);
    return decltype(count)::value;
  };
  for (; r + kRows <= rows; r += rows_at_once(std::integral_constant<int, kRows>{})) beside();
  if constexpr (kRows > 6) {
    if (r + 6 <= rows) r += rows_at_once(std::integral_constant<int, 6>{});
  }
  const int64_t rest = rows - r;
  if (rest == 5) rows_at_once(std::integral_constant<int, 5>{});
  if (rest == 4) rows_at_once(std::integral_constant<int, 4>{});
  if (rest == 3) rows_at_once(std::integral_constant<int, 3>{});
  if (rest == 2) rows_at_once(std::integral_constant<int, 2>{});
  if (rest == 1) rows_at_once(std::integral_constant<int, 1>{});
}

// C (rows x columns) = or += A (rows x depth) B (depth x columns); columns is a multiple of the
// lanes. Column panels of B are two vectors wide (the last may be one) and `b_panel` apart.
template <typename U, Left kLeft, bool kAccumulate, typename F = Nothing>
X_ROPE_CLS_INLINE void multiply(int64_t rows, int64_t columns, int64_t depth, const U* a,
                                int64_t a_stride, const U* b, int64_t b_stride, int64_t b_panel,
                                Sum<U>* c, int64_t c_stride, F&& beside = {}) {
  constexpr int kWide = 2 * kLanes<Sum<U>>;
  int64_t column = 0;
  for (; column + kWide <= columns; column += kWide) {
    multiply_panel<U, kLeft, kAccumulate, 2>(rows, depth, a, a_stride, b, b_stride, c + column,
                                             c_stride, beside);
    b += b_panel;
  }
  if (column < columns) {
    multiply_panel<U, kLeft, kAccumulate, 1>(rows, depth, a, a_stride, b, b_stride, c + column,
                                             c_stride, beside);
  }
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
