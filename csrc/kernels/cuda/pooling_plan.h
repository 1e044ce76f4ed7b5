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
// Tile of the kernels of float32 and float64 on the FMA units: tokens, rows, and bytes of a token
// that a warp has, 16 a lane.
inline constexpr int kFmaTokens = 8;
inline constexpr int kFmaRows = 8;
inline constexpr int kFmaSlabBytes = 512;
// At most, and as many as a multiprocessor has registers for: 1,536 channels of float32, 768 of
// float64.
inline constexpr int kFmaWarps = 12;
inline constexpr int kFmaMostStages = 2;
// Numbers that backward keeps of a tile and a group of rows where there are several groups: scale *
// ds, then p, and four of each token for its normalisation.
inline constexpr int kFmaRecord = 2 * kFmaRows * kFmaTokens + 4 * kFmaTokens;
inline constexpr int64_t kPoolMostSplits = 256;
// Rows and tokens that a block of the kernels without tensor cores sums up at once.
inline constexpr int kPoolSimpleRows = 8;
inline constexpr int kPoolSimpleTokens = 32;
inline constexpr int kPoolThreads = 128;
inline constexpr int kPoolConstants = 8;  // numbers of a row that are the same for all tokens

enum class PoolKernels : int32_t {
  kSimple,      // any dtype and size; tokens are read twice, three times backward
  kFma,         // float32 and float64
  kTensorCores  // bfloat16 and float16
};

