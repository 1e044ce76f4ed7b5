// Operators of pooling.cpp; schemas and meaning are in operators.h.
#pragma once

#include <tuple>

#include "checks.h"

namespace x_rope_cls::ops {

std::tuple<Tensor, Tensor> late_cls_pool(const Tensor& x, const Tensor& query,
                                         const OptionalTensor& key_mask,
                                         const OptionalTensor& norm_weight,
                                         const OptionalTensor& norm_bias, double scale,
                                         int64_t norm, double norm_eps);

std::tuple<Tensor, Tensor, Tensor, Tensor> late_cls_pool_backward(
    const Tensor& grad, const OptionalTensor& grad_lse, const Tensor& x, const Tensor& query,
    const Tensor& pooled, const Tensor& lse, const OptionalTensor& key_mask,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double scale, int64_t norm,
    double norm_eps, bool need_x_grad);

}  // namespace x_rope_cls::ops
