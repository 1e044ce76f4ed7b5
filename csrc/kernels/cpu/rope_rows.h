// The rotation of rows where they lie, whatever their storage type: nothing but vectors between one
// read and one write of memory.
//
// The table of a token serves all heads that share it: from registers where it fills vectors
// (rope_vectors.h), else laid out in memory as the loops read it. bfloat16 needs no conversion: a
// 32-bit word of two is a pair, or parts of two pairs, whose halves are float32 after a shift and a
// mask.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

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

// Elements of cos, and of sin, of `pairs` pairs.
constexpr int64_t table_elements(PairLayout layout, int64_t pairs) {
  return layout == PairLayout::kTwice ? 2 * pairs : pairs;
}
// The same in whole vectors.
template <typename T>
constexpr int64_t table_span(PairLayout layout, int64_t pairs) {
  return round_up(table_elements(layout, pairs), kLanes<T>);
}
// A vector of a table for words: the lower half of a NaN is 0. What products make of it is NaN with
// such a half too, as is what they make of bfloat16.
X_ROPE_CLS_INLINE FloatVec clean(FloatVec v) {
#ifdef __AVX512BF16__
  return v;  // all the same to the instruction that rounds
#else
  return v == v ? v : broadcast<float>(__builtin_nanf(""));
#endif
}
// to: 2 * span elements, cos and then sin, zeros behind. sign: -1 turns the other way.
template <typename T, PairLayout kLayout>
static __attribute__((noinline)) void lay_out_table(TableRow<T> from, int64_t cos_stride,
                                                    int64_t sin_stride, int64_t pairs, T sign,
                                                    T* to) {
  constexpr int64_t kL = kLanes<T>;
  constexpr bool kTwice = kLayout == PairLayout::kTwice;
  const int64_t span = table_span<T>(kLayout, pairs);
  T* const cos = to;
  T* const sin = to + span;
  int64_t i = 0;
  if (cos_stride == 1 && sin_stride == 1) {
    Vec<T> signs = broadcast<T>(sign);
    for (int lane = 0; kTwice && lane < kL; lane += 2) signs[lane] = -sign;
    for (; i + kL <= pairs; i += kL) {
      const Vec<T> c = load<T>(from.cos + i);
      const Vec<T> s = load<T>(from.sin + i);
      if constexpr (kTwice) {
        store<T>(cos + 2 * i, shuffle<T, TwiceFrom<0>>(c, c));
        store<T>(cos + 2 * i + kL, shuffle<T, TwiceFrom<kL / 2>>(c, c));
        store<T>(sin + 2 * i, shuffle<T, TwiceFrom<0>>(s, s) * signs);
        store<T>(sin + 2 * i + kL, shuffle<T, TwiceFrom<kL / 2>>(s, s) * signs);
      } else {
        store<T>(cos + i, c);
        store<T>(sin + i, s * signs);
      }
    }
  }
  for (; i < pairs; ++i) {
    const T c = from.cos[i * cos_stride];
    const T s = from.sin[i * sin_stride] * sign;
    if constexpr (kTwice) {
      cos[2 * i] = cos[2 * i + 1] = c;
      sin[2 * i] = -s;
      sin[2 * i + 1] = s;
    } else {
      cos[i] = c;
      sin[i] = s;
    }
  }
  for (i *= kTwice ? 2 : 1; i < span; ++i) cos[i] = sin[i] = T{0};
  if constexpr (kLayout == PairLayout::kWords) {
    for (i = 0; i < 2 * span; i += kL) store<T>(to + i, clean(load<T>(to + i)));
  }
}

// -------------------------------------------------------------------------------------------------
// Rotations of vectors where they lie. Pairs that fill none are turned together with others, or
// with channels behind them, or, where there are none, by way of a padded copy.

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
#ifdef __AVX512BF16__
// Elements 0, 16, 1, 17 and so on: of two vectors one after the other, by turns.
template <int... kIndex>
X_ROPE_CLS_INLINE __m512i by_turns(std::integer_sequence<int, kIndex...> /*unused*/) {
  typedef uint16_t Words __attribute__((vector_size(kVectorBytes)));
  return reinterpret_cast<__m512i>(Words{static_cast<uint16_t>(kIndex % 2 * 16 + kIndex / 2)...});
}
#endif
#ifndef __AVX512BF16__
// bfloat16 in the upper half of each lane, as round_to_bfloat16 has it. v: no NaN whose lower half
// is not 0, which rounding might carry over into the sign; see clean().
X_ROPE_CLS_INLINE UInt32Vec round_clean(FloatVec v) {
  const UInt32Vec bits = reinterpret_cast<UInt32Vec>(v);
  return bits + 0x7fffU + ((bits >> 16) & 1U);
}
#endif
// Words of bfloat16: `low` in the lower halves. Both come of bfloat16 and of tables that are clean.
X_ROPE_CLS_INLINE UInt32Vec rounded_words(FloatVec low, FloatVec high) {
#ifdef __AVX512BF16__
  const __m512i order = by_turns(std::make_integer_sequence<int, 32>{});
  const auto both =
      (__m512i)_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
  return reinterpret_cast<UInt32Vec>(_mm512_permutexvar_epi16(order, both));
#else
  const UInt32Vec lower = round_clean(low) >> 16;
  const UInt32Vec upper = round_clean(high);
#if X_ROPE_CLS_LANES == 8 && defined(__AVX2__)
  constexpr int kOdd = 0xaa;
  return (UInt32Vec)_mm256_blend_epi16((__m256i)lower, (__m256i)upper, kOdd);
#else
  return lower | (upper & 0xffff0000U);
#endif
#endif
}

