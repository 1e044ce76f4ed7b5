// Pooling backward. With s = scale <q, y_n>, p = exp(s - lse) and g the gradient of the pooled row,
// ds = p (<g, y_n> - <g, pooled> + grad_lse), dy_n = sum over rows of p g + scale ds q, dq = scale
// sum over n of ds y_n, where y = x' weight + bias and x' is x or the normalised x. Sums over
// tokens are of x' and kept by split: weight and bias come in where they are merged, in order.
#include "launch.h"
#include "pooling_backward_fma.cuh"
#include "pooling_backward_tiles.cuh"
#include "pooling_simple.cuh"

namespace x_rope_cls::cuda {
namespace {

// What one row of one batch adds to the gradients of query, weight and bias. The exact ds sum up to
// grad_lse times the sum of p: what the rounding of pooled leaves over is p times the excess, and
// is taken out here. The sum over tokens of dy and of dy x' are sums over rows of what was summed
// up for them already: g and q times sums of p and ds, or of p x' and ds x'.
template <typename S>
__global__ void __launch_bounds__(kPoolThreads)
    merge_grads_kernel(const __grid_constant__ PoolCall<S> call, uint32_t pieces) {
  using T = Compute<S>;
  __shared__ T memory[kPoolThreads];
  const PoolParams& p = call.p();
  const int64_t row = blockIdx.x / pieces;
  const int64_t c = static_cast<int64_t>(blockIdx.x % pieces) * kPoolThreads + threadIdx.x;
  const int64_t b = row / call.plan.rows, r = row % call.plan.rows;
  const PoolStats<T>* const stats = call.stats(b, 0, r);
  T grads{0}, weights{0};
  for (int64_t s = threadIdx.x; s < call.plan.splits; s += kPoolThreads) {
    const PoolStats<T> own = stats[s];
    grads += own.first;
    weights += own.second;
  }
  grads = block_sum(grads, memory);
  weights = block_sum(weights, memory);
  const T exact = block_sum(threadIdx.x == 0 ? call.lse_grad(b, r) : T{0}, memory) * weights *
                  static_cast<T>(p.scale);
  if (c >= p.channels) return;
  T sum{0}, other{0};
  for (int64_t s = 0; s < call.plan.splits; ++s) {
    sum += call.sums(b, s, r, 0)[c];
    if (call.plan.weighted) other += call.sums(b, s, r, 1)[c];
  }
  const T excess = grads - exact;
  const T dquery = sum * call.weight(c) + grads * call.bias(c) - excess * call.pooled(b, r, c);
  call.merged(0, b, r)[c] = dquery;
  const T grad = call.grad(b, r, c), query = call.query(b, r, c);
  if (call.plan.weighted) {
    call.merged(1, b, r)[c] = grad * other + query * (sum - excess * other);
  }
  if (call.g.dbias != nullptr) call.merged(2, b, r)[c] = grad * weights + query * exact;
}

// to[row][c] = sum over i of from[(i * rows + row) * channels + c]: 32 channels a block, in as many
// partial sums as it has warps.
template <typename T, typename Out>
__global__ void __launch_bounds__(kPoolThreads)
    add_up_kernel(const T* from, int64_t count, int64_t rows, int64_t channels, Out* to) {
  constexpr int kParts = kPoolThreads / 32;
  __shared__ T parts[kParts][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, part = static_cast<int>(threadIdx.x) / 32;
  const int64_t pieces = (channels + 31) / 32;
  const int64_t row = blockIdx.x / pieces, c = blockIdx.x % pieces * 32 + lane;
  T sum{0};
  for (int64_t i = part; i < count && c < channels; i += kParts) {
    sum += from[(i * rows + row) * channels + c];
  }
  parts[part][lane] = sum;
  __syncthreads();
  if (part != 0 || c >= channels) return;
  for (int i = 1; i < kParts; ++i) sum += parts[i][lane];
  to[row * channels + c] = from_compute<Out>(sum);
}

template <typename T, typename Out>
cudaError_t add_up(const T* from, int64_t count, int64_t rows, int64_t channels, Out* to,
                   cudaStream_t stream) {
  return launch_pool(add_up_kernel<T, Out>, rows * pool_ceil(channels, 32), kPoolThreads, 0, stream,
                     from, count, rows, channels, to);
}

template <typename S>
cudaError_t simple_backward(const PoolCall<S>& call, cudaStream_t stream) {
  const PoolParams& p = call.p();
  cudaError_t error = simple_scores(call, true, stream);
  if (error == cudaSuccess) {
    error = launch_pool(simple_score_grads_kernel<S>, p.batch * call.plan.rows, kPoolThreads, 0,
                        stream, call);
  }
  if (error == cudaSuccess) error = simple_sums(call, stream);
  if (error != cudaSuccess || call.g.dx.data == nullptr) return error;
  return launch_pool(simple_token_grads_kernel<S>, pool_ceil(p.batch * p.tokens, kPoolThreads / 32),
                     kPoolThreads, 0, stream, call);
}

// Tensor cores, or FMA units.
template <typename S>
cudaError_t one_pass(const PoolCall<S>& call, cudaStream_t stream) {
  const PoolParams& p = call.p();
  const PoolPlan& plan = call.plan;
  const bool whole = has_whole_pieces<S>(p.x, p.channels);
  const bool whole_grads = has_whole_pieces<S>(call.g.dx, p.channels);
  cudaError_t error = stack_rows(call, true, stream);
  if (error != cudaSuccess) return error;
  const bool dx_later = plan.groups > 1 && call.g.dx.data != nullptr;
  if constexpr (sizeof(S) == 2) {
    error = launch_tiles(backward_tiles_kernel<S>, call, plan.groups, stream, whole, whole_grads);
    if (error != cudaSuccess || !dx_later) return error;
    error = launch_tiles(token_grads_kernel<S>, call, 1, stream, whole, whole_grads);
  } else {
    error = launch_tiles(backward_fma_kernel<S>, call, plan.groups, stream, whole, whole_grads);
    if (error != cudaSuccess || !dx_later) return error;
    PoolCall<S> later = call;
    later.plan.shared_bytes = fma_token_bytes(plan.warps, sizeof(S));
    error = launch_tiles(token_grads_fma_kernel<S>, later, 1, stream, whole, whole_grads);
  }
  return error;
}

template <typename S>
cudaError_t backward(const PoolBackwardParams& g, const Device& device, void* workspace,
                     cudaStream_t stream) {
  using T = Compute<S>;
  const PoolParams& p = g.forward;
  const PoolCall<S> call{g, pool_backward_plan(g, device), static_cast<char*>(workspace)};
  const PoolPlan& plan = call.plan;
  cudaError_t error =
      plan.kernels == PoolKernels::kSimple ? simple_backward(call, stream) : one_pass(call, stream);
  const auto pieces = static_cast<uint32_t>(pool_ceil(p.channels, kPoolThreads));
  if (error == cudaSuccess) {
    error = launch_pool(merge_grads_kernel<S>, p.batch * plan.rows * pieces, kPoolThreads, 0,
                        stream, call, pieces);
  }
  const int64_t size = p.batch * plan.rows * p.channels;
  const T* const merged = reinterpret_cast<const T*>(call.memory + plan.merged);
  if (error == cudaSuccess) {
    const int64_t count = p.query_batch == 1 ? p.batch : 1;
    error = add_up(merged, count, p.query_batch * plan.rows, p.channels, static_cast<S*>(g.dquery),
                   stream);
  }
  if (error == cudaSuccess && g.dweight != nullptr) {
    error = add_up(merged + size, p.batch * plan.rows, 1, p.channels, static_cast<T*>(g.dweight),
                   stream);
  }
  if (error == cudaSuccess && g.dbias != nullptr) {
    error = add_up(merged + 2 * size, p.batch * plan.rows, 1, p.channels, static_cast<T*>(g.dbias),
                   stream);
  }
  return error;
}

}  // namespace

int64_t pool_backward_workspace(const PoolBackwardParams& params, const Device& device) {
  return pool_backward_plan(params, device).bytes;
}

cudaError_t pool_backward(const PoolBackwardParams& params, const Device& device, void* workspace,
                          cudaStream_t stream) {
  return with_dtype(params.forward.dtype, [&](auto element) {
    return backward<decltype(element)>(params, device, workspace, stream);
  });
}

}  // namespace x_rope_cls::cuda
