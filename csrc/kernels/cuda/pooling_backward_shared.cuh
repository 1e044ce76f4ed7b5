// What the warps of a block of pooling backward share.
#pragma once

#include "pooling_tile.cuh"

namespace x_rope_cls::cuda {
namespace {

constexpr int kScoreFloats = kPoolRows * kPoolTokens;           // of one kind and warp
constexpr int kStackBytes = kPoolRows * kPoolBackwardSlab * 2;  // of one kind and warp
constexpr int kWeightBytes = kPoolRows * kPoolTokens * 2;       // of one kind

struct BackwardShared {
  char* stack;     // of this warp: queries, then gradients, (32, slab)
  float* partial;  // (warps, 2, 2, 16, 8)
  float2* moments;
  char* weights;                 // scale * ds, then p: (2, 2, 16, 8)
  float* constants;              // (16, kPoolConstants)
  float *grad_sum, *weight_sum;  // (16) each
  float2* token_sums;            // (4, 16): of four rows each, for the normalisation

  __device__ BackwardShared(char* memory, int64_t warps, int warp) {
    stack = memory + warp * 2 * kStackBytes;
    partial = reinterpret_cast<float*>(memory + warps * 2 * kStackBytes);
    moments = reinterpret_cast<float2*>(partial + warps * 2 * kScoreFloats);
    weights = reinterpret_cast<char*>(moments + warps * kPoolTokens);
    constants = reinterpret_cast<float*>(weights + 2 * kWeightBytes);
    grad_sum = constants + kPoolConstants * kPoolRows;
    weight_sum = grad_sum + kPoolRows;
    token_sums = reinterpret_cast<float2*>(weight_sum + kPoolRows);
  }
  __device__ float constant(PoolConstant which, int row) const {
    return constants[row * kPoolConstants + which];
  }
};

}  // namespace
}  // namespace x_rope_cls::cuda
