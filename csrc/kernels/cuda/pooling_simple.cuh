// Pooling for what the other kernels do not take: any dtype, any number of channels and rows. A
// warp a token for scores and dx, a thread a channel for sums over tokens; scores are kept in
// scratch memory between the two, so that tokens are read twice (three times backward).
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
  constexpr int kRows = 4;  // at once: every x is used for all of them
  for (int64_t first = 0; first < call.plan.rows; first += kRows) {
    T score[kRows] = {}, other[kRows] = {};
    for (int64_t c = lane; c < p.channels && counts; c += 32) {
      const T x = (to_compute(token[c * p.x.stride_c]) - m.mean) * m.inverse;
      const T y = x * call.weight(c) + call.bias(c);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (first + i >= call.plan.rows) break;
        score[i] += call.query(b, first + i, c) * y;
        if (backward) other[i] += call.grad(b, first + i, c) * y;
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (first + i >= call.plan.rows) break;
      const T sum = warp_sum(score[i]) * static_cast<T>(p.scale * kLog2E);
      const T other_sum = backward ? warp_sum(other[i]) : T{0};
      if (lane != 0) continue;
      const int64_t at = (b * call.plan.rows + first + i) * p.tokens + n;
      scores[at] = counts ? sum : -static_cast<T>(INFINITY);
      if (backward) others[at] = other_sum;
    }
  }
}

// Both numbers of a row of all tokens stand with the first split; `neutral` and 0 with the others.
template <typename S>
__device__ void store_stats(const PoolCall<S>& call, int64_t row, Compute<S> first,
                            Compute<S> second, Compute<S> neutral) {
  PoolStats<Compute<S>>* const stats = call.stats(row / call.plan.rows, 0, row % call.plan.rows);
  for (int64_t s = threadIdx.x; s < call.plan.splits; s += kPoolThreads) {
    stats[s] = {s == 0 ? first : neutral, s == 0 ? second : Compute<S>{0}};
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
  store_stats(call, row, largest, sum, largest);
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
  store_stats(call, blockIdx.x, weights * lse_grad * scale, weights, T{0});
}

// Weights, and what else is needed of the tokens of one step.
template <typename T, int kKinds>
struct SimpleStep {
  T weights[kKinds][kPoolSimpleRows][kPoolSimpleTokens];
  T mean[kPoolSimpleTokens], inverse[kPoolSimpleTokens];
  bool counts[kPoolSimpleTokens];
};

// Weighted sums of one split's normalised tokens, a thread a channel, several rows at once. Tokens
// that do not count are not looked at.
template <typename S, int kKinds>
__global__ void __launch_bounds__(kPoolThreads)
    simple_sums_kernel(const __grid_constant__ PoolCall<S> call, uint32_t pieces) {
  using T = Compute<S>;
  __shared__ SimpleStep<T, kKinds> step;
  const PoolParams& p = call.p();
  const PoolPlan& plan = call.plan;
  int64_t block = blockIdx.x;
  const int64_t c = block % pieces * kPoolThreads + threadIdx.x;
  block /= pieces;
  const int64_t first_row = block % plan.groups * kPoolSimpleRows;
  block /= plan.groups;
  const int64_t split = block % plan.splits, b = block / plan.splits;
  const int64_t start = split * plan.split_tokens, end = start + plan.split_tokens;
  const int64_t last = end < p.tokens ? end : p.tokens;
  const T* const weights = call.scores() + b * plan.rows * p.tokens;
  const T* const moments = call.moments() + 2 * b * p.tokens;
  T sums[kKinds][kPoolSimpleRows] = {};
  for (int64_t first = start; first < last; first += kPoolSimpleTokens) {
    __syncthreads();  // the last step's weights may still be read
    constexpr int kCells = kPoolSimpleRows * kPoolSimpleTokens;
    for (int i = static_cast<int>(threadIdx.x); i < kKinds * kCells; i += kPoolThreads) {
      const int kind = i / kCells, row = i % kCells / kPoolSimpleTokens, j = i % kPoolSimpleTokens;
      const bool is_there = first_row + row < plan.rows && first + j < last;
      const int64_t at = ((kind * p.batch * plan.rows) + first_row + row) * p.tokens + first + j;
      step.weights[kind][row][j] = is_there ? weights[at] : T{0};
    }
    if (threadIdx.x < kPoolSimpleTokens) {
      const int64_t n = first + threadIdx.x;
      const bool counts = n < last && call.counts(b, n);
      step.counts[threadIdx.x] = counts;
      const bool normal = counts && plan.normalised;
      step.mean[threadIdx.x] = normal ? moments[2 * n] : T{0};
      step.inverse[threadIdx.x] = normal ? moments[2 * n + 1] : T{1};
    }
    __syncthreads();
    if (c >= p.channels) continue;
#pragma unroll 8
    for (int j = 0; j < kPoolSimpleTokens; ++j) {
      T x{0};
      if (step.counts[j]) x = to_compute(call.token(b, first + j)[c * p.x.stride_c]);
      x = (x - step.mean[j]) * step.inverse[j];
#pragma unroll
      for (int kind = 0; kind < kKinds; ++kind) {
#pragma unroll
        for (int r = 0; r < kPoolSimpleRows; ++r) sums[kind][r] += step.weights[kind][r][j] * x;
      }
    }
  }
  if (c >= p.channels) return;
#pragma unroll
  for (int kind = 0; kind < kKinds; ++kind) {
#pragma unroll
    for (int r = 0; r < kPoolSimpleRows; ++r) {
      if (first_row + r < plan.rows) call.sums(b, split, first_row + r, kind)[c] = sums[kind][r];
    }
  }
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
  const PoolPlan& plan = call.plan;
  const int64_t blocks = plan.rows == 0 ? 0 : call.p().batch * plan.splits * plan.groups * pieces;
  auto* const kernel = plan.kinds == 2 ? simple_sums_kernel<S, 2> : simple_sums_kernel<S, 1>;
  return launch_pool(kernel, blocks, kPoolThreads, 0, stream, call, pieces);
}

}  // namespace
}  // namespace x_rope_cls::cuda
