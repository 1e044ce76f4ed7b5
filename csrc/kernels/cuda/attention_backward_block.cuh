// A block of attention backward on tensor cores: what it does, step by step.
#pragma once

#include <cstdint>

#include "attention_backward.cuh"
#include "attention_backward_choices.h"

namespace x_rope_cls::cuda {

enum class MmaSum { kQueries, kKeysValues, kKeys, kValues };

__device__ __forceinline__ void copy_async_8(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? 8 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}

template <typename T_, int kDim_, MmaSum kSum_, bool kGeneral_>
struct BackwardKernel {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr bool kGeneral = kGeneral_;  // biases and dropout
  static constexpr bool kOwnsQueries = kSum_ == MmaSum::kQueries;
  static constexpr bool kFirst = kSum_ != MmaSum::kValues;  // dQ or dK
  static constexpr bool kSecond = kSum_ == MmaSum::kValues || kSum_ == MmaSum::kKeysValues;  // dV
  static constexpr BackwardShape kShape = backward_shape(kDim);
  static constexpr int kThreads = kShape.warps * kWarpSize;
  static constexpr int kRowTiles = kShape.row_tiles;
  static constexpr int kPartners = kShape.partners;

  // Of each row tile, owners lane / 4 and lane / 4 + 8, channels 2 * (lane % 4) + {0, 1} of every
  // eight; [0] of an absent sum keeps the compiler from reserving registers.
  struct Sums {
    float first[kFirst ? kRowTiles : 1][kFirst ? kDim / 8 : 1][4];
    float second[kSecond ? kRowTiles : 1][kSecond ? kDim / 8 : 1][4];
  };

  const MmaBackwardArgs& args;
  uint32_t own_first, own_second, stages;  // shared memory: K and V, or Q and dO; partners
  int32_t b, h;
  int32_t first, count;  // owners: place of the first
  int lane, warp_row;

  // A thread's owners.
  struct Owners {
    float shift[kRowTiles][2], delta[kRowTiles][2];  // where they are queries
  };

  __device__ __forceinline__ const int32_t* tokens_of(bool queries, int64_t batch) const {
    const TokenOrder& order = queries ? args.common.queries : args.common.keys;
    return order.list(batch);
  }
  // `queries`: rows of a query head in the queries' order; else of the key head in the keys'.
  template <int kRows>
  __device__ __forceinline__ void load(const TileRows& from, bool queries, uint32_t to, int32_t at,
                                       int32_t rows) const;
  __device__ __forceinline__ void load_owners(bool raw, bool again) const;
  __device__ __forceinline__ const float2* stats() const {
    const int64_t batch = afresh(b);
    return static_cast<const float2*>(args.common.stats) +
           (batch * args.common.heads + h) * args.common.query_count;
  }
  template <int kTile>
  __device__ __forceinline__ void load_partners(bool raw, uint32_t stage, int32_t at,
                                                int32_t rows) const;

  // s = owners * partners over the channels. The second row tile and the second eight partners of
  // a narrow tile may not be there.
  template <int kColumns>
  __device__ __forceinline__ void multiply(uint32_t owners, uint32_t partners,
                                           int32_t partner_count,
                                           float (&s)[kRowTiles][kColumns][4]) const;

  // sums += s * partners, s rounded to T.
  template <int kColumns>
  __device__ __forceinline__ void add_products(const float (&s)[kRowTiles][kColumns][4],
                                               uint32_t partners,
                                               float (&sums)[kRowTiles][kDim / 8][4]) const;

  __device__ __forceinline__ int32_t partner_token(int32_t place) const {
    const int32_t* const tokens = tokens_of(!kOwnsQueries, b);
    return tokens == nullptr ? place : tokens[place];
  }

  // -1: there is none. Looked up each time; kept, it would cost the main loop a spill.
  __device__ __forceinline__ int32_t owner_token(int m, int half) const {
    const int32_t* const tokens = tokens_of(kOwnsQueries, afresh(b));
    const int32_t row = row_of_half(m, half);
    if (row >= count) return -1;
    return tokens == nullptr ? first + row : tokens[first + row];
  }

  // Scores in log2 with the bias.
  template <int kColumns>
  __device__ __forceinline__ void add_biases(int32_t at, int32_t rows,
                                             float (&s)[kRowTiles][kColumns][4]) const;

  // Weights that dropout drops get a minus sign, which 0 can have too. The loop that draws is not
  // unrolled; its code is long enough once.
  template <int kColumns>
  __device__ __forceinline__ void drop(int32_t at, int32_t rows,
                                       float (&s)[kRowTiles][kColumns][4]) const;

  // Logsumexp and delta of partner 8 n + 2 * (lane % 4) and the next.
  __device__ __forceinline__ void load_stats(uint32_t stage, int n, float (&shifts)[2],
                                             float (&deltas)[2]) const;

  // Scores become weights.
  template <int kColumns>
  __device__ __forceinline__ void soften(const Owners& owners, uint32_t stage, int32_t at,
                                         int32_t rows, float (&s)[kRowTiles][kColumns][4]) const;

  // `grads` (dP) become the gradients of the scores, and dropped weights 0.
  template <int kColumns>
  __device__ __forceinline__ void differentiate(const Owners& owners, uint32_t stage,
                                                float (&s)[kRowTiles][kColumns][4],
                                                float (&grads)[kRowTiles][kColumns][4]) const;

  // Dropped weights become 0.
  template <int kColumns>
  __device__ __forceinline__ void keep(float (&s)[kRowTiles][kColumns][4]) const;

  template <int kTile>
  __device__ __forceinline__ void meet(const Owners& owners, uint32_t stage, int32_t at,
                                       int32_t rows, Sums& sums) const;

  // The owners' pass over partners at places [at, last) of one head. Copies of the owners may be
  // under way, uncommitted.
  template <int kTile>
  __device__ __forceinline__ void pass(const Owners& owners, bool raw, int32_t at, int32_t last,
                                       Sums& sums) const;

  __device__ __forceinline__ int32_t row_of_half(int m, int half) const {
    return warp_row + 16 * m + 8 * half + lane / 4;
  }
  __device__ __forceinline__ void look_up(Owners& owners) const;

  template <int kM, int kN>
  static __device__ __forceinline__ void clear(float (&sums)[kM][kN][4]) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
      }
    }
  }
  // To rows of `width` from place `first` on.
  __device__ __forceinline__ void store(void* to, int32_t width,
                                        float (&sums)[kRowTiles][kDim / 8][4]) const;

  // Owners without a position meet all partners unrotated; the others first the rotated ones, then,
  // unrotated themselves, those without. dV is the same in both frames.
  // Over the query heads that share the owners' key head, or the owners' own head.
  template <int kTile>
  __device__ __forceinline__ void pass_heads(const Owners& owners, bool raw, int32_t at,
                                             int32_t last, Sums& sums);

  __device__ __forceinline__ void run(bool special, Sums& sums);
};

}  // namespace x_rope_cls::cuda
