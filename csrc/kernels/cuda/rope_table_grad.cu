// Gradients of the rotation to its tables: for each row of a table the sum over the batches and
// heads that share it, always in the same order. Threads of a block take units of channels times
// splits of the rows that are summed; the splits are added up in shared memory.
#include <cstdint>

#include "launch.h"
#include "numeric.cuh"
#include "rope_launch.h"
#include "rotate.cuh"

namespace x_rope_cls::cuda {
namespace {

struct TableGradCall {
  RopeTableGradParams p;
  RopeRow row;
  int64_t table_rows;
  int32_t summed_heads;  // of the rows that are summed; the rest are batches
  int32_t summed;
};

template <typename T>
__device__ __forceinline__ const T* row_at(const Tensor4& t, int64_t b, int64_t h, int64_t n) {
  return static_cast<const T*>(t.data) + b * t.stride_b + h * t.stride_h + n * t.stride_n;
}

__device__ __forceinline__ bool counts(const RopeTableGradParams& p, int64_t b, int64_t n) {
  const bool rotated =
      p.rotate == nullptr || p.rotate[b * p.rotate_stride_b + n * p.rotate_stride_n] != 0;
  return rotated && (p.keep == nullptr || p.keep[b * p.keep_stride_b + n * p.keep_stride_n] != 0);
}

// kCount channels of a dense row.
template <int kCount, typename T>
struct alignas(kCount * sizeof(T)) Channels {
  T values[kCount];
};
template <int kCount, typename T>
__device__ __forceinline__ void load_channels(const T* from, Compute<T> (&to)[kCount]) {
  const auto packed = *reinterpret_cast<const Channels<kCount, T>*>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = to_compute(packed.values[i]);
}

template <typename C>
struct PairSum {
  C cos, sin;

  __device__ __forceinline__ void add(C g0, C g1, C x0, C x1) {
    cos += g0 * x0 + g1 * x1;
    sin += g1 * x0 - g0 * x1;
  }
};

// Channels of a unit: what 16 bytes of the wider type hold, so that both are read without gaps.
template <typename S, typename G>
inline constexpr int kUnit = 16 / static_cast<int>(sizeof(S) > sizeof(G) ? sizeof(S) : sizeof(G));

// Adds one row's share of a unit's pairs.
template <typename S, typename G>
__device__ __forceinline__ void add_row(const TableGradCall& c, const G* g, const S* x,
                                        int32_t unit, PairSum<Compute<S>> (&sums)[kUnit<S, G>]) {
  using C = Compute<S>;
  constexpr int kChannels = kUnit<S, G>;
  if (c.row.units == RopeUnits::kScalar) {
    const int64_t first = c.p.interleaved ? 2 * unit : unit;
    const int64_t second = c.p.interleaved ? first + 1 : first + c.p.pairs;
    const int64_t sg = c.p.grad.stride_d;
    const int64_t sx = c.p.x.stride_d;
    sums[0].add(to_compute(g[first * sg]), to_compute(g[second * sg]), to_compute(x[first * sx]),
                to_compute(x[second * sx]));
    return;
  }
  C g0[kChannels];
  C x0[kChannels];
  load_channels(g + unit * kChannels, g0);
  load_channels(x + unit * kChannels, x0);
  if (c.row.units == RopeUnits::kInterleaved) {
#pragma unroll
    for (int i = 0; i < kChannels / 2; ++i) {
      sums[i].add(g0[2 * i], g0[2 * i + 1], x0[2 * i], x0[2 * i + 1]);
    }
  } else {
    C g1[kChannels];
    C x1[kChannels];
    load_channels(g + c.p.pairs + unit * kChannels, g1);
    load_channels(x + c.p.pairs + unit * kChannels, x1);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) sums[i].add(g0[i], g1[i], x0[i], x1[i]);
  }
}

// One unit of one row of the table: this thread's split of the sum.
template <typename S, typename G>
__device__ __forceinline__ void sum_split(const TableGradCall& c, int64_t table_row, int32_t unit,
                                          PairSum<Compute<S>> (&sums)[kUnit<S, G>]) {
  const int64_t n = table_row % c.p.tokens;
  const int64_t th = table_row / c.p.tokens % c.p.table_heads;
  const int64_t tb = table_row / c.p.tokens / c.p.table_heads;
  const int64_t b_first = c.p.table_batch == 1 ? 0 : tb;
  const int64_t h_first = c.p.table_heads == 1 ? 0 : th;
  for (int32_t r = static_cast<int32_t>(threadIdx.y); r < c.summed;
       r += static_cast<int32_t>(blockDim.y)) {
    const int64_t b = b_first + r / c.summed_heads;
    const int64_t h = h_first + r % c.summed_heads;
    if (!counts(c.p, b, n)) continue;
    add_row<S, G>(c, row_at<G>(c.p.grad, b, h, n), row_at<S>(c.p.x, b, h, n), unit, sums);
  }
}

// Sums of pair i of a thread lie at i * kPitch + thread: neighbouring threads store to, and
// neighbouring pairs are read from, different banks.
template <typename C, int kPairs>
inline constexpr int kPitch = kRopeThreads + 128 / (static_cast<int>(sizeof(C)) * kPairs);

// kPairs: of a unit. One block has blockDim.z rows of the table.
template <typename S, typename G, int kPairs>
__device__ __forceinline__ void reduce(const TableGradCall& c, int64_t first_row,
                                       int32_t first_unit,
                                       const PairSum<Compute<S>> (&sums)[kUnit<S, G>],
                                       Compute<S>* shared) {
  using C = Compute<S>;
  constexpr int kStep = kPitch<C, kPairs>;
  const int32_t x = static_cast<int32_t>(blockDim.x);
  const int32_t y = static_cast<int32_t>(blockDim.y);
  const int32_t thread =
      static_cast<int32_t>(threadIdx.x) +
      x * (static_cast<int32_t>(threadIdx.y) + y * static_cast<int32_t>(threadIdx.z));
  const int32_t threads = x * y * static_cast<int32_t>(blockDim.z);
  const int32_t pairs = x * kPairs;  // that the block has of each row
  const C sign = c.p.inverse ? C{-1} : C{1};
  for (int which = 0; which < 2; ++which) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      shared[i * kStep + thread] = which == 0 ? sums[i].cos : sums[i].sin;
    }
    __syncthreads();
    C* const out = static_cast<C*>(which == 0 ? c.p.dcos : c.p.dsin);
    for (int32_t o = thread; o < pairs * static_cast<int32_t>(blockDim.z); o += threads) {
      const int32_t z = o / pairs;
      const int32_t pair = o % pairs;
      const int64_t row = first_row + z;
      const int64_t column = static_cast<int64_t>(first_unit) * kPairs + pair;
      if (row >= c.table_rows || column >= c.p.pairs) continue;
      const C* from = shared + pair % kPairs * kStep + z * y * x + pair / kPairs;
      C sum = 0;
      for (int32_t split = 0; split < y; ++split) sum += from[split * x];
      out[row * c.p.pairs + column] = which == 0 ? sum : sign * sum;
    }
  }
}

