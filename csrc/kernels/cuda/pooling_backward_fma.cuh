// Pooling backward of float32 and float64: one pass over the tokens, whose gradients are written on
// the way. Queries and gradients of pooled, 8 rows each, lie in shared memory, sums over tokens
// stay in registers. One barrier a tile: each warp adds up all warps' partial scores.
//
// More than 8 rows take a block a group of 8 for the sums, and dx another kernel, which adds up the
// groups in registers from the weights that these blocks leave in scratch memory.
//
// A normalisation costs no sums over channels of dx, see pooling_backward_tiles.cuh.
#pragma once

#include "pooling_fma.cuh"

namespace x_rope_cls::cuda {
namespace {

// What the normalisation of a token needs for its gradient.
template <typename T>
struct alignas(16) FmaToken {
  T level, along, mean, inverse;
};

// Constants of a group's rows to shared memory, (kPoolConstants, rows). Rows of padding have
// nothing to attend to.
template <typename T>
__device__ void copy_fma_constants(const PoolCall<T>& call, int64_t b, int64_t first_row,
                                   T* constants) {
  const T* const from = call.constants() + (b * call.plan.rows + first_row) * kPoolConstants;
  for (int i = static_cast<int>(threadIdx.x); i < kPoolConstants * kFmaRows; i += blockDim.x) {
    const int row = i % kFmaRows, which = i / kFmaRows;
    const T padding = which == kShift ? static_cast<T>(INFINITY) : T{0};
    constants[i] = first_row + row < call.plan.rows ? from[row * kPoolConstants + which] : padding;
  }
}

// Weights of a tile's tokens with a row, of which a lane has row lane / 4 of tokens lane % 4 and
// lane % 4 + 4, and sums of them.
template <typename T>
struct FmaScoreGrads {
  T grad_sum{0}, weight_sum{0};  // of this lane's tokens

  // Scores and inner products with the gradients become scale * ds and p, kept in `weights`. score:
  // (warps, 2, cells) from this lane's first on. level and along: sums over the rows, of the lane's
  // two tokens.
  __device__ void make(const T* score, const T* constants, const PoolCall<T>& call, int lane,
                       uint32_t counts, T* weights, T (&level)[2], T (&along)[2]) {
    const auto constant = [&](PoolConstant which) {
      return constants[which * kFmaRows + lane / kFmaFour];
    };
    const PoolParams& p = call.p();
    T own[2] = {}, other[2] = {};
#pragma unroll 2
    for (int w = 0; w < call.plan.warps; ++w, score += 2 * kFmaCells) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        own[i] += score[i * 32];
        other[i] += score[kFmaCells + i * 32];
      }
    }
    const T offset = constant(kScoreOffset) - constant(kShift), grad_offset = constant(kGradOffset);
    const T scale = static_cast<T>(p.scale), log_scale = static_cast<T>(p.scale * kLog2E);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool is_there = (counts >> (lane % kFmaFour + kFmaFour * i) & 1) != 0;
      const T weight = is_there ? power_of_two(own[i] * log_scale + offset) : T{0};
      const T grad = is_there ? weight * (other[i] + grad_offset) * scale : T{0};
      weights[i * 32 + lane] = grad;
      weights[kFmaCells + i * 32 + lane] = weight;
      grad_sum += grad;
      weight_sum += weight;
      if (p.norm == PoolNorm::kNone) continue;
      level[i] = weight * constant(kGradMean) + grad * constant(kQueryMean);
      along[i] = (weight * other[i] + grad * own[i]) / static_cast<T>(p.channels);
#pragma unroll
      for (int by = kFmaFour; by < 32; by *= 2) {
        level[i] += __shfl_xor_sync(kAllLanes, level[i], by);
        along[i] += __shfl_xor_sync(kAllLanes, along[i], by);
      }
    }
    __syncwarp();
  }
};

// Partial scores of this lane's channels, of four tokens from `tile` on with 8 stacked rows, summed
// up over the warp: that of row lane / 4 and token lane % 4.
template <typename T>
__device__ __forceinline__ T stacked_scores(const char* tile, const char* stack, int lane) {
  constexpr int kValues = kPiece<T>;
  T x[kFmaFour][kValues], sums[kFmaRows * kFmaFour] = {};
#pragma unroll
  for (int t = 0; t < kFmaFour; ++t) {
    load_values(tile + (t ^ lane % kFmaFour) * kFmaSlabBytes, x[t]);
  }
#pragma unroll
  for (int r = 0; r < kFmaRows; ++r) {
    T row[kValues];
    load_values(stack + (r ^ lane / kFmaFour) * kFmaSlabBytes, row);
#pragma unroll
    for (int t = 0; t < kFmaFour; ++t) {
#pragma unroll
      for (int e = 0; e < kValues; ++e) sums[r * kFmaFour + t] += row[e] * x[t][e];
    }
  }
  return sum_across(sums);
}

