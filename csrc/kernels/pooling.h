// Contract of the pooling kernels: softmax(scale * query x^T) x, attention of a few queries whose
// keys and values are the token states x themselves, normalised on the way if wanted.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "parallel.h"
#include "rope.h"

namespace x_rope_cls {

enum class PoolNorm : int32_t { kNone = 0, kLayer = 1, kRms = 2 };

// A (batch, tokens, channels) tensor: strides in elements, any values.
struct Tensor3 {
  void* data;
  int64_t stride_b, stride_n, stride_c;
};

struct PoolParams {
  DType dtype;  // of x, query, pooled and their gradients
  PoolNorm norm;

  int64_t batch, tokens, channels;
  int64_t heads, queries;
  int64_t query_batch;  // batch, or 1: shared by the batch

  Tensor3 x;      // (batch, tokens, channels)
  Tensor4 query;  // (query_batch, heads, queries, channels); stride_b 0 where it is 1
  void* pooled;   // (batch, heads, queries, channels), contiguous
  void* lse;      // (batch, heads, queries), compute type, contiguous, natural log

  const uint8_t* key_mask;  // non-zero: attend; null: all
  int64_t key_mask_stride_b, key_mask_stride_n;

  const void* norm_weight;  // (channels,), compute type, contiguous; null: 1
  const void* norm_bias;    // likewise; null: 0

  double scale;
  double norm_eps;
};

struct PoolBackwardParams {
  PoolParams forward;    // pooled and lse hold what the forward pass returned
  Tensor4 grad;          // of pooled, dtype
  const void* grad_lse;  // (batch, heads, queries) by strides, compute type; null: none
  int64_t grad_lse_stride_b, grad_lse_stride_h, grad_lse_stride_m;

  Tensor3 dx;     // null data: not wanted
  void* dquery;   // shape of query, contiguous
  void* dweight;  // (channels,), compute type; null: not wanted
  void* dbias;
};

// Bytes of scratch memory, see attention.h.
using PoolWorkspace = int64_t (*)(const PoolParams&, int64_t workers);
using PoolForward = void (*)(const PoolParams&, const Parallel&, void* workspace);
using PoolBackwardWorkspace = int64_t (*)(const PoolBackwardParams&, int64_t workers);
using PoolBackward = void (*)(const PoolBackwardParams&, const Parallel&, void* workspace);

}  // namespace x_rope_cls
