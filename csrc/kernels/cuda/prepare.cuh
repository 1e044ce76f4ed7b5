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

// Tokens of a batch with and without a position; dropped ones are not among them.
struct alignas(8) TokenCounts {
  int32_t with, without;

  __device__ __forceinline__ int32_t all() const { return with + without; }
};

// A batch's tokens in the order in which kernels take them: ascending those with a position, then,
// ascending, those without; dropped ones are not among them. On the device.
//
// Memory moves in sectors of 32 bytes, and a list read by one thread a row moves eight times what
// is used. So lists start on sectors, and kernels read them with neighbouring threads, once.
struct TokenOrder {
  const int32_t* tokens;      // (batch, pitch): token at each place; null: place i is token i
  const TokenCounts* counts;  // (batch); null: length and 0
  int64_t length;             // tokens of the sequence

  // Of a batch's list.
  static __host__ __device__ constexpr int64_t pitch(int64_t length) {
    return (length + 7) / 8 * 8;
  }

  __device__ __forceinline__ TokenCounts counts_of(int64_t b) const {
    return counts == nullptr ? TokenCounts{static_cast<int32_t>(length), 0} : counts[b];
  }
  // Null: place i is token i.
  __device__ __forceinline__ const int32_t* list(int64_t b) const {
    return tokens == nullptr ? nullptr : tokens + b * pitch(length);
  }
  __device__ __forceinline__ int32_t token(int64_t b, int32_t place) const {
    return tokens == nullptr ? place : list(b)[place];
  }
};

// Tokens at the places of a block's rows, and which of them are rotated. kRows: of the block's
// threads.
template <int kRows>
struct PlacedTokens {
  int32_t tokens[kRows];
  bool turned[kRows];
  TokenCounts counts;

  // Places first ... last of batch b. All threads call it; those beyond the order have no token.
  // turns(token): whether it is rotated if it counts as one with a position.
  template <typename Turns>
  __device__ __forceinline__ void look_up(const TokenOrder& order, int64_t b, int32_t first,
                                          int32_t last, const Turns& turns) {
    const int32_t place = first + static_cast<int32_t>(threadIdx.x);
    if (threadIdx.x == 0 || place <= last) {
      const TokenCounts own = order.counts_of(b);
      if (threadIdx.x == 0) counts = own;
      if (place < own.all()) {
        const int32_t token = order.token(b, place);
        tokens[threadIdx.x] = token;
        turned[threadIdx.x] = place < own.with && turns(token);
      }
    }
    __syncthreads();
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
