// Attention backward in half precision on tensor cores. One kernel in two roles: owners are the
// tokens whose sums a block has, partners those that it passes over.
//   owners keys:     S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q
//   owners queries:  S = Q K^T, dP = dO V^T, dQ += dS K
// In both the scores' layout in registers is the left operand's of the products that follow, so
// nothing but inputs goes through shared memory, and no sum is shared between blocks.
#pragma once

#include <cstdint>

#include "attention_backward_scores.cuh"

namespace x_rope_cls::cuda {

template <typename T_, int kDim_, MmaSum kSum_, bool kGeneral_>
template <int kRows>
__device__ __forceinline__ void BackwardKernel<T_, kDim_, kSum_, kGeneral_>::load(
    const TileRows& from, bool queries, uint32_t to, int32_t at, int32_t rows) const {
  const int32_t batch = afresh(b);
  const T* const data = static_cast<const T*>(from.data) + batch * from.stride_b +
                        (queries ? h : h / args.group) * from.stride_h;
  const int32_t* const tokens = from.gathered ? tokens_of(queries, batch) : nullptr;
  // Where no register is left to carry a thread's places in a tile through the main loops.
  constexpr bool kShort = kGeneral || kDim == 256;
  const auto own = static_cast<int32_t>(threadIdx.x);
  load_tile<T, kDim, kRows, kThreads, 1>(to, data, from.stride_n, tokens, at, rows, from.pieces,
                                         kShort ? afresh(own) : own);
}

template <typename T_, int kDim_, MmaSum kSum_, bool kGeneral_>
__device__ __forceinline__ void BackwardKernel<T_, kDim_, kSum_, kGeneral_>::load_owners(
    bool raw, bool again) const {
  const TileRows& from = kOwnsQueries ? (raw ? args.q_raw : args.q) : (raw ? args.k_raw : args.k);
  load<kShape.owners>(from, kOwnsQueries, own_first, first, count);
  if (again || !kFirst) return;
  load<kShape.owners>(kOwnsQueries ? args.grad_out : args.v, kOwnsQueries, own_second, first,
                      count);
}

template <typename T_, int kDim_, MmaSum kSum_, bool kGeneral_>
template <int kTile>
__device__ __forceinline__ void BackwardKernel<T_, kDim_, kSum_, kGeneral_>::load_partners(
    bool raw, uint32_t stage, int32_t at, int32_t rows) const {
  const TileRows& from = kOwnsQueries ? (raw ? args.k_raw : args.k) : (raw ? args.q_raw : args.q);
  load<kTile>(from, !kOwnsQueries, stage, at, rows);
  load<kTile>(kOwnsQueries ? args.v : args.grad_out, !kOwnsQueries, stage + kPartners * kDim * 2,
              at, rows);
  if (!kOwnsQueries && threadIdx.x < kTile) {
    const auto row = static_cast<int32_t>(threadIdx.x);
    copy_async_8(stage + 2 * kPartners * kDim * 2 + row * 8, stats() + at + (row < rows ? row : 0),
                 row < rows);
  }
  copy_async_commit();
}

template <typename T_, int kDim_, MmaSum kSum_, bool kGeneral_>
template <int kTile>
__device__ __forceinline__ void BackwardKernel<T_, kDim_, kSum_, kGeneral_>::pass(
    const Owners& owners, bool raw, int32_t at, int32_t last, Sums& sums) const {
  if (at >= last) return;
  constexpr int32_t kStage = backward_stage_bytes(kDim);
  const bool works = warp_row < count;  // the same in the whole warp
  load_partners<kTile>(raw, stages, at, min(kTile, last - at));
  uint32_t stage = 0;
#pragma unroll 1
  for (; at < last; at += kTile) {
    const int32_t next = at + kTile;
    copy_async_wait<0>();
    __syncthreads();  // the tile is there, the one before has been used
    if (kShape.stages == 2 && next < last) {
      load_partners<kTile>(raw, stages + (kStage - stage), next, min(kTile, last - next));
    }
    if (works) meet<kTile>(owners, stages + stage, at, min(kTile, last - at), sums);
    if (kShape.stages == 2) {
      stage = kStage - stage;
    } else if (next < last) {
      __syncthreads();
      load_partners<kTile>(raw, stages, next, min(kTile, last - next));
    }
  }
  __syncthreads();  // all has been used
}

template <typename T_, int kDim_, MmaSum kSum_, bool kGeneral_>
__device__ __forceinline__ void BackwardKernel<T_, kDim_, kSum_, kGeneral_>::look_up(
    Owners& owners) const {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t place = first + min(row_of_half(m, half), count - 1);
      if (kOwnsQueries) {
        const float2 x = stats()[place];
        owners.shift[m][half] = x.x;
        owners.delta[m][half] = x.y;
      }
    }
  }
}