template <typename S, typename G>
__global__ void __launch_bounds__(kRopeThreads)
    table_grad_kernel(const __grid_constant__ TableGradCall c) {
  using C = Compute<S>;
  constexpr int kChannels = kUnit<S, G>;
  __shared__ C shared[kChannels * kPitch<C, kChannels>];
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * blockDim.z;
  const int64_t table_row = first_row + threadIdx.z;
  for (int32_t first_unit = 0; first_unit < c.row.rotated;
       first_unit += static_cast<int32_t>(blockDim.x)) {
    const int32_t unit = first_unit + static_cast<int32_t>(threadIdx.x);
    PairSum<C> sums[kChannels] = {};
    if (table_row < c.table_rows && unit < c.row.rotated) {
      sum_split<S, G>(c, table_row, unit, sums);
    }
    if (c.row.units == RopeUnits::kScalar) {
      reduce<S, G, 1>(c, first_row, first_unit, sums, shared);
    } else if (c.row.units == RopeUnits::kInterleaved) {
      reduce<S, G, kChannels / 2>(c, first_row, first_unit, sums, shared);
    } else {
      reduce<S, G, kChannels>(c, first_row, first_unit, sums, shared);
    }
  }
}

template <typename S, typename G>
cudaError_t launch_table_grad(const RopeTableGradParams& p, cudaStream_t stream) {
  TableGradCall c{};
  c.p = p;
  c.table_rows = p.table_batch * p.table_heads * p.tokens;
  const int64_t heads = p.table_heads == 1 ? p.heads : 1;
  const int64_t summed = heads * (p.table_batch == 1 ? p.batch : 1);
  if (c.table_rows == 0 || p.pairs == 0) return cudaSuccess;
  if (summed > INT32_MAX) return cudaErrorInvalidConfiguration;
  c.summed = static_cast<int32_t>(summed);
  c.summed_heads = static_cast<int32_t>(heads);
  const bool whole = rows_are_whole<S>(p.x, p.head_dim) && rows_are_whole<G>(p.grad, p.head_dim);
  c.row = rope_row(p.head_dim, p.pairs, p.interleaved, whole, kUnit<S, G>);
  const TableGradBlock block = table_grad_block(c.row.rotated, summed);
  const int64_t grid = (c.table_rows + block.rows - 1) / block.rows;
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  const dim3 threads(static_cast<unsigned>(block.units), static_cast<unsigned>(block.splits),
                     static_cast<unsigned>(block.rows));
  table_grad_kernel<S, G><<<static_cast<unsigned>(grid), threads, 0, stream>>>(c);
  return cudaGetLastError();
}

}  // namespace

cudaError_t rope_table_grad(const RopeTableGradParams& params, cudaStream_t stream) {
  return with_dtype(params.dtype, [&](auto element) {
    using S = decltype(element);
    if (params.grad_dtype == params.dtype) return launch_table_grad<S, S>(params, stream);
    return launch_table_grad<S, Compute<S>>(params, stream);
  });
}

}  // namespace x_rope_cls::cuda
