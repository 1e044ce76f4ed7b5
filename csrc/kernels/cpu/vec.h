// Vectors of X_ROPE_CLS_LANES floats (half as many doubles) by the compiler's vector extensions.
// Everything lives in an anonymous namespace inside the ISA's own: nothing of it may be shared
// between files that are compiled for different instruction sets.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define X_ROPE_CLS_INLINE static inline __attribute__((always_inline))
#define X_ROPE_CLS_UNROLL _Pragma("GCC unroll 16")

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

constexpr int kVectorBytes = 4 * X_ROPE_CLS_LANES;

typedef float FloatVec __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVec __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int32Vec __attribute__((vector_size(kVectorBytes)));
typedef int64_t Int64Vec __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UInt32Vec __attribute__((vector_size(kVectorBytes)));
typedef uint64_t UInt64Vec __attribute__((vector_size(kVectorBytes)));
typedef float FloatVecAny __attribute__((vector_size(kVectorBytes), aligned(4)));
typedef double DoubleVecAny __attribute__((vector_size(kVectorBytes), aligned(8)));

template <typename T>
struct VecTraits;
template <>
struct VecTraits<float> {
  using Vec = FloatVec;
  using Any = FloatVecAny;  // the same, at any address
  using Int = Int32Vec;
  using IntScalar = int32_t;
  static constexpr int kLanes = X_ROPE_CLS_LANES;
  // Rows of a register tile two vectors wide: 2 * rows accumulators leave room for the operands.
  static constexpr int kTileRows = X_ROPE_CLS_LANES == 16 ? 12 : 6;
};
template <>
struct VecTraits<double> {
  using Vec = DoubleVec;
  using Any = DoubleVecAny;
  using Int = Int64Vec;
  using IntScalar = int64_t;
  static constexpr int kLanes = X_ROPE_CLS_LANES / 2;
  static constexpr int kTileRows = X_ROPE_CLS_LANES == 16 ? 12 : 6;
};

template <typename T>
using Vec = typename VecTraits<T>::Vec;
template <typename T>
constexpr int kLanes = VecTraits<T>::kLanes;

template <typename T>
constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

template <typename T>
X_ROPE_CLS_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecTraits<T>::Any*>(p);
}
template <typename T>
X_ROPE_CLS_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecTraits<T>::Any*>(p) = v;
}
// s - 0 is s for every s, and compiles to the broadcast alone (s + 0 does not: -0 + 0 is 0).
template <typename T>
X_ROPE_CLS_INLINE Vec<T> broadcast(T s) {
  return s - Vec<T>{};
}

// Larger of a and b in each lane; b where one of them is NaN.
template <typename T>
X_ROPE_CLS_INLINE Vec<T> max_or_second(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// shuffle<Pick>(a, b): lane i is lane Pick::at(i) of a, or lane Pick::at(i) - lanes of b.
template <typename Pick, typename V, int... kIndex>
X_ROPE_CLS_INLINE V shuffle_lanes(V a, V b, std::integer_sequence<int, kIndex...>) {
  return __builtin_shufflevector(a, b, Pick::at(kIndex)...);
}
template <typename T, typename Pick>
X_ROPE_CLS_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b) {
  return shuffle_lanes<Pick>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

template <int kDistance>
struct SwapParts {
  static constexpr int at(int i) { return i ^ kDistance; }
};
template <int kPart>
struct EvenParts {  // parts 0, 2, ... of a, then of b
  static constexpr int at(int i) {
    const int part = i / kPart * 2;
    return part * kPart + i % kPart;
  }
};
template <int kPart>
struct OddParts {
  static constexpr int at(int i) { return EvenParts<kPart>::at(i) + kPart; }
};

// Every lane holds the sum of all lanes, added in pairs.
template <typename T, int kDistance = kLanes<T> / 2>
X_ROPE_CLS_INLINE Vec<T> sum_everywhere(Vec<T> v) {
  v += shuffle<T, SwapParts<kDistance>>(v, v);
  if constexpr (kDistance > 1) return sum_everywhere<T, kDistance / 2>(v);
  return v;
}
template <typename T>
X_ROPE_CLS_INLINE T sum_lanes(Vec<T> v) {
  return sum_everywhere<T>(v)[0];
}

// The largest lane; any lane where one is NaN.
template <typename T, int kDistance = kLanes<T> / 2>
X_ROPE_CLS_INLINE T max_lanes(Vec<T> v) {
  v = max_or_second<T>(v, shuffle<T, SwapParts<kDistance>>(v, v));
  if constexpr (kDistance > 1) return max_lanes<T, kDistance / 2>(v);
  return v[0];
}

// Stage of a butterfly transpose: 2x2 blocks of kSize lanes are transposed.
template <int kLaneCount, int kSize>
struct UpperBlocks {
  static constexpr int at(int i) { return (i & kSize) ? kLaneCount + i - kSize : i; }
};
template <int kLaneCount, int kSize>
struct LowerBlocks {
  static constexpr int at(int i) { return (i & kSize) ? kLaneCount + i : i + kSize; }
};
template <typename T, int kSize>
X_ROPE_CLS_INLINE void transpose_stages(Vec<T> (&rows)[kLanes<T>]) {
  X_ROPE_CLS_UNROLL
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i & kSize) continue;
    const Vec<T> upper = rows[i];
    const Vec<T> lower = rows[i + kSize];
    rows[i] = shuffle<T, UpperBlocks<kLanes<T>, kSize>>(upper, lower);
    rows[i + kSize] = shuffle<T, LowerBlocks<kLanes<T>, kSize>>(upper, lower);
  }
  if constexpr (kSize > 1) transpose_stages<T, kSize / 2>(rows);
}
// rows[i][j] becomes rows[j][i].
template <typename T>
X_ROPE_CLS_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  transpose_stages<T, kLanes<T> / 2>(rows);
}

