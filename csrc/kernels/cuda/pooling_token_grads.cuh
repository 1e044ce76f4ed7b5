// The gradient of a tile of tokens in pooling backward: weights, their tokens as rows, times the
// stacked rows, then through the normalisation and to memory.
#pragma once

#include "pooling_backward_shared.cuh"

namespace x_rope_cls::cuda {
namespace {

// What dx of the two tokens of a lane needs beside products: the inverse spread, and sums over rows
// that its mean and its part along the token come to.
struct TokenSums {
  float by[2], level[2], along[2];
  bool is_there[2];

  // inverse: of token lane % 16.
  __device__ TokenSums(uint32_t counts, float inverse, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = lane / 4 + 8 * half;
      is_there[half] = (counts >> token & 1) != 0;
      by[half] = __shfl_sync(kAllLanes, inverse, token);
      level[half] = along[half] = 0.0F;
    }
  }
  __device__ void add(const BackwardShared& s, int rows, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      for (int row = 0; row < rows; row += 4) {
        const float2 sums = s.token_sums[row / 4 * kPoolTokens + lane / 4 + 8 * half];
        level[half] += sums.x;
        along[half] += sums.y;
      }
    }
  }
};

// Weights with their tokens as rows: a left operand of dx.
__device__ __forceinline__ void load_token_weights(const BackwardShared& s, int lane,
                                                   uint32_t (&weight)[2][4]) {
  const MatrixLane at = pieces_first(lane);
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
    load_matrices_transposed(weight[kind], shared_address(s.weights) + kind * kWeightBytes +
                                               weight_offset(at.row, 8 * at.piece));
  }
}

// d (16 tokens, two times 8 channels) += weights times stacked rows.
template <typename S>
__device__ __forceinline__ void add_rows(uint32_t stack, int j, const uint32_t (&weight)[2][4],
                                         float (&d)[2][4]) {
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
    uint32_t stacked[4];
    load_matrices_transposed(stacked, (stack ^ 32 * j) + kind * kStackBytes);
    multiply_add<S>(d[0], weight[kind], stacked[0], stacked[1]);
    multiply_add<S>(d[1], weight[kind], stacked[2], stacked[3]);
  }
}

// Two pieces of dx to the tile, whose place they take.
template <typename S>
__device__ __forceinline__ void place_token_grads(char* tile, int j, int lane, bool normalised,
                                                  const TokenSums& sums, const float (&d)[2][4]) {
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float a = d[part][2 * half], b = d[part][2 * half + 1];
      auto* const at = reinterpret_cast<uint32_t*>(
          tile + tile_offset<kPoolBackwardSlab>(lane / 4 + 8 * half, 2 * j + part) + lane % 4 * 4);
      if (normalised) {
        const float2 x = unpack_pair<S>(*at);
        a = (a - sums.level[half] - x.x * sums.along[half]) * sums.by[half];
        b = (b - sums.level[half] - x.y * sums.along[half]) * sums.by[half];
      }
      *at = sums.is_there[half] ? pack_pair<S>(a, b) : 0U;
    }
  }
}

// A tile of dx to memory. start: its first token.
template <typename S, typename Tiles>
__device__ void store_token_grads(const PoolCall<S>& call, const Tiles& tiles, int start,
                                  const char* tile, bool whole) {
  const Tensor3& dx = call.g.dx;
  const int64_t channels = call.p().channels, c = tiles.channel + tiles.piece() * 8;
#pragma unroll
  for (int i = 0; i < kPoolTokens / Tiles::kTokensAtOnce; ++i) {
    const int n = start + tiles.token(i);
    if (n >= tiles.place.last || c >= channels) continue;
    const char* const from = tile + tile_offset<kPoolBackwardSlab>(tiles.token(i), tiles.piece());
    S* const to =
        static_cast<S*>(dx.data) + tiles.place.b * dx.stride_b + n * dx.stride_n + c * dx.stride_c;
    if (whole) {
      store_piece(to, load_piece(from));
    } else {
      store_elements(to, dx.stride_c, from, channels - c);
    }
  }
}

// dx of the tile's tokens: takes the place of the tile, then goes to memory.
template <typename S, typename Tiles>
__device__ void token_grads(const PoolCall<S>& call, const BackwardShared& s, const Tiles& tiles,
                            int start, char* tile, uint32_t counts, float inverse, int rows,
                            bool whole) {
  const int lane = forget(tiles.lane);
  uint32_t weight[2][4];
  load_token_weights(s, lane, weight);
  TokenSums sums(counts, inverse, lane);
  if (call.plan.normalised) sums.add(s, rows, lane);
  const uint32_t stack = lane_address<kPoolBackwardSlab>(s.stack, rows_first(lane));
#pragma unroll 1
  for (int j = 0; j < kPoolBackwardSlab / 16; ++j) {
    float d[2][4] = {};
    add_rows<S>(stack, j, weight, d);
    place_token_grads<S>(tile, j, lane, call.plan.normalised, sums, d);
  }
  __syncwarp();
  store_token_grads(call, tiles, start, tile, whole);
}

}  // namespace
}  // namespace x_rope_cls::cuda