template <typename T_, int kDim_, MmaSum kSum_, bool kGeneral_>
__device__ __forceinline__ void BackwardKernel<T_, kDim_, kSum_, kGeneral_>::store(
    void* to, int32_t width, float (&sums)[kRowTiles][kDim / 8][4]) const {
  const TokenOrder& order = kOwnsQueries ? args.common.queries : args.common.keys;
  const int32_t thread = afresh(static_cast<int32_t>(threadIdx.x));
  const int32_t own = thread / kWarpSize * kRowTiles * 16 + thread % kWarpSize / 4;
  const int32_t batch = afresh(b);
  const int32_t head = kOwnsQueries
                           ? batch * static_cast<int32_t>(args.common.heads) + h
                           : batch * static_cast<int32_t>(args.common.key_heads) + h / args.group;
  float* const rows =
      static_cast<float*>(to) + (static_cast<int64_t>(head) * order.length + afresh(first)) * width;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t row = own + 16 * m + 8 * half;
      if (row >= count) continue;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        if (8 * n >= width) continue;
        *reinterpret_cast<float2*>(rows + static_cast<int64_t>(row) * width + 8 * n +
                                   2 * (thread % 4)) =
            make_float2(sums[m][n][2 * half], sums[m][n][2 * half + 1]);
      }
    }
  }
}

template <typename T_, int kDim_, MmaSum kSum_, bool kGeneral_>
template <int kTile>
__device__ __forceinline__ void BackwardKernel<T_, kDim_, kSum_, kGeneral_>::pass_heads(
    const Owners& owners, bool raw, int32_t at, int32_t last, Sums& sums) {
  const int32_t heads = kOwnsQueries ? 1 : args.group;
#pragma unroll 1
  for (int32_t i = 0; i < heads; ++i, ++h) pass<kTile>(owners, raw, at, last, sums);
  h -= heads;
}

template <typename T_, int kDim_, MmaSum kSum_, bool kGeneral_>
__device__ __forceinline__ void BackwardKernel<T_, kDim_, kSum_, kGeneral_>::run(bool special,
                                                                                 Sums& sums) {
  const TokenOrder& other = kOwnsQueries ? args.common.keys : args.common.queries;
  const GradSums& to = kOwnsQueries ? args.dq : args.dk;
  Owners owners;
  look_up(owners);
  if constexpr (kFirst) clear(sums.first);
  if constexpr (kSecond) clear(sums.second);
  load_owners(false, false);
  TokenCounts others = other.counts_of(b);
  pass_heads<kPartners>(owners, special, 0, special ? others.all() : others.with, sums);
  if constexpr (kFirst) store(to.main, to.width, sums.first);
  const int32_t batch = afresh(b);
  others = other.counts_of(batch);
  if (!special && others.without > 0) {
    copy_async_commit();  // without ordinary partners the owners are still on their way
    copy_async_wait<0>();
    __syncthreads();
    load_owners(true, true);
    if constexpr (kFirst) clear(sums.first);
    pass_heads<kNarrowPartners>(owners, false, others.with, others.all(), sums);
    if constexpr (kFirst) store(to.raw, to.width, sums.first);
  }
  if constexpr (kSecond) store(args.dv.main, args.dv.width, sums.second);
  copy_async_commit();  // without any partner likewise
  copy_async_wait<0>();
}

