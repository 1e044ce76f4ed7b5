// Private operators of x_rope_cls/projected.py, which knows when they serve: late_cls_pool between
// the projections folded around it, in one call. CPU alone, no derivatives of their own.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"

namespace x_rope_cls::ops {

struct ProjectedArguments {
  const Tensor& x;
  const Tensor& q;         // (batch or 1, queries, heads, key_dim); with q_weight (batch or 1,
                           // queries, dim), or (queries, dim) for the whole batch
  const Tensor& k_weight;  // (key_heads * key_dim, channels)
  const Tensor& v_weight;  // (key_heads * value_dim, channels)
  const OptionalTensor& q_weight;    // (heads * key_dim, dim)
  const OptionalTensor& out_weight;  // (out_dim, heads * value_dim)
  const OptionalTensor& key_mask;
  const OptionalTensor& norm_weight;
  const OptionalTensor& norm_bias;
  int64_t heads;
  bool cyclic;  // head h reads key head h % key_heads; else h / (heads / key_heads)
};

// out (batch, queries, heads, value_dim), or (.., out_dim) with out_weight; lse of late_cls_pool;
// and what else the backward wants, in one tensor.
using Projected = std::tuple<Tensor, Tensor, Tensor>;
Projected pool_projected(const Tensor& x, const Tensor& q, const Tensor& k_weight,
                         const Tensor& v_weight, const OptionalTensor& q_weight,
                         const OptionalTensor& out_weight, const OptionalTensor& key_mask,
                         const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                         int64_t heads, bool cyclic, double scale, int64_t norm, double norm_eps);

// grad: of out. dx, dq, gradients of k_weight, v_weight, q_weight, out_weight, norm_weight and
// norm_bias; of shape (0,) where not asked for or given.
using ProjectedGradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
ProjectedGradients pool_projected_backward(
    const Tensor& grad, const OptionalTensor& grad_lse, const Tensor& lse, const Tensor& saved,
    const Tensor& x, const Tensor& q, const Tensor& k_weight, const Tensor& v_weight,
    const OptionalTensor& q_weight, const OptionalTensor& out_weight,
    const OptionalTensor& key_mask, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, int64_t heads, bool cyclic, double scale, int64_t norm,
    double norm_eps, bool need_x_grad, bool need_weight_grads);

void define_pool_projected(torch::stable::detail::StableLibrary& m);
void implement_pool_projected(torch::stable::detail::StableLibrary& m);

}  // namespace x_rope_cls::ops
