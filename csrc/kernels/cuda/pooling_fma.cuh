// Pooling of float32 and float64 on the FMA units: tiles of 8 tokens by 8 rows, each token read
// once. float32 asks for 4 R flop for each 4 bytes, 2 R TFLOP/s on an A100: the limit is memory.
//
// A warp has a slab of 512 bytes of every token, a lane the same 16 bytes of each: a lane fetches
// its own pieces, multiplies them and sums them up without looking at another's. Only scores, which
// sum over all channels, and the moments of a normalisation go through warp and block.
#pragma once

#include "pooling_blocks.cuh"

namespace x_rope_cls::cuda {
namespace {

// Tokens whose scores a warp adds up at once: with 8 rows 32, one for each lane. Scores and weights
// of a tile are those of its first four tokens, then of the others: (2, rows, 4).
constexpr int kFmaFour = 4;
constexpr int kFmaCells = kFmaRows * kFmaTokens;

// 16 bytes of elements in registers.
template <typename T>
__device__ __forceinline__ void load_values(const void* from, T (&x)[kPiece<T>]) {
  const Piece<T> piece = *static_cast<const Piece<T>*>(from);
#pragma unroll
  for (int e = 0; e < kPiece<T>; ++e) x[e] = piece.values[e];
}
template <typename T>
__device__ __forceinline__ void store_values(void* to, const T (&x)[kPiece<T>]) {
  Piece<T> piece;
#pragma unroll
  for (int e = 0; e < kPiece<T>; ++e) piece.values[e] = x[e];
  *static_cast<Piece<T>*>(to) = piece;
}
// The same to memory that may not take it whole: those below `count`.
template <typename T>
__device__ __forceinline__ void store_values(T* to, int64_t stride, bool whole, int64_t count,
                                             const T (&x)[kPiece<T>]) {
  if (whole) {
    if (count > 0) store_values(to, x);
    return;
  }
#pragma unroll
  for (int e = 0; e < kPiece<T>; ++e) {
    if (e < count) to[e * stride] = x[e];
  }
}

// Sums over all lanes of what each of them has of `kCount` numbers, kCount a power of two up to 32.
// Number i of a lane is that of index i ^ (lane / (32 / kCount)), so that what a lane keeps and
// what it gives away are the same registers in every lane, and nothing is selected. The sum with
// index lane / (32 / kCount) is returned.
template <int kCount, int kHalf = kCount / 2, typename T>
__device__ __forceinline__ T sum_across(T (&x)[kCount]) {
  if constexpr (kHalf > 0) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      x[i] += __shfl_xor_sync(kAllLanes, x[i + kHalf], kHalf * (32 / kCount));
    }
    return sum_across<kCount, kHalf / 2>(x);
  } else {
#pragma unroll
    for (int by = 16 / kCount; by > 0; by /= 2) x[0] += __shfl_xor_sync(kAllLanes, x[0], by);
    return x[0];
  }
}

// What the warps of a block share, and what each has for itself.
template <typename T>
struct FmaShared {
  char* tiles;    // of this lane, stage 0
  char* stack;    // of this lane (backward): 8 queries, then 8 gradients
  T* partial;     // (2, warps, kinds, cells), by turns
  T* moments;     // (warps, tokens, 2)
  T* constants;   // of the block (backward): (kPoolConstants, rows)
  char* weights;  // of this warp: (kinds, cells)

  __device__ FmaShared(char* memory, const PoolPlan& plan, bool backward, int lane, int warp) {
    const int kinds = backward ? 2 : 1;
    tiles = memory + warp * kFmaTokens * kFmaSlabBytes + lane * 16;
    memory += plan.stages * plan.warps * kFmaTokens * kFmaSlabBytes;
    stack = memory + warp * 2 * kFmaRows * kFmaSlabBytes + lane * 16;
    if (backward) memory += plan.warps * 2 * kFmaRows * kFmaSlabBytes;
    partial = reinterpret_cast<T*>(memory);
    moments = partial + 2 * plan.warps * kinds * kFmaCells;
    constants = moments + plan.warps * 2 * kFmaTokens;
    T* const all_weights = constants + (backward ? kPoolConstants * kFmaRows : 0);
    weights = reinterpret_cast<char*>(all_weights + warp * kinds * kFmaCells);
  }
};