// a[t][e] += weights of row r with token t times row[e].
template <typename T>
__device__ __forceinline__ void add_row(const T (&weight)[kFmaFour], const T (&row)[kPiece<T>],
                                        T (&a)[kFmaFour][kPiece<T>]) {
#pragma unroll
  for (int t = 0; t < kFmaFour; ++t) {
#pragma unroll
    for (int e = 0; e < kPiece<T>; ++e) a[t][e] += weight[t] * row[e];
  }
}
template <typename T>
__device__ __forceinline__ void sum_tokens(const T (&weight)[kFmaFour],
                                           const T (&x)[kFmaFour][kPiece<T>], T (&sum)[kPiece<T>]) {
#pragma unroll
  for (int t = 0; t < kFmaFour; ++t) {
#pragma unroll
    for (int e = 0; e < kPiece<T>; ++e) sum[e] += weight[t] * x[t][e];
  }
}

// A token's gradient, from that of the normalised token x.
template <typename T>
__device__ __forceinline__ void through_norm(const FmaToken<T>& token, const T (&x)[kPiece<T>],
                                             T (&d)[kPiece<T>]) {
#pragma unroll
  for (int e = 0; e < kPiece<T>; ++e) {
    d[e] = (d[e] - token.level - x[e] * token.along) * token.inverse;
  }
}

// One token's gradient to memory, zeros where it does not count.
template <typename T>
__device__ __forceinline__ void store_token_grad(const PoolCall<T>& call, const FmaTiles<T>& tiles,
                                                 int64_t n, bool counts, bool whole,
                                                 T (&d)[kPiece<T>]) {
  const Tensor3& dx = call.g.dx;
#pragma unroll
  for (int e = 0; e < kPiece<T>; ++e) d[e] = counts ? d[e] : T{0};
  T* const to = static_cast<T*>(dx.data) + tiles.place.b * dx.stride_b + n * dx.stride_n +
                tiles.channel * dx.stride_c;
  store_values(to, dx.stride_c, whole, n < tiles.place.last ? tiles.width : 0, d);
}

// What other blocks leave to the kernel of dx.
template <typename T>
__device__ __forceinline__ T* record_of(const PoolCall<T>& call, int64_t b, int64_t start,
                                        int64_t group) {
  const int64_t tiles = (call.p().tokens + kFmaTokens - 1) / kFmaTokens;
  return reinterpret_cast<T*>(call.memory + call.plan.records) +
         ((b * tiles + start / kFmaTokens) * call.plan.groups + group) * kFmaRecord;
}
template <typename T>
__device__ void store_record(T* record, const T* weights, int lane, const FmaToken<T>& token) {
#pragma unroll
  for (int i = 0; i < 2 * kFmaCells / (32 * kPiece<T>); ++i) {
    const int at = (i * 32 + lane) * kPiece<T>;
    store_piece(record + at, load_piece(weights + at));
  }
  auto* const tokens = reinterpret_cast<FmaToken<T>*>(record + 2 * kFmaCells);
  if (lane < kFmaTokens) tokens[lane] = token;
}

