// Pooling without tiles, for what the tensor-core kernels do not take: any dtype, any number of
// channels and rows. A warp a token for scores and dx, a thread a channel for sums over tokens;
// scores are kept in scratch memory between the two.
#pragma once

#include "pooling_common.cuh"

namespace x_rope_cls::cuda {
namespace {

template <typename T>
struct Moments {
  T mean, inverse;
};

// Mean and inverse spread of one token; all lanes of a warp call it.
template <typename S>
__device__ Moments<Compute<S>> token_moments(const PoolCall<S>& call, const S* token) {
  using T = Compute<S>;
  const PoolParams& p = call.p();
  const int64_t lane = threadIdx.x % 32;
  const T count = static_cast<T>(p.channels);
  Moments<T> m{T{0}, T{1}};
  if (p.norm == PoolNorm::kNone) return m;
  if (p.norm == PoolNorm::kLayer) {
    T sum{0};
    for (int64_t c = lane; c < p.channels; c += 32) sum += to_compute(token[c * p.x.stride_c]);
    m.mean = warp_sum(sum) / count;
  }
  T squares{0};
  for (int64_t c = lane; c < p.channels; c += 32) {
    const T d = to_compute(token[c * p.x.stride_c]) - m.mean;
    squares += d * d;
  }
  m.inverse = T{1} / sqrt(warp_sum(squares) / count + static_cast<T>(p.norm_eps));
  return m;
}

// Scores of all rows with one token, in units of log2, and inner products with the gradients.
template <typename S>
__global__ void __launch_bounds__(kPoolThreads)
    simple_scores_kernel(const __grid_constant__ PoolCall<S> call, bool backward) {
  using T = Compute<S>;
  const PoolParams& p = call.p();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kPoolThreads / 32) + threadIdx.x / 32;
  if (index >= p.batch * p.tokens) return;
  const int64_t b = index / p.tokens, n = index % p.tokens, lane = threadIdx.x % 32;
  const bool counts = call.counts(b, n);
  const S* token = call.token(b, n);
  const Moments<T> m = counts ? token_moments(call, token) : Moments<T>{T{0}, T{0}};
  if (call.plan.normalised && lane == 0) {
    call.moments()[2 * index] = m.mean;
    call.moments()[2 * index + 1] = m.inverse;
  }
  T* const scores = call.scores();
  T* const others = scores + p.batch * call.plan.rows * p.tokens;
  for (int64_t r = 0; r < call.plan.rows; ++r) {
    T score{0}, other{0};
    for (int64_t c = lane; c < p.channels && counts; c += 32) {
      const T x = (to_compute(token[c * p.x.stride_c]) - m.mean) * m.inverse;
      const T y = x * call.weight(c) + call.bias(c);
      score += call.query(b, r, c) * y;
      if (backward) other += call.grad(b, r, c) * y;
    }
    score = warp_sum(score) * static_cast<T>(p.scale * kLog2E);
    if (backward) other = warp_sum(other);
    if (lane != 0) continue;
    const int64_t at = (b * call.plan.rows + r) * p.tokens + n;
    scores[at] = counts ? score : -static_cast<T>(INFINITY);
    if (backward) others[at] = other;
  }
}

// Scores of one row become weights relative to their maximum.
template <typename S>
__global__ void __launch_bounds__(kPoolThreads)
    simple_softmax_kernel(const __grid_constant__ PoolCall<S> call) {
  using T = Compute<S>;
  __shared__ T memory[kPoolThreads];
  const int64_t row = blockIdx.x, tokens = call.p().tokens;
  T* const scores = call.scores() + row * tokens;
  T largest = -static_cast<T>(INFINITY);
  for (int64_t n = threadIdx.x; n < tokens; n += kPoolThreads) {
    largest = larger(largest, scores[n]);
  }
  largest = block_combine(largest, memory, [](T a, T b) { return larger(a, b); });
  const T shift = largest == -static_cast<T>(INFINITY) ? T{0} : largest;
  T sum{0};
  for (int64_t n = threadIdx.x; n < tokens; n += kPoolThreads) {
    scores[n] = power_of_two(scores[n] - shift);
    sum += scores[n];
  }
  sum = block_sum(sum, memory);
  if (threadIdx.x != 0) return;
  T* const stats = call.stats(row / call.plan.rows, 0, row % call.plan.rows);
  stats[0] = largest;
  stats[1] = sum;
}

// Scores and inner products with the gradient of one row become scale * ds and p. The exact ds sum
// up to grad_lse times the sum of p: what the rounding of pooled leaves over is p times a constant,
// and is taken out.
template <typename S>
__global__ void __launch_bounds__(kPoolThreads)
    simple_score_grads_kernel(const __grid_constant__ PoolCall<S> call) {
  using T = Compute<S>;
  __shared__ T memory[kPoolThreads];
  const PoolParams& p = call.p();
  const int64_t b = blockIdx.x / call.plan.rows, r = blockIdx.x % call.plan.rows;
  T* const scores = call.scores() + blockIdx.x * p.tokens;
  T* const others = scores + p.batch * call.plan.rows * p.tokens;
  T delta{0};
  for (int64_t c = threadIdx.x; c < p.channels; c += kPoolThreads) {
    delta += call.grad(b, r, c) * call.pooled(b, r, c);
  }
  const T lse_grad = call.lse_grad(b, r);
  delta = block_sum(delta, memory) - lse_grad;
  const T shift = call.shift(b, r), scale = static_cast<T>(p.scale);
  T grads{0}, weights{0};
  for (int64_t n = threadIdx.x; n < p.tokens; n += kPoolThreads) {
    const T weight = power_of_two(scores[n] - shift);
    const T grad = weight * (others[n] - delta) * scale;
    scores[n] = grad;
    others[n] = weight;
    grads += grad;
    weights += weight;
  }
  grads = block_sum(grads, memory);
  weights = block_sum(weights, memory);
  const T excess = weights == T{0} ? T{0} : grads / weights - lse_grad * scale;
  for (int64_t n = threadIdx.x; n < p.tokens; n += kPoolThreads) scores[n] -= others[n] * excess;
  if (threadIdx.x != 0) return;
  call.stats(b, 0, r)[0] = weights * lse_grad * scale;
  call.stats(b, 0, r)[1] = weights;
}

// Weighted sums of the normalised tokens, a thread a channel. Tokens that do not count are not
// looked at.
template <typename S>
__global__ void __launch_bounds__(kPoolThreads)
    simple_sums_kernel(const __grid_constant__ PoolCall<S> call, uint32_t pieces) {
  using T = Compute<S>;
  const PoolParams& p = call.p();
  const int64_t row = blockIdx.x / pieces;
  const int64_t c = static_cast<int64_t>(blockIdx.x % pieces) * kPoolThreads + threadIdx.x;
  if (c >= p.channels) return;
  const int64_t b = row / call.plan.rows, r = row % call.plan.rows;
  const T* const first = call.scores() + row * p.tokens;
  const T* const second = first + p.batch * call.plan.rows * p.tokens;
  const T* const moments = call.moments() + 2 * b * p.tokens;
  const bool two = call.plan.kinds == 2;
  T sum{0}, other{0};
  for (int64_t n = 0; n < p.tokens; ++n) {
    if (!call.counts(b, n)) continue;
    T x = to_compute(call.token(b, n)[c * p.x.stride_c]);
    if (call.plan.normalised) x = (x - moments[2 * n]) * moments[2 * n + 1];
    sum += first[n] * x;
    if (two) other += second[n] * x;
  }
  call.sums(b, 0, r, 0)[c] = sum;
  if (two) call.sums(b, 0, r, 1)[c] = other;
}

// Gradient of one token, a warp each.
template <typename S>
__global__ void __launch_bounds__(kPoolThreads)
    simple_token_grads_kernel(const __grid_constant__ PoolCall<S> call) {
  using T = Compute<S>;
  const PoolParams& p = call.p();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kPoolThreads / 32) + threadIdx.x / 32;
  if (index >= p.batch * p.tokens) return;
  const int64_t b = index / p.tokens, n = index % p.tokens, lane = threadIdx.x % 32;
  const T* const grads = call.scores() + b * call.plan.rows * p.tokens + n;
  const T* const weights = grads + p.batch * call.plan.rows * p.tokens;
  const Tensor3& dx = call.g.dx;
  S* const to = static_cast<S*>(dx.data) + b * dx.stride_b + n * dx.stride_n;
  if (!call.counts(b, n)) {
    for (int64_t c = lane; c < p.channels; c += 32) to[c * dx.stride_c] = from_compute<S>(T{0});
    return;
  }
  const bool normalised = call.plan.normalised;
  const T mean = normalised ? call.moments()[2 * index] : T{0};
  const T inverse = normalised ? call.moments()[2 * index + 1] : T{1};
  const S* const token = call.token(b, n);
  const auto grad_of = [&](int64_t c) {
    T sum{0};
    for (int64_t r = 0; r < call.plan.rows; ++r) {
      sum += weights[r * p.tokens] * call.grad(b, r, c) + grads[r * p.tokens] * call.query(b, r, c);
    }
    return sum * call.weight(c);
  };
  const auto unit_of = [&](int64_t c) {
    return (to_compute(token[c * p.x.stride_c]) - mean) * inverse;
  };
  T level{0}, along{0};
  for (int64_t c = lane; c < p.channels && normalised; c += 32) {
    const T grad = grad_of(c);
    if (p.norm == PoolNorm::kLayer) level += grad;
    along += grad * unit_of(c);
  }
  level = warp_sum(level) / static_cast<T>(p.channels);
  along = warp_sum(along) / static_cast<T>(p.channels);
  for (int64_t c = lane; c < p.channels; c += 32) {
    T grad = grad_of(c);
    if (normalised) grad = (grad - level - unit_of(c) * along) * inverse;
    to[c * dx.stride_c] = from_compute<S>(grad);
  }
}

template <typename S>
cudaError_t simple_scores(const PoolCall<S>& call, bool backward, cudaStream_t stream) {
  const int64_t blocks = pool_ceil(call.p().batch * call.p().tokens, kPoolThreads / 32);
  return launch_pool(simple_scores_kernel<S>, blocks, kPoolThreads, 0, stream, call, backward);
}
template <typename S>
cudaError_t simple_sums(const PoolCall<S>& call, cudaStream_t stream) {
  const auto pieces = static_cast<uint32_t>(pool_ceil(call.p().channels, kPoolThreads));
  return launch_pool(simple_sums_kernel<S>, call.p().batch * call.plan.rows * pieces, kPoolThreads,
                     0, stream, call, pieces);
}

}  // namespace
}  // namespace x_rope_cls::cuda
