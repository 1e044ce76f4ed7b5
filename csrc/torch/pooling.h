// Operators of pooling.cpp; schemas and meaning are in operators.h.
#pragma once

#include <tuple>

#include "../kernels/pooling.h"
#include "checks.h"

namespace x_rope_cls::ops {

// What the kernels are told of the tokens; queries, results and gradients are left to fill in.
// Lives until the kernel has been called.
class PoolInput {
 public:
  explicit PoolInput(const PoolTokens& a);
  PoolInput(const PoolInput&) = delete;
  PoolInput& operator=(const PoolInput&) = delete;

  PoolParams params;

 private:
  OptionalTensor weight_, bias_;  // contiguous
};

struct TokenGradients {
  Tensor dx;              // of shape (0,) where not asked for
  Tensor dweight, dbias;  // of the norm; of shape (0,) where not given
};
// Makes them, and tells the kernel of them and of grad_lse.
TokenGradients make_gradients(const PoolTokens& a, const OptionalTensor& grad_lse, bool need_x_grad,
                              PoolBackwardParams& g);

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
