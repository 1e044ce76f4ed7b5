#include "params.h"

#include <algorithm>
#include <array>
#include <stdexcept>

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

constexpr size_t kMostDims = 4;  // of tensors that the operators make

int32_t shim_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    default:
      return aoti_torch_dtype_float32();  // nothing else is asked for
  }
}

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

// Past torch::stable::empty, which looks the operator up by its name for each tensor.
Tensor empty_of(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  if (sizes.size() > kMostDims) throw std::logic_error("empty_of: too many axes");
  std::array<int64_t, kMostDims> strides{};
  const auto dims = static_cast<int64_t>(sizes.size());
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  int32_t device_type = 0;
  int32_t device_index = 0;
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes.data(), strides.data(), shim_dtype(dtype), device_type, device_index, &made));
  return Tensor(made);
}

Tensor empty_heads_inside(const Tensor& like, int64_t batch, int64_t heads, int64_t tokens,
                          int64_t channels) {
  const Tensor t = empty_of(like, {batch, tokens, heads, channels}, like.scalar_type());
  prepare_output(t);
  return torch::stable::transpose(t, 1, 2);
}

}  // namespace x_rope_cls::ops
