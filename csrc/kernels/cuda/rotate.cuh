// Pieces of rows, rotated on the way from memory to registers.
#pragma once

#include <cstdint>

#include "../attention.h"
#include "numeric.cuh"

namespace x_rope_cls::cuda {

// One token's row of channels. `whole`: unit stride, 16-byte aligned, and a multiple of
// kPiece<T> channels, so that it can be read in pieces of 16 bytes.
template <typename T>
struct Row {
  const T* data;
  int64_t stride;
  int32_t channels;
  bool whole;
};

// Whether every row of x can be read in pieces of 16 bytes. On the host, once a call.
template <typename T>
bool rows_are_whole(const Tensor4& x, int64_t channels) {
  constexpr int64_t kBytes = static_cast<int64_t>(sizeof(T));
  const auto aligned = [](int64_t stride) { return stride * kBytes % 16 == 0; };
  return x.stride_d == 1 && channels * kBytes % 16 == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && aligned(x.stride_b) &&
         aligned(x.stride_h) && aligned(x.stride_n);
}

template <typename T>
__device__ __forceinline__ Row<T> row_of(const Tensor4& x, int64_t b, int64_t h, int64_t n,
                                         int32_t channels, bool whole) {
  const T* data = static_cast<const T*>(x.data) + b * x.stride_b + h * x.stride_h + n * x.stride_n;
  return {data, x.stride_d, channels, whole};
}

// Channels first ... first + kPiece - 1, zeros beyond the row.
template <typename T>
__device__ __forceinline__ void load_piece(const Row<T>& row, int32_t first,
                                           Compute<T> (&x)[kPiece<T>]) {
  if (row.whole && first < row.channels) {
    const Piece<T> piece = *reinterpret_cast<const Piece<T>*>(row.data + first);
#pragma unroll
    for (int i = 0; i < kPiece<T>; ++i) x[i] = to_compute(piece.values[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPiece<T>; ++i) {
    const int32_t c = first + i;
    x[i] = c < row.channels ? to_compute(row.data[c * row.stride]) : Compute<T>{0};
  }
}

// One token's angles; null cos: it is not rotated.
template <typename C>
struct Angles {
  const C* cos;
  const C* sin;
  int64_t cos_stride, sin_stride;
  int32_t pairs;
  bool interleaved;
};

// Of token n. `rotated` says whether it is rotated at all: the table's `rotate` is not looked at.
template <typename C>
__device__ __forceinline__ Angles<C> angles_of(const RotaryTable& t, int64_t b, int64_t h,
                                               int64_t n, int32_t pairs, bool interleaved,
                                               bool rotated) {
  if (!rotated) return {nullptr, nullptr, 0, 0, pairs, interleaved};
  return {
      static_cast<const C*>(t.cos) + b * t.cos_stride_b + h * t.cos_stride_h + n * t.cos_stride_n,
      static_cast<const C*>(t.sin) + b * t.sin_stride_b + h * t.sin_stride_h + n * t.sin_stride_n,
      t.cos_stride_i,
      t.sin_stride_i,
      pairs,
      interleaved};
}

__device__ __forceinline__ bool has_position(const RotaryTable& t, int64_t b, int64_t n) {
  return t.rotate == nullptr || t.rotate[b * t.rotate_stride_b + n * t.rotate_stride_n] != 0;
}

// The pair of channel c (which must be below 2 * pairs), and c's place in it.
struct Pair {
  int32_t index, partner;
  bool second;
};
template <typename C>
__device__ __forceinline__ Pair pair_of(const Angles<C>& a, int32_t c) {
  if (a.interleaved) return {c >> 1, c ^ 1, (c & 1) != 0};
  const bool second = c >= a.pairs;
  return {second ? c - a.pairs : c, second ? c - a.pairs : c + a.pairs, second};
}

// cos or sin of pairs first ... first + kCount - 1, in pieces of up to 16 bytes where they can be.
template <typename C, int kCount>
__device__ __forceinline__ void load_angles(const C* from, int64_t stride, int32_t first,
                                            C (&angles)[kCount]) {
  constexpr int kStep = kCount < kPiece<C> ? kCount : kPiece<C>;
  struct alignas(kStep * sizeof(C)) Step {
    C values[kStep];
  };
  const C* const at = from + first * stride;
  if (kCount % kStep == 0 && stride == 1 && reinterpret_cast<uintptr_t>(at) % alignof(Step) == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += kStep) {
      const Step step = *reinterpret_cast<const Step*>(at + i);
#pragma unroll
      for (int j = 0; j < kStep; ++j) angles[i + j] = step.values[j];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) angles[i] = at[i * stride];
}

// rotate_piece where the whole piece is rotated and, unless interleaved, lies in one half of the
// channels: its angles are neighbours.
template <typename C, int kCount, typename Partner>
__device__ __forceinline__ void rotate_whole_piece(C (&x)[kCount], const Angles<C>& a,
                                                   int32_t first, bool inverse,
                                                   const Partner& partner) {
  if (a.interleaved) {
    C cosine[kCount / 2];
    C sine[kCount / 2];
    load_angles(a.cos, a.cos_stride, first / 2, cosine);
    load_angles(a.sin, a.sin_stride, first / 2, sine);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const C s = inverse ? -sine[i] : sine[i];
      const C even = x[2 * i];
      const C odd = x[2 * i + 1];
      x[2 * i] = even * cosine[i] - odd * s;
      x[2 * i + 1] = odd * cosine[i] + even * s;
    }
    return;
  }
  const bool second = first >= a.pairs;
  const int32_t pair = second ? first - a.pairs : first;
  C cosine[kCount];
  C sine[kCount];
  load_angles(a.cos, a.cos_stride, pair, cosine);
  load_angles(a.sin, a.sin_stride, pair, sine);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const C s = second != inverse ? sine[i] : -sine[i];
    x[i] = x[i] * cosine[i] + partner(i, second ? pair + i : first + a.pairs + i) * s;
  }
}

// The piece rotated by the angles (inverse: by their negatives), in the compute type. `partners`
// reads channel c of the same row as it was before the rotation.
template <typename C, int kCount, typename Partner>
__device__ __forceinline__ void rotate_piece(C (&x)[kCount], const Angles<C>& a, int32_t first,
                                             bool inverse, const Partner& partner) {
  if (a.cos == nullptr) return;
  const bool one_half = first + kCount <= a.pairs || first >= a.pairs;
  if (first + kCount <= 2 * a.pairs && (a.interleaved || one_half)) {
    return rotate_whole_piece(x, a, first, inverse, partner);
  }
  C rotated[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    rotated[i] = x[i];
    const int32_t c = first + i;
    if (c >= 2 * a.pairs) continue;
    const Pair pair = pair_of(a, c);
    const C cosine = a.cos[pair.index * a.cos_stride];
    const C sine = a.sin[pair.index * a.sin_stride];
    // Interleaved partners are in the piece itself: kCount and first are even.
    const C other = a.interleaved ? x[i ^ 1] : partner(i, pair.partner);
    rotated[i] = x[i] * cosine + (pair.second != inverse ? other * sine : -other * sine);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = rotated[i];
}

// load_piece and the rotation. Where pairs is a multiple of the piece, so that the partners of a
// piece are one piece, they are read as one.
template <typename T>
__device__ __forceinline__ void load_rotated_piece(const Row<T>& row, const Angles<Compute<T>>& a,
                                                   int32_t first, Compute<T> (&x)[kPiece<T>]) {
  load_piece(row, first, x);
  if (a.cos == nullptr || first >= 2 * a.pairs) return;
  if (!a.interleaved && a.pairs % kPiece<T> == 0) {
    Compute<T> others[kPiece<T>];
    load_piece(row, first < a.pairs ? first + a.pairs : first - a.pairs, others);
    rotate_piece(x, a, first, false, [&](int i, int32_t) { return others[i]; });
  } else {
    rotate_piece(x, a, first, false,
                 [&](int, int32_t c) { return to_compute(row.data[c * row.stride]); });
  }
}

}  // namespace x_rope_cls::cuda
