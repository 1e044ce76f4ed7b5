// Pooling forward: parts of the tokens are summed apart, relative to their own largest score, and
// merged in order.
#include "launch.h"
#include "pooling_forward_fma.cuh"
#include "pooling_forward_tiles.cuh"
#include "pooling_simple.cuh"

namespace x_rope_cls::cuda {
namespace {

// One row: the splits' sums to pooled and lse.
template <typename S>
__global__ void __launch_bounds__(kPoolThreads)
    merge_kernel(const __grid_constant__ PoolCall<S> call) {
  using T = Compute<S>;
  __shared__ T factors[kPoolMostSplits];
  __shared__ T memory[kPoolThreads];
  const PoolParams& p = call.p();
  const int64_t b = blockIdx.x / call.plan.rows, r = blockIdx.x % call.plan.rows;
  const int64_t splits = call.plan.splits;
  const PoolStats<T>* const stats = call.stats(b, 0, r);
  T largest = -static_cast<T>(INFINITY);
  for (int64_t s = threadIdx.x; s < splits; s += kPoolThreads) {
    largest = larger(largest, stats[s].first);
  }
  largest = block_combine(largest, memory, [](T x, T y) { return larger(x, y); });
  const T shift = largest == -static_cast<T>(INFINITY) ? T{0} : largest;
  T sum{0};
  for (int64_t s = threadIdx.x; s < splits; s += kPoolThreads) {
    const PoolStats<T> own = stats[s];
    factors[s] = power_of_two(own.first - shift);
    sum += factors[s] * own.second;
  }
  sum = block_sum(sum, memory);
  const bool none = sum == T{0};
  if (threadIdx.x == 0) static_cast<T*>(p.lse)[blockIdx.x] = log_sum(largest, sum);
  S* const to = static_cast<S*>(p.pooled) + static_cast<int64_t>(blockIdx.x) * p.channels;
  for (int64_t c = threadIdx.x; c < p.channels; c += kPoolThreads) {
    T value{0};
    for (int64_t s = 0; s < splits; ++s) value += factors[s] * call.sums(b, s, r, 0)[c];
    value = none ? T{0} : value / sum * call.weight(c) + call.bias(c);
    to[c] = from_compute<S>(value);
  }
}

template <typename S>
cudaError_t merge(const PoolCall<S>& call, cudaStream_t stream) {
  return launch_pool(merge_kernel<S>, call.p().batch * call.plan.rows, kPoolThreads, 0, stream,
                     call);
}

// Tensor cores, or FMA units.
template <typename S>
cudaError_t one_pass(const PoolCall<S>& call, cudaStream_t stream) {
  const bool whole = has_whole_pieces<S>(call.p().x, call.p().channels);
  cudaError_t error = stack_rows(call, false, stream);
  if (error != cudaSuccess) return error;
  if constexpr (sizeof(S) == 2) {
    error = launch_tiles(forward_tiles_kernel<S>, call, call.plan.groups, stream, whole);
    if (call.plan.splits == 1) return error;
  } else {
    error = launch_tiles(forward_fma_kernel<S>, call, call.plan.groups, stream, whole);
  }
  return error == cudaSuccess ? merge(call, stream) : error;
}

template <typename S>
cudaError_t forward(const PoolParams& p, const Device& device, void* workspace,
                    cudaStream_t stream) {
  PoolCall<S> call{};
  call.g.forward = p;
  call.plan = pool_plan(p, device);
  call.memory = static_cast<char*>(workspace);
  const int64_t rows = p.batch * call.plan.rows;
  if (rows == 0) return cudaSuccess;
  if (call.plan.kernels != PoolKernels::kSimple) return one_pass(call, stream);
  cudaError_t error = simple_scores(call, false, stream);
  if (error == cudaSuccess) {
    error = launch_pool(simple_softmax_kernel<S>, rows, kPoolThreads, 0, stream, call);
  }
  if (error == cudaSuccess) error = simple_sums(call, stream);
  return error == cudaSuccess ? merge(call, stream) : error;
}

}  // namespace

int64_t pool_workspace(const PoolParams& params, const Device& device) {
  return pool_plan(params, device).bytes;
}

cudaError_t pool_forward(const PoolParams& params, const Device& device, void* workspace,
                         cudaStream_t stream) {
  return with_dtype(params.dtype, [&](auto element) {
    return forward<decltype(element)>(params, device, workspace, stream);
  });
}

}  // namespace x_rope_cls::cuda