template <typename T>
__global__ void __launch_bounds__(32 * kFmaWarps)
    backward_fma_kernel(const __grid_constant__ PoolCall<T> call, bool whole, bool whole_grads) {
  constexpr int kValues = kPiece<T>;
  extern __shared__ __align__(256) char memory[];
  const PoolPlan& plan = call.plan;
  const PoolParams& p = call.p();
  const PoolPlace place(plan, p.tokens, plan.groups);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const FmaShared<T> s(memory, plan, true, lane, warp);
  FmaTiles<T> tiles(call, place, s.tiles, lane, warp, whole);
  const bool dx_here = call.g.dx.data != nullptr && plan.groups == 1;
  const bool dx_later = call.g.dx.data != nullptr && plan.groups > 1 && warp == 0;

  const T* stack =
      call.stack() +
      (static_cast<int64_t>(place.b) * plan.groups + place.group) * 2 * kFmaRows * plan.padded +
      tiles.channel;
#pragma unroll 4
  for (int r = 0; r < 2 * kFmaRows; ++r, stack += plan.padded) {
    copy_async(shared_address(s.stack + r * kFmaSlabBytes), stack, true);
  }
  copy_async_commit();
  for (int i = 0; i < plan.stages - 1; ++i) tiles.fetch(i);
  const int64_t first_row = static_cast<int64_t>(place.group) * kFmaRows;
  const int64_t own_row = first_row + lane / kFmaFour;
  FmaScoreGrads<T> grads;
  copy_fma_constants(call, place.b, first_row, s.constants);  // read behind a barrier
  T* const weights = reinterpret_cast<T*>(s.weights);

  T grad_sums[kFmaRows][kValues] = {}, weight_sums[kFmaRows][kValues] = {};
  const int count = (place.last - place.first + kFmaTokens - 1) / kFmaTokens;
  for (int i = 0; i < count; ++i) {
    tiles.lane = forget(lane);
    tiles.fetch(i + plan.stages - 1);
    const uint32_t counts = tiles.wait();
    char* const tile = tiles.stage(i);
    FmaToken<T> token{T{0}, T{0}, T{0}, T{1}};
    if (plan.normalised) tiles.normalise(tile, counts, s.moments, &token.mean, &token.inverse);
    T* const partial = s.partial + i % 2 * plan.warps * 2 * kFmaCells;
#pragma unroll 1
    for (int part = 0; part < 4; ++part) {
      const int kind = part / 2, half = part % 2;
      partial[(2 * warp + kind) * kFmaCells + half * 32 + tiles.lane] =
          stacked_scores<T>(tile + half * kFmaFour * kFmaSlabBytes,
                            s.stack + kind * kFmaRows * kFmaSlabBytes, tiles.lane);
    }
    __syncthreads();  // and the other half of `partial` may be overwritten
    T level[2] = {}, along[2] = {};
    grads.make(partial + tiles.lane, s.constants, call, tiles.lane, counts, weights, level, along);
    if (plan.normalised) {  // of token lane % 8
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const T a = __shfl_sync(kAllLanes, level[half], tiles.lane % kFmaFour);
        const T b = __shfl_sync(kAllLanes, along[half], tiles.lane % kFmaFour);
        if (tiles.lane / kFmaFour % 2 == half) token.level = a, token.along = b;
      }
    }
    const int start = place.first + i * kFmaTokens;
    if (dx_later) {
      store_record(record_of(call, place.b, start, place.group), weights, tiles.lane, token);
    }
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      T x[kFmaFour][kValues], d[kFmaFour][kValues] = {};
#pragma unroll
      for (int t = 0; t < kFmaFour; ++t) {
        load_values(tile + (half * kFmaFour + t) * kFmaSlabBytes, x[t]);
      }
#pragma unroll
      for (int r = 0; r < kFmaRows; ++r) {
        T weight[kFmaFour], row[kValues];
        load_weights(s.weights, half, r, weight);
        sum_tokens(weight, x, grad_sums[r]);
        if (dx_here) {
          load_values(s.stack + r * kFmaSlabBytes, row);
          add_row(weight, row, d);
        }
        load_weights(s.weights + kFmaCells * sizeof(T), half, r, weight);
        if (plan.weighted) sum_tokens(weight, x, weight_sums[r]);
        if (dx_here) {
          load_values(s.stack + (kFmaRows + r) * kFmaSlabBytes, row);
          add_row(weight, row, d);
        }
      }
      if (!dx_here) continue;
#pragma unroll
      for (int t = 0; t < kFmaFour; ++t) {
        const int at = half * kFmaFour + t;
        if (plan.normalised) {
          const FmaToken<T> its{__shfl_sync(kAllLanes, token.level, at),
                                __shfl_sync(kAllLanes, token.along, at), T{0},
                                __shfl_sync(kAllLanes, token.inverse, at)};
          through_norm(its, x[t], d[t]);
        }
        store_token_grad(call, tiles, start + at, (counts >> at & 1) != 0, whole_grads, d[t]);
      }
    }
  }

  copy_async_wait<0>();
  const bool whole_sums = p.channels % kValues == 0;