template <typename T>
struct FmaTiles {
  static constexpr int kValues = kPiece<T>;

  const PoolCall<T>& call;
  const PoolPlace& place;
  char* memory;     // stage 0 of this lane
  int32_t channel;  // the first of this lane
  int32_t width;    // its channels: kValues, or fewer at the end
  int lane, warp;
  bool whole;
  uint32_t pending = 0;  // bits of the tokens that count, of the tiles under way

  __device__ FmaTiles(const PoolCall<T>& its_call, const PoolPlace& its_place, char* its_memory,
                      int its_lane, int its_warp, bool is_whole)
      : call(its_call),
        place(its_place),
        memory(its_memory),
        channel((its_warp * 32 + its_lane) * kValues),
        lane(its_lane),
        warp(its_warp),
        whole(is_whole) {
    const int64_t left = call.p().channels - channel;
    width = static_cast<int32_t>(left < 0 ? 0 : left < kValues ? left : kValues);
  }

  __device__ char* stage(int i) const {
    return memory + i % call.plan.stages * call.plan.warps * kFmaTokens * kFmaSlabBytes;
  }

  // Starts to fetch tile i; nothing where there is none. Tokens that do not count become zeros.
  __device__ void fetch(int i) {
    const int64_t start = place.first + static_cast<int64_t>(i) * kFmaTokens;
    uint32_t counts = 0;
    if (start < place.last) {
      const bool mine = lane < kFmaTokens && start + lane < place.last;
      counts = __ballot_sync(kAllLanes, mine && call.counts(place.b, start + lane));
      fetch_tile(start, counts, stage(i));
    }
    copy_async_commit();
    pending = pending << kFmaTokens | counts;
  }
  __device__ void fetch_tile(int64_t start, uint32_t counts, char* to) const {
    const PoolParams& p = call.p();
    if (!whole) {
      fetch_elements(start, counts, to);
      return;
    }
    const T* from = call.token(place.b, start) + channel;
    if (width == 0) counts = 0;
#pragma unroll
    for (int t = 0; t < kFmaTokens; ++t) {
      const bool there = (counts >> t & 1) != 0;
      copy_async(shared_address(to + t * kFmaSlabBytes),
                 there ? from : static_cast<const T*>(p.x.data), there);
      from += p.x.stride_n;
    }
  }
  __device__ void fetch_elements(int64_t start, uint32_t counts, char* to) const {
    const int64_t stride = call.p().x.stride_c;
#pragma unroll 1
    for (int t = 0; t < kFmaTokens; ++t) {
      const T* const from = call.token(place.b, start + t) + channel * stride;
      T x[kValues];
#pragma unroll
      for (int e = 0; e < kValues; ++e) {
        x[e] = (counts >> t & 1) != 0 && e < width ? from[e * stride] : T{0};
      }
      store_values(to + t * kFmaSlabBytes, x);
    }
  }
  // Waits for the lane's part of the oldest tile; returns which of its tokens count.
  __device__ uint32_t wait() const {
    constexpr uint32_t kAll = (1U << kFmaTokens) - 1;
    if (call.plan.stages == 2) {
      copy_async_wait<1>();
      return pending >> kFmaTokens & kAll;
    }
    copy_async_wait<0>();
    return pending & kAll;
  }

  __device__ T slab_width(int w) const {
    constexpr int kSlab = 32 * kValues;
    const int64_t left = call.p().channels - static_cast<int64_t>(w) * kSlab;
    return static_cast<T>(left < kSlab ? left : kSlab);
  }

