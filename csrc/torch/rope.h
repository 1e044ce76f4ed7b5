// Operators of rope.cpp; schemas and meaning are in operators.h.
#pragma once

#include <tuple>

#include "checks.h"

namespace x_rope_cls::ops {

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& rotate,
            bool interleaved, bool inverse);

std::tuple<Tensor, Tensor> rope_qk(const Tensor& q, const Tensor& k, const Tensor& cos_q,
                                   const Tensor& sin_q, const Tensor& cos_k, const Tensor& sin_k,
                                   const OptionalTensor& rotate_q, const OptionalTensor& rotate_k,
                                   bool interleaved, bool inverse);

std::tuple<Tensor, Tensor> rope_table_grad(const Tensor& grad, const Tensor& x, const Tensor& cos,
                                           const OptionalTensor& rotate, bool interleaved,
                                           bool inverse);

// One byte a token, by strides; null: all tokens.
struct TokenMask {
  const uint8_t* data;
  int64_t stride_b, stride_n;
};

// The same without checks; grad may be of the compute type. Tokens that are not kept count for
// nothing.
std::tuple<Tensor, Tensor> table_gradients(const Tensor& grad, const Tensor& x, const Tensor& cos,
                                           const TokenMask& rotate, const TokenMask& keep,
                                           bool interleaved, bool inverse);

}  // namespace x_rope_cls::ops
