// What the products of attention multiply: elements of the compute type, or, where the processor
// has dot products of them, pairs of bfloat16 along the summed axis. A pair is as wide as a float
// and takes the place of one, so that the same loops serve both: a depth counted in operands is
// half as large.
//
// A row of floats, rounded in place, is a row of pairs along its channels. Products that sum over
// rows want them stacked: row i of a stack holds the pairs of rows 2 i and 2 i + 1.
#pragma once

#include <cstdint>

#include "convert.h"
#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// An operand that is one element.
template <typename T>
struct OperandTraits {
  using Sum = T;  // what sums of products are in the end
  using Vector = Vec<T>;
  using Accumulator = Vec<T>;
  static constexpr int kTogether = 1;  // elements of an operand

  X_ROPE_CLS_INLINE Vector load_vector(const T* p) { return load<T>(p); }
  X_ROPE_CLS_INLINE void store_vector(T* p, Vector v) { store<T>(p, v); }
  X_ROPE_CLS_INLINE Vector broadcast_one(T operand) { return broadcast<T>(operand); }
  X_ROPE_CLS_INLINE void add_products(Accumulator& sum, Vector a, Vector b) { sum += a * b; }
  // A vector of a stack of two rows; of `even` alone where an operand is one element.
  X_ROPE_CLS_INLINE Vector stacked(const T* even, const T* /*odd*/) { return load<T>(even); }
  // Sums become elements `column` and following of a row of operands.
  template <int kVectors>
  X_ROPE_CLS_INLINE void store_elements(T* row, int64_t column, const Vec<T> (&v)[kVectors]) {
    X_ROPE_CLS_UNROLL
    for (int i = 0; i < kVectors; ++i) store<T>(row + column + i * kLanes<T>, v[i]);
  }
  // A row of n elements, a multiple of the lanes, becomes operands along it, in place.
  X_ROPE_CLS_INLINE T* round_row(T* row, int64_t /*n*/) { return row; }
};

template <typename Storage>
struct OperandType {
  using type = Compute<Storage>;
};

#ifdef __AVX512BF16__
struct BFloat16Pair {
  uint32_t bits;  // the first in the lower half
};

template <>
struct OperandTraits<BFloat16Pair> {
  using Sum = float;
  using Vector = __m512i;
  using Accumulator = FloatVec;
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  static constexpr int kTogether = 2;

  X_ROPE_CLS_INLINE Vector load_vector(const BFloat16Pair* p) { return _mm512_loadu_si512(p); }
  X_ROPE_CLS_INLINE void store_vector(BFloat16Pair* p, Vector v) { _mm512_storeu_si512(p, v); }
  X_ROPE_CLS_INLINE Vector broadcast_one(BFloat16Pair operand) {
    return _mm512_set1_epi32(static_cast<int32_t>(operand.bits));
  }
  X_ROPE_CLS_INLINE void add_products(FloatVec& sum, Vector a, Vector b) {
    sum = (FloatVec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  X_ROPE_CLS_INLINE Vector stacked(const BFloat16Pair* even, const BFloat16Pair* odd) {
    Half low, high;
    __builtin_memcpy(&low, even, sizeof(low));
    __builtin_memcpy(&high, odd, sizeof(high));
    return (__m512i)(__builtin_convertvector(low, UInt32Vec) |
                     (__builtin_convertvector(high, UInt32Vec) << 16));
  }
  // Pairs of the lanes of two vectors, rounded.
  X_ROPE_CLS_INLINE Vector paired(FloatVec first, FloatVec second) {
    const auto low = (Half)_mm512_cvtneps_pbh((__m512)first);
    const auto high = (Half)_mm512_cvtneps_pbh((__m512)second);
    return (__m512i)(__builtin_convertvector(low, UInt32Vec) |
                     (__builtin_convertvector(high, UInt32Vec) << 16));
  }
  template <int kVectors>
  X_ROPE_CLS_INLINE void store_elements(float* row, int64_t column, const FloatVec (&v)[kVectors]) {
    auto* const to = reinterpret_cast<uint16_t*>(row) + column;
    X_ROPE_CLS_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v[i]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + int64_t{i} * kLanes<float>),
                          (__m256i)rounded);
    }
  }
  X_ROPE_CLS_INLINE BFloat16Pair* round_row(float* row, int64_t n) {
    auto* to = reinterpret_cast<BFloat16Pair*>(row);
    for (int64_t i = 0; i < n; i += kLanes<float>) {
      const __m256bh rounded = _mm512_cvtneps_pbh((__m512)load<float>(row + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i / 2), (__m256i)rounded);
    }
    return to;
  }
};

template <>
struct OperandType<BFloat16> {
  using type = BFloat16Pair;
};
#endif

template <typename Storage>
using Operand = typename OperandType<Storage>::type;
template <typename U>
using Sum = typename OperandTraits<U>::Sum;
template <typename U>
using Accumulator = typename OperandTraits<U>::Accumulator;  // what they are summed in
template <typename U>
constexpr int kTogether = OperandTraits<U>::kTogether;

// Where a row is packed that will be operands in `to`: there, or in `buffer` if it has to be
// rounded.
template <typename U>
X_ROPE_CLS_INLINE Sum<U>* packed_in(U* to, Sum<U>* buffer) {
  if constexpr (kTogether<U> == 1) {
    return to;
  } else {
    return buffer;
  }
}
// Makes operands of it. n: a multiple of the lanes.
template <typename U>
X_ROPE_CLS_INLINE void round_into(Sum<U>* packed, int64_t n, U* to) {
  if constexpr (kTogether<U> > 1) {
    for (int64_t i = 0; i < n; i += kLanes<Sum<U>>) {
      const Vec<Sum<U>> part[1] = {load<Sum<U>>(packed + i)};
      OperandTraits<U>::store_elements(reinterpret_cast<Sum<U>*>(to), i, part);
    }
  }
}

// Stacks `count` rows of operands along their n elements, `stride` apart; zeros follow an odd one.
// n: a multiple of the lanes.
template <typename U>
X_ROPE_CLS_INLINE void stack_rows(const U* rows, int64_t stride, int64_t count, int64_t n, U* to,
                                  int64_t to_stride) {
  const U zeros[kLanes<Sum<U>>] = {};
  for (int64_t r = 0; r < count; r += kTogether<U>) {
    const U* even = rows + r * stride;
    const bool whole = r + kTogether<U> <= count;
    for (int64_t i = 0; i < n; i += kLanes<Sum<U>>) {
      const int64_t at = i / kTogether<U>;
      const U* odd = whole ? even + stride + at : zeros;
      OperandTraits<U>::store_vector(to + i, OperandTraits<U>::stacked(even + at, odd));
    }
    to += to_stride;
  }
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
