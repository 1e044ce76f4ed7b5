// Panels of keys that fill no more than half a vector: products of half vectors, which take half
// the time where the processor splits whole ones. 196 patches and a CLS token are 12 vectors and 5.
#pragma once

#include <cstdint>

#include "fixed_point.h"
#include "operands.h"
#include "tile.h"
#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// An operand in half vectors; `void` where they are of no use.
template <typename U>
struct HalfOperandType {
  using type = void;
};

#if X_ROPE_CLS_LANES == 16 && defined(__AVX512F__)
constexpr int kHalfBytes = kVectorBytes / 2;
typedef float FloatHalf __attribute__((vector_size(kHalfBytes)));
typedef int32_t Int32Half __attribute__((vector_size(kHalfBytes)));
typedef float FloatHalfAny __attribute__((vector_size(kHalfBytes), aligned(4)));

// A float, or a sum that will be one.
struct HalfFloat {
  float value;
};
template <>
struct VecTraits<HalfFloat> {
  using Vec = FloatHalf;
  using Any = FloatHalfAny;
  static constexpr int kLanes = X_ROPE_CLS_LANES / 2;
  static constexpr int kTileRows = VecTraits<float>::kTileRows;
};
template <>
struct OperandTraits<HalfFloat> {
  using Sum = HalfFloat;
  using Vector = FloatHalf;
  using Accumulator = FloatHalf;
  static constexpr int kTogether = 1;

  X_ROPE_CLS_INLINE Vector load_vector(const HalfFloat* p) { return load<HalfFloat>(p); }
  X_ROPE_CLS_INLINE Vector broadcast_one(HalfFloat operand) { return operand.value - Vector{}; }
  X_ROPE_CLS_INLINE void add_products(Accumulator& sum, Vector a, Vector b) { sum += a * b; }
};
template <>
struct HalfOperandType<float> {
  using type = HalfFloat;
};

X_ROPE_CLS_INLINE FloatVec widen(FloatHalf v) {
  return __builtin_shufflevector(v, FloatHalf{}, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
                                 15);
}
X_ROPE_CLS_INLINE Int32Vec widen(Int32Half v) {
  return reinterpret_cast<Int32Vec>(widen(reinterpret_cast<FloatHalf>(v)));
}

// Sums of half vectors are given to `finish` as whole ones, with 0 behind them.
template <typename E>
struct Widened {
  const E& finish;

  template <int kRows, typename V>
  __attribute__((always_inline)) void operator()(const V (&acc)[kRows][1], int64_t r, HalfFloat* c,
                                                 int64_t c_stride) const {
    decltype(widen(V{})) whole[kRows][1];
    X_ROPE_CLS_UNROLL
    for (int i = 0; i < kRows; ++i) whole[i][0] = widen(acc[i][0]);
    finish(whole, r, reinterpret_cast<float*>(c), c_stride);
  }
};

#ifdef __AVX512BF16__
// Pairs of 16 bits.
template <typename U>
struct HalfPair {
  uint32_t bits;
};
template <typename U>
struct HalfPairTraits {
  using Sum = HalfFloat;
  using Vector = __m256i;
  static constexpr int kTogether = 2;

  X_ROPE_CLS_INLINE Vector load_vector(const HalfPair<U>* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  X_ROPE_CLS_INLINE Vector broadcast_one(HalfPair<U> operand) {
    return _mm256_set1_epi32(static_cast<int32_t>(operand.bits));
  }
};
template <>
struct OperandTraits<HalfPair<BFloat16Pair>> : HalfPairTraits<BFloat16Pair> {
  using Accumulator = FloatHalf;
  X_ROPE_CLS_INLINE void add_products(Accumulator& sum, Vector a, Vector b) {
    sum = (Accumulator)_mm256_dpbf16_ps((__m256)sum, (__m256bh)a, (__m256bh)b);
  }
};
template <>
struct HalfOperandType<BFloat16Pair> {
  using type = HalfPair<BFloat16Pair>;
};
#endif

#ifdef __AVX512VNNI__
template <>
struct OperandTraits<HalfPair<Int16Pair>> : HalfPairTraits<Int16Pair> {
  using Accumulator = Int32Half;
  X_ROPE_CLS_INLINE void add_products(Accumulator& sum, Vector a, Vector b) {
    sum = (Accumulator)_mm256_dpwssd_epi32((__m256i)sum, a, b);
  }
};
template <>
struct HalfOperandType<Int16Pair> {
  using type = HalfPair<Int16Pair>;
};
#endif
#endif

// Products of all rows with a panel one vector wide, of which `count` columns are wanted, as
// multiply_panel's. False, and nothing is done, where half vectors are of no use.
template <typename U, typename F, typename E>
X_ROPE_CLS_INLINE bool multiply_half_panel(
    [[maybe_unused]] int64_t count, [[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t depth,
    [[maybe_unused]] const U* a, [[maybe_unused]] int64_t a_stride, [[maybe_unused]] const U* panel,
    [[maybe_unused]] Sum<U>* c, [[maybe_unused]] int64_t c_stride, [[maybe_unused]] F&& beside,
    [[maybe_unused]] const E& finish) {
#if X_ROPE_CLS_LANES == 16 && defined(__AVX512F__)
  using Half = typename HalfOperandType<U>::type;
  if constexpr (!__is_same(Half, void)) {
    if (2 * count > kLanes<Sum<U>>) return false;
    multiply_panel<Half, Left::kByRow, false, 1>(rows, depth, reinterpret_cast<const Half*>(a),
                                                 a_stride, reinterpret_cast<const Half*>(panel),
                                                 kLanes<Sum<U>>, reinterpret_cast<HalfFloat*>(c),
                                                 c_stride, beside, Widened<E>{finish});
    return true;
  }
#endif
  return false;
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
