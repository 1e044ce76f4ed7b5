// Storage types and their conversion to and from the compute type, a row at a time.
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "vec.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename Storage>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename Storage>
using Compute = typename ComputeType<Storage>::type;

X_ROPE_CLS_INLINE float float_from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
X_ROPE_CLS_INLINE uint32_t bits_from_float(float value) {
  return __builtin_bit_cast(uint32_t, value);
}

X_ROPE_CLS_INLINE float to_compute(float v) { return v; }
X_ROPE_CLS_INLINE double to_compute(double v) { return v; }
X_ROPE_CLS_INLINE float to_compute(BFloat16 v) {
  return float_from_bits(static_cast<uint32_t>(v.bits) << 16);
}
X_ROPE_CLS_INLINE float to_compute(Float16 v) {
  // Shift exponent and mantissa into place, rescale by 2^112 (exact, subnormals too), and put the
  // exponent of infinities and NaNs back.
  const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7fffU) << 13;
  uint32_t bits = bits_from_float(float_from_bits(magnitude) * 0x1p112F);
  bits |= (v.bits & 0x7c00U) == 0x7c00U ? 0x7f800000U : 0U;
  return float_from_bits(bits | (static_cast<uint32_t>(v.bits & 0x8000U) << 16));
}

X_ROPE_CLS_INLINE float narrow(float v, float /*to*/) { return v; }
X_ROPE_CLS_INLINE double narrow(double v, double /*to*/) { return v; }
X_ROPE_CLS_INLINE BFloat16 narrow(float v, BFloat16 /*to*/) {
  const uint32_t bits = bits_from_float(v);
  const uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;  // nearest, ties to even
  const uint32_t quiet = (bits >> 16) | 0x40U;
  return {static_cast<uint16_t>((bits & 0x7fffffffU) > 0x7f800000U ? quiet : rounded)};
}
X_ROPE_CLS_INLINE Float16 narrow(float v, Float16 /*to*/) {
  const uint32_t bits = bits_from_float(v);
  const uint32_t magnitude = bits & 0x7fffffffU;
  // Normal results: round the mantissa to 10 bits, ties to even, and rebias the exponent.
  const uint32_t normal = (magnitude - 0x38000000U + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
  // Results below 2^-14: adding 1/2 leaves the value in units of 2^-24 in the low mantissa bits.
  const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5F) - 0x3f000000U;
  const uint32_t special = magnitude > 0x7f800000U ? 0x7e00U : 0x7c00U;  // NaN, infinity
  uint32_t half = magnitude < 0x38800000U ? subnormal : normal;
  half = magnitude >= 0x477ff000U ? special : half;  // 65520 and more round to infinity
  return {static_cast<uint16_t>(half | ((bits >> 16) & 0x8000U))};
}

template <typename Storage>
X_ROPE_CLS_INLINE Storage from_compute(Compute<Storage> v) {
  return narrow(v, Storage{});
}

// Number of leading elements that whole-vector conversions handle; the rest goes one by one.
template <typename Storage>
X_ROPE_CLS_INLINE int64_t load_vectors([[maybe_unused]] const Storage* from,
                                       [[maybe_unused]] int64_t n,
                                       [[maybe_unused]] Compute<Storage>* to) {
#if X_ROPE_CLS_LANES >= 8 && defined(__F16C__)
  if constexpr (__is_same(Storage, Float16)) {
    const int64_t whole = n & ~int64_t{7};
    for (int64_t i = 0; i < whole; i += 8) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
    }
    return whole;
  }
#endif
  return 0;
}
template <typename Storage>
X_ROPE_CLS_INLINE int64_t store_vectors([[maybe_unused]] const Compute<Storage>* from,
                                        [[maybe_unused]] int64_t n, [[maybe_unused]] Storage* to) {
#if X_ROPE_CLS_LANES >= 8 && defined(__F16C__)
  if constexpr (__is_same(Storage, Float16)) {
    const int64_t whole = n & ~int64_t{7};
    for (int64_t i = 0; i < whole; i += 8) {
      const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
    }
    return whole;
  }
#endif
  return 0;
}

// n elements, `stride` apart, into a dense row of the compute type.
template <typename Storage>
X_ROPE_CLS_INLINE void load_row(const Storage* from, int64_t stride, int64_t n,
                                Compute<Storage>* __restrict__ to) {
  if (stride == 1) {
    for (int64_t i = load_vectors(from, n, to); i < n; ++i) to[i] = to_compute(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = to_compute(from[i * stride]);
  }
}
template <typename Storage>
X_ROPE_CLS_INLINE void store_row(const Compute<Storage>* __restrict__ from, int64_t stride,
                                 int64_t n, Storage* to) {
  if (stride == 1) {
    for (int64_t i = store_vectors(from, n, to); i < n; ++i) to[i] = from_compute<Storage>(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i * stride] = from_compute<Storage>(from[i]);
  }
}

// Calls f with a value of the storage type: the one switch over dtypes.
template <typename F>
X_ROPE_CLS_INLINE void with_storage_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
    case DType::kBool:
      return;  // never a tensor of values
  }
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
