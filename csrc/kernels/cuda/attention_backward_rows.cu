// Before and after the sums of attention backward: passes over rows, bound by memory.
#include <cstdint>

#include "attention_backward.cuh"
#include "rotate.cuh"

namespace x_rope_cls::cuda {
namespace {

constexpr int kRowThreads = 128;
constexpr int kFinishThreads = 256;
constexpr int kStatsRows = 32;  // of a block
constexpr int64_t kMostBlocks = INT32_MAX;

struct StatsArgs {
  Tensor4 out, grad_out;
  const void* lse;
  const void* grad_lse;
  int64_t grad_lse_stride_b, grad_lse_stride_h, grad_lse_stride_n;
  TokenOrder order;
  int64_t heads, queries, rows;
  int32_t channels;
  bool whole, log2;
};

struct QueryPlace {
  int64_t b, h, n;
};
// Of row `row`: the rows of a head are in the order of its queries.
__device__ __forceinline__ QueryPlace query_at(const StatsArgs& p, int64_t row) {
  const int64_t b = row / p.queries / p.heads;
  return {b, row / p.queries % p.heads, p.order.token(b, static_cast<int32_t>(row % p.queries))};
}

template <typename C>
struct alignas(2 * sizeof(C)) RowStats {
  C lse, delta;
};

// kStatsRows rows a block. Warps take rows for delta; before and after, a thread has a row, so that
// neighbours read and write neighbours.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) stats_kernel(StatsArgs p, Compute<T>* stats) {
  using C = Compute<T>;
  __shared__ C deltas[kStatsRows];
  __shared__ QueryPlace places[kStatsRows];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int own = static_cast<int>(threadIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kStatsRows;
  const int rows = static_cast<int>(min(static_cast<int64_t>(kStatsRows), p.rows - first));
  if (own < rows) places[own] = query_at(p, first + own);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x) / kWarpSize; i < rows; i += kRowThreads / kWarpSize) {
    const QueryPlace at = places[i];
    const Row<T> out = row_of<T>(p.out, at.b, at.h, at.n, p.channels, p.whole);
    const Row<T> grad = row_of<T>(p.grad_out, at.b, at.h, at.n, p.channels, p.whole);
    C delta = 0;
    for (int32_t c = lane * kPiece<T>; c < p.channels; c += kWarpSize * kPiece<T>) {
      C x[kPiece<T>];
      C y[kPiece<T>];
      load_piece(out, c, x);
      load_piece(grad, c, y);
#pragma unroll
      for (int j = 0; j < kPiece<T>; ++j) delta += x[j] * y[j];
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      delta += __shfl_xor_sync(0xffffffffU, delta, offset);
    }
    if (lane == 0) deltas[i] = delta;
  }
  __syncthreads();
  if (own >= rows) return;
  const QueryPlace at = places[own];
  RowStats<C> result{0, deltas[own]};
  if (p.grad_lse != nullptr) {
    result.delta -=
        static_cast<const C*>(p.grad_lse)[at.b * p.grad_lse_stride_b + at.h * p.grad_lse_stride_h +
                                          at.n * p.grad_lse_stride_n];
  }
  // +infinity, and so weights 0, for rows with nothing to attend to and for those hidden by biases
  // so large that nothing is left of the scores.
  constexpr C kHidden = static_cast<C>(sizeof(C) == 8 ? -1e300 : -1e30);
  C lse = static_cast<const C*>(p.lse)[(at.b * p.heads + at.h) * p.queries + at.n];
  if (p.log2) lse *= static_cast<C>(kLog2E);
  result.lse = lse < kHidden ? static_cast<C>(INFINITY) : lse;
  reinterpret_cast<RowStats<C>*>(stats)[first + own] = result;
}

struct FinishArgs {
  GradSums sums;
  TokenOrder order, partners;
  Tensor4 to, rotated;
  RotaryTable table;
  bool has_table, by_token, interleaved, whole;
  int64_t heads, tokens;
  int32_t pieces, pairs, channels;
  uint32_t blocks;
  double factor;
};