struct PoolPlan {
  PoolKernels kernels;
  bool normalised;
  bool weighted;         // sums of the normalised tokens' weights too, for dweight
  int64_t rows;          // heads * queries
  int64_t groups;        // of rows, a block each
  int64_t group_rows;    // of a whole group
  int64_t splits;        // of the tokens, a block each
  int64_t split_tokens;  // whole tiles
  int64_t padded;        // channels of all warps
  int32_t warps, stages;
  int64_t shared_bytes;
  int64_t kinds;  // sums a row and channel
  // Offsets in bytes.
  int64_t moments;    // (batch, tokens, 2): mean and inverse of the spread
  int64_t scores;     // (1 or 2, batch, rows, tokens)
  int64_t records;    // (batch, tiles, groups, kFmaRecord)
  int64_t stack;      // (batch, groups, 1 or 2, group_rows, padded), dtype: queries and gradients
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

// Likewise of a block of the FMA kernels, of `size` bytes a number: tiles, stacked rows (backward),
// partial scores of two tiles, moments, constants (backward), weights.
inline int64_t fma_shared_bytes(int64_t warps, int64_t stages, bool backward, int64_t size) {
  const int64_t kinds = backward ? 2 : 1, cells = int64_t{kFmaRows} * kFmaTokens;
  const int64_t stacked = backward ? int64_t{2} * kFmaRows * kFmaSlabBytes : 0;
  const int64_t constants = backward ? int64_t{kPoolConstants} * kFmaRows : 0;
  return warps * (stages * kFmaTokens * kFmaSlabBytes + stacked +
                  (2 * kinds * cells + int64_t{2} * kFmaTokens + kinds * cells) * size) +
         constants * size;
}

// Of the FMA kernel of dx: weights of a group and a tile.
inline constexpr int64_t fma_token_bytes(int64_t warps, int64_t size) {
  return warps * (int64_t{2} * kFmaRows * kFmaTokens * size + int64_t{kFmaTokens} * kFmaSlabBytes);
}

// Cuts the tokens into enough parts to have `at_once` blocks, of `least` tokens or more, and of
// whole tiles.
inline void split_tokens(PoolPlan& plan, int64_t tokens, int64_t blocks, int64_t at_once,
                         int64_t least, int64_t tile) {
  int64_t splits = pool_ceil(at_once < 1 ? 1 : at_once, blocks < 1 ? 1 : blocks);
  if (splits > tokens / least) splits = tokens / least;
  if (splits > kPoolMostSplits) splits = kPoolMostSplits;
  if (splits < 1) splits = 1;
  plan.split_tokens = pool_ceil(pool_ceil(tokens, splits), tile) * tile;
  plan.splits = tokens == 0 ? 1 : pool_ceil(tokens, plan.split_tokens);
}

// Tensor cores whenever elements are 16-bit: reading them at bandwidth B asks for 2 R B flop/s
// forward (4 flop for each of R rows and 2 bytes), that is 4 R TFLOP/s on an A100 (2.0 TB/s; 19.5
// of FMA, 312 of mma) and 6.7 R on an H100 (3.35 TB/s; 67 and 990). FMA units would be the limit
// from 5 to 10 rows on before a single conversion is counted, while 16 padded rows take a fifth
// (A100) and a ninth (H100) of the tensor cores, so that fewer rows need no kernel of their own.
//
// False, and nothing of the plan changed, where they do not take the call.
inline bool plan_tensor_cores(PoolPlan& plan, const PoolParams& p, const Device& device,
                              bool backward) {
  const int64_t slab = backward ? kPoolBackwardSlab : kPoolForwardSlab;
  const int64_t warps = pool_ceil(p.channels, slab);
  const bool half = p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16;
  const bool cancels = backward && plan.normalised && p.channels < kPoolLeastNormalised;
  if (!half || cancels || warps > (backward ? kPoolBackwardWarps : kPoolForwardWarps)) return false;
  int32_t stages = kPoolMostStages;
  while (stages > 0 && pool_shared_bytes(warps, stages, backward) > device.shared_per_block) {
    --stages;
  }
  if (stages == 0) return false;
  plan.kernels = PoolKernels::kTensorCores;
  plan.warps = static_cast<int32_t>(warps);
  plan.stages = stages;
  plan.shared_bytes = pool_shared_bytes(warps, stages, backward);
  plan.padded = warps * slab;
  plan.group_rows = kPoolRows;
  plan.groups = pool_ceil(plan.rows, kPoolRows);
  // Blocks of at least 64 tokens, and of so many that the sums they write (4 bytes a row) stay well
  // below what they read (2 bytes a token).
  const int64_t at_once =
      device.shared_per_multiprocessor / (plan.shared_bytes + 1024) * device.multiprocessors;
  const int64_t least = plan.rows > 8 ? 8 * kPoolRows : 4 * kPoolRows;
  split_tokens(plan, p.tokens, p.batch * plan.groups, at_once, least, kPoolTokens);
  return true;
}

// Likewise the FMA units, for float32 and float64.
inline bool plan_fma(PoolPlan& plan, const PoolParams& p, const Device& device, bool backward) {
  if (p.dtype != DType::kFloat32 && p.dtype != DType::kFloat64) return false;
  const int64_t size = p.dtype == DType::kFloat64 ? 8 : 4;
  const int64_t warps = pool_ceil(p.channels * size, kFmaSlabBytes);
  if (warps > kFmaWarps) return false;
  int32_t stages = kFmaMostStages;
  while (stages > 0 && fma_shared_bytes(warps, stages, backward, size) > device.shared_per_block) {
    --stages;
  }
  if (stages == 0) return false;
  plan.kernels = PoolKernels::kFma;
  plan.warps = static_cast<int32_t>(warps);
  plan.stages = stages;
  plan.shared_bytes = fma_shared_bytes(warps, stages, backward, size);
  plan.padded = warps * (kFmaSlabBytes / size);
  plan.group_rows = kFmaRows;
  plan.groups = pool_ceil(plan.rows, kFmaRows);
  int64_t resident = device.shared_per_multiprocessor / (plan.shared_bytes + 1024);
  if (resident > kFmaWarps / warps) resident = kFmaWarps / warps;
  const int64_t least = int64_t{8} * kFmaRows;  // sums are an eighth of the tokens
  split_tokens(plan, p.tokens, p.batch * plan.groups, resident * device.multiprocessors, least,
               kFmaTokens);
  return true;
}

inline void plan_simple(PoolPlan& plan, const PoolParams& p, const Device& device) {
  plan.kernels = PoolKernels::kSimple;
  plan.group_rows = kPoolSimpleRows;
  plan.groups = pool_ceil(plan.rows, kPoolSimpleRows);
  const int64_t blocks = p.batch * plan.groups * pool_ceil(p.channels, kPoolThreads);
  const int64_t at_once = int64_t{8} * device.multiprocessors / (blocks < 1 ? 1 : blocks);
  split_tokens(plan, p.tokens, 1, at_once, int64_t{2} * kPoolSimpleTokens, kPoolSimpleTokens);
}

inline PoolPlan make_pool_plan(const PoolParams& p, const Device& device, bool backward,
                               bool weighted) {
  PoolPlan plan{};
  plan.rows = p.heads * p.queries;
  plan.normalised = p.norm != PoolNorm::kNone;
  plan.weighted = weighted;
  plan.kinds = weighted ? 2 : 1;
  plan.splits = 1;
  const bool any = plan.rows > 0 && p.tokens > 0;
  if (plan.rows > 0 && !(any && (plan_tensor_cores(plan, p, device, backward) ||
                                 plan_fma(plan, p, device, backward)))) {
    plan_simple(plan, p, device);
  }
  const int64_t size = p.dtype == DType::kFloat64 ? 8 : 4;
  const auto take = [&](int64_t bytes) {
    const int64_t offset = plan.bytes;
    plan.bytes += pool_ceil(bytes, 256) * 256;
    return offset;
  };
  const int64_t row_count = p.batch * plan.rows;
  if (plan.kernels == PoolKernels::kSimple) {
    if (plan.normalised) plan.moments = take(p.batch * p.tokens * 2 * size);
    plan.scores = take((backward ? 2 : 1) * row_count * p.tokens * size);
  } else {
    const int64_t element = plan.kernels == PoolKernels::kTensorCores ? 2 : size;
    const int64_t stacks = backward ? 2 * p.batch : p.query_batch;
    plan.stack = take(stacks * plan.groups * plan.group_rows * plan.padded * element);
    plan.constants = take(row_count * kPoolConstants * size);
    if (backward && plan.kernels == PoolKernels::kFma && plan.groups > 1) {
      plan.records =
          take(p.batch * pool_ceil(p.tokens, kFmaTokens) * plan.groups * kFmaRecord * size);
    }
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
