// What the parts of attention backward hand to each other. The passes:
//   prepare   orders of tokens; q and k packed, rotated; per row the logsumexp and
//             delta = sum(out * grad_out) - grad_lse
//   sums      float32 (float64) sums of dQ, dK and dV, by place in the order of the tokens; of
//             tokens with a position in two parts: what rotated partners gave, in the rotated
//             frame, and what unrotated ones gave
//   finish    turns the first part back, adds the second, rounds and stores
// dQ has kernels of its own, which compute the scores a second time: sums without atomics, so
// that results are the same in every run. Un-rotating at the end costs one pass over the sums.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../attention.h"
#include "attention_common.cuh"
#include "prepare.cuh"

namespace x_rope_cls::cuda {

// Rows of q, k, v or grad_out as the plain kernels read them: any strides.
struct PlainRows {
  Tensor4 rows;
  int32_t channels;
  bool whole;     // pieces of 16 bytes are aligned
  bool gathered;  // by token; else by place
};

// What all kernels of the sums read. Stats are pairs of the compute type by place: the logsumexp
// (+infinity where all weights are 0) and delta.
struct BackwardCommon {
  TokenOrder queries, keys;
  int64_t batch, heads, key_heads, query_count, key_count;
  const void* stats;  // (batch, heads, queries, 2)
  ScoreBias bias;
  DropoutParams dropout;
  double scale;
  double kept;  // factor of the weights that dropout keeps; 1 without
};

// One sum: (batch, heads, tokens, width) by place. `raw`: what unrotated partners gave to tokens
// with a position; null where there are none.
struct GradSums {
  void* main;
  void* raw;
  int32_t width;
};

struct PlainBackwardArgs {
  BackwardCommon common;
  PlainRows q, q_raw, k, k_raw, v, grad_out;
  GradSums dq, dk, dv;
};

// attention_backward_plain.cu: any dtype and size, on the FMA units.
cudaError_t plain_backward(DType dtype, const PlainBackwardArgs& args, cudaStream_t stream);

struct MmaBackwardArgs {
  BackwardCommon common;  // stats in log2
  TileRows q, q_raw, k, k_raw, v, grad_out;
  GradSums dq, dk, dv;
  float scale_log2;
  int32_t group;                   // query heads a key head
  int32_t query_tiles, key_tiles;  // of a head, enough for any split
};

// attention_backward_<kDim>.cu
template <int kDim>
cudaError_t mma_backward(DType dtype, const MmaBackwardArgs& args, cudaStream_t stream);

// attention_backward_bias.cu. Everything in the tokens' natural order: `common`'s orders are null
// ones. q_raw and k_raw have data where pairs differ in their rotation.
struct BiasGradArgs {
  BackwardCommon common;
  PlainRows q, q_raw, k, k_raw, v, grad_out;
  const uint8_t* rotate_q;
  int64_t rotate_q_stride_b, rotate_q_stride_n;
  const uint8_t* rotate_k;
  int64_t rotate_k_stride_b, rotate_k_stride_n;
  const uint8_t* key_mask;
  int64_t key_mask_stride_b, key_mask_stride_n;
  void* dbias;
  int64_t dbias_stride_b, dbias_stride_h, dbias_stride_n, dbias_stride_m;
};
cudaError_t bias_grad(DType dtype, const BiasGradArgs& args, cudaStream_t stream);

// attention_backward_rows.cu
// log2: the logsumexp in log2.
cudaError_t row_stats(const AttentionBackwardParams& params, const TokenOrder& order, bool log2,
                      void* stats, cudaStream_t stream);

struct FinishParams {
  DType dtype;
  GradSums sums;
  TokenOrder order;     // of these tokens
  TokenOrder partners;  // `raw` counts where a batch has some without a position
  Tensor4 to;
  Tensor4 rotated;           // null data: not wanted
  const RotaryTable* table;  // null: nothing is rotated
  RotationRule rule;
  bool interleaved;
  int64_t pairs;
  double factor;
  int64_t batch, heads, tokens, channels;
};
cudaError_t finish_sums(const FinishParams& params, cudaStream_t stream);

// Zeros for tokens that no kernel visits: masked keys.
cudaError_t clear_masked(DType dtype, const Tensor4& to, const AttentionParams& params,
                         int64_t channels, cudaStream_t stream);

}  // namespace x_rope_cls::cuda
