// Pooling forward on tensor cores: 16 tokens a step, each read once.
//
// Scores of a warp's channels with all tokens are an mma chain whose left operand, the queries,
// stays in registers; the warps' partial scores are added up through shared memory, four rows a
// warp, where the online softmax is; the weights come back through shared memory as the left
// operand of the second product, into sums that stay in registers too. Two barriers a tile.
#pragma once

#include "pooling_tile.cuh"

namespace x_rope_cls::cuda {
namespace {

struct ForwardShared {
  float* partial;  // (warps, 2, 16, 8)
  float2* moments;
  char* weights;                           // (2, 16, 8)
  float *offset, *maximum, *sum, *factor;  // (16) each

  __device__ ForwardShared(char* memory, int64_t warps) {
    partial = reinterpret_cast<float*>(memory);
    moments = reinterpret_cast<float2*>(partial + warps * kPoolRows * kPoolTokens);
    weights = reinterpret_cast<char*>(moments + warps * kPoolTokens);
    offset = reinterpret_cast<float*>(weights + kPoolRows * kPoolTokens * 2);
    maximum = offset + kPoolRows;
    sum = maximum + kPoolRows;
    factor = sum + kPoolRows;
  }
};

// Adds up four rows of scores and makes weights of them, relative to the largest score so far.
template <typename S>
__device__ void soften_rows(const ForwardShared& s, int first_row, int lane, int warps, float scale,
                            uint32_t counts) {
  const int row = first_row + lane / 8, token = lane % 8;
  float score[2] = {0.0F, 0.0F};
  const float* from = s.partial + score_index(row, token);
#pragma unroll 4
  for (int w = 0; w < warps; ++w, from += kPoolRows * kPoolTokens) {
    score[0] += from[0];
    score[1] += from[kPoolRows * 8];
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool is_there = (counts >> (token + 8 * i) & 1) != 0;
    score[i] = is_there ? score[i] * scale + s.offset[row] : -INFINITY;
  }
  const float before = s.maximum[row];
  float largest = fmaxf(before, fmaxf(score[0], score[1]));
#pragma unroll
  for (int by = 4; by > 0; by /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, by));
  }
  const float shift = largest == -INFINITY ? 0.0F : largest;
  float sum = 0.0F;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float weight = exp2f(score[i] - shift);
    *reinterpret_cast<S*>(s.weights + weight_offset(row, token + 8 * i)) = from_compute<S>(weight);
    sum += weight;
  }
  sum = row_sum(sum);
  __syncwarp();
  if (token != 0) return;
  const float factor = exp2f(before - shift);
  s.factor[row] = factor;
  s.maximum[row] = largest;
  s.sum[row] = s.sum[row] * factor + sum;
}

// The whole result of a row where its tokens are not split. `tile`: this warp's memory for it.
template <typename S>
__device__ void store_pooled(const PoolCall<S>& call, const PoolPlace& place,
                             const ForwardShared& s, const float (&out)[kPoolForwardSlab / 8][4],
                             int64_t channel, int lane, char* tile) {
  constexpr int kSlab = kPoolForwardSlab;
  const int64_t channels = call.p().channels;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    const float sum = s.sum[row], inverse = 1.0F / sum;
#pragma unroll
    for (int j = 0; j < kSlab / 8; ++j) {
      float value[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t c = channel + j * 8 + lane % 4 * 2 + e;
        const bool there = c < channels && sum != 0.0F;
        value[e] = there ? out[j][2 * half + e] * inverse * call.weight(c) + call.bias(c) : 0.0F;
      }
      *reinterpret_cast<uint32_t*>(tile + tile_offset<kSlab>(row, j) + lane % 4 * 4) =
          pack_pair<S>(value[0], value[1]);
    }
  }
  __syncwarp();
  const bool whole = channels % 8 == 0 && reinterpret_cast<uintptr_t>(call.p().pooled) % 16 == 0;
  const int64_t c = channel + lane % 16 * 8;