template <typename C>
__device__ __forceinline__ void load_sums(const C* from, C (&x)[kPiece<C>]) {
  const Piece<C> piece = *reinterpret_cast<const Piece<C>*>(from);
#pragma unroll
  for (int i = 0; i < kPiece<C>; ++i) x[i] = piece.values[i];
}

// kCount results, for one store.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Results {
  T values[kCount];
};

// 16 bytes of the sums a thread; `blocks` of them a head.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const FinishArgs p) {
  using C = Compute<T>;
  constexpr int kCount = kPiece<C>;
  __shared__ PlacedTokens<kFinishThreads> placed;
  __shared__ bool adds_raw;
  const int64_t start = static_cast<int64_t>(blockIdx.x % p.blocks) * kFinishThreads;
  const int64_t h = blockIdx.x / p.blocks % p.heads;
  const int64_t b = blockIdx.x / p.blocks / p.heads;
  if (threadIdx.x == 0) {
    adds_raw = p.sums.raw != nullptr && p.partners.counts_of(b).without > 0;
  }
  const auto first_place = static_cast<int32_t>(start / p.pieces);
  placed.look_up(
      p.order, b, first_place, static_cast<int32_t>((start + kFinishThreads - 1) / p.pieces),
      [&](int32_t n) { return p.has_table && (!p.by_token || has_position(p.table, b, n)); });
  const int64_t index = start + threadIdx.x;
  const auto place = static_cast<int32_t>(index / p.pieces);
  if (place >= placed.counts.all()) return;
  const int32_t first = static_cast<int32_t>(index % p.pieces) * kCount;
  const int64_t n = placed.tokens[place - first_place];
  const bool turned = placed.turned[place - first_place];
  const int64_t row = (b * p.heads + h) * p.tokens + place;
  const C* const main = static_cast<const C*>(p.sums.main) + row * p.sums.width;
  const C factor = static_cast<C>(p.factor);
  C x[kCount];
  load_sums(main + first, x);
  if (p.rotated.data != nullptr) {
    C* const to = static_cast<C*>(p.rotated.data) + b * p.rotated.stride_b +
                  h * p.rotated.stride_h + n * p.rotated.stride_n;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (first + i < p.channels) {
        to[(first + i) * p.rotated.stride_d] = turned ? x[i] * factor : C{0};
      }
    }
  }
  if (turned) {
    const auto angles = angles_of<C>(p.table, b, h, n, p.pairs, p.interleaved, true);
    if (!p.interleaved && p.pairs % kCount == 0 && first < 2 * p.pairs) {
      C others[kCount];
      load_sums(main + (first < p.pairs ? first + p.pairs : first - p.pairs), others);
      rotate_piece(x, angles, first, true, [&](int i, int32_t) { return others[i]; });
    } else {
      rotate_piece(x, angles, first, true, [&](int, int32_t c) { return main[c]; });
    }
  }
  if (adds_raw && place < placed.counts.with) {
    const C* const raw = static_cast<const C*>(p.sums.raw) + row * p.sums.width;
    C y[kCount];
    load_sums(raw + first, y);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] += y[i];
  }
  T* const to =
      static_cast<T*>(p.to.data) + b * p.to.stride_b + h * p.to.stride_h + n * p.to.stride_n;
  Results<T, kCount> piece;
#pragma unroll
  for (int i = 0; i < kCount; ++i) piece.values[i] = from_compute<T>(x[i] * factor);
  if (p.whole) {
    *reinterpret_cast<Results<T, kCount>*>(to + first) = piece;
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (first + i < p.channels) to[(first + i) * p.to.stride_d] = piece.values[i];
  }
}

struct ClearArgs {
  Tensor4 to;
  const uint8_t* keep;
  int64_t keep_stride_b, keep_stride_n;
  int64_t heads, tokens, channels, elements;
};

