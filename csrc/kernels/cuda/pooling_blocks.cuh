// What the kernels that read each token once share: a block's place in the call, rows stacked as
// they want them, pieces of 16 bytes, and how they are launched.
#pragma once

#include "mma.cuh"
#include "pooling_common.cuh"

namespace x_rope_cls::cuda {
namespace {

// The block's place in the call. Neighbours read the same tokens for other rows.
// 32 bits are enough: the grid and the operators' checks see to it.
struct PoolPlace {
  int32_t group, split, b;
  int32_t first, last;  // tokens

  // group_blocks: groups of rows, a block each; 1 where a block goes through all of them.
  __device__ PoolPlace(const PoolPlan& plan, int64_t tokens, int64_t group_blocks) {
    const auto groups = static_cast<uint32_t>(group_blocks);
    const auto splits = static_cast<uint32_t>(plan.splits);
    group = static_cast<int32_t>(blockIdx.x % groups);
    split = static_cast<int32_t>(blockIdx.x / groups % splits);
    b = static_cast<int32_t>(blockIdx.x / groups / splits);
    const int64_t start = split * plan.split_tokens, end = start + plan.split_tokens;
    first = static_cast<int32_t>(start);
    last = static_cast<int32_t>(end < tokens ? end : tokens);
  }
};

// 16 bytes at once: a struct of eight elements would be copied one by one.
__device__ __forceinline__ uint4 load_piece(const void* from) {
  return *static_cast<const uint4*>(from);
}
__device__ __forceinline__ void store_piece(void* to, const uint4& piece) {
  *static_cast<uint4*>(to) = piece;
}

// The same number, of which the compiler does not know that it is the same in every step: what is
// computed from it is computed anew instead of being kept in registers that the loop lacks.
__device__ __forceinline__ int forget(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Elements of a piece to memory where it cannot be written whole: those below `count`.
template <typename S>
__device__ void store_elements(S* to, int64_t stride, const void* piece, int64_t count) {
#pragma unroll 1
  for (int e = 0; e < kPiece<S> && e < count; ++e) to[e * stride] = static_cast<const S*>(piece)[e];
}

// Constants of a row.
enum PoolConstant {
  kScoreOffset,  // scale * <q, bias> in units of log2
  kGradOffset,   // <g, bias> - <g, pooled> + grad_lse
  kShift,        // logsumexp in units of log2, infinite where there is nothing to attend to
  kQueryMean,    // mean over the channels of q * weight (LayerNorm)
  kGradMean      // likewise of g
};

// Rows of queries (and gradients) times the weight of the normalisation, as blocks want them:
// dense, padded with zeros to whole groups of rows and all channels of the warps. A warp a row.
template <typename S>
__global__ void __launch_bounds__(kPoolThreads)
    stack_rows_kernel(const __grid_constant__ PoolCall<S> call, int64_t batch, bool backward) {
  using T = Compute<S>;
  const PoolParams& p = call.p();
  const PoolPlan& plan = call.plan;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kPoolThreads / 32) + threadIdx.x / 32;
  const int64_t padded_rows = plan.groups * plan.group_rows;
  if (index >= batch * padded_rows) return;
  const int64_t b = index / padded_rows, r = index % padded_rows, lane = threadIdx.x % 32;
  const bool there = r < plan.rows;
  const int kinds = backward ? 2 : 1;
  const int64_t group = b * plan.groups + r / plan.group_rows;
  S* const to =
      call.stack() + (group * kinds * plan.group_rows + r % plan.group_rows) * plan.padded;
  S* const to_grad = to + plan.group_rows * plan.padded;
  T offset{0}, grad_offset{0}, mean{0}, grad_mean{0};
  for (int64_t c = lane; c < plan.padded; c += 32) {
    const bool inside = there && c < p.channels;
    const T query = inside ? call.query(b, r, c) : T{0};
    const T weight = inside ? call.weight(c) : T{0}, bias = inside ? call.bias(c) : T{0};
    const S scaled = from_compute<S>(query * weight);
    to[c] = scaled;
    offset += query * bias;
    mean += to_compute(scaled);
    if (!backward) continue;
    const T grad = inside ? call.grad(b, r, c) : T{0};
    const S scaled_grad = from_compute<S>(grad * weight);
    to_grad[c] = scaled_grad;
    grad_offset += grad * bias - (inside ? grad * call.pooled(b, r, c) : T{0});
    grad_mean += to_compute(scaled_grad);
  }
  offset = warp_sum(offset);
  mean = warp_sum(mean);
  grad_offset = warp_sum(grad_offset);
  grad_mean = warp_sum(grad_mean);
  if (lane >= kPoolConstants || !there) return;
  // A lane each, because together they are whole sectors.
  T constant = lane == kScoreOffset ? offset * static_cast<T>(p.scale * kLog2E) : T{0};
  if (backward) {
    const T per_channel = p.norm == PoolNorm::kLayer ? T{1} / static_cast<T>(p.channels) : T{0};
    if (lane == kGradOffset) constant = grad_offset + call.lse_grad(b, r);
    if (lane == kShift) constant = call.shift(b, r);
    if (lane == kQueryMean) constant = mean * per_channel;
    if (lane == kGradMean) constant = grad_mean * per_channel;
  }
  call.constants()[(b * plan.rows + r) * kPoolConstants + lane] = constant;
}

template <typename S>
cudaError_t stack_rows(const PoolCall<S>& call, bool backward, cudaStream_t stream) {
  const int64_t batch = backward ? call.p().batch : call.p().query_batch;
  return launch_pool(stack_rows_kernel<S>,
                     pool_ceil(batch * call.plan.groups * call.plan.group_rows, kPoolThreads / 32),
                     kPoolThreads, 0, stream, call, batch, backward);
}

// Whether pieces of 16 bytes can be read or written along the channels.
template <typename S>
bool has_whole_pieces(const Tensor3& t, int64_t channels) {
  const auto fits = [](int64_t elements) {
    return elements * static_cast<int64_t>(sizeof(S)) % 16 == 0;
  };
  return t.stride_c == 1 && fits(channels) && fits(t.stride_b) && fits(t.stride_n) &&
         reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
}

// Launches a kernel that may need more shared memory than every kernel may have.
template <typename Kernel, typename Call, typename... More>
cudaError_t launch_tiles(Kernel* kernel, const Call& call, int64_t group_blocks,
                         cudaStream_t stream, const More&... more) {
  const PoolPlan& plan = call.plan;
  if (plan.shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  return launch_pool(kernel, call.p().batch * plan.splits * group_blocks, 32 * plan.warps,
                     plan.shared_bytes, stream, call, more...);
}

}  // namespace
}  // namespace x_rope_cls::cuda