// ---------------------------------------------------------------------------------------------
// 2^x. Relative error below 1.3 units in the last place (float), 2 (double). Results below the
// smallest exponents that stay normal with room to spare are 0; NaN stays NaN.

// 2^r on [-1/2, 1/2], minimax in relative error, lowest power first.
template <typename T>
struct Exp2Constants;
template <>
struct Exp2Constants<float> {
  static constexpr float kMagic = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLowest = -125.0F;
  static constexpr int kShift = 23;
  static constexpr int kBias = 127;
};
template <>
struct Exp2Constants<double> {
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLowest = -1021.0;
  static constexpr int kShift = 52;
  static constexpr int kBias = 1023;
};

X_ROPE_CLS_INLINE FloatVec exp2_polynomial(FloatVec r) {
  FloatVec y = broadcast<float>(0.001327647263F);
  y = y * r + 0.009675541343F;
  y = y * r + 0.05550713272F;
  y = y * r + 0.2402211972F;
  y = y * r + 0.6931469671F;
  y = y * r + 1.000000072F;
  return y;
}
X_ROPE_CLS_INLINE DoubleVec exp2_polynomial(DoubleVec r) {
  DoubleVec y = broadcast<double>(4.435282706957277151e-10);
  y = y * r + 7.074105613508142796e-9;
  y = y * r + 1.017819802167193084e-7;
  y = y * r + 1.321543308967639918e-6;
  y = y * r + 0.00001525273348998852565;
  y = y * r + 0.0001540353046251443206;
  y = y * r + 0.001333355814678992172;
  y = y * r + 0.009618129107588335244;
  y = y * r + 0.0555041086648199216;
  y = y * r + 0.240226506959101562;
  y = y * r + 0.6931471805599453305;
  y = y * r + 0.9999999999999999971;
  return y;
}

#ifdef __AVX512F__
// The processor rounds to integers and scales by powers of two.
X_ROPE_CLS_INLINE FloatVec round_avx512(FloatVec x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  constexpr __mmask16 kAll = 0xffff;  // GCC 12 warns about the intrinsic without a mask
  return (FloatVec)_mm512_maskz_roundscale_ps(kAll, (__m512)x, kNearest);
}
X_ROPE_CLS_INLINE FloatVec exp2_avx512(FloatVec x) {
  const __mmask16 normal =
      _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(Exp2Constants<float>::kLowest), _CMP_NLT_UQ);
  const FloatVec rounded = round_avx512(x);
  const FloatVec value = exp2_polynomial(x - rounded);
  return (FloatVec)_mm512_maskz_scalef_ps(normal, (__m512)value, (__m512)rounded);
}
#endif

// 2^i, where `rounded` is the integer i plus kMagic: i sits in the low mantissa bits; what is above
// them is shifted out.
template <typename T>
X_ROPE_CLS_INLINE Vec<T> power_of_two(Vec<T> rounded) {
  using C = Exp2Constants<T>;
  using Int = typename VecTraits<T>::Int;
  using IntScalar = typename VecTraits<T>::IntScalar;
  const Int bits = reinterpret_cast<Int>(rounded);
  return reinterpret_cast<Vec<T>>((bits + static_cast<IntScalar>(C::kBias)) << C::kShift);
}

// 2^x for |x| below 100.
template <typename T>
X_ROPE_CLS_INLINE Vec<T> exp2_moderate(Vec<T> x) {
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4) {
    const FloatVec rounded = round_avx512(x);
    const FloatVec value = exp2_polynomial(x - rounded);
    return (FloatVec)_mm512_maskz_scalef_ps(0xffff, (__m512)value, (__m512)rounded);
  }
#endif
  using C = Exp2Constants<T>;
  using Int = typename VecTraits<T>::Int;
  const Vec<T> rounded = x + C::kMagic;
  const Vec<T> value = exp2_polynomial(x - (rounded - C::kMagic));
  // Its exponent grows by i, which sits in the low mantissa bits.
  return reinterpret_cast<Vec<T>>(reinterpret_cast<Int>(value) +
                                  (reinterpret_cast<Int>(rounded) << C::kShift));
}

template <typename T>
X_ROPE_CLS_INLINE Vec<T> exp2(Vec<T> x) {
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4) return exp2_avx512(x);
#endif
  using C = Exp2Constants<T>;
  const Vec<T> lowest = broadcast<T>(C::kLowest);
  const Vec<T> clamped = lowest > x ? lowest : x;  // keeps NaN
  const Vec<T> rounded = clamped + C::kMagic;
  const Vec<T> fraction = clamped - (rounded - C::kMagic);
  const Vec<T> result = exp2_polynomial(fraction) * power_of_two<T>(rounded);
  return x < lowest ? Vec<T>{} : result;
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
