// Contract of the rotation kernels: y = R x on the first rotary_dim channels, the rest copied.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace x_rope_cls {

// cos and sin, element (b, h, n, i) at b * stride_b + h * stride_h + n * stride_n + i * stride_i of
// each, in the compute type (float64 for float64 tensors, float32 else). Broadcast axes have stride
// 0. i counts channel pairs. `rotate` (one byte a token, non-zero: has a position) may be null: all
// have.
struct RotaryTable {
  const void* cos;
  const void* sin;
  int64_t cos_stride_b, cos_stride_h, cos_stride_n, cos_stride_i;
  int64_t sin_stride_b, sin_stride_h, sin_stride_n, sin_stride_i;
  const uint8_t* rotate;
  int64_t rotate_stride_b, rotate_stride_n;
};

// A (batch, heads, tokens, channels) tensor: strides in elements, any values.
struct Tensor4 {
  void* data;
  int64_t stride_b, stride_h, stride_n, stride_d;
};

struct RopeParams {
  DType dtype;
  Tensor4 x;  // (batch, heads, tokens, head_dim)
  Tensor4 y;  // the same shape; may be x itself with the same strides
  RotaryTable table;
  int64_t batch, heads, tokens, head_dim;
  int64_t pairs;     // rotary_dim / 2
  bool interleaved;  // pairs (2i, 2i+1), else (i, i + pairs)
  bool inverse;      // multiply by the transpose of R
};

// Gradients of sum(grad * rope(x)) to cos and sin, summed over the axes the tables are broadcast
// along. dcos and dsin: compute type, contiguous (table_batch, table_heads, tokens, pairs).
struct RopeTableGradParams {
  DType dtype;       // of x
  DType grad_dtype;  // the same, or the compute type
  Tensor4 grad;
  Tensor4 x;
  const uint8_t* rotate;
  int64_t rotate_stride_b, rotate_stride_n;
  const uint8_t* keep;  // non-zero: the token counts; its x may be anything where not. Null: all do
  int64_t keep_stride_b, keep_stride_n;
  void* dcos;
  void* dsin;
  int64_t table_batch, table_heads;  // 1 where broadcast
  int64_t batch, heads, tokens, head_dim, pairs;
  bool interleaved;
  bool inverse;
};

}  // namespace x_rope_cls