template <typename T, int kDim, MmaSum kSum, bool kGeneral>
__global__ void __launch_bounds__(BackwardKernel<T, kDim, kSum, kGeneral>::kThreads,
                                  backward_shape(kDim).blocks)
    attention_backward_kernel(const __grid_constant__ MmaBackwardArgs args) {
  using Kernel = BackwardKernel<T, kDim, kSum, kGeneral>;
  constexpr bool kOwnsQueries = Kernel::kOwnsQueries;
  constexpr int kOwners = Kernel::kShape.owners;
  extern __shared__ __align__(128) char shared[];
  const BackwardCommon& p = args.common;
  const int32_t tiles = kOwnsQueries ? args.query_tiles : args.key_tiles;
  const auto tile = static_cast<int32_t>(blockIdx.x % tiles);
  const auto unit = static_cast<int64_t>(blockIdx.x / tiles);
  const int64_t heads = kOwnsQueries ? p.heads : p.key_heads;
  const int64_t b = unit / heads;
  const TokenOrder& own = kOwnsQueries ? p.queries : p.keys;
  const auto [with, without] = own.counts_of(b);
  const int32_t ordinary_tiles = (with + kOwners - 1) / kOwners;
  const bool special = tile >= ordinary_tiles;
  const int32_t first = special ? with + (tile - ordinary_tiles) * kOwners : tile * kOwners;
  const int32_t end = special ? with + without : with;
  if (first >= end) return;
  const uint32_t start = shared_address(shared);
  const auto h = static_cast<int32_t>(unit % heads);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  Kernel kernel{args,
                start,
                start + kOwners * kDim * 2,
                start + 2 * kOwners * kDim * 2,
                static_cast<int32_t>(b),
                kOwnsQueries ? h : h * args.group,
                first,
                min(kOwners, end - first),
                static_cast<int>(threadIdx.x) % kWarpSize,
                warp * Kernel::kRowTiles * 16};
  typename Kernel::Sums sums;
  kernel.run(special, sums);
}

template <typename T, int kDim, MmaSum kSum, bool kGeneral>
cudaError_t launch_backward(const MmaBackwardArgs& args, cudaStream_t stream) {
  constexpr int32_t kShared = backward_shared_bytes(kDim);
  const bool queries = kSum == MmaSum::kQueries;
  const BackwardCommon& p = args.common;
  const int64_t blocks =
      p.batch * (queries ? p.heads * args.query_tiles : p.key_heads * args.key_tiles);
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = attention_backward_kernel<T, kDim, kSum, kGeneral>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), backward_shape(kDim).warps * kWarpSize, kShared,
           stream>>>(args);
  return cudaGetLastError();
}

template <typename T, int kDim, bool kGeneral>
cudaError_t launch_backward_sums(const MmaBackwardArgs& args, cudaStream_t stream) {
  if constexpr (backward_joins_keys_and_values(kDim)) {
    const cudaError_t error = launch_backward<T, kDim, MmaSum::kKeysValues, kGeneral>(args, stream);
    if (error != cudaSuccess) return error;
  } else {
    cudaError_t error = launch_backward<T, kDim, MmaSum::kKeys, kGeneral>(args, stream);
    if (error != cudaSuccess) return error;
    error = launch_backward<T, kDim, MmaSum::kValues, kGeneral>(args, stream);
    if (error != cudaSuccess) return error;
  }
  return launch_backward<T, kDim, MmaSum::kQueries, kGeneral>(args, stream);
}

// Two dtypes, with and without biases and dropout (whose code would cost plain calls registers),
// keys and queries: 8 kernels, 12 at 256 channels.
template <int kDim>
cudaError_t mma_backward(DType dtype, const MmaBackwardArgs& args, cudaStream_t stream) {
  const bool general = args.common.bias.data != nullptr || args.common.dropout.seed != nullptr;
  if (dtype == DType::kBFloat16) {
    return general ? launch_backward_sums<bf16, kDim, true>(args, stream)
                   : launch_backward_sums<bf16, kDim, false>(args, stream);
  }
  return general ? launch_backward_sums<fp16, kDim, true>(args, stream)
                 : launch_backward_sums<fp16, kDim, false>(args, stream);
}

}  // namespace x_rope_cls::cuda