#pragma unroll
  for (int r = 0; r < kFmaRows; ++r) {
    const int32_t there = first_row + r < plan.rows ? tiles.width : 0;
    T* const to = call.sums(place.b, place.split, first_row + r, 0) + tiles.channel;
    store_values(to, 1, whole_sums, there, grad_sums[r]);
    if (plan.weighted) store_values(to + p.channels, 1, whole_sums, there, weight_sums[r]);
  }
#pragma unroll
  for (int by = 1; by < kFmaFour; by *= 2) {
    grads.grad_sum += __shfl_xor_sync(kAllLanes, grads.grad_sum, by);
    grads.weight_sum += __shfl_xor_sync(kAllLanes, grads.weight_sum, by);
  }
  if (warp != 0 || lane % kFmaFour != 0 || own_row >= plan.rows) return;
  *call.stats(place.b, place.split, own_row) = {grads.grad_sum, grads.weight_sum};
}

// dx where there are more rows than a group has: all groups for one tile, a warp a slab. Shared
// memory of a warp: weights, then a tile.
template <typename T>
__global__ void __launch_bounds__(32 * kFmaWarps)
    token_grads_fma_kernel(const __grid_constant__ PoolCall<T> call, bool whole, bool whole_grads) {
  constexpr int kValues = kPiece<T>;
  extern __shared__ __align__(256) char memory[];
  const PoolPlan& plan = call.plan;
  const PoolPlace place(plan, call.p().tokens, 1);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  char* const own_memory = memory + warp * fma_token_bytes(1, sizeof(T));
  T* const weights = reinterpret_cast<T*>(own_memory);
  char* const tile = own_memory + 2 * kFmaCells * sizeof(T) + lane * 16;
  const FmaTiles<T> tiles(call, place, tile, lane, warp, whole);
  const int64_t groups = plan.groups;
  for (int start = place.first; start < place.last; start += kFmaTokens) {
    const bool mine = lane < kFmaTokens && start + lane < place.last;
    const uint32_t counts = __ballot_sync(kAllLanes, mine && call.counts(place.b, start + lane));
    if (plan.normalised) tiles.fetch_tile(start, counts, tile);
    FmaToken<T> token{T{0}, T{0}, T{0}, T{1}};  // lane % 8
    T d[2][kFmaFour][kValues] = {};
    for (int64_t group = 0; group < groups; ++group) {
      const T* const record = record_of(call, place.b, start, group);
      const T* const stack =
          call.stack() + (place.b * groups + group) * 2 * kFmaRows * plan.padded + tiles.channel;
      __syncwarp();  // the weights of before have been read
#pragma unroll
      for (int i = 0; i < 2 * kFmaCells / (32 * kValues); ++i) {
        const int at = (i * 32 + lane) * kValues;
        copy_async(shared_address(weights + at), record + at, true);
      }
      copy_async_commit();
      copy_async_wait<0>();
      if (plan.normalised) {
        const FmaToken<T> own =
            reinterpret_cast<const FmaToken<T>*>(record + 2 * kFmaCells)[lane % kFmaTokens];
        token = {token.level + own.level, token.along + own.along, own.mean, own.inverse};
      }
      __syncwarp();
#pragma unroll 4
      for (int r = 0; r < 2 * kFmaRows; ++r) {
        T row[kValues];
        load_values(stack + r * plan.padded, row);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          T weight[kFmaFour];
          load_weights(own_memory + r / kFmaRows * kFmaCells * sizeof(T), half, r % kFmaRows,
                       weight);
          add_row(weight, row, d[half]);
        }
      }
    }
#pragma unroll
    for (int at = 0; at < kFmaTokens; ++at) {
      T(&own)[kValues] = d[at / kFmaFour][at % kFmaFour];
      if (plan.normalised) {
        const FmaToken<T> its{
            __shfl_sync(kAllLanes, token.level, at), __shfl_sync(kAllLanes, token.along, at),
            __shfl_sync(kAllLanes, token.mean, at), __shfl_sync(kAllLanes, token.inverse, at)};
        T x[kValues];
        load_values(tile + at * kFmaSlabBytes, x);
#pragma unroll
        for (int e = 0; e < kValues; ++e) x[e] = (x[e] - its.mean) * its.inverse;
        through_norm(its, x, own);
      }
      store_token_grad(call, tiles, start + at, (counts >> at & 1) != 0, whole_grads, own);
    }
  }
}

}  // namespace
}  // namespace x_rope_cls::cuda
