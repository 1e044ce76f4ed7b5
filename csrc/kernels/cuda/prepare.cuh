// What happens before the attention kernels run: the tokens of each batch are split into those with
// a position and those without, masked keys are dropped, and keys are rotated.
//
// Keys are rotated in a kernel of their own, not while an attention kernel stages its tiles. Per
// key head that reads and writes keys * head_dim elements once, which stay in L2; rotating at
// staging time would repeat 4 conversions, 2 multiply-adds and the table's loads for every element
// in each of queries / 128 blocks, on the units that the softmax needs.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../attention.h"

namespace x_rope_cls::cuda {

// A batch's tokens in the order in which kernels take them: ascending those with a position, then,
// ascending, those without; dropped ones are not among them. On the device.
struct TokenOrder {
  const int32_t* tokens;  // (batch, length): token at each place; null: place i is token i
  const int32_t* counts;  // (batch, 2): tokens with and without a position; null: length and 0
  int64_t length;         // tokens of the sequence

  __device__ __forceinline__ int32_t with_position(int64_t b) const {
    return counts == nullptr ? static_cast<int32_t>(length) : counts[2 * b];
  }
  __device__ __forceinline__ int32_t without_position(int64_t b) const {
    return counts == nullptr ? 0 : counts[2 * b + 1];
  }
  __device__ __forceinline__ int32_t token(int64_t b, int32_t place) const {
    return tokens == nullptr ? place : tokens[b * length + place];
  }
};

// Whether tokens are split: only `mask` treats pairs differently.
inline bool splits_tokens(const AttentionParams& p, const RotaryTable& table) {
  return p.has_rotary && p.cls_rope == ClsRope::kMask && table.rotate != nullptr;
}
inline bool orders_queries(const AttentionParams& p) { return splits_tokens(p, p.table_q); }
inline bool orders_keys(const AttentionParams& p) {
  return splits_tokens(p, p.table_k) || p.key_mask != nullptr;
}

// Whether token n is rotated in the tiles of tokens with a position: in `mask` all of them are, in
// `skip` those that have a position, in `rotate` all (the tables have no `rotate` then).
struct RotationRule {
  bool by_token;  // look at the table's `rotate`
};
inline RotationRule rotation_rule(const AttentionParams& p) {
  return {p.cls_rope == ClsRope::kSkip};
}

// Bytes, rounded up to 256, of a TokenOrder's arrays.
int64_t order_bytes(int64_t batch, int64_t tokens);
// Fills `memory` and returns what lies there in *order. rotate and keep: null where all tokens have
// a position or are kept.
cudaError_t order_tokens(int64_t batch, int64_t tokens, const uint8_t* rotate,
                         int64_t rotate_stride_b, int64_t rotate_stride_n, const uint8_t* keep,
                         int64_t keep_stride_b, int64_t keep_stride_n, void* memory,
                         TokenOrder* order, cudaStream_t stream);

// Copies rows to (batch, heads, tokens, padded_dim), in the order given, with zeros in the channels
// beyond head_dim; rows beyond the order's are left as they are. `table`: rotates those with a
// position; null: nothing is rotated.
struct PackParams {
  DType dtype;
  Tensor4 from;
  void* to;
  TokenOrder order;
  const RotaryTable* table;
  RotationRule rule;
  int64_t batch, heads, tokens, head_dim, padded_dim;  // padded_dim: a multiple of 16 bytes
  int64_t pairs;
  bool interleaved;
};
int64_t packed_bytes(const PackParams& p);  // rounded up to 256
cudaError_t pack_rows(const PackParams& p, cudaStream_t stream);

}  // namespace x_rope_cls::cuda
