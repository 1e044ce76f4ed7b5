// Launch choices of attention backward: pure functions of shapes, free of CUDA.
#pragma once

#include <cstdint>

#include "attention_choices.h"

namespace x_rope_cls::cuda {

// A block of the tensor core kernels. Its owners are keys (dK, dV) or queries (dQ); partners are
// the others. Every warp has row tiles of its own, so weights and gradients of scores stay in
// registers.
struct BackwardShape {
  int32_t warps;
  int32_t row_tiles;  // mma tiles of 16 owners a warp
  int32_t owners;     // of a block
  int32_t partners;   // of a tile
  int32_t stages;     // tiles of partners in shared memory
  int32_t blocks;     // a multiprocessor's registers must have room for
};

// Up to 64 channels two row tiles a warp, so that every fragment of the partners feeds two
// products. Beyond, the sums of dK and dV of 32 owners do not fit the registers: one row tile, 8
// warps. At 256 channels not even those of 16 do; dK and dV are summed by kernels of their own, and
// tiles of 16 partners leave registers for the sums and room for two. 8 warps a multiprocessor, as
// FlashAttention-2 has, or more.
constexpr BackwardShape backward_shape(int32_t dim) {
  if (dim <= 64) return {4, 2, 128, 32, 2, 2};
  if (dim <= 128) return {8, 1, 128, 32, 2, 1};
  return {8, 1, 128, 16, 2, 1};
}
constexpr int32_t kNarrowPartners = 16;  // of a tile of tokens without a position, which are few
constexpr bool backward_joins_keys_and_values(int32_t dim) { return dim <= 128; }

// Two tiles of owners, two of partners a stage, and the partners' logsumexp and delta.
constexpr int32_t backward_stage_bytes(int32_t dim) {
  const BackwardShape s = backward_shape(dim);
  return 2 * s.partners * dim * 2 + s.partners * 8;
}
constexpr int32_t backward_shared_bytes(int32_t dim) {
  const BackwardShape s = backward_shape(dim);
  return 2 * s.owners * dim * 2 + s.stages * backward_stage_bytes(dim);
}

// The instance for these sizes; 0: the plain kernels take them.
constexpr int32_t backward_dim(int64_t head_dim, int64_t value_dim, int32_t shared_per_block) {
  const int32_t dim = native_dim(head_dim, value_dim);
  return dim != 0 && backward_shared_bytes(dim) <= shared_per_block ? dim : 0;
}

}  // namespace x_rope_cls::cuda
