// Operators of attention.cpp; schemas and meaning are in operators.h.
#pragma once

#include <tuple>

#include "checks.h"

namespace x_rope_cls::ops {

std::tuple<Tensor, Tensor> rope_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& cos_q,
    const OptionalTensor& sin_q, const OptionalTensor& cos_k, const OptionalTensor& sin_k,
    const OptionalTensor& rotate_q, const OptionalTensor& rotate_k, const OptionalTensor& attn_mask,
    const OptionalTensor& key_mask, const OptionalTensor& seed, int64_t cls_rope, bool interleaved,
    double scale, double dropout_p);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rope_attention_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const OptionalTensor& cos_q,
    const OptionalTensor& sin_q, const OptionalTensor& cos_k, const OptionalTensor& sin_k,
    const OptionalTensor& rotate_q, const OptionalTensor& rotate_k, const OptionalTensor& attn_mask,
    const OptionalTensor& key_mask, const OptionalTensor& seed, int64_t cls_rope, bool interleaved,
    double scale, double dropout_p, bool need_bias_grad, bool need_table_grad);

}  // namespace x_rope_cls::ops
