// What the attention passes share: rows of keys and values as tiles in shared memory, the rotated
// queries, and what is added to or dropped from scores.
#pragma once

#include <cstdint>

#include "../attention.h"
#include "attention_choices.h"
#include "mma.cuh"
#include "numeric.cuh"
#include "philox.cuh"
#include "prepare.cuh"
#include "rotate.cuh"

namespace x_rope_cls::cuda {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.69314718f;

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

// 2^x in one instruction; exp2f would spend more on results below 2^-126, which do not matter here.
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x anew: keeps the compiler from carrying what it derives from x through the main loops, whose
// registers are full.
__device__ __forceinline__ int32_t afresh(int32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Rows of keys or values that can be copied in pieces of 16 bytes: (batch, key heads, tokens), in
// places (gathered: false) or looked up by the token at a place.
struct TileRows {
  const void* data;
  int64_t stride_b, stride_h;
  int32_t stride_n;  // rows farther apart than that are packed
  int32_t pieces;    // 16-byte pieces that a row has; those beyond are zeros
  bool gathered;
};

// Starts copies of rows at places first ... first + count - 1 to a tile; zeros elsewhere. `tokens`:
// the token at each place; null: place i is row i. count is at least 1.
// kUnroll: 1 where registers are short; unrolled, it cost the main loops spills.
template <typename T, int kDim, int kRows, int kThreads, int kUnroll = kDim >= 96 ? 1 : 4>
__device__ __forceinline__ void load_tile(uint32_t to, const T* rows, int32_t stride_n,
                                          const int32_t* tokens, int32_t first, int32_t count,
                                          int32_t pieces, int32_t thread) {
  constexpr int kLanes = kDim % 64 == 0 ? 8 : 4;  // lanes that share a row: 128 or 64 bytes
  constexpr int kTogether = kWarpSize / kLanes;   // rows that a warp copies at a time
  constexpr int kPass = kThreads / kLanes;
  constexpr int kPasses = (kRows + kPass - 1) / kPass;
  constexpr int kWarpRows = kPasses * kTogether;  // neighbours, whose tokens the warp looks up once
  static_assert(kWarpRows <= kWarpSize && kRows % kWarpRows == 0);
  const int lane = thread % kWarpSize;
  const int warp_row = thread / kWarpSize * kWarpRows;
  if (kRows < kPass && warp_row >= kRows) return;
  [[maybe_unused]] int32_t own = 0;
  if (kPasses > 1 && tokens != nullptr && lane < kWarpRows && warp_row + lane < count) {
    own = tokens[first + warp_row + lane];
  }
#pragma unroll kUnroll
  for (int i = 0; i < kPasses; ++i) {
    const int warp_place = i * kTogether + lane / kLanes;
    const int row = warp_row + warp_place;
    const bool valid = row < count;
    int32_t token = first + (valid ? row : 0);
    if (tokens != nullptr) {
      if constexpr (kPasses > 1) {
        token = __shfl_sync(0xffffffffU, own, warp_place);
      } else {
        token = valid ? tokens[token] : 0;
      }
    }
    const T* const from = rows + static_cast<int64_t>(token) * stride_n;
#pragma unroll
    for (int j = 0; j < kDim / 8 / kLanes; ++j) {
      const int piece = lane % kLanes + j * kLanes;
      const bool read = valid && piece < pieces;
      copy_async(to + tile_offset<kDim>(row, piece), from + (read ? piece * 8 : 0), read);
    }
  }
}

// Offset of piece 2 * step + second of a row: tile_offset with what does not depend on the lane
// taken out of the permutation, so that steps 64 channels apart share a register.
template <int kDim>
__device__ __forceinline__ uint32_t fragment_offset(int row, int second, int step) {
  constexpr int kPermuted = kDim % 64 == 0 ? 8 : 4;  // pieces within which rows are permuted
  const int piece = 2 * step % kPermuted;
  const int by = (kDim % 64 == 0 ? row & 7 : (row >> 1) & 3) ^ second;
  return static_cast<uint32_t>(row * kDim * 2 + (piece ^ by) * 16 + (2 * step - piece) * 16);
}

// The address that a lane gives to ldmatrix for a block of 16 rows and 16 channels. As the left
// operand, rows are the product's rows; as the right one, its columns.
template <int kDim>
__device__ __forceinline__ uint32_t left_address(uint32_t tile, int row, int step, int lane) {
  return tile + row * kDim * 2 + fragment_offset<kDim>(lane % 16, lane / 16, step);
}
template <int kDim>
__device__ __forceinline__ uint32_t right_address(uint32_t tile, int row, int step, int lane) {
  return tile + row * kDim * 2 +
         fragment_offset<kDim>(lane / 16 * 8 + lane % 8, lane / 8 % 2, step);
}

// The bias in units of log2, finite where it was: the most negative floats, often used as a mask,
// must not become -infinity, or a row of nothing else would lose its uniform distribution.
__device__ __forceinline__ float bias_log2(float value) {
  constexpr float kLargest = 3.402823466e38f;
  const float scaled = value * kLog2E;
  const float low = scaled < -kLargest && value >= -kLargest ? -kLargest : scaled;
  return scaled > kLargest && value <= kLargest ? kLargest : low;
}

// The bias of all pairs, by strides in elements; null data: none.
struct ScoreBias {
  const void* data;
  DType dtype;
  int64_t stride_b, stride_h, stride_n, stride_m;

  __device__ __forceinline__ int64_t row(int64_t b, int64_t h, int64_t n) const {
    return b * stride_b + h * stride_h + n * stride_n;
  }
};
inline ScoreBias score_bias(const AttentionParams& p) {
  return {p.bias, p.bias_dtype, p.bias_stride_b, p.bias_stride_h, p.bias_stride_n, p.bias_stride_m};
}

template <typename B>
__device__ __forceinline__ void add_bias(float& score, B value) {
  score += bias_log2(static_cast<float>(to_compute(value)));
}
// Hides the pair, whatever its score is.
__device__ __forceinline__ void add_bias(float& score, uint8_t keep) {
  if (keep == 0) score = negative_infinity();
}

// visit(typed pointer) for the bias's dtype.
template <typename Visit>
__device__ __forceinline__ void with_bias(const ScoreBias& bias, const Visit& visit) {
  switch (bias.dtype) {
    case DType::kBool:
      return visit(static_cast<const uint8_t*>(bias.data));
    case DType::kFloat64:
      return visit(static_cast<const double*>(bias.data));
    case DType::kBFloat16:
      return visit(static_cast<const bf16*>(bias.data));
    case DType::kFloat16:
      return visit(static_cast<const fp16*>(bias.data));
    default:
      return visit(static_cast<const float*>(bias.data));
  }
}

// Dropout as a launch takes it; the seed is read where a block starts.
struct DropoutParams {
  const int64_t* seed;  // null: no dropout
  uint64_t threshold;
  float kept;  // factor of the kept weights; 1 without dropout
};
inline DropoutParams dropout_params(const AttentionParams& p) {
  if (p.dropout_p <= 0) return {nullptr, 0, 1.0f};
  return {p.seed_data, dropout_threshold(p.dropout_p),
          static_cast<float>(dropout_kept(p.dropout_p))};
}

}  // namespace x_rope_cls::cuda
