// Weights and gradients of scores in the kernels on the FMA units.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention_backward.cuh"
#include "plain_tiles.cuh"

namespace x_rope_cls::cuda {

template <typename T>
__device__ __forceinline__ PlainRowsAt<T> rows_at(const PlainRows& x, int64_t b, int64_t h,
                                                  const TokenOrder& order, int32_t first,
                                                  int32_t count) {
  const Tensor4& r = x.rows;
  return {static_cast<const T*>(r.data) + b * r.stride_b + h * r.stride_h,
          r.stride_n,
          r.stride_d,
          x.gathered ? order.list(b) : nullptr,
          first,
          count,
          x.channels,
          x.whole};
}

// 64 owners by 64 partners as queries and keys, by place.
struct PairTile {
  int64_t b, h;
  int32_t q_first, q_count, k_first, k_count;

  template <bool kOwnsQueries>
  __device__ __forceinline__ int32_t row(int i, int j) const {
    return kOwnsQueries ? 4 * (static_cast<int>(threadIdx.x) / 16) + i
                        : 4 * (static_cast<int>(threadIdx.x) % 16) + j;
  }
  template <bool kOwnsQueries>
  __device__ __forceinline__ int32_t column(int i, int j) const {
    return row<!kOwnsQueries>(i, j);
  }
};

// What the bias adds to a pair's score.
template <typename C>
__device__ __forceinline__ C plain_bias(const BackwardCommon& p, int64_t b, int64_t h, int64_t n,
                                        int64_t m) {
  const double bias =
      load_any(p.bias.data, p.bias.dtype, p.bias.row(b, h, n) + m * p.bias.stride_m);
  if (p.bias.dtype != DType::kBool) return static_cast<C>(bias);
  return bias == 0 ? -static_cast<C>(INFINITY) : C{0};
}

// Scores become weights exp(scale * score + bias - lse), times dropout's factors (kValues), or the
// gradients of the scores: weight * (factor * grad - delta). 0 outside the tile. Biases and kept
// pairs come in loops that are not unrolled, whose code is long enough once: the former on the way
// through this thread's own part of shared.weights, the latter as bits.
template <typename T, bool kOwnsQueries, bool kValues>
__device__ __forceinline__ void weigh(const BackwardCommon& p, const PairTile& tile, uint64_t seed,
                                      typename PlainTileOf<T>::Shared& shared,
                                      Compute<T> (&scores)[4][4], const Compute<T> (&grads)[4][4]) {
  using C = Compute<T>;
  using Tile = PlainTileOf<T>;
  const int y = static_cast<int>(threadIdx.x) / 16;
  const int x = static_cast<int>(threadIdx.x) % 16;
  const auto there = [&](int i, int j) {
    return tile.row<kOwnsQueries>(i, j) < tile.q_count &&
           tile.column<kOwnsQueries>(i, j) < tile.k_count;
  };
  const bool biased = p.bias.data != nullptr;
  const bool drops = p.dropout.seed != nullptr;
  uint32_t kept = 0xffffU;
  if (biased || drops) {
    kept = 0;
#pragma unroll 1
    for (int e = 0; e < 16; ++e) {
      const int i = e % 4;
      const int j = e / 4;
      if (!there(i, j)) continue;
      const int64_t n = p.queries.token(tile.b, tile.q_first + tile.row<kOwnsQueries>(i, j));
      const int64_t m = p.keys.token(tile.b, tile.k_first + tile.column<kOwnsQueries>(i, j));
      if (biased) {
        shared.weights[Tile::weight_at(4 * x + j, 4 * y) + i] =
            plain_bias<C>(p, tile.b, tile.h, n, m);
      }
      const bool keeps =
          !drops || dropout_factor({seed, p.dropout.threshold, 1.0f}, tile.b * p.heads + tile.h,
                                   static_cast<int32_t>(n), static_cast<int32_t>(m)) != 0.0f;
      kept |= static_cast<uint32_t>(keeps) << e;
    }
  }
  const C* const stats =
      static_cast<const C*>(p.stats) + 2 * (tile.b * p.heads + tile.h) * p.query_count;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      C result = 0;
      if (there(i, j)) {
        const int64_t at = 2 * static_cast<int64_t>(tile.q_first + tile.row<kOwnsQueries>(i, j));
        C score = scores[i][j] * static_cast<C>(p.scale);
        if (biased) {
          const C bias = shared.weights[Tile::weight_at(4 * x + j, 4 * y) + i];
          score = bias == -static_cast<C>(INFINITY) ? bias : score + bias;
        }
        const C weight = exp(score - stats[at]);
        const C factor = (kept >> (4 * j + i) & 1) == 0 ? C{0} : static_cast<C>(p.kept);
        result = kValues ? weight * factor : weight * (grads[i][j] * factor - stats[at + 1]);
      }
      scores[i][j] = result;
    }
  }
}

}  // namespace x_rope_cls::cuda
