// Attention backward in half precision on tensor cores. One kernel in two roles: owners are the
// tokens whose sums a block has, partners those that it passes over.
//   owners keys:     S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q
//   owners queries:  S = Q K^T, dP = dO V^T, dQ += dS K
// In both the scores' layout in registers is the left operand's of the products that follow, so
// nothing but inputs goes through shared memory, and no sum is shared between blocks.
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

  // x anew: keeps the compiler from carrying what it derives from x through the main loops, whose
  // registers are full.
  static __device__ __forceinline__ int32_t afresh(int32_t x) {
    asm volatile("" : "+r"(x));
    return x;
  }

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
                                       int32_t rows) const {
    const int32_t batch = afresh(b);
    const T* const data = static_cast<const T*>(from.data) + batch * from.stride_b +
                          (queries ? h : h / args.group) * from.stride_h;
    const int32_t* const tokens = from.gathered ? tokens_of(queries, batch) : nullptr;
    load_tile<T, kDim, kRows, kThreads, 1>(to, data, from.stride_n, tokens, at, rows, from.pieces);
  }
  __device__ __forceinline__ void load_owners(bool raw, bool again) const {
    const TileRows& from = kOwnsQueries ? (raw ? args.q_raw : args.q) : (raw ? args.k_raw : args.k);
    load<kShape.owners>(from, kOwnsQueries, own_first, first, count);
    if (again || !kFirst) return;
    load<kShape.owners>(kOwnsQueries ? args.grad_out : args.v, kOwnsQueries, own_second, first,
                        count);
  }
  __device__ __forceinline__ const float2* stats() const {
    const int64_t batch = afresh(b);
    return static_cast<const float2*>(args.common.stats) +
           (batch * args.common.heads + h) * args.common.query_count;
  }
  template <int kTile>
  __device__ __forceinline__ void load_partners(bool raw, uint32_t stage, int32_t at,
                                                int32_t rows) const {
    const TileRows& from = kOwnsQueries ? (raw ? args.k_raw : args.k) : (raw ? args.q_raw : args.q);
    load<kTile>(from, !kOwnsQueries, stage, at, rows);
    load<kTile>(kOwnsQueries ? args.v : args.grad_out, !kOwnsQueries, stage + kPartners * kDim * 2,
                at, rows);
    if (!kOwnsQueries && threadIdx.x < kTile) {
      const auto row = static_cast<int32_t>(threadIdx.x);
      copy_async_8(stage + 2 * kPartners * kDim * 2 + row * 8,
                   stats() + at + (row < rows ? row : 0), row < rows);
    }
    copy_async_commit();
  }

  // s = owners * partners over the channels. The second row tile and the second eight partners of
  // a narrow tile may not be there.
  template <int kColumns>
  __device__ __forceinline__ void multiply(uint32_t owners, uint32_t partners,
                                           int32_t partner_count,
                                           float (&s)[kRowTiles][kColumns][4]) const {
    const bool both = warp_row + 16 < count;
    const bool right = kColumns > 2 || partner_count > 8;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;
      }
    }
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        load_matrices(a[m], left_address<kDim>(owners, warp_row + 16 * m, step));
      }
