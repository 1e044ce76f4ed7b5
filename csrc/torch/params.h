// From tensors to the parameter structs of the kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "../kernels/attention.h"
#include "../kernels/rope.h"
#include "checks.h"

namespace x_rope_cls::ops {

DType dtype_of(const Tensor& t);
Tensor4 view_of(const Tensor& t);

// cos, sin: 2 to 4 axes; missing and single ones are broadcast.
RotaryTable table_of(const Tensor& cos, const Tensor& sin, const OptionalTensor& rotate);

// An empty (batch, heads, tokens, channels) tensor in (batch, tokens, heads, channels) memory
// order, so that merging the heads is a view; for a kernel to fill.
Tensor empty_heads_inside(const Tensor& like, int64_t batch, int64_t heads, int64_t tokens,
                          int64_t channels);

// An empty contiguous tensor on the device of `like`.
Tensor empty_of(const Tensor& like, const std::vector<int64_t>& sizes,
                torch::headeronly::ScalarType dtype);

}  // namespace x_rope_cls::ops
