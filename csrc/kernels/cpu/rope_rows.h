// The rotation of rows where they lie, whatever their storage type: nothing but vectors between one
// read and one write of memory.
//
// The tables of a token are laid out once, as the loops read them, and serve all heads that share
// them. bfloat16 with neighbouring pairs needs no conversion at all: a pair is a 32-bit word, whose
// halves are float32 after a shift and a mask.
#pragma once

#include <cstdint>

#include "convert_vec.h"
#include "rotate.h"
#include "stores.h"
#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// n < kMost elements, a power of two.
template <int kMost, typename S>
X_ROPE_CLS_INLINE void copy_few(const S* from, S* to, int64_t n) {
  X_ROPE_CLS_UNROLL
  for (int part = kMost / 2; part > 0; part /= 2) {
    if ((n & part) == 0) continue;
    __builtin_memcpy(to, from, static_cast<size_t>(part) * sizeof(S));
    from += part;
    to += part;
  }
}
template <typename S, bool kStream>
X_ROPE_CLS_INLINE void copy_row(const S* from, S* to, int64_t n) {
  constexpr int64_t kElements = kVectorBytes / static_cast<int64_t>(sizeof(S));
  if (from == to) return;
  int64_t c = 0;
  for (; c + kElements <= n; c += kElements) {
    UInt32Vec bits;
    __builtin_memcpy(&bits, from + c, sizeof(bits));
    put<kStream>(to + c, bits);
  }
  if (c < n) copy_few<kElements>(from + c, to + c, n - c);
}

// -------------------------------------------------------------------------------------------------
// Tables.

enum class PairLayout {
  kTwice,   // neighbours; cos and sin twice each, sin with alternating signs
  kWords,   // neighbours, both bfloat16
  kHalves,  // `half` apart
};

// Elements of cos, and of sin, of `pairs` pairs; whole vectors.
template <typename T>
constexpr int64_t table_span(PairLayout layout, int64_t pairs) {
  return round_up(layout == PairLayout::kTwice ? 2 * pairs : pairs, kLanes<T>);
}

// to: 2 * span elements, cos and then sin, zeros behind. sign: -1 turns the other way.
template <typename T>
X_ROPE_CLS_INLINE void lay_out_strided(PairLayout layout, TableRow<T> from, int64_t cos_stride,
                                       int64_t sin_stride, int64_t pairs, T sign, T* to) {
  const int64_t span = table_span<T>(layout, pairs);
  T* const cos = to;
  T* const sin = to + span;
  int64_t end = pairs;
  if (layout == PairLayout::kTwice) {
    end = 2 * pairs;
    for (int64_t i = 0; i < pairs; ++i) {
      const T s = from.sin[i * sin_stride] * sign;
      cos[2 * i] = cos[2 * i + 1] = from.cos[i * cos_stride];
      sin[2 * i] = -s;
      sin[2 * i + 1] = s;
    }
  } else {
    for (int64_t i = 0; i < pairs; ++i) {
      cos[i] = from.cos[i * cos_stride];
      sin[i] = from.sin[i * sin_stride] * sign;
    }
  }
  for (int64_t i = end; i < span; ++i) cos[i] = sin[i] = T{0};
}
// The same; in vectors where both rows are dense, as most are.
template <typename T>
X_ROPE_CLS_INLINE void lay_out_table(PairLayout layout, TableRow<T> from, int64_t cos_stride,
                                     int64_t sin_stride, int64_t pairs, T sign, T* to) {
  if (cos_stride == 1 && sin_stride == 1) {
    lay_out_strided<T>(layout, from, 1, 1, pairs, sign, to);
  } else {
    lay_out_strided<T>(layout, from, cos_stride, sin_stride, pairs, sign, to);
  }
}

// -------------------------------------------------------------------------------------------------
// Rotations. Each takes whole vectors where they lie and the rest by way of a padded copy.

// Vectors of storage elements. The instruction that rounds to bfloat16 takes results below 2^-126
// as 0; it is worth that: without it the rounding takes longer than the memory.
template <typename S>
X_ROPE_CLS_INLINE auto rounded(Vec<Compute<S>> v) {
#ifdef __AVX512BF16__
  if constexpr (__is_same(S, BFloat16)) {
    return (UInt16HalfVec)_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
  } else {
    return vector_from_compute(v, S{});
  }
#else
  return vector_from_compute(v, S{});
#endif
}
// Words of bfloat16: `low` in the lower halves.
X_ROPE_CLS_INLINE UInt32Vec rounded_words(FloatVec low, FloatVec high) {
#ifdef __AVX512BF16__
  const __m512i order = _mm512_add_epi16(
      _mm512_set1_epi32(0x00100000),
      _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32(0x00010001)));
  const auto both =
      (__m512i)_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
  return reinterpret_cast<UInt32Vec>(_mm512_permutexvar_epi16(order, both));