template <typename S>
X_ROPE_CLS_INLINE auto turned_twice(const S* x, Vec<Compute<S>> cos, Vec<Compute<S>> sin) {
  using T = Compute<S>;
  const Vec<T> v = load_as(x);
  return rounded<S>(v * cos + shuffle<T, SwapNeighbours>(v, v) * sin);
}

// Words of two bfloat16.
X_ROPE_CLS_INLINE UInt32Vec load_words(const BFloat16* x) {
  UInt32Vec words;
  __builtin_memcpy(&words, x, sizeof(words));
  return words;
}
X_ROPE_CLS_INLINE FloatVec lower_halves(UInt32Vec words) {
  return reinterpret_cast<FloatVec>(words << 16);
}
X_ROPE_CLS_INLINE FloatVec upper_halves(UInt32Vec words) {
  return reinterpret_cast<FloatVec>(words & 0xffff0000U);
}
X_ROPE_CLS_INLINE UInt32Vec turned_words(const BFloat16* x, FloatVec cos, FloatVec sin) {
  const UInt32Vec words = load_words(x);
  const FloatVec v0 = lower_halves(words);
  const FloatVec v1 = upper_halves(words);
  return rounded_words(v0 * cos - v1 * sin, v1 * cos + v0 * sin);
}

template <typename V>
struct Halves {
  V first, second;
};
template <typename S>
X_ROPE_CLS_INLINE auto turned_halves(const S* x0, const S* x1, Vec<Compute<S>> cos,
                                     Vec<Compute<S>> sin) {
  using T = Compute<S>;
  const Vec<T> v0 = load_as(x0);
  const Vec<T> v1 = load_as(x1);
  const auto first = rounded<S>(v0 * cos - v1 * sin);
  return Halves<decltype(+first)>{first, rounded<S>(v1 * cos + v0 * sin)};
}
// Two vectors of pairs, whose even ones turn by cos[0] and sin[0], and the odd ones by the others.
X_ROPE_CLS_INLINE Halves<UInt32Vec> turned_half_words(const BFloat16* x0, const BFloat16* x1,
                                                      const FloatVec* cos, const FloatVec* sin) {
  const UInt32Vec first = load_words(x0);
  const UInt32Vec second = load_words(x1);
  const FloatVec even0 = lower_halves(first);
  const FloatVec even1 = lower_halves(second);
  const FloatVec odd0 = upper_halves(first);
  const FloatVec odd1 = upper_halves(second);
  return {rounded_words(even0 * cos[0] - even1 * sin[0], odd0 * cos[1] - odd1 * sin[1]),
          rounded_words(even1 * cos[0] + even0 * sin[0], odd1 * cos[1] + odd0 * sin[1])};
}

// A vector of pairs, the first of them at x and y.
template <typename S, PairLayout kLayout, bool kStream>
X_ROPE_CLS_INLINE void turn_vector(const S* x, S* y, Vec<Compute<S>> cos, Vec<Compute<S>> sin,
                                   int64_t half) {
  if constexpr (kLayout == PairLayout::kTwice) {
    put<kStream>(y, turned_twice(x, cos, sin));
  } else if constexpr (kLayout == PairLayout::kWords) {
    put<kStream>(y, turned_words(x, cos, sin));
  } else {
    const auto turned = turned_halves(x, x + half, cos, sin);
    put<kStream>(y, turned.first);
    put<kStream>(y + half, turned.second);
  }
}

// `turned` in the first n lanes, what lies at x in the others.
template <typename S, typename V>
X_ROPE_CLS_INLINE V first_lanes(V turned, const S* x, int64_t n) {
  using Lanes = decltype(turned < turned);
  using Lane = std::remove_reference_t<decltype(Lanes{}[0])>;
  constexpr int kCount = sizeof(V) / sizeof(Lane);
  Lanes lanes;
  for (int i = 0; i < kCount; ++i) lanes[i] = static_cast<Lane>(i);
  V kept;
  __builtin_memcpy(&kept, x, sizeof(kept));
  return lanes < static_cast<Lane>(n) ? turned : kept;
}

