// What all pooling kernels share: where tokens, rows and scratch memory lie, and sums over a warp
// or a block in a fixed order.
#pragma once

#include <cstdint>

#include "numeric.cuh"
#include "pooling_plan.h"

namespace x_rope_cls::cuda {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr uint32_t kAllLanes = 0xffffffffU;

// Two numbers of a row and a split, moved at once: apart, each would move sectors half of which it
// does not use.
template <typename T>
struct alignas(2 * sizeof(T)) PoolStats {
  T first, second;
};

// A backward call, or a forward call with only `forward` filled in.
template <typename S>
struct PoolCall {
  using T = Compute<S>;
  PoolBackwardParams g;
  PoolPlan plan;
  char* memory;

  __host__ __device__ const PoolParams& p() const { return g.forward; }
  __device__ T* moments() const { return reinterpret_cast<T*>(memory + plan.moments); }
  __device__ T* scores() const { return reinterpret_cast<T*>(memory + plan.scores); }
  __device__ T* constants() const { return reinterpret_cast<T*>(memory + plan.constants); }
  __device__ S* stack() const { return reinterpret_cast<S*>(memory + plan.stack); }
  // Sums of kind `kind` of row `row` over the tokens of one split.
  __device__ T* sums(int64_t b, int64_t split, int64_t row, int64_t kind) const {
    const int64_t at = ((b * plan.splits + split) * plan.rows + row) * plan.kinds + kind;
    return reinterpret_cast<T*>(memory + plan.sums) + at * p().channels;
  }
  // Forward: maximum (in units of log2) and sum of the weights. Backward: sums of scale * ds and p.
  __device__ PoolStats<T>* stats(int64_t b, int64_t split, int64_t row) const {
    return reinterpret_cast<PoolStats<T>*>(memory + plan.stats) +
           (b * plan.rows + row) * plan.splits + split;
  }
  // What a row of batch b adds to the gradients of query (0), weight (1) and bias (2).
  __device__ T* merged(int64_t what, int64_t b, int64_t row) const {
    return reinterpret_cast<T*>(memory + plan.merged) +
           ((what * p().batch + b) * plan.rows + row) * p().channels;
  }

  __device__ const S* token(int64_t b, int64_t n) const {
    return static_cast<const S*>(p().x.data) + b * p().x.stride_b + n * p().x.stride_n;
  }
  __device__ bool counts(int64_t b, int64_t n) const {
    const PoolParams& q = p();
    return q.key_mask == nullptr ||
           q.key_mask[b * q.key_mask_stride_b + n * q.key_mask_stride_n] != 0;
  }
  __device__ T weight(int64_t c) const {
    return p().norm_weight == nullptr ? T{1} : static_cast<const T*>(p().norm_weight)[c];
  }
  __device__ T bias(int64_t c) const {
    return p().norm_bias == nullptr ? T{0} : static_cast<const T*>(p().norm_bias)[c];
  }
  // In 32 bits: a 64-bit division is a subroutine.
  __device__ uint32_t head_of(int64_t row) const {
    return static_cast<uint32_t>(row) / static_cast<uint32_t>(p().queries);
  }
  __device__ uint32_t query_of(int64_t row) const {
    return static_cast<uint32_t>(row) % static_cast<uint32_t>(p().queries);
  }
  __device__ const S* row4(const Tensor4& t, int64_t b, int64_t row) const {
    return static_cast<const S*>(t.data) + b * t.stride_b + head_of(row) * t.stride_h +
           query_of(row) * t.stride_n;
  }
  __device__ T query(int64_t b, int64_t row, int64_t c) const {
    return to_compute(row4(p().query, b, row)[c * p().query.stride_d]);
  }
  __device__ T grad(int64_t b, int64_t row, int64_t c) const {
    return to_compute(row4(g.grad, b, row)[c * g.grad.stride_d]);
  }
  __device__ T pooled(int64_t b, int64_t row, int64_t c) const {
    return to_compute(static_cast<const S*>(p().pooled)[(b * plan.rows + row) * p().channels + c]);
  }
  __device__ T lse_grad(int64_t b, int64_t row) const {
    if (g.grad_lse == nullptr) return T{0};
    return static_cast<const T*>(
        g.grad_lse)[b * g.grad_lse_stride_b + head_of(row) * g.grad_lse_stride_h +
                    query_of(row) * g.grad_lse_stride_m];
  }
  // Subtracted from scores in units of log2: infinite where there is nothing to attend to.
  __device__ T shift(int64_t b, int64_t row) const {
    const T lse = static_cast<const T*>(p().lse)[b * plan.rows + row];
    return lse == -static_cast<T>(INFINITY) ? static_cast<T>(INFINITY)
                                            : lse * static_cast<T>(kLog2E);
  }
};

__device__ __forceinline__ float power_of_two(float x) { return exp2f(x); }
__device__ __forceinline__ double power_of_two(double x) { return exp2(x); }

template <typename T>
__device__ __forceinline__ T larger(T a, T b) {
  return a > b ? a : b;
}

// The natural logarithm of sum * 2^maximum.
template <typename T>
__device__ T log_sum(T maximum, T sum) {
  if (sum == T{0}) return -static_cast<T>(INFINITY);
  return static_cast<T>((static_cast<double>(maximum) + log2(static_cast<double>(sum))) * kLn2);
}

// Of all 32 lanes; every lane gets the sum.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(kAllLanes, x, by);
  return x;
}

// Of all kPoolThreads threads; `memory` has a place for each.
template <typename T, typename Combine>
__device__ T block_combine(T x, T* memory, const Combine& combine) {
  __syncthreads();  // `memory` may still be read from before
  memory[threadIdx.x] = x;
  for (int by = kPoolThreads / 2; by > 0; by /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < by) {
      memory[threadIdx.x] = combine(memory[threadIdx.x], memory[threadIdx.x + by]);
    }
  }
  __syncthreads();
  return memory[0];
}
template <typename T>
__device__ T block_sum(T x, T* memory) {
  return block_combine(x, memory, [](T a, T b) { return a + b; });
}

// Launches `kernel` with as many blocks as there is work for.
template <typename Kernel, typename Call, typename... More>
cudaError_t launch_pool(Kernel* kernel, int64_t blocks, int64_t threads, int64_t shared,
                        cudaStream_t stream, const Call& call, const More&... more) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
           static_cast<size_t>(shared), stream>>>(call, more...);
  return cudaGetLastError();
}

}  // namespace
}  // namespace x_rope_cls::cuda
