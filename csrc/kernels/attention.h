// Contract of the attention kernels: softmax(scale * <rotated q, rotated k> + bias) v, where a pair
// with a token that has no position is left unrotated as `cls_rope` says.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "parallel.h"
#include "rope.h"

namespace x_rope_cls {

enum class ClsRope : int32_t { kRotate = 0, kSkip = 1, kMask = 2 };

struct AttentionParams {
  DType dtype;  // of q, k, v, out and their gradients
  ClsRope cls_rope;
  bool interleaved;
  bool has_rotary;  // false: the tables are unused

  int64_t batch, heads, key_heads;  // heads is a multiple of key_heads
  int64_t queries, keys;
  int64_t head_dim, value_dim;
  int64_t pairs;  // rotary_dim / 2

  Tensor4 q;    // (batch, heads, queries, head_dim)
  Tensor4 k;    // (batch, key_heads, keys, head_dim)
  Tensor4 v;    // (batch, key_heads, keys, value_dim)
  Tensor4 out;  // (batch, heads, queries, value_dim)
  void* lse;    // (batch, heads, queries), compute type, contiguous, natural log

  RotaryTable table_q;  // heads: query heads
  RotaryTable table_k;  // heads: key heads

  const uint8_t* key_mask;  // non-zero: attend; null: all
  int64_t key_mask_stride_b, key_mask_stride_n;

  const void* bias;  // (batch, heads, queries, keys) by strides, 0 where broadcast; null: none
  DType bias_dtype;  // kBool: non-zero means attend
  int64_t bias_stride_b, bias_stride_h, bias_stride_n, bias_stride_m;

  double scale;
  double dropout_p;
  uint64_t seed;             // used where dropout_p > 0
  const int64_t* seed_data;  // CUDA: where the seed lies on the device, used in place of `seed`
};

struct AttentionBackwardParams {
  AttentionParams forward;  // out and lse hold what the forward pass returned
  Tensor4 grad_out;         // (batch, heads, queries, value_dim), dtype
  const void* grad_lse;     // (batch, heads, queries) by strides, compute type; null: none
  int64_t grad_lse_stride_b, grad_lse_stride_h, grad_lse_stride_n;

  Tensor4 dq;  // shapes of q, k, v
  Tensor4 dk;
  Tensor4 dv;

  // Gradients with respect to the rotated q and k, compute type, zero in unrotated rows; null data:
  // not wanted. Tables' gradients are computed from them.
  Tensor4 dq_rotated;
  Tensor4 dk_rotated;

  // Gradient of the bias, compute type, zero-filled by the caller, strides 0 where the bias is
  // broadcast along batches, heads or queries, but never along keys; null: not wanted.
  void* dbias;
  int64_t dbias_stride_b, dbias_stride_h, dbias_stride_n, dbias_stride_m;
};

// Bytes of scratch memory that a call needs with so many workers. The caller allocates it, 64-byte
// aligned, and passes it along; it need not be initialised.
using AttentionWorkspace = int64_t (*)(const AttentionParams&, int64_t workers);
using AttentionForward = void (*)(const AttentionParams&, const Parallel&, void* workspace);
using AttentionBackwardWorkspace = int64_t (*)(const AttentionBackwardParams&, int64_t workers);
using AttentionBackward = void (*)(const AttentionBackwardParams&, const Parallel&,
                                   void* workspace);

}  // namespace x_rope_cls