// The n pairs of a row, fewer than a vector has. The channels that follow them in the vector are
// stored as they were.
template <typename S, PairLayout kLayout>
X_ROPE_CLS_INLINE void turn_few(const S* x, S* y, const Compute<S>* table, int64_t n) {
  using T = Compute<S>;
  const Vec<T> cos = load<T>(table);
  const Vec<T> sin = load<T>(table + kLanes<T>);
  if constexpr (kLayout == PairLayout::kTwice) {
    put<false>(y, first_lanes(turned_twice(x, cos, sin), x, n));
  } else if constexpr (kLayout == PairLayout::kWords) {
    put<false>(y, first_lanes(turned_words(x, cos, sin), x, n));
  } else {
    const auto turned = turned_halves(x, x + n, cos, sin);
    const auto first = first_lanes(turned.first, x, n);
    const auto second = first_lanes(turned.second, x + n, n);
    put<false>(y, first);
    put<false>(y + n, second);
  }
}
// Channels of a row that it reads and writes.
template <typename T>
constexpr int64_t few_reach(PairLayout layout, int64_t n) {
  return (layout == PairLayout::kHalves ? n : 0) +
         (layout == PairLayout::kWords ? 2 : 1) * kLanes<T>;
}

// The pairs of a row behind its whole vectors, where these pairs cannot be part of another one.
template <typename S, PairLayout kLayout>
__attribute__((noinline)) void turn_last(const S* x, S* y, const Compute<S>* table, int64_t pairs,
                                         int64_t half, int64_t channels) {
  using T = Compute<S>;
  constexpr int64_t kL = kLanes<T>;
  constexpr int64_t kStep = kLayout == PairLayout::kWords ? 2 : 1;  // channels an element
  const int64_t n = table_elements(kLayout, pairs);
  if (n < kL && half == pairs && few_reach<T>(kLayout, n) <= channels) {
    return turn_few<S, kLayout>(x, y, table, n);
  }
  const int64_t done = n / kL * kL;
  constexpr int64_t kPart = kStep * kL;
  const int64_t rest = kStep * (n - done);
  x += kStep * done;
  y += kStep * done;
  S from[2 * kL] = {};
  S to[2 * kL];
  copy_few<kPart>(x, from, rest);
  if constexpr (kLayout == PairLayout::kHalves) copy_few<kL>(x + half, from + kL, rest);
  turn_vector<S, kLayout, false>(from, to, load<T>(table + done),
                                 load<T>(table + table_span<T>(kLayout, pairs) + done), kL);
  copy_few<kPart>(to, y, rest);
  if constexpr (kLayout == PairLayout::kHalves) copy_few<kL>(to + kL, y + half, rest);
}

// Pairs of one row. half: from the first member of a pair to the second where they lie apart.
// channels: of the row, from x on, rotated or not.
template <typename S, PairLayout kLayout, bool kStream>
X_ROPE_CLS_INLINE void turn_row(const S* x, S* y, const Compute<S>* table, int64_t pairs,
                                int64_t half, int64_t channels) {
  using T = Compute<S>;
  constexpr int64_t kL = kLanes<T>;
  constexpr int64_t kStep = kLayout == PairLayout::kWords ? 2 : 1;  // channels an element
  const T* const cos = table;
  const T* const sin = table + table_span<T>(kLayout, pairs);
  const int64_t n = table_elements(kLayout, pairs);
  for (int64_t i = 0; i + kL <= n; i += kL) {
    turn_vector<S, kLayout, kStream>(x + kStep * i, y + kStep * i, load<T>(cos + i),
                                     load<T>(sin + i), half);
  }
  if (n % kL == 0) return;
  if (n >= kL && x != y) {  // some pairs once more
    const int64_t i = n - kL;
    turn_vector<S, kLayout, false>(x + kStep * i, y + kStep * i, load<T>(cos + i), load<T>(sin + i),
                                   half);
  } else {
    turn_last<S, kLayout>(x, y, table, pairs, half, channels);
  }
}

// What turns the rows of a token: a table as lay_out_table makes it.
template <typename S, PairLayout kLayout>
struct LaidTable {
  const Compute<S>* table;
  int64_t pairs;
  int64_t channels;

  template <bool kStream>
  __attribute__((always_inline)) void turn(const S* x, S* y) const {
    turn_row<S, kLayout, kStream>(x, y, table, pairs, pairs, channels);
  }
};

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
