// Pooling backward on tensor cores: 16 tokens a step, each read once and its gradient written once.
//
// Queries and gradients of pooled, 16 rows each, lie stacked in shared memory. One product with the
// tile gives both kinds of scores, added up over the warps' channels through shared memory; weights
// p and scale * ds come back as left operands: of the sums over tokens as they lie, and transposed
// of dx, whose right operand are the stacked rows. dx replaces the tile in shared memory, so that
// it is stored 16 bytes at a time.
//
// More than 16 rows take a block a group of 16 for the sums, and dx another kernel, which adds up
// the groups in registers.
//
// A normalisation costs no sums over channels of dx: those that its gradient needs, of dx' and of
// dx' x', are sums over rows of p and ds times means of the stacked rows or times scores.
#pragma once

#include "pooling_backward_shared.cuh"
#include "pooling_token_grads.cuh"

namespace x_rope_cls::cuda {
namespace {

// Adds up four rows of both kinds of scores and makes p and scale * ds of them. What is summed up
// of them is rounded as the products see it, so that what remains of a product is known exactly.
template <typename S>
__device__ void score_grads(const BackwardShared& s, int first_row, int lane, int warps,
                            const PoolParams& p, uint32_t counts) {
  const int row = first_row + lane / 8, token = lane % 8;
  float score[2] = {0.0F, 0.0F}, other[2] = {0.0F, 0.0F};
  const float* from = s.partial + score_index(row, token);
#pragma unroll 4
  for (int w = 0; w < warps; ++w, from += 2 * kScoreFloats) {
    score[0] += from[0];
    score[1] += from[kPoolRows * 8];
    other[0] += from[kScoreFloats];
    other[1] += from[kScoreFloats + kPoolRows * 8];
  }
  const auto scale = static_cast<float>(p.scale), log_scale = static_cast<float>(p.scale * kLog2E);
  const float offset = s.constant(kScoreOffset, row) - s.constant(kShift, row);
  const float grad_offset = s.constant(kGradOffset, row);
  float grad_sum = 0.0F, weight_sum = 0.0F;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool is_there = (counts >> (token + 8 * i) & 1) != 0;
    const float weight = is_there ? exp2f(score[i] * log_scale + offset) : 0.0F;
    const S grad = from_compute<S>(is_there ? weight * (other[i] + grad_offset) * scale : 0.0F);
    const S rounded_weight = from_compute<S>(weight);
    const uint32_t at = weight_offset(row, token + 8 * i);
    *reinterpret_cast<S*>(s.weights + at) = grad;
    *reinterpret_cast<S*>(s.weights + kWeightBytes + at) = rounded_weight;
    const float rounded = to_compute(grad), summed = to_compute(rounded_weight);
    grad_sum += rounded;
    weight_sum += weight;
    if (p.norm == PoolNorm::kNone) continue;
    float level = summed * s.constant(kGradMean, row) + rounded * s.constant(kQueryMean, row);
    float along = (summed * other[i] + rounded * score[i]) / static_cast<float>(p.channels);
#pragma unroll
    for (int by = 8; by < 32; by *= 2) {
      level += __shfl_xor_sync(kAllLanes, level, by);
      along += __shfl_xor_sync(kAllLanes, along, by);
    }
    if (lane < 8) {
      s.token_sums[first_row / 4 * kPoolTokens + token + 8 * i] = make_float2(level, along);
    }
  }
  grad_sum = row_sum(grad_sum);
  weight_sum = row_sum(weight_sum);
  if (token != 0) return;
  s.grad_sum[row] += grad_sum;
  s.weight_sum[row] += weight_sum;
}

// out += weights times the tile, a tensor-core product along the tokens.
template <typename S>
__device__ __forceinline__ void sum_tokens(const char* weights, const char* tile, int lane,
                                           float (&out)[kPoolBackwardSlab / 8][4]) {
  constexpr int kSlab = kPoolBackwardSlab;
  const MatrixLane at = rows_first(lane);
  uint32_t weight[4];
  load_matrices(weight, shared_address(weights) + weight_offset(at.row, 8 * at.piece));
  const uint32_t address = lane_address<kSlab>(tile, at);
#pragma unroll
  for (int j = 0; j < kSlab / 16; ++j) {
    uint32_t x[4];
    load_matrices_transposed(x, address ^ 32 * j);
    multiply_add<S>(out[2 * j], weight, x[0], x[1]);
    multiply_add<S>(out[2 * j + 1], weight, x[2], x[3]);
  }
}

// The scores of one warp's channels: queries and gradients times the tile, to shared memory.
template <typename S>
__device__ __forceinline__ void partial_scores(const char* stack, const char* tile, int lane,
                                               float* to) {
  constexpr int kSlab = kPoolBackwardSlab;
  const MatrixLane left = rows_first(lane), right = pieces_first(lane);
  const uint32_t address = lane_address<kSlab>(tile, right);
  const uint32_t queries = lane_address<kSlab>(stack, left);
  float score[2][2][4] = {};
#pragma unroll
  for (int k = 0; k < kSlab / 16; ++k) {
    uint32_t x[4];
    load_matrices(x, address ^ 32 * k);
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
      uint32_t stacked[4];
      load_matrices(stacked, (queries ^ 32 * k) + kind * kStackBytes);
      multiply_add<S>(score[kind][0], stacked, x[0], x[1]);
      multiply_add<S>(score[kind][1], stacked, x[2], x[3]);
    }
  }
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
    store_scores(score[kind][0], lane, 0, to + kind * kScoreFloats);
    store_scores(score[kind][1], lane, 1, to + kind * kScoreFloats);
  }
}

