// Element types of tensors as the kernels see them.
#pragma once

#include <cstdint>

namespace x_rope_cls {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kBool = 4 };

}  // namespace x_rope_cls