  // Normalises a tile in place, without weight and bias; mean and inverse spread of token lane % 8
  // are left in *mean and *inverse, zeros where it does not count. Squares are of differences from
  // each warp's own mean, so that a large mean costs no accuracy.
  __device__ void normalise(char* tile, uint32_t counts, T* moments, T* mean, T* inverse) const {
    const bool centred = call.p().norm == PoolNorm::kLayer;
    // Token t of a lane is t ^ (lane / 4), see sum_across. Values are read anew for each step: the
    // sums over tokens leave no registers to keep them in.
    T sums[kFmaTokens];
    T own_mean{0};
    if (centred) {
#pragma unroll
      for (int t = 0; t < kFmaTokens; ++t) {
        T x[kValues];
        load_values(tile + (t ^ lane / 4) * kFmaSlabBytes, x);
        sums[t] = T{0};
#pragma unroll
        for (int e = 0; e < kValues; ++e) sums[t] += x[e];
      }
      own_mean = sum_across(sums) / slab_width(warp);
    }
    const int part = forget(lane) / 4;
#pragma unroll
    for (int t = 0; t < kFmaTokens; ++t) {
      const T from = __shfl_sync(kAllLanes, own_mean, (t ^ part) * 4);
      T x[kValues];
      load_values(tile + (t ^ part) * kFmaSlabBytes, x);
      sums[t] = T{0};
#pragma unroll
      for (int e = 0; e < kValues; ++e) sums[t] += e < width ? (x[e] - from) * (x[e] - from) : T{0};
    }
    const T squares = sum_across(sums);
    if (lane % 4 == 0) {
      T* const to = moments + (warp * kFmaTokens + lane / 4) * 2;
      to[0] = own_mean;
      to[1] = squares;
    }
    __syncthreads();
    join_moments(moments + lane % kFmaTokens * 2, (counts >> lane % kFmaTokens & 1) != 0, mean,
                 inverse);
#pragma unroll 2
    for (int t = 0; t < kFmaTokens; ++t) {
      const T from = __shfl_sync(kAllLanes, *mean, t);
      const T by = __shfl_sync(kAllLanes, *inverse, t);
      T x[kValues];
      load_values(tile + t * kFmaSlabBytes, x);
#pragma unroll
      for (int e = 0; e < kValues; ++e) x[e] = (x[e] - from) * by;
      store_values(tile + t * kFmaSlabBytes, x);
    }
  }
  // All warps' means and squares of one token to those of the whole.
  __device__ void join_moments(const T* moments, bool counts, T* mean, T* inverse) const {
    const auto channels = static_cast<T>(call.p().channels);
    const int warps = call.plan.warps;
    T sum{0}, squares{0};
    for (int w = 0; w < warps; ++w) sum += moments[w * kFmaTokens * 2] * slab_width(w);
    *mean = sum / channels;
    for (int w = 0; w < warps; ++w) {
      const T d = moments[w * kFmaTokens * 2] - *mean;
      squares += moments[w * kFmaTokens * 2 + 1] + d * d * slab_width(w);
    }
    *inverse = T{1} / sqrt(squares / channels + static_cast<T>(call.p().norm_eps));
    if (!counts) *mean = *inverse = T{0};
  }
};

// Weights of one row with four tokens, which all lanes read.
template <typename T>
__device__ __forceinline__ void load_weights(const char* weights, int half, int row,
                                             T (&w)[kFmaFour]) {
  constexpr int kValues = kPiece<T>;
  const char* const from = weights + (half * kFmaRows + row) * kFmaFour * sizeof(T);
#pragma unroll
  for (int first = 0; first < kFmaFour; first += kValues) {
    T part[kValues];
    load_values(from + first * sizeof(T), part);
#pragma unroll
    for (int e = 0; e < kValues; ++e) w[first + e] = part[e];
  }
}

}  // namespace
}  // namespace x_rope_cls::cuda