// Sums over tokens of one kind to scratch memory.
template <typename S>
__device__ void store_split(const PoolCall<S>& call, const PoolPlace& place, int kind, int rows,
                            int64_t channel, int lane,
                            const float (&out)[kPoolBackwardSlab / 8][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    if (row >= rows) continue;
    float* const to = call.sums(place.b, place.split, place.group * kPoolRows + row, kind);
#pragma unroll
    for (int j = 0; j < kPoolBackwardSlab / 8; ++j) {
      store_sums(out[j][2 * half], out[j][2 * half + 1], channel + j * 8 + lane % 4 * 2,
                 call.p().channels, to);
    }
  }
}

// Constants of a group's rows. Rows of padding have nothing to attend to.
template <typename S>
__device__ void copy_constants(const PoolCall<S>& call, int64_t b, int group,
                               const BackwardShared& s) {
  const int64_t left = call.plan.rows - static_cast<int64_t>(group) * kPoolRows;
  const float* const from =
      call.constants() + (b * call.plan.rows + group * kPoolRows) * kPoolConstants;
  for (int i = static_cast<int>(threadIdx.x); i < kPoolConstants * kPoolRows; i += blockDim.x) {
    const int which = i % kPoolConstants;
    const float padding = which == kShift ? INFINITY : 0.0F;
    s.constants[i] = i / kPoolConstants < left && which <= kGradMean ? from[i] : padding;
  }
}

template <typename S>
__global__ void __launch_bounds__(32 * kPoolBackwardWarps)
    backward_tiles_kernel(const __grid_constant__ PoolCall<S> call, bool whole, bool whole_grads) {
  constexpr int kSlab = kPoolBackwardSlab;
  using Tiles = TokenTiles<S, kSlab>;
  extern __shared__ __align__(256) char memory[];
  const PoolPlan& plan = call.plan;
  const PoolParams& p = call.p();
  const PoolPlace place(plan, p.tokens, plan.groups);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  Tiles tiles{call, place, memory + warp * Tiles::kTileBytes, warp * kSlab, lane, warp, whole};
  const BackwardShared s(memory + plan.stages * plan.warps * Tiles::kTileBytes, plan.warps, warp);
  const int first_row = place.group * kPoolRows;
  const int left = static_cast<int>(plan.rows) - first_row;
  const int rows = left < kPoolRows ? left : kPoolRows;
  const bool tokens_too = call.g.dx.data != nullptr && plan.groups == 1;

  const S* const stack = call.stack() +
                         (place.b * plan.groups + place.group) * 2 * kPoolRows * plan.padded +
                         tiles.channel + tiles.piece() * 8;
#pragma unroll
  for (int i = 0; i < 2 * kPoolRows / Tiles::kTokensAtOnce; ++i) {
    copy_async(shared_address(s.stack) + tile_offset<kSlab>(tiles.token(i), tiles.piece()),
               stack + tiles.token(i) * plan.padded, true);
  }
  copy_async_commit();
  for (int i = 0; i < plan.stages - 1; ++i) tiles.fetch(i);
  copy_constants(call, place.b, place.group, s);
  if (threadIdx.x < kPoolRows) s.grad_sum[threadIdx.x] = s.weight_sum[threadIdx.x] = 0.0F;
  for (int i = static_cast<int>(threadIdx.x); i < 2 * kWeightBytes / 4; i += blockDim.x) {
    reinterpret_cast<uint32_t*>(s.weights)[i] = 0;
  }
  __syncthreads();

  float grad_sums[kSlab / 8][4] = {}, weight_sums[kSlab / 8][4] = {};
  const int count = (place.last - place.first + kPoolTokens - 1) / kPoolTokens;
  for (int i = 0; i < count; ++i) {
    tiles.lane = forget(lane);
    tiles.fetch(i + plan.stages - 1);
    const uint32_t counts = tiles.wait();
    char* const tile = tiles.stage(i);
    const float inverse = plan.normalised ? tiles.normalise(tile, counts, s.moments) : 1.0F;
    partial_scores<S>(s.stack, tile, forget(lane), s.partial + warp * 2 * kScoreFloats);
    __syncthreads();
    for (int row = 4 * warp; row < rows; row += 4 * plan.warps) {
      score_grads<S>(s, row, forget(lane), plan.warps, p, counts);
    }
    __syncthreads();
    sum_tokens<S>(s.weights, tile, forget(lane), grad_sums);
    if (plan.weighted) {
      sum_tokens<S>(s.weights + kWeightBytes, tile, forget(lane), weight_sums);
    }
    __syncwarp();
    if (tokens_too) {
      token_grads<S>(call, s, tiles, place.first + i * kPoolTokens, tile, counts, inverse, rows,
                     whole_grads);
    }
    __syncwarp();  // the tile may be overwritten
  }

  copy_async_wait<0>();
  __syncthreads();
  store_split(call, place, 0, rows, tiles.channel, lane, grad_sums);
  if (plan.weighted) store_split(call, place, 1, rows, tiles.channel, lane, weight_sums);
  if (static_cast<int>(threadIdx.x) >= rows) return;
  *call.stats(place.b, place.split, first_row + threadIdx.x) = {s.grad_sum[threadIdx.x],
                                                                s.weight_sum[threadIdx.x]};
}

