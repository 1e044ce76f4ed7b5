// Pooling forward of float32 and float64: queries and sums over tokens stay in registers. One
// barrier a tile: each warp adds up all warps' partial scores and keeps the softmax for itself.
#pragma once

#include "pooling_fma.cuh"

namespace x_rope_cls::cuda {
namespace {

// The online softmax of a warp, whose lanes have row lane / 4 of tokens lane % 4 and lane % 4 + 4.
template <typename T>
struct FmaSoftmax {
  T offset;
  T maximum = -static_cast<T>(INFINITY);
  T sum{0};  // of this lane's tokens

  // Scores of a tile to weights relative to the largest score so far; returns the factor that
  // earlier sums of the row take. score: (warps, cells) from this lane's first on.
  __device__ T soften(const T* score, int warps, int lane, T scale, uint32_t counts, T* weights) {
    T own[2] = {};
#pragma unroll 4
    for (int w = 0; w < warps; ++w, score += kFmaCells) {
      own[0] += score[0];
      own[1] += score[kFmaCells / 2];
    }
    const T before = maximum;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool is_there = (counts >> (lane % kFmaFour + kFmaFour * i) & 1) != 0;
      own[i] = is_there ? own[i] * scale + offset : -static_cast<T>(INFINITY);
      maximum = larger(maximum, own[i]);
    }
#pragma unroll
    for (int by = 1; by < kFmaFour; by *= 2) {
      maximum = larger(maximum, __shfl_xor_sync(kAllLanes, maximum, by));
    }
    const T shift = maximum == -static_cast<T>(INFINITY) ? T{0} : maximum;
    const T factor = power_of_two(before - shift);
    sum *= factor;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const T weight = power_of_two(own[i] - shift);
      weights[lane + 32 * i] = weight;
      sum += weight;
    }
    __syncwarp();
    return factor;
  }
};

// Partial scores of this lane's channels, of four tokens from `tile` on with 8 rows, summed up over
// the warp: that of row lane / 4 and token lane % 4. query[r]: of row r ^ (lane / 4).
template <typename T>
__device__ __forceinline__ T partial_scores(const char* tile, int lane,
                                            const T (&query)[kFmaRows][kPiece<T>]) {
  T sums[kFmaRows * kFmaFour] = {};
#pragma unroll
  for (int t = 0; t < kFmaFour; ++t) {
    T x[kPiece<T>];
    load_values(tile + (t ^ lane % kFmaFour) * kFmaSlabBytes, x);
#pragma unroll
    for (int r = 0; r < kFmaRows; ++r) {
#pragma unroll
      for (int e = 0; e < kPiece<T>; ++e) sums[r * kFmaFour + t] += query[r][e] * x[e];
    }
  }
  return sum_across(sums);
}

template <typename T>
__global__ void __launch_bounds__(32 * kFmaWarps)
    forward_fma_kernel(const __grid_constant__ PoolCall<T> call, bool whole) {
  constexpr int kValues = kPiece<T>;
  extern __shared__ __align__(256) char memory[];
  const PoolPlan& plan = call.plan;
  const PoolParams& p = call.p();
  const PoolPlace place(plan, p.tokens, plan.groups);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const FmaShared<T> s(memory, plan, false, lane, warp);
  FmaTiles<T> tiles(call, place, s.tiles, lane, warp, whole);
  for (int i = 0; i < plan.stages - 1; ++i) tiles.fetch(i);

  const int64_t query_b = p.query_batch == 1 ? 0 : place.b;
  const int64_t first_row = static_cast<int64_t>(place.group) * kFmaRows;
  const T* const stack =
      call.stack() + (query_b * plan.groups + place.group) * kFmaRows * plan.padded + tiles.channel;
  T query[kFmaRows][kValues];  // row r ^ (lane / 4), so that four lanes read whole sectors of one
#pragma unroll
  for (int r = 0; r < kFmaRows; ++r) {
    load_values(stack + (r ^ lane / kFmaFour) * plan.padded, query[r]);
  }
  const int64_t own_row = first_row + lane / kFmaFour;
  FmaSoftmax<T> softmax;
  softmax.offset =
      own_row < plan.rows
          ? call.constants()[(query_b * plan.rows + own_row) * kPoolConstants + kScoreOffset]
          : T{0};

  T out[kFmaRows][kValues] = {};
  const T scale = static_cast<T>(p.scale * kLog2E);
  const int count = (place.last - place.first + kFmaTokens - 1) / kFmaTokens;
  for (int i = 0; i < count; ++i) {
    tiles.lane = forget(lane);
    tiles.fetch(i + plan.stages - 1);
    const uint32_t counts = tiles.wait();
    char* const tile = tiles.stage(i);
    T mean{0}, inverse{1};
    if (plan.normalised) tiles.normalise(tile, counts, s.moments, &mean, &inverse);
    T* const partial = s.partial + i % 2 * plan.warps * kFmaCells;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      partial[warp * kFmaCells + half * 32 + tiles.lane] =
          partial_scores(tile + kFmaFour * half * kFmaSlabBytes, tiles.lane, query);
    }
    __syncthreads();  // and the other half of `partial` may be overwritten
    const T factor = softmax.soften(partial + tiles.lane, plan.warps, tiles.lane, scale, counts,
                                    reinterpret_cast<T*>(s.weights));
    if (__any_sync(kAllLanes, factor != T{1})) {
#pragma unroll
      for (int r = 0; r < kFmaRows; ++r) {
        const T by = __shfl_sync(kAllLanes, factor, kFmaFour * r);
#pragma unroll
        for (int e = 0; e < kValues; ++e) out[r][e] *= by;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T x[kFmaFour][kValues];
#pragma unroll
      for (int t = 0; t < kFmaFour; ++t) {
        load_values(tile + (half * kFmaFour + t) * kFmaSlabBytes, x[t]);
      }
#pragma unroll
      for (int r = 0; r < kFmaRows; ++r) {
        T weight[kFmaFour];
        load_weights(s.weights, half, r, weight);
#pragma unroll
        for (int t = 0; t < kFmaFour; ++t) {
#pragma unroll
          for (int e = 0; e < kValues; ++e) out[r][e] += weight[t] * x[t][e];
        }
      }
    }
  }

  copy_async_wait<0>();
  const bool whole_sums = p.channels % kValues == 0;
#pragma unroll
  for (int r = 0; r < kFmaRows; ++r) {
    T* const to = call.sums(place.b, place.split, first_row + r, 0) + tiles.channel;
    const int32_t there = first_row + r < plan.rows ? tiles.width : 0;
    store_values(to, 1, whole_sums, there, out[r]);
  }
#pragma unroll
  for (int by = 1; by < kFmaFour; by *= 2) {
    softmax.sum += __shfl_xor_sync(kAllLanes, softmax.sum, by);
  }
  if (warp != 0 || lane % kFmaFour != 0 || own_row >= plan.rows) return;
  *call.stats(place.b, place.split, own_row) = {softmax.maximum, softmax.sum};
}

}  // namespace
}  // namespace x_rope_cls::cuda
