// Private operators of x_rope_cls/projected.py, which knows when they serve: late_cls_pool between
// the projections folded around it, in one call. CPU alone, no derivatives of their own.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"

namespace x_rope_cls::ops {

// q: (batch or 1, queries, heads, key_dim). k_weight: (key_heads * key_dim, channels), v_weight:
// (key_heads * value_dim, channels). Head h reads key head h / (heads / key_heads), or h %
// key_heads where `cyclic`. Result: out (batch, queries, heads, value_dim), the folded queries,
// pooled and lse of late_cls_pool.
std::tuple<Tensor, Tensor, Tensor, Tensor> pool_projected(
    const Tensor& x, const Tensor& q, const Tensor& k_weight, const Tensor& v_weight,
    const OptionalTensor& key_mask, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, double scale, int64_t norm, double norm_eps, bool cyclic);

// dx, dq, gradients of k_weight, v_weight, norm_weight and norm_bias; of shape (0,) where not asked
// for or given.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> pool_projected_backward(
    const Tensor& grad, const OptionalTensor& grad_lse, const Tensor& x, const Tensor& q,
    const Tensor& k_weight, const Tensor& v_weight, const Tensor& folded, const Tensor& pooled,
    const Tensor& lse, const OptionalTensor& key_mask, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, double scale, int64_t norm, double norm_eps, bool cyclic,
    bool need_x_grad, bool need_weight_grads);

void define_pool_projected(torch::stable::detail::StableLibrary& m);
void implement_pool_projected(torch::stable::detail::StableLibrary& m);

}  // namespace x_rope_cls::ops