// dx where there are more rows than a group has: all groups for one tile after the other.
template <typename S>
__global__ void __launch_bounds__(32 * kPoolBackwardWarps)
    token_grads_kernel(const __grid_constant__ PoolCall<S> call, bool whole, bool whole_grads) {
  constexpr int kSlab = kPoolBackwardSlab;
  using Tiles = TokenTiles<S, kSlab>;
  extern __shared__ __align__(256) char memory[];
  const PoolPlan& plan = call.plan;
  const PoolPlace place(plan, call.p().tokens, 1);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  Tiles tiles{call, place, memory + warp * Tiles::kTileBytes, warp * kSlab, lane, warp, whole};
  const BackwardShared s(memory + plan.stages * plan.warps * Tiles::kTileBytes, plan.warps, warp);
  const int groups = static_cast<int>(plan.groups);
  if (threadIdx.x < kPoolRows) s.grad_sum[threadIdx.x] = s.weight_sum[threadIdx.x] = 0.0F;
  for (int i = 0; i < plan.stages - 1; ++i) tiles.fetch(i);

  const int count = (place.last - place.first + kPoolTokens - 1) / kPoolTokens;
  for (int i = 0; i < count; ++i) {
    tiles.fetch(i + plan.stages - 1);
    const uint32_t counts = tiles.wait();
    char* const tile = tiles.stage(i);
    const float inverse = plan.normalised ? tiles.normalise(tile, counts, s.moments) : 1.0F;
    float d[kSlab / 16][2][4] = {};
    TokenSums sums(counts, inverse, lane);
    for (int group = 0; group < groups; ++group) {
      // Of this warp's channels: no other warp has to wait for them. Plain copies, because the
      // asynchronous ones under way are the next tiles.
      const S* from =
          call.stack() +
          (static_cast<int64_t>(place.b) * groups + group) * 2 * kPoolRows * plan.padded +
          tiles.token(0) * plan.padded + tiles.channel + tiles.piece() * 8;
#pragma unroll 4
      for (int r = 0; r < 2 * kPoolRows / Tiles::kTokensAtOnce; ++r) {
        store_piece(s.stack + tile_offset<kSlab>(tiles.token(r), tiles.piece()), load_piece(from));
        from += Tiles::kTokensAtOnce * plan.padded;
      }
      copy_constants(call, place.b, group, s);
      __syncwarp();
      partial_scores<S>(s.stack, tile, forget(lane), s.partial + warp * 2 * kScoreFloats);
      __syncthreads();
      for (int row = 4 * warp; row < kPoolRows; row += 4 * plan.warps) {
        score_grads<S>(s, row, forget(lane), plan.warps, call.p(), counts);
      }
      __syncthreads();
      uint32_t weight[2][4];
      load_token_weights(s, forget(lane), weight);
      if (plan.normalised) sums.add(s, kPoolRows, lane);
      const uint32_t stack = lane_address<kSlab>(s.stack, rows_first(forget(lane)));
#pragma unroll
      for (int j = 0; j < kSlab / 16; ++j) add_rows<S>(stack, j, weight, d[j]);
      __syncwarp();  // the stacked rows may be overwritten
    }
#pragma unroll
    for (int j = 0; j < kSlab / 16; ++j) {
      place_token_grads<S>(tile, j, lane, plan.normalised, sums, d[j]);
    }
    __syncwarp();
    store_token_grads(call, tiles, place.first + i * kPoolTokens, tile, whole_grads);
    __syncwarp();  // the tile may be overwritten
  }
}

}  // namespace
}  // namespace x_rope_cls::cuda
