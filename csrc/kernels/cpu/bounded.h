// Softmax without a maximum. A score is at most the length of its query times that of its key.
// Where this bound is moderate for all pairs of a block, no power of two can overflow or vanish, so
// weights are taken relative to 0, as soon as their scores are summed and still in registers.
#pragma once

#include <cstdint>

#include "operands.h"
#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// Of a score in units of log2. Weights stay between 2^-32 and 2^32: sums of 2^20 of them times
// values of 1e22 are finite, and values of 1e-28 keep all of their bits.
constexpr double kMostBound = 32;

// Squares of the lengths of rows or keys, as products see them.
template <typename U>
class Reach {
  using T = Sum<U>;
  using Ops = OperandTraits<U>;

 public:
  // `depth` operands: whole vectors, or half a one behind them where operands are pairs.
  __attribute__((always_inline)) void add_row(const U* row, int64_t depth) {
    add(sum_everywhere<T>(squares_of(row, depth)));
  }
  // The same in less time, after which value() may be too large: the rows' largest squares in each
  // lane need not be those of one row.
  __attribute__((always_inline)) void add_row_by_lanes(const U* row, int64_t depth) {
    by_lanes_ = max_or_second<T>(squares_of(row, depth), by_lanes_);
  }
  // Keys as columns: key (d, column) at d * width + column.
  __attribute__((always_inline)) void add_panel(const U* panel, int64_t width, int64_t depth) {
    for (int64_t column = 0; column < width; column += kLanes<T>) {
      Vec<T> squares{};
      for (int64_t d = 0; d < depth; ++d) {
        const auto x = Ops::load_vector(panel + d * width + column);
        Ops::add_products(squares, x, x);
      }
      add(squares);
    }
  }
  // One that is known.
  __attribute__((always_inline)) void add_square(T square) { add(broadcast<T>(square)); }
  // The largest square. A row or key with NaN does not count: NaN is what becomes of all it meets.
  T value() const { return max_of(max_lanes<T>(largest_), sum_lanes<T>(by_lanes_)); }

 private:
  X_ROPE_CLS_INLINE Vec<T> squares_of(const U* row, int64_t depth) {
    constexpr int kL = kLanes<T>;
    Vec<T> squares{};
    int64_t d = 0;
    for (; d + kL <= depth; d += kL) {
      const auto x = Ops::load_vector(row + d);
      Ops::add_products(squares, x, x);
    }
    if (kTogether<U> > 1 && d < depth) {
      U rest[kL] = {};
      for (int i = 0; i < kL / kTogether<U>; ++i) rest[i] = row[d + i];
      const auto x = Ops::load_vector(rest);
      Ops::add_products(squares, x, x);
    }
    return squares;
  }
  __attribute__((always_inline)) void add(Vec<T> squares) {
    largest_ = max_or_second<T>(squares, largest_);
  }
  Vec<T> largest_{};
  Vec<T> by_lanes_{};
};

// Whether no score of rows and keys that reach so far exceeds the bound.
template <typename T>
X_ROPE_CLS_INLINE bool is_bounded(T rows, T keys) {
  return rows * keys <= static_cast<T>(kMostBound * kMostBound);  // false for 0 times infinity
}

// What becomes of a tile of scores that are bounded: operands 2^score from `column` of their rows
// of C, their sums added to lane_sums (row, lanes). kPart: only columns with 1 in `keep` have a
// key.
template <typename U, bool kPart>
struct Weighted {
  using T = Sum<U>;
  int64_t column;
  T* lane_sums;
  const T* keep;  // two vectors of 1 or 0

  template <int kRows, int kVectors>
  __attribute__((always_inline)) void operator()(const Vec<T> (&acc)[kRows][kVectors], int64_t r,
                                                 T* c, int64_t c_stride) const {
    X_ROPE_CLS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      T* const to = lane_sums + (r + i) * kLanes<T>;
      Vec<T> weights[kVectors];
      X_ROPE_CLS_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        weights[v] = exp2_moderate<T>(acc[i][v]);
        if constexpr (kPart) weights[v] *= load<T>(keep + v * kLanes<T>);
      }
      store<T>(to, load<T>(to) + (kVectors == 2 ? weights[0] + weights[kVectors - 1] : weights[0]));
      OperandTraits<U>::store_elements(c + (r + i) * c_stride, column, weights);
    }
  }
};

// The same one tile later. Where tiles are small, powers of two of sums that have just been
// finished would wait for these, and the processor would not see the next tile before they are
// done. Those of the tile before wait for nothing, and are taken beside products.
template <typename U, bool kPart>
struct WeightedLater {
  using T = Sum<U>;
  int64_t column;
  T* lane_sums;
  const T* keep;     // two vectors of 1 or 0
  int64_t* weighed;  // rows of this panel that are weights

  template <int kRows, int kVectors>
  __attribute__((always_inline)) void operator()(const Vec<T> (&acc)[kRows][kVectors], int64_t r,
                                                 T* c, int64_t c_stride) const {
    X_ROPE_CLS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      OperandTraits<U>::store_elements(c + (r + i) * c_stride, column, acc[i]);
    }
    weigh_up_to<kVectors>(r, c, c_stride);
  }
  // Rows up to `last` become weights.
  template <int kVectors>
  __attribute__((always_inline)) void weigh_up_to(int64_t last, T* c, int64_t c_stride) const {
    for (int64_t r = *weighed; r < last; ++r) {
      T* const row = c + r * c_stride + column;
      T* const to = lane_sums + r * kLanes<T>;
      Vec<T> sum = load<T>(to);
      X_ROPE_CLS_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        Vec<T> weight = exp2_moderate<T>(load<T>(row + v * kLanes<T>));
        if constexpr (kPart) weight *= load<T>(keep + v * kLanes<T>);
        store<T>(row + v * kLanes<T>, weight);
        sum += weight;
      }
      store<T>(to, sum);
    }
    *weighed = last;
  }
};

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
