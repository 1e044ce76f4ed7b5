// Attention forward: the sums of a block go to memory.
#pragma once

#include "attention_forward_block.cuh"

namespace x_rope_cls::cuda {

template <typename T_, int kDim_, bool kWide_, bool kGeneral_>
__device__ __forceinline__ void ForwardKernel<T_, kDim_, kWide_, kGeneral_>::join_sums(
    State& state) const {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& sum = state.sum[m][half];
      sum += __shfl_xor_sync(0xffffffffU, sum, 1);
      sum += __shfl_xor_sync(0xffffffffU, sum, 2);
    }
  }
}

template <typename T_, int kDim_, bool kWide_, bool kGeneral_>
__device__ __forceinline__ void ForwardKernel<T_, kDim_, kWide_, kGeneral_>::store_lse(
    int row, float lse2, int64_t slot) const {
  if (args.partial.out != nullptr) {
    args.partial.lse[slot] = lse2;
  } else {
    const RowPlace at = place_of_row(row);
    args.lse[(static_cast<int64_t>(tile.b) * args.rows.heads + at.h) * args.queries + at.n] =
        lse2 * kLn2;
  }
}

template <typename T_, int kDim_, bool kWide_, bool kGeneral_>
__device__ __forceinline__ void ForwardKernel<T_, kDim_, kWide_, kGeneral_>::store_wide(
    int64_t slot, State& state) const {
  join_sums(state);
  __syncthreads();  // without keys nobody has waited for those who loaded the queries
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of_half(m, half);
      const float sum = state.sum[m][half];
      const float factor = sum == 0.0f ? 0.0f : args.dropout.kept / sum;
      if (row < tile.rows && lane % 4 == 0) {
        store_lse(row, log2_sum(state.maximum[m][half], sum), slot + row);
      }
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const float x = state.out[m][n][2 * half] * factor;
        const float y = state.out[m][n][2 * half + 1] * factor;
        if (args.partial.out == nullptr) {
          asm volatile(
              "st.shared.b32 [%0], %1;" ::"r"(queries + tile_offset<kDim>(row, n) + lane % 4 * 4),
              "r"(pack_pair<T>(x, y))
              : "memory");
        } else if (row < tile.rows && 8 * n + lane % 4 * 2 < args.partial.width) {
          *reinterpret_cast<float2*>(args.partial.out + (slot + row) * args.partial.width + 8 * n +
                                     lane % 4 * 2) = make_float2(x, y);
        }
      }
    }
  }
  if (args.partial.out != nullptr) return;
  __syncwarp();
  constexpr int kPieces = kDim / 8;
#pragma unroll 1
  for (int i = lane; i < kRowTiles * 16 * kPieces; i += kWarpSize) {
    const int row = warp_row + i / kPieces;
    const int first = i % kPieces * 8;
    if (row >= tile.rows || first >= args.value_dim) continue;
    uint32_t packed[4];
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(packed[0]), "=r"(packed[1]), "=r"(packed[2]), "=r"(packed[3])
                 : "r"(queries + tile_offset<kDim>(row, i % kPieces))
                 : "memory");
    T* const to = out_row(row);
    if (args.out_whole) {
      *reinterpret_cast<uint4*>(to + first) =
          make_uint4(packed[0], packed[1], packed[2], packed[3]);
      continue;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (first + j < args.value_dim) {
        to[(first + j) * args.out.stride_d] = reinterpret_cast<const T*>(packed)[j];
      }
    }
  }
}

template <typename T_, int kDim_, bool kWide_, bool kGeneral_>
__device__ __forceinline__ void ForwardKernel<T_, kDim_, kWide_, kGeneral_>::store_narrow(
    int64_t slot, State& state, float* sums) const {
  constexpr int kPitch = kDim + kMergePadding;
  constexpr int kWarps = kShape.warps;
  float* const maxima = sums + kWarps * 16 * kPitch;  // (warps, 16)
  float* const totals = maxima + kWarps * 16;         // (warps, 16)
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  join_sums(state);
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + 8 * half + lane / 4;
    if (lane % 4 == 0) {
      maxima[row] = state.maximum[0][half] * (kGeneral ? 1.0f : args.scale_log2);
      totals[row] = state.sum[0][half];
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(
                       keys + (row * kPitch + 8 * n + lane % 4 * 2) * 4),
                   "f"(state.out[0][n][2 * half]), "f"(state.out[0][n][2 * half + 1])
                   : "memory");
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < 16 * kDim / 4; i += kThreads) {
    const int row = i / (kDim / 4);
    const int first = i % (kDim / 4) * 4;
    if (row >= tile.rows || first >= args.partial.width) continue;
    float largest = negative_infinity();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, maxima[w * 16 + row]);
    const float shift = largest == negative_infinity() ? 0.0f : largest;
    float sum = 0.0f;
    float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float factor = power_of_two(maxima[w * 16 + row] - shift);
      const float4 part = *reinterpret_cast<const float4*>(sums + (w * 16 + row) * kPitch + first);
      sum = fmaf(totals[w * 16 + row], factor, sum);
      x[0] = fmaf(part.x, factor, x[0]);
      x[1] = fmaf(part.y, factor, x[1]);
      x[2] = fmaf(part.z, factor, x[2]);
      x[3] = fmaf(part.w, factor, x[3]);
    }
    const float inverse = sum == 0.0f ? 0.0f : args.dropout.kept / sum;
#pragma unroll
    for (float& value : x) value *= inverse;
    if (first == 0) {
      store_lse(row, sum == 0.0f ? negative_infinity() : shift + log2f(sum), slot + row);
    }
    if (args.partial.out != nullptr) {
      *reinterpret_cast<float4*>(args.partial.out + (slot + row) * args.partial.width + first) =
          make_float4(x[0], x[1], x[2], x[3]);
    } else if (args.out_whole) {
      *reinterpret_cast<uint2*>(out_row(row) + first) =
          make_uint2(pack_pair<T>(x[0], x[1]), pack_pair<T>(x[2], x[3]));
    } else {
      T* const to = out_row(row);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (first + j < args.value_dim) {
          to[(first + j) * args.out.stride_d] = from_compute<T>(x[j]);
        }
      }
    }
  }
}

}  // namespace x_rope_cls::cuda