#else
  return round_to_bfloat16(low) >> 16 | (round_to_bfloat16(high) & 0xffff0000U);
#endif
}

template <typename S, bool kStream>
X_ROPE_CLS_INLINE void turn_twice(const S* x, S* y, const Compute<S>* cos, const Compute<S>* sin) {
  using T = Compute<S>;
  const Vec<T> v = load_as(x);
  const Vec<T> turned = v * load<T>(cos) + shuffle<T, SwapNeighbours>(v, v) * load<T>(sin);
  put<kStream>(y, rounded<S>(turned));
}
template <typename S, bool kStream>
X_ROPE_CLS_INLINE void turn_halves(const S* x0, const S* x1, S* y0, S* y1, const Compute<S>* cos,
                                   const Compute<S>* sin) {
  using T = Compute<S>;
  const Vec<T> c = load<T>(cos);
  const Vec<T> s = load<T>(sin);
  const Vec<T> v0 = load_as(x0);
  const Vec<T> v1 = load_as(x1);
  put<kStream>(y0, rounded<S>(v0 * c - v1 * s));
  put<kStream>(y1, rounded<S>(v1 * c + v0 * s));
}
template <bool kStream>
X_ROPE_CLS_INLINE void turn_words(const BFloat16* x, BFloat16* y, const float* cos,
                                  const float* sin) {
  UInt32Vec words;
  __builtin_memcpy(&words, x, sizeof(words));
  const FloatVec c = load<float>(cos);
  const FloatVec s = load<float>(sin);
  const FloatVec v0 = reinterpret_cast<FloatVec>(words << 16);
  const FloatVec v1 = reinterpret_cast<FloatVec>(words & 0xffff0000U);
  put<kStream>(y, rounded_words(v0 * c - v1 * s, v1 * c + v0 * s));
}

// Pairs of one row. half: from the first member of a pair to the second where they lie apart.
template <typename S, PairLayout kLayout, bool kStream>
X_ROPE_CLS_INLINE void turn_row(const S* x, S* y, const Compute<S>* table, int64_t pairs,
                                int64_t half) {
  using T = Compute<S>;
  constexpr int64_t kL = kLanes<T>;
  const T* const cos = table;
  const T* const sin = table + table_span<T>(kLayout, pairs);
  int64_t i = 0;
  if constexpr (kLayout == PairLayout::kTwice) {
    const int64_t n = 2 * pairs;
    for (; i + kL <= n; i += kL) turn_twice<S, kStream>(x + i, y + i, cos + i, sin + i);
    if (i == n) return;
    S from[kL] = {};
    S to[kL];
    copy_few<kL>(x + i, from, n - i);
    turn_twice<S, false>(from, to, cos + i, sin + i);
    copy_few<kL>(to, y + i, n - i);
  } else if constexpr (kLayout == PairLayout::kWords) {
    for (; i + kL <= pairs; i += kL) turn_words<kStream>(x + 2 * i, y + 2 * i, cos + i, sin + i);
    if (i == pairs) return;
    S from[2 * kL] = {};
    S to[2 * kL];
    copy_few<2 * kL>(x + 2 * i, from, 2 * (pairs - i));
    turn_words<false>(from, to, cos + i, sin + i);
    copy_few<2 * kL>(to, y + 2 * i, 2 * (pairs - i));
  } else {
    for (; i + kL <= pairs; i += kL) {
      turn_halves<S, kStream>(x + i, x + half + i, y + i, y + half + i, cos + i, sin + i);
    }
    if (i == pairs) return;
    S from[2 * kL] = {};
    S to[2 * kL];
    copy_few<kL>(x + i, from, pairs - i);
    copy_few<kL>(x + half + i, from + kL, pairs - i);
    turn_halves<S, false>(from, from + kL, to, to + kL, cos + i, sin + i);
    copy_few<kL>(to, y + i, pairs - i);
    copy_few<kL>(to + kL, y + half + i, pairs - i);
  }
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
