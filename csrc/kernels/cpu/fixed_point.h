// Queries and keys of float16 or bfloat16 as integers of 16 bits, where the processor has products
// of pairs of them: twice as many a cycle as those of floats, or with AVX2, which adds them up by
// an instruction of its own, 1.6 times as many (Zen 4).
//
// A row is rounded relative to its length: to steps of length / kFixedLength, where steps of the
// largest element stay in 16 bits. The error that this makes in a score is about 1e-5 of the
// product of both lengths, even where the score itself is small because large channels of one meet
// none of the other. So it is done only where this product bounds scores (is_bounded): the error is
// about 3e-4 there at most, and that of a weight less than half a unit of float16. Products of two
// rows stay below 2^31 by Cauchy and Schwarz, so their sums are exact.
#pragma once

#include <cstdint>

#include "isa.h"
#include "operands.h"
#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// What a forward call multiplies: rows with keys as Score, weights with values as Value.
template <typename V, typename Q>
struct ForwardOperands {
  using Value = V;
  using Score = Q;
  using T = Sum<V>;
  static constexpr bool kFixed = !__is_same(V, Q);
};

#ifdef X_ROPE_CLS_HAVE_INT16
struct Int16Pair {
  uint32_t bits;  // the first in the lower half
};

template <>
struct OperandTraits<Int16Pair> {
  using Sum = float;  // once it is scaled
  using Accumulator = Int32Vec;
  static constexpr int kTogether = 2;

#ifdef __AVX512VNNI__
  using Vector = __m512i;

  X_ROPE_CLS_INLINE Vector load_vector(const Int16Pair* p) { return _mm512_loadu_si512(p); }
  X_ROPE_CLS_INLINE Vector broadcast_one(Int16Pair operand) {
    return _mm512_set1_epi32(static_cast<int32_t>(operand.bits));
  }
  X_ROPE_CLS_INLINE void add_products(Accumulator& sum, Vector a, Vector b) {
    sum = (Accumulator)_mm512_dpwssd_epi32((__m512i)sum, a, b);
  }
  X_ROPE_CLS_INLINE void store_rounded(int16_t* to, FloatVec v) {
    const __m512i nearest = _mm512_maskz_cvtps_epi32(0xffff, (__m512)v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_maskz_cvtsepi32_epi16(0xffff, nearest));
  }
#else
  using Vector = __m256i;

  X_ROPE_CLS_INLINE Vector load_vector(const Int16Pair* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  X_ROPE_CLS_INLINE Vector broadcast_one(Int16Pair operand) {
    return _mm256_set1_epi32(static_cast<int32_t>(operand.bits));
  }
  // No element is -2^15, so that the sum of two products fits.
  X_ROPE_CLS_INLINE void add_products(Accumulator& sum, Vector a, Vector b) {
    sum += reinterpret_cast<Accumulator>(_mm256_madd_epi16(a, b));
  }
  X_ROPE_CLS_INLINE void store_rounded(int16_t* to, FloatVec v) {
    const __m256i nearest = _mm256_cvtps_epi32(v);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(to),
        _mm_packs_epi32(_mm256_castsi256_si128(nearest), _mm256_extracti128_si256(nearest, 1)));
  }
#endif
};
#endif

// A length of (46000 + sqrt(channels) / 2) steps, which is what rounding may make of it, is below
// sqrt(2^31) for up to 400,000 channels.
constexpr float kFixedLength = 46000;
constexpr float kFixedLargest = 32767;

// A row of n elements (a multiple of the lanes) becomes operands along it, perhaps in place, in
// units of `step`, which is NaN where an element is. Returns the square of its length: infinity
// where elements are infinite or too large to be squared, which no integers stand for.
template <typename Q>
X_ROPE_CLS_INLINE float fix_row(const float* row, int64_t n, Q* to, float& step) {
  constexpr int kL = kLanes<float>;
  FloatVec squares{};
  FloatVec most{};
  for (int64_t i = 0; i < n; i += kL) {
    const FloatVec x = load<float>(row + i);
    squares += x * x;
    most = max_or_second<float>(x > -x ? x : -x, most);
  }
  const float square = sum_everywhere<float>(squares)[0];
  const bool finite = square < kInfinity<float>;
  float steps = 0;  // of 1
  step = square != square ? square : 0;
  if (finite && square > 0) {
    const float length = __builtin_sqrtf(square);
    steps = min_of(kFixedLength / length, kFixedLargest / max_lanes<float>(most));
    step = 1 / steps;
  }
  auto* const elements = reinterpret_cast<int16_t*>(to);
  for (int64_t i = 0; i < n; i += kL) {
    const FloatVec x = load<float>(row + i);
    const FloatVec scaled = finite ? x * steps : FloatVec{};
    OperandTraits<Q>::store_rounded(elements + i, scaled);
  }
  return square;
}

// Scores of integers are given to `finish` in units of log2.
template <typename E>
struct Scaled {
  const float* rows;     // their steps, from row 0 on
  const float* columns;  // steps of the panel's columns
  E finish;

  template <int kRows, int kVectors>
  __attribute__((always_inline)) void operator()(const Int32Vec (&acc)[kRows][kVectors], int64_t r,
                                                 float* c, int64_t c_stride) const {
    FloatVec column[kVectors];
    X_ROPE_CLS_UNROLL
    for (int v = 0; v < kVectors; ++v)
      column[v] = load<float>(columns + int64_t{v} * kLanes<float>);
    FloatVec scores[kRows][kVectors];
    X_ROPE_CLS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      X_ROPE_CLS_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const FloatVec sum = __builtin_convertvector(acc[i][v], FloatVec);
        scores[i][v] = sum * (column[v] * rows[r + i]);
      }
    }
    finish(scores, r, c, c_stride);
  }
};

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