template <typename T>
__global__ void __launch_bounds__(kRowThreads) clear_kernel(const ClearArgs p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (index >= p.elements) return;
  const int64_t row = index / p.channels;
  const int64_t n = row % p.tokens;
  const int64_t h = row / p.tokens % p.heads;
  const int64_t b = row / p.tokens / p.heads;
  if (p.keep[b * p.keep_stride_b + n * p.keep_stride_n] != 0) return;
  static_cast<T*>(p.to.data)[b * p.to.stride_b + h * p.to.stride_h + n * p.to.stride_n +
                             index % p.channels * p.to.stride_d] = from_compute<T>(Compute<T>{0});
}

}  // namespace

cudaError_t row_stats(const AttentionBackwardParams& params, const TokenOrder& order, bool log2,
                      void* stats, cudaStream_t stream) {
  const AttentionParams& p = params.forward;
  return with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    StatsArgs a{};
    a.out = p.out;
    a.grad_out = params.grad_out;
    a.lse = p.lse;
    a.grad_lse = params.grad_lse;
    a.grad_lse_stride_b = params.grad_lse_stride_b;
    a.grad_lse_stride_h = params.grad_lse_stride_h;
    a.grad_lse_stride_n = params.grad_lse_stride_n;
    a.order = order;
    a.heads = p.heads;
    a.queries = p.queries;
    a.rows = p.batch * p.heads * p.queries;
    a.channels = static_cast<int32_t>(p.value_dim);
    a.whole =
        rows_are_whole<T>(p.out, p.value_dim) && rows_are_whole<T>(params.grad_out, p.value_dim);
    a.log2 = log2;
    const int64_t blocks = ceil_div(a.rows, kStatsRows);
    if (blocks == 0) return cudaSuccess;
    if (blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
    stats_kernel<T><<<static_cast<unsigned>(blocks), kRowThreads, 0, stream>>>(
        a, static_cast<Compute<T>*>(stats));
    return cudaGetLastError();
  });
}

cudaError_t finish_sums(const FinishParams& params, cudaStream_t stream) {
  return with_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    FinishArgs a{};
    a.sums = params.sums;
    a.order = params.order;
    a.partners = params.partners;
    a.to = params.to;
    a.rotated = params.rotated;
    a.has_table = params.table != nullptr;
    if (a.has_table) a.table = *params.table;
    a.by_token = params.rule.by_token;
    a.interleaved = params.interleaved;
    a.whole = rows_are_whole<T>(params.to, params.channels);
    a.heads = params.heads;
    a.tokens = params.tokens;
    a.pieces = static_cast<int32_t>(ceil_div(params.channels, kPiece<Compute<T>>));
    a.pairs = static_cast<int32_t>(params.pairs);
    a.channels = static_cast<int32_t>(params.channels);
    a.factor = params.factor;
    const int64_t head_blocks = ceil_div(params.tokens * a.pieces, kFinishThreads);
    const int64_t blocks = head_blocks * params.batch * params.heads;
    if (blocks == 0) return cudaSuccess;
    if (blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
    a.blocks = static_cast<uint32_t>(head_blocks);
    finish_kernel<T><<<static_cast<unsigned>(blocks), kFinishThreads, 0, stream>>>(a);
    return cudaGetLastError();
  });
}

cudaError_t clear_masked(DType dtype, const Tensor4& to, const AttentionParams& params,
                         int64_t channels, cudaStream_t stream) {
  if (to.data == nullptr || params.key_mask == nullptr) return cudaSuccess;
  return with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const ClearArgs a{to,
                      params.key_mask,
                      params.key_mask_stride_b,
                      params.key_mask_stride_n,
                      params.key_heads,
                      params.keys,
                      channels,
                      params.batch * params.key_heads * params.keys * channels};
    const int64_t blocks = ceil_div(a.elements, kRowThreads);
    if (blocks == 0) return cudaSuccess;
    if (blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
    clear_kernel<T><<<static_cast<unsigned>(blocks), kRowThreads, 0, stream>>>(a);
    return cudaGetLastError();
  });
}

}  // namespace x_rope_cls::cuda