#pragma unroll 1
  for (int i = 0; i < kPoolRows / 2; ++i) {
    const int64_t row = place.group * kPoolRows + i * 2 + lane / 16;
    if (row >= call.plan.rows || c >= channels) continue;
    const char* const from = tile + tile_offset<kSlab>(i * 2 + lane / 16, lane % 16);
    S* const to =
        static_cast<S*>(call.p().pooled) + (place.b * call.plan.rows + row) * channels + c;
    if (whole) {
      store_piece(to, load_piece(from));
    } else {
      store_elements(to, 1, from, channels - c);
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(32 * kPoolForwardWarps)
    forward_tiles_kernel(const __grid_constant__ PoolCall<S> call, bool whole) {
  constexpr int kSlab = kPoolForwardSlab;
  using Tiles = TokenTiles<S, kSlab>;
  extern __shared__ __align__(256) char memory[];
  const PoolPlan& plan = call.plan;
  const PoolParams& p = call.p();
  const PoolPlace place(plan, p.tokens, plan.groups);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  Tiles tiles{call, place, memory + warp * Tiles::kTileBytes, warp * kSlab, lane, warp, whole};
  const ForwardShared s(memory + plan.stages * plan.warps * Tiles::kTileBytes, plan.warps);
  const int64_t left = plan.rows - place.group * kPoolRows;
  const int rows = static_cast<int>(left < kPoolRows ? left : kPoolRows);
  const int64_t query_b = p.query_batch == 1 ? 0 : place.b;

  // Queries, through the last stage, which is free until the loop begins.
  char* const last_stage = tiles.stage(plan.stages - 1);
  const S* const queries = call.stack() +
                           (query_b * plan.groups + place.group) * kPoolRows * plan.padded +
                           tiles.channel + tiles.piece() * 8;
#pragma unroll
  for (int i = 0; i < kPoolRows / Tiles::kTokensAtOnce; ++i) {
    copy_async(shared_address(last_stage) + tile_offset<kSlab>(tiles.token(i), tiles.piece()),
               queries + tiles.token(i) * plan.padded, true);
  }
  copy_async_commit();
  for (int i = 0; i < plan.stages - 1; ++i) tiles.fetch(i);
  if (threadIdx.x < kPoolRows) {
    const int64_t row = query_b * plan.rows + place.group * kPoolRows + threadIdx.x;
    s.offset[threadIdx.x] = static_cast<int>(threadIdx.x) < rows
                                ? call.constants()[row * kPoolConstants + kScoreOffset]
                                : 0.0F;
    s.maximum[threadIdx.x] = -INFINITY;
    s.sum[threadIdx.x] = 0.0F;
    s.factor[threadIdx.x] = 1.0F;
  }
  for (int i = static_cast<int>(threadIdx.x); i < kPoolRows * kPoolTokens / 2; i += blockDim.x) {
    reinterpret_cast<uint32_t*>(s.weights)[i] = 0;
  }
  tiles.wait();
  const MatrixLane left_lane = rows_first(lane), right_lane = pieces_first(lane);
  uint32_t query[kSlab / 16][4];
#pragma unroll
  for (int k = 0; k < kSlab / 16; ++k) {
    load_matrices(query[k], lane_address<kSlab>(last_stage, left_lane) ^ 32 * k);
  }
  __syncthreads();

  float out[kSlab / 8][4] = {};
  const auto scale = static_cast<float>(p.scale * kLog2E);
  const int count = (place.last - place.first + kPoolTokens - 1) / kPoolTokens;
  for (int i = 0; i < count; ++i) {
    tiles.fetch(i + plan.stages - 1);
    const uint32_t counts = tiles.wait();
    char* const tile = tiles.stage(i);
    if (plan.normalised) tiles.normalise(tile, counts, s.moments);
    float score[2][4] = {};
    const uint32_t right = lane_address<kSlab>(tile, right_lane);
#pragma unroll
    for (int k = 0; k < kSlab / 16; ++k) {
      uint32_t x[4];
      load_matrices(x, right ^ 32 * k);
      multiply_add<S>(score[0], query[k], x[0], x[1]);
      multiply_add<S>(score[1], query[k], x[2], x[3]);
    }
    float* const own = s.partial + warp * kPoolRows * kPoolTokens;
    store_scores(score[0], lane, 0, own);
    store_scores(score[1], lane, 1, own);
    __syncthreads();
    for (int row = 4 * warp; row < rows; row += 4 * plan.warps) {
      soften_rows<S>(s, row, lane, plan.warps, scale, counts);
    }
    __syncthreads();
    const float factor[2] = {s.factor[lane / 4], s.factor[lane / 4 + 8]};
    if (__any_sync(kAllLanes, factor[0] != 1.0F || factor[1] != 1.0F)) {
#pragma unroll
      for (auto& part : out) {
#pragma unroll
        for (int e = 0; e < 4; ++e) part[e] *= factor[e / 2];
      }
    }
    uint32_t weight[4];
    load_matrices(weight,
                  shared_address(s.weights) + weight_offset(left_lane.row, 8 * left_lane.piece));
    const uint32_t transposed = lane_address<kSlab>(tile, left_lane);
#pragma unroll
    for (int j = 0; j < kSlab / 16; ++j) {
      uint32_t x[4];
      load_matrices_transposed(x, transposed ^ 32 * j);
      multiply_add<S>(out[2 * j], weight, x[0], x[1]);
      multiply_add<S>(out[2 * j + 1], weight, x[2], x[3]);
    }
    __syncwarp();  // the tile may be overwritten
  }

  copy_async_wait<0>();
  __syncthreads();
  if (plan.splits == 1) {
    store_pooled(call, place, s, out, tiles.channel, lane, tiles.stage(0));
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      if (row >= rows) continue;
      float* const to = call.sums(place.b, place.split, place.group * kPoolRows + row, 0);
#pragma unroll
      for (int j = 0; j < kSlab / 8; ++j) {
        store_sums(out[j][2 * half], out[j][2 * half + 1], tiles.channel + j * 8 + lane % 4 * 2,
                   p.channels, to);
      }
    }
  }
  if (static_cast<int>(threadIdx.x) >= rows) return;
  const int64_t row = place.group * kPoolRows + threadIdx.x;
  const float largest = s.maximum[threadIdx.x], sum = s.sum[threadIdx.x];
  if (plan.splits > 1) {
    *call.stats(place.b, place.split, row) = {largest, sum};
  } else {
    static_cast<float*>(p.lse)[place.b * plan.rows + row] = log_sum(largest, sum);
  }
}

}  // namespace
}  // namespace x_rope_cls::cuda
