// Whole vectors of the compute type, from and to elements of a storage type at any address.
#pragma once

#include <cstdint>

#include "convert.h"
#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

constexpr int kHalfVectorBytes = kVectorBytes / 2;
typedef uint16_t UInt16HalfVec __attribute__((vector_size(kHalfVectorBytes)));
typedef uint16_t UInt16HalfVecAny __attribute__((vector_size(kHalfVectorBytes), aligned(2)));

X_ROPE_CLS_INLINE UInt32Vec load_16_bits(const void* p) {
  return __builtin_convertvector(*static_cast<const UInt16HalfVecAny*>(p), UInt32Vec);
}

X_ROPE_CLS_INLINE FloatVec load_as(const float* p) { return load<float>(p); }
X_ROPE_CLS_INLINE DoubleVec load_as(const double* p) { return load<double>(p); }
X_ROPE_CLS_INLINE FloatVec load_as(const BFloat16* p) {
  return reinterpret_cast<FloatVec>(load_16_bits(p) << 16);
}
X_ROPE_CLS_INLINE FloatVec load_as(const Float16* p) {
#if X_ROPE_CLS_LANES == 16 && defined(__AVX512F__)
  return reinterpret_cast<FloatVec>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p)));
#elif X_ROPE_CLS_LANES == 8 && defined(__F16C__)
  return reinterpret_cast<FloatVec>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
#else  // as to_compute does
  const UInt32Vec half = load_16_bits(p);
  UInt32Vec bits =
      reinterpret_cast<UInt32Vec>(reinterpret_cast<FloatVec>((half & 0x7fffU) << 13) * 0x1p112F);
  bits |= (half & 0x7c00U) == 0x7c00U ? UInt32Vec{} + 0x7f800000U : UInt32Vec{};
  return reinterpret_cast<FloatVec>(bits | (half & 0x8000U) << 16);
#endif
}

// bfloat16 in the upper half of each lane, nearest, ties to even; what is below it is rubbish.
X_ROPE_CLS_INLINE UInt32Vec round_to_bfloat16(FloatVec v) {
  const UInt32Vec bits = reinterpret_cast<UInt32Vec>(v);
  const UInt32Vec rounded = bits + 0x7fffU + ((bits >> 16) & 1U);
  return v == v ? rounded : bits | 0x400000U;  // NaN stays NaN
}

// Vectors of storage elements.
X_ROPE_CLS_INLINE FloatVec vector_from_compute(FloatVec v, float /*to*/) { return v; }
X_ROPE_CLS_INLINE DoubleVec vector_from_compute(DoubleVec v, double /*to*/) { return v; }
X_ROPE_CLS_INLINE UInt16HalfVec vector_from_compute(FloatVec v, BFloat16 /*to*/) {
  const UInt32Vec bits = round_to_bfloat16(v) >> 16;
#if X_ROPE_CLS_LANES == 8 && defined(__AVX2__)
  const __m256i words = reinterpret_cast<__m256i>(bits);
  return reinterpret_cast<UInt16HalfVec>(
      _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
#else
  return __builtin_convertvector(bits, UInt16HalfVec);
#endif
}
X_ROPE_CLS_INLINE UInt16HalfVec vector_from_compute(FloatVec v, Float16 /*to*/) {
#if X_ROPE_CLS_LANES == 16 && defined(__AVX512F__)
  return reinterpret_cast<UInt16HalfVec>(
      _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif X_ROPE_CLS_LANES == 8 && defined(__F16C__)
  return reinterpret_cast<UInt16HalfVec>(
      _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else  // as narrow does
  const UInt32Vec bits = reinterpret_cast<UInt32Vec>(v);
  const UInt32Vec magnitude = bits & 0x7fffffffU;
  const UInt32Vec normal = (magnitude - 0x38000000U + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
  const UInt32Vec subnormal =
      reinterpret_cast<UInt32Vec>(reinterpret_cast<FloatVec>(magnitude) + 0.5F) - 0x3f000000U;
  const UInt32Vec infinity = UInt32Vec{} + 0x7c00U;
  UInt32Vec half = magnitude < 0x38800000U ? subnormal : normal;
  half = magnitude >= 0x477ff000U ? (v == v ? infinity : infinity | 0x200U) : half;
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000U), UInt16HalfVec);
#endif
}

// n elements, next to each other, of a row times a factor.
template <typename S>
X_ROPE_CLS_INLINE void store_scaled(const Compute<S>* from, Compute<S> factor, int64_t n, S* to) {
  using T = Compute<S>;
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    const auto v = vector_from_compute(load<T>(from + i) * factor, S{});
    __builtin_memcpy(to + i, &v, sizeof(v));
  }
  for (; i < n; ++i) to[i] = from_compute<S>(from[i] * factor);
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
