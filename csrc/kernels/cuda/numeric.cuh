// Element types: what they are computed in, conversions, 16-byte pieces of rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../dtype.h"

namespace x_rope_cls::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// float64 is computed in float64, everything else in float32.
template <typename T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

__device__ __forceinline__ float to_compute(float x) { return x; }
__device__ __forceinline__ double to_compute(double x) { return x; }
__device__ __forceinline__ float to_compute(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_compute(fp16 x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_compute(Compute<T> x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_compute<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ fp16 from_compute<fp16>(float x) {
  return __float2half_rn(x);
}

// Two values rounded to T in one register, `low` in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<fp16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Elements in 16 bytes.
template <typename T>
inline constexpr int kPiece = 16 / static_cast<int>(sizeof(T));

template <typename T>
struct alignas(16) Piece {
  T values[kPiece<T>];
};

// A value of any element type, for tensors whose dtype is not a template parameter (masks).
__device__ __forceinline__ double load_any(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat64:
      return static_cast<const double*>(data)[index];
    case DType::kBFloat16:
      return to_compute(static_cast<const bf16*>(data)[index]);
    case DType::kFloat16:
      return to_compute(static_cast<const fp16*>(data)[index]);
    case DType::kBool:
      return static_cast<const uint8_t*>(data)[index];
    default:
      return static_cast<const float*>(data)[index];
  }
}

// Calls visit(T{}) with the element type of dtype (never kBool).
template <typename Visit>
auto with_dtype(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::kFloat64:
      return visit(double{});
    case DType::kBFloat16:
      return visit(bf16{});
    case DType::kFloat16:
      return visit(fp16{});
    default:
      return visit(float{});
  }
}

}  // namespace x_rope_cls::cuda