#pragma unroll
      for (int n = 0; n < kColumns / 2; ++n) {
        uint32_t x[4];
        load_matrices(x, right_address<kDim>(partners, 16 * n, step));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          if (m > 0 && !both) continue;
          multiply_add<T>(s[m][2 * n], a[m], x[0], x[1]);
          if (right) multiply_add<T>(s[m][2 * n + 1], a[m], x[2], x[3]);
        }
      }
    }
  }

  // sums += s * partners, s rounded to T.
  template <int kColumns>
  __device__ __forceinline__ void add_products(const float (&s)[kRowTiles][kColumns][4],
                                               uint32_t partners,
                                               float (&sums)[kRowTiles][kDim / 8][4]) const {
    const bool both = warp_row + 16 < count;
#pragma unroll
    for (int step = 0; step < kColumns / 2; ++step) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const float (&left)[4] = s[m][2 * step];
        const float (&right)[4] = s[m][2 * step + 1];
        a[m][0] = pack_pair<T>(left[0], left[1]);
        a[m][1] = pack_pair<T>(left[2], left[3]);
        a[m][2] = pack_pair<T>(right[0], right[1]);
        a[m][3] = pack_pair<T>(right[2], right[3]);
      }
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        uint32_t x[4];
        load_matrices_transposed(x, left_address<kDim>(partners, 16 * step, n));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          if (m > 0 && !both) continue;
          multiply_add<T>(sums[m][2 * n], a[m], x[0], x[1]);
          multiply_add<T>(sums[m][2 * n + 1], a[m], x[2], x[3]);
        }
      }
    }
  }

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
                                             float (&s)[kRowTiles][kColumns][4]) const {
    const ScoreBias& bias = args.common.bias;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] *= args.scale_log2;
      }
    }
    if (bias.data == nullptr) return;
    with_bias(bias, [&](const auto* data) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int32_t owner = owner_token(m, half);
          if (owner < 0) continue;
#pragma unroll
          for (int n = 0; n < kColumns; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const int column = 8 * n + 2 * (lane % 4) + c;
              if (column >= rows) continue;
              const int32_t partner = partner_token(at + column);
              const int32_t query = kOwnsQueries ? owner : partner;
              const int32_t key = kOwnsQueries ? partner : owner;
              add_bias(s[m][n][2 * half + c], data[bias.row(b, h, query) + key * bias.stride_m]);
            }
          }
        }
      }
    });
  }

  // Weights that dropout drops get a minus sign, which 0 can have too. The loop that draws is not
  // unrolled; its code is long enough once.
  template <int kColumns>
  __device__ __forceinline__ void drop(int32_t at, int32_t rows,
                                       float (&s)[kRowTiles][kColumns][4]) const {
    // Read each time: registers are short.
    const auto seed = static_cast<uint64_t>(*args.common.dropout.seed);
    const Dropout dropout{seed, args.common.dropout.threshold, 1.0f};
    const int64_t head = static_cast<int64_t>(b) * args.common.heads + h;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t owner = owner_token(m, half);
        if (owner < 0) continue;
        uint32_t dropped = 0;
#pragma unroll 1
        for (int i = 0; i < 2 * kColumns; ++i) {
          const int column = 8 * (i / 2) + 2 * (lane % 4) + i % 2;
          if (column >= rows) break;
          const int32_t partner = partner_token(at + column);
          const bool drops = dropout_factor(dropout, head, kOwnsQueries ? owner : partner,
                                            kOwnsQueries ? partner : owner) == 0.0f;
          dropped |= static_cast<uint32_t>(drops) << i;
        }
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& x = s[m][n][2 * half + c];
            x = __uint_as_float(__float_as_uint(x) | (dropped >> (2 * n + c) & 1) << 31);
          }
        }
      }
    }
  }

  // Logsumexp and delta of partner 8 n + 2 * (lane % 4) and the next.
  __device__ __forceinline__ void load_stats(uint32_t stage, int n, float (&shifts)[2],
                                             float (&deltas)[2]) const {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(shifts[0]), "=f"(deltas[0]), "=f"(shifts[1]), "=f"(deltas[1])
                 : "r"(stage + 2 * kPartners * kDim * 2 + (8 * n + 2 * (lane % 4)) * 8)
                 : "memory");
  }

  // Scores become weights.
  template <int kColumns>
  __device__ __forceinline__ void soften(const Owners& owners, uint32_t stage, int32_t at,
                                         int32_t rows, float (&s)[kRowTiles][kColumns][4]) const {
    if constexpr (kGeneral) add_biases(at, rows, s);
    const float scale = kGeneral ? 1.0f : args.scale_log2;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      float shifts[2];
      float deltas[2];
      if constexpr (!kOwnsQueries) load_stats(stage, n, shifts, deltas);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float shift = kOwnsQueries ? owners.shift[m][i / 2] : shifts[i % 2];
          s[m][n][i] = power_of_two(fmaf(s[m][n][i], scale, -shift));
          // Zeros in place of absent keys have no logsumexp that bounds their weights.
          if (kOwnsQueries && 8 * n + 2 * (lane % 4) + i % 2 >= rows) s[m][n][i] = 0.0f;
        }
      }
    }
    if constexpr (kGeneral) {
      if (args.common.dropout.seed != nullptr) drop(at, rows, s);
    }
  }

  // `grads` (dP) become the gradients of the scores, and dropped weights 0.
  template <int kColumns>
  __device__ __forceinline__ void differentiate(const Owners& owners, uint32_t stage,
                                                float (&s)[kRowTiles][kColumns][4],
                                                float (&grads)[kRowTiles][kColumns][4]) const {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      float shifts[2];
      float deltas[2];
      if constexpr (!kOwnsQueries) load_stats(stage, n, shifts, deltas);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float delta = kOwnsQueries ? owners.delta[m][i / 2] : deltas[i % 2];
          float grad = grads[m][n][i];
          float& weight = s[m][n][i];
          if constexpr (kGeneral) {
            const bool keeps = !signbit(weight);
            grad = keeps ? grad * args.common.dropout.kept : 0.0f;
            grads[m][n][i] = fabsf(weight) * (grad - delta);
            weight = keeps ? weight : 0.0f;
          } else {
            grads[m][n][i] = weight * (grad - delta);
          }
        }
      }
    }
  }

  // Dropped weights become 0.
  template <int kColumns>
  __device__ __forceinline__ void keep(float (&s)[kRowTiles][kColumns][4]) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = signbit(s[m][n][i]) ? 0.0f : s[m][n][i];
      }
    }
  }

  template <int kTile>
  __device__ __forceinline__ void meet(const Owners& owners, uint32_t stage, int32_t at,
                                       int32_t rows, Sums& sums) const {
    constexpr int kColumns = kTile / 8;
    const uint32_t partners = stage;
    const uint32_t second = stage + kPartners * kDim * 2;
    float s[kRowTiles][kColumns][4];
    [[maybe_unused]] float grads[kRowTiles][kColumns][4];
    multiply(own_first, partners, rows, s);
    soften(owners, stage, at, rows, s);
    if constexpr (kFirst) {
      multiply(own_second, second, rows, grads);
      differentiate(owners, stage, s, grads);
    } else if constexpr (kGeneral) {
      keep(s);
    }
    if constexpr (kSecond) add_products(s, second, sums.second);
    if constexpr (kFirst) add_products(grads, partners, sums.first);
  }

  // The owners' pass over partners at places [at, last) of one head. Copies of the owners may be
  // under way, uncommitted.
  template <int kTile>
  __device__ __forceinline__ void pass(const Owners& owners, bool raw, int32_t at, int32_t last,
                                       Sums& sums) const {
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

  __device__ __forceinline__ int32_t row_of_half(int m, int half) const {
    return warp_row + 16 * m + 8 * half + lane / 4;
  }
  __device__ __forceinline__ void look_up(Owners& owners) const {
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
                                        float (&sums)[kRowTiles][kDim / 8][4]) const {
    const TokenOrder& order = kOwnsQueries ? args.common.queries : args.common.keys;
    const int32_t thread = afresh(static_cast<int32_t>(threadIdx.x));
    const int32_t own = thread / kWarpSize * kRowTiles * 16 + thread % kWarpSize / 4;
    const int64_t batch = afresh(b);
    const int64_t head = kOwnsQueries ? batch * args.common.heads + h
                                      : batch * args.common.key_heads + h / args.group;
    float* const rows = static_cast<float*>(to) + (head * order.length + first) * width;
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

  // Owners without a position meet all partners unrotated; the others first the rotated ones, then,
  // unrotated themselves, those without. dV is the same in both frames.
  // Over the query heads that share the owners' key head, or the owners' own head.
  template <int kTile>
  __device__ __forceinline__ void pass_heads(const Owners& owners, bool raw, int32_t at,
                                             int32_t last, Sums& sums) {
    const int32_t heads = kOwnsQueries ? 1 : args.group;
#pragma unroll 1
    for (int32_t i = 0; i < heads; ++i, ++h) pass<kTile>(owners, raw, at, last, sums);
    h -= heads;
  }

  __device__ __forceinline__ void run(bool special, Sums& sums) {
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
};

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
