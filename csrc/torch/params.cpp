#include "params.h"

#include <optional>

#include "backend.h"

namespace x_rope_cls::ops {

using torch::headeronly::ScalarType;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Bool:
      return DType::kBool;
    default:
      return DType::kFloat32;  // the checks let nothing else through
  }
}

Tensor4 view_of(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

namespace {

// Stride of the axis that is `from_end` from the end, 0 where it is missing or broadcast.
int64_t broadcast_stride(const Tensor& t, int64_t from_end) {
  const int64_t axis = t.dim() - from_end;
  return axis < 0 || t.size(axis) == 1 ? 0 : t.stride(axis);
}

}  // namespace

RotaryTable table_of(const Tensor& cos, const Tensor& sin, const OptionalTensor& rotate) {
  RotaryTable t{};
  t.cos = cos.data_ptr();
  t.sin = sin.data_ptr();
  t.cos_stride_b = broadcast_stride(cos, 4);
  t.cos_stride_h = broadcast_stride(cos, 3);
  t.cos_stride_n = cos.stride(cos.dim() - 2);
  t.cos_stride_i = cos.stride(cos.dim() - 1);
  t.sin_stride_b = broadcast_stride(sin, 4);
  t.sin_stride_h = broadcast_stride(sin, 3);
  t.sin_stride_n = sin.stride(sin.dim() - 2);
  t.sin_stride_i = sin.stride(sin.dim() - 1);
  if (rotate) {
    t.rotate = static_cast<const uint8_t*>(rotate->data_ptr());
    t.rotate_stride_n = rotate->stride(rotate->dim() - 1);
    t.rotate_stride_b = rotate->dim() == 2 ? broadcast_stride(*rotate, 2) : 0;
  }
  return t;
}

Tensor empty_of(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device());
}

Tensor empty_heads_inside(const Tensor& like, int64_t batch, int64_t heads, int64_t tokens,
                          int64_t channels) {
  const Tensor t = empty_of(like, {batch, tokens, heads, channels}, like.scalar_type());
  prepare_output(t);
  return torch::stable::transpose(t, 1, 2);
}

}  // namespace x_rope_cls::ops
