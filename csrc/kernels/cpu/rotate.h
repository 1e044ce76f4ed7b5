// The rotation of one row of channels, and access to the tables of cos and sin.
#pragma once

#include <cstdint>

#include "../rope.h"
#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// cos and sin of one (batch, head, token). Unit stride in the pairs, or `buffer` holds a dense
// copy.
template <typename T>
struct TableRow {
  const T* cos;
  const T* sin;
};

template <typename T>
X_ROPE_CLS_INLINE const T* dense_row(const T* row, int64_t stride, int64_t n, T* buffer) {
  if (stride == 1) return row;
  for (int64_t i = 0; i < n; ++i) buffer[i] = row[i * stride];
  return buffer;
}

// Where the row of one token starts; its pairs are adjacent only if the table's pair strides are 1.
template <typename T>
X_ROPE_CLS_INLINE TableRow<T> table_row_start(const RotaryTable& t, int64_t b, int64_t h,
                                              int64_t n) {
  return {
      static_cast<const T*>(t.cos) + b * t.cos_stride_b + h * t.cos_stride_h + n * t.cos_stride_n,
      static_cast<const T*>(t.sin) + b * t.sin_stride_b + h * t.sin_stride_h + n * t.sin_stride_n};
}

// The row with adjacent pairs. buffer: room for 2 * pairs, used only where they are not adjacent.
template <typename T>
X_ROPE_CLS_INLINE TableRow<T> table_row(const RotaryTable& t, int64_t b, int64_t h, int64_t n,
                                        int64_t pairs, T* buffer) {
  const TableRow<T> row = table_row_start<T>(t, b, h, n);
  return {dense_row(row.cos, t.cos_stride_i, pairs, buffer),
          dense_row(row.sin, t.sin_stride_i, pairs, buffer + pairs)};
}

X_ROPE_CLS_INLINE bool has_position(const RotaryTable& t, int64_t b, int64_t n) {
  return t.rotate == nullptr || t.rotate[b * t.rotate_stride_b + n * t.rotate_stride_n] != 0;
}

struct SwapNeighbours {
  static constexpr int at(int i) { return i ^ 1; }
};
template <int kOffset>
struct TwiceFrom {
  static constexpr int at(int i) { return kOffset + i / 2; }
};

// Pairs (2i, 2i+1): row[2i] = c x0 - s x1, row[2i+1] = c x1 + s x0, times scale; sign -1 turns the
// other way.
template <typename T>
X_ROPE_CLS_INLINE void rotate_interleaved(const T* from, T* to, TableRow<T> t, int64_t pairs,
                                          T sign, T scale) {
  sign *= scale;
  constexpr int kL = kLanes<T>;
  Vec<T> alternate;
  for (int i = 0; i < kL; ++i) alternate[i] = (i & 1) ? sign : -sign;
  int64_t i = 0;
  for (; i + kL <= pairs; i += kL) {
    const Vec<T> c = load<T>(t.cos + i) * scale;
    const Vec<T> s = load<T>(t.sin + i);
    const Vec<T> x0 = load<T>(from + 2 * i);
    const Vec<T> x1 = load<T>(from + 2 * i + kL);
    const Vec<T> y0 =
        x0 * shuffle<T, TwiceFrom<0>>(c, c) +
        shuffle<T, SwapNeighbours>(x0, x0) * (shuffle<T, TwiceFrom<0>>(s, s) * alternate);
    const Vec<T> y1 =
        x1 * shuffle<T, TwiceFrom<kL / 2>>(c, c) +
        shuffle<T, SwapNeighbours>(x1, x1) * (shuffle<T, TwiceFrom<kL / 2>>(s, s) * alternate);
    store<T>(to + 2 * i, y0);
    store<T>(to + 2 * i + kL, y1);
  }
  for (; i < pairs; ++i) {
    const T x0 = from[2 * i];
    const T x1 = from[2 * i + 1];
    const T c = t.cos[i] * scale;
    const T s = t.sin[i] * sign;
    to[2 * i] = x0 * c - x1 * s;
    to[2 * i + 1] = x1 * c + x0 * s;
  }
}

// Pairs (i, i + pairs).
template <typename T>
X_ROPE_CLS_INLINE void rotate_halves(const T* from, T* to, TableRow<T> t, int64_t pairs, T sign,
                                     T scale) {
  sign *= scale;
  int64_t i = 0;
  for (; i + kLanes<T> <= pairs; i += kLanes<T>) {
    const Vec<T> c = load<T>(t.cos + i) * scale;
    const Vec<T> s = load<T>(t.sin + i) * sign;
    const Vec<T> x0 = load<T>(from + i);
    const Vec<T> x1 = load<T>(from + pairs + i);
    store<T>(to + i, x0 * c - x1 * s);
    store<T>(to + pairs + i, x1 * c + x0 * s);
  }
  for (; i < pairs; ++i) {
    const T x0 = from[i];
    const T x1 = from[pairs + i];
    const T c = t.cos[i] * scale;
    const T s = t.sin[i] * sign;
    to[i] = x0 * c - x1 * s;
    to[pairs + i] = x1 * c + x0 * s;
  }
}

// to[0 .. 2 * pairs) = scale R from, or with R's transpose where `inverse`. In place is fine.
template <typename T>
X_ROPE_CLS_INLINE void rotate_row(const T* from, T* to, TableRow<T> t, int64_t pairs,
                                  bool interleaved, bool inverse, T scale = T{1}) {
  const T sign = inverse ? T{-1} : T{1};
  if (interleaved) {
    rotate_interleaved(from, to, t, pairs, sign, scale);
  } else {
    rotate_halves(from, to, t, pairs, sign, scale);
  }
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
