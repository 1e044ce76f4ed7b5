// How a pooling call is cut, and where its scratch memory lies: functions of shapes and device
// alone, so that results depend on nothing else. No CUDA types.
#pragma once

#include <cstdint>

#include "../pooling.h"
#include "device.h"

namespace x_rope_cls::cuda {

// Tile of the tensor-core kernels: 16 tokens and 16 rows, the shape of one mma. More rows take more
// blocks, which find the tokens in the L2 cache.
inline constexpr int kPoolTokens = 16;
inline constexpr int kPoolRows = 16;
// At most; more would leave too few registers a thread.
inline constexpr int kPoolForwardWarps = 12;   // 1,536 channels
inline constexpr int kPoolBackwardWarps = 16;  // 1,024 channels
// Channels of a warp: as many as its sums have registers for (16 rows of 128 channels are 64 a
// lane; the backward pass has two kinds of sums).
inline constexpr int kPoolForwardSlab = 128;
inline constexpr int kPoolBackwardSlab = 64;
inline constexpr int kPoolMostStages = 3;
// The gradient of a normalised token is what is left once its part along the token is taken away:
// in a few dimensions next to nothing, and less than rounding of 16-bit tokens. Fewer channels
// than these take the kernels that normalise in float32.
inline constexpr int kPoolLeastNormalised = 8;
inline constexpr int64_t kPoolMostSplits = 256;
// Rows and tokens that a block of the kernels without tensor cores sums up at once.
inline constexpr int kPoolSimpleRows = 8;
inline constexpr int kPoolSimpleTokens = 32;
inline constexpr int kPoolThreads = 128;
inline constexpr int kPoolConstants = 8;  // numbers of a row that are the same for all tokens

struct PoolPlan {
  bool tensor_cores;
  bool normalised;
  bool weighted;         // sums of the normalised tokens' weights too, for dweight
  int64_t rows;          // heads * queries
  int64_t groups;        // of rows, a block each
  int64_t splits;        // of the tokens, a block each
  int64_t split_tokens;  // a multiple of kPoolTokens
  int64_t padded;        // channels of all warps
  int32_t warps, stages;
  int64_t shared_bytes;
  int64_t kinds;  // sums a row and channel
  // Offsets in bytes.
  int64_t moments;    // (batch, tokens, 2): mean and inverse of the spread
  int64_t scores;     // (1 or 2, batch, rows, tokens)
  int64_t stack;      // (batch, groups, 1 or 2, 16, padded), dtype: rows of queries and gradients
  int64_t constants;  // (batch, rows, kPoolConstants)
  int64_t sums;       // (batch, splits, rows, kinds, channels)
  int64_t stats;      // (batch, rows, splits, 2)
  int64_t merged;     // (3, batch, rows, channels)
  int64_t bytes;
};

inline int64_t pool_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Shared memory of a tensor-core block, in the order of the kernels: token tiles, stacked rows
// (backward), partial scores of each warp, weights, moments of each warp's channels, and numbers
// of rows and tokens.
inline int64_t pool_shared_bytes(int64_t warps, int64_t stages, bool backward) {
  const int64_t slab = backward ? kPoolBackwardSlab : kPoolForwardSlab;
  const int64_t stacked = backward ? 2 * kPoolRows : kPoolRows;
  return warps * (stages * kPoolTokens * slab * 2 + (backward ? stacked * slab * 2 : 0) +
                  stacked * kPoolTokens * 4 + int64_t{kPoolTokens} * 8) +
         stacked * kPoolTokens * 2 + (backward ? 1152 : 256);
}

// Tensor cores whenever elements are 16-bit: reading them at bandwidth B asks for 2 R B flop/s
// forward (4 flop for each of R rows and 2 bytes), that is 4 R TFLOP/s on an A100 (2.0 TB/s; 19.5
// of FMA, 312 of mma) and 6.7 R on an H100 (3.35 TB/s; 67 and 990). FMA units would be the limit
// from 5 to 10 rows on before a single conversion is counted, while 16 padded rows take a fifth
// (A100) and a ninth (H100) of the tensor cores, so that fewer rows need no kernel of their own.
inline PoolPlan make_pool_plan(const PoolParams& p, const Device& device, bool backward,
                               bool weighted) {
  PoolPlan plan{};
  plan.rows = p.heads * p.queries;
  plan.normalised = p.norm != PoolNorm::kNone;
  plan.weighted = weighted;
  plan.kinds = weighted ? 2 : 1;
  plan.groups = pool_ceil(plan.rows, kPoolRows);
  plan.splits = 1;
  const bool half = p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16;
  const int64_t slab = backward ? kPoolBackwardSlab : kPoolForwardSlab;
  const int64_t warps = pool_ceil(p.channels, slab);
  plan.warps = static_cast<int32_t>(warps);
  plan.stages = kPoolMostStages;
  while (plan.stages > 1 &&
         pool_shared_bytes(warps, plan.stages, backward) > device.shared_per_block) {
    --plan.stages;
  }
  plan.shared_bytes = pool_shared_bytes(warps, plan.stages, backward);
  plan.padded = warps * slab;
  const bool cancels = backward && plan.normalised && p.channels < kPoolLeastNormalised;
  plan.tensor_cores = half && plan.rows > 0 && p.tokens > 0 && !cancels &&
                      warps <= (backward ? kPoolBackwardWarps : kPoolForwardWarps) &&
                      plan.shared_bytes <= device.shared_per_block;
  if (plan.tensor_cores) {
    // Enough blocks to fill the device, of at least 64 tokens, and of so many that the sums
    // they write (4 bytes a row) stay well below what they read (2 bytes a token).
    const int64_t blocks = p.batch * plan.groups;
    const int64_t at_once =
        device.shared_per_multiprocessor / (plan.shared_bytes + 1024) * device.multiprocessors;
    const int64_t least = plan.rows > 8 ? 8 * kPoolRows : 4 * kPoolRows;
    int64_t splits = pool_ceil(at_once < 1 ? 1 : at_once, blocks < 1 ? 1 : blocks);
    if (splits > p.tokens / least) splits = p.tokens / least;
    if (splits > kPoolMostSplits) splits = kPoolMostSplits;
    if (splits < 1) splits = 1;
    plan.split_tokens = pool_ceil(pool_ceil(p.tokens, splits), kPoolTokens) * kPoolTokens;
    plan.splits = pool_ceil(p.tokens, plan.split_tokens);
  }
  if (!plan.tensor_cores && plan.rows > 0) {
    plan.groups = pool_ceil(plan.rows, kPoolSimpleRows);
    const int64_t blocks = p.batch * plan.groups * pool_ceil(p.channels, kPoolThreads);
    int64_t splits = blocks < 1 ? 1 : int64_t{8} * device.multiprocessors / blocks;
    if (splits > p.tokens / (int64_t{2} * kPoolSimpleTokens))
      splits = p.tokens / (int64_t{2} * kPoolSimpleTokens);
    if (splits > kPoolMostSplits) splits = kPoolMostSplits;
    if (splits < 1) splits = 1;
    plan.split_tokens =
        pool_ceil(pool_ceil(p.tokens, splits), kPoolSimpleTokens) * kPoolSimpleTokens;
    plan.splits = p.tokens == 0 ? 1 : pool_ceil(p.tokens, plan.split_tokens);
  }
  const int64_t size = p.dtype == DType::kFloat64 ? 8 : 4;
  const auto take = [&](int64_t bytes) {
    const int64_t offset = plan.bytes;
    plan.bytes += pool_ceil(bytes, 256) * 256;
    return offset;
  };
  const int64_t row_count = p.batch * plan.rows;
  if (plan.tensor_cores) {
    const int64_t stacks = backward ? 2 * p.batch : p.query_batch;
    plan.stack = take(stacks * plan.groups * kPoolRows * plan.padded * 2);
    plan.constants = take(row_count * kPoolConstants * size);
  } else {
    if (plan.normalised) plan.moments = take(p.batch * p.tokens * 2 * size);
    plan.scores = take((backward ? 2 : 1) * row_count * p.tokens * size);
  }
  plan.sums = take(plan.splits * row_count * plan.kinds * p.channels * size);
  plan.stats = take(plan.splits * row_count * 2 * size);
  if (backward) plan.merged = take(3 * row_count * p.channels * size);
  return plan;
}

inline PoolPlan pool_plan(const PoolParams& p, const Device& device) {
  return make_pool_plan(p, device, false, false);
}
inline PoolPlan pool_backward_plan(const PoolBackwardParams& g, const Device& device) {
  return make_pool_plan(g.forward, device, true, g.dweight != nullptr);
}

}  // namespace x_rope_cls::cuda
