// Rows whose pairs fill whole vectors, with the table of a token in registers for all its heads.
#pragma once

#include <cstdint>

#include "rope_rows.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// What turns the rows of a token: its table, kVectors vectors.
template <typename S, PairLayout kLayout, int kVectors>
struct TokenTable {
  // Where a pair's halves lie apart, words of bfloat16 hold two pairs, an even one and an odd one:
  // so many vectors come in twos, and perhaps one is left.
  static constexpr int kInTwos =
      kLayout == PairLayout::kHalves && __is_same(S, BFloat16) ? kVectors / 2 * 2 : 0;

  Vec<Compute<S>> cos[kVectors];
  Vec<Compute<S>> sin[kVectors];
  int64_t half;  // from the first member of a pair to the second where they lie apart

  template <bool kStream>
  __attribute__((always_inline)) void turn(const S* x, S* y) const {
    constexpr int64_t kStep = (kLayout == PairLayout::kWords ? 2 : 1) * kLanes<Compute<S>>;
    if constexpr (kInTwos > 0) {
      X_ROPE_CLS_UNROLL
      for (int v = 0; v < kInTwos; v += 2) {
        const S* const from = x + v * kStep;
        const auto turned = turned_half_words(from, from + half, cos + v, sin + v);
        put<kStream>(y + v * kStep, turned.first);
        put<kStream>(y + v * kStep + half, turned.second);
      }
    }
    X_ROPE_CLS_UNROLL
    for (int v = kInTwos; v < kVectors; ++v) {
      turn_vector<S, kLayout, kStream>(x + v * kStep, y + v * kStep, cos[v], sin[v], half);
    }
  }
};

// from: adjacent pairs.
template <typename T, PairLayout kLayout, int kInTwos, int kVectors>
X_ROPE_CLS_INLINE void load_table(const T* from, Vec<T> factors, Vec<T> (&to)[kVectors]) {
  constexpr int64_t kL = kLanes<T>;
  if constexpr (kLayout == PairLayout::kTwice) {
    X_ROPE_CLS_UNROLL
    for (int v = 0; v < kVectors; v += 2) {
      const Vec<T> pairs = load<T>(from + v / 2 * kL);
      to[v] = shuffle<T, TwiceFrom<0>>(pairs, pairs) * factors;
      to[v + 1] = shuffle<T, TwiceFrom<kL / 2>>(pairs, pairs) * factors;
    }
    return;
  }
  X_ROPE_CLS_UNROLL
  for (int v = 0; v < kVectors; ++v) to[v] = load<T>(from + v * kL) * factors;
  if constexpr (kInTwos > 0 || kLayout == PairLayout::kWords) {
    X_ROPE_CLS_UNROLL
    for (int v = 0; v < kVectors; ++v) to[v] = clean(to[v]);
  }
  X_ROPE_CLS_UNROLL
  for (int v = 0; v < kInTwos; v += 2) {
    const Vec<T> first = to[v];
    to[v] = shuffle<T, EvenParts<1>>(first, to[v + 1]);
    to[v + 1] = shuffle<T, OddParts<1>>(first, to[v + 1]);
  }
}
// sign: -1 turns the other way.
template <typename S, PairLayout kLayout, int kVectors>
X_ROPE_CLS_INLINE TokenTable<S, kLayout, kVectors> token_table(TableRow<Compute<S>> row,
                                                               Compute<S> sign, int64_t half) {
  using T = Compute<S>;
  using Table = TokenTable<S, kLayout, kVectors>;
  Vec<T> signs = broadcast<T>(sign);
  if constexpr (kLayout == PairLayout::kTwice) {
    for (int lane = 0; lane < kLanes<T>; lane += 2) signs[lane] = -sign;
  }
  Table table;
  table.half = half;
  load_table<T, kLayout, Table::kInTwos>(row.cos, broadcast<T>(T{1}), table.cos);
  load_table<T, kLayout, Table::kInTwos>(row.sin, signs, table.sin);
  return table;
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
