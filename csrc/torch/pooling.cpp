// The operators late_cls_pool and late_cls_pool_backward.
#include "pooling.h"

#include <vector>

#include "backend.h"
#include "params.h"

namespace x_rope_cls::ops {
namespace {

Tensor3 view3_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

void set_query(PoolParams& p, const Tensor& query) {
  p.query_batch = query.size(0);
  p.heads = query.size(1);
  p.queries = query.size(2);
  p.query = view_of(query);
  if (p.query_batch == 1) p.query.stride_b = 0;
}

OptionalTensor contiguous(const OptionalTensor& t) {
  if (!t) return {};
  return torch::stable::contiguous(*t);
}

}  // namespace

PoolInput::PoolInput(const PoolTokens& a) : params{} {
  weight_ = contiguous(a.norm_weight);
  bias_ = contiguous(a.norm_bias);
  PoolParams& p = params;
  p.dtype = dtype_of(a.x);
  p.norm = static_cast<PoolNorm>(a.norm);
  p.batch = a.x.size(0);
  p.tokens = a.x.size(1);
  p.channels = a.x.size(2);
  p.x = view3_of(a.x);
  if (a.key_mask) {
    p.key_mask = static_cast<const uint8_t*>(a.key_mask->data_ptr());
    p.key_mask_stride_b = a.key_mask->stride(0);
    p.key_mask_stride_n = a.key_mask->stride(1);
  }
  p.norm_weight = weight_ ? weight_->data_ptr() : nullptr;
  p.norm_bias = bias_ ? bias_->data_ptr() : nullptr;
  p.scale = a.scale;
  p.norm_eps = a.norm_eps;
}

TokenGradients make_gradients(const PoolTokens& a, const OptionalTensor& grad_lse, bool need_x_grad,
                              PoolBackwardParams& g) {
  const Tensor& x = a.x;
  if (grad_lse) {
    g.grad_lse = grad_lse->data_ptr();
    g.grad_lse_stride_b = grad_lse->stride(0);
    g.grad_lse_stride_h = grad_lse->stride(1);
    g.grad_lse_stride_m = grad_lse->stride(2);
  }
  const std::vector<int64_t> nothing{0};
  const std::vector<int64_t> channels{x.size(2)};
  const auto compute = compute_type(x);
  TokenGradients made{
      empty_of(x, need_x_grad ? std::vector<int64_t>{x.size(0), x.size(1), x.size(2)} : nothing,
               x.scalar_type()),
      empty_of(x, a.norm_weight ? channels : nothing, compute),
      empty_of(x, a.norm_bias ? channels : nothing, compute)};
  if (need_x_grad) {
    prepare_output(made.dx);
    g.dx = view3_of(made.dx);
  }
  g.dweight = a.norm_weight ? made.dweight.data_ptr() : nullptr;
  g.dbias = a.norm_bias ? made.dbias.data_ptr() : nullptr;
  return made;
}

std::tuple<Tensor, Tensor> late_cls_pool(const Tensor& x, const Tensor& query,
                                         const OptionalTensor& key_mask,
                                         const OptionalTensor& norm_weight,
                                         const OptionalTensor& norm_bias, double scale,
                                         int64_t norm, double norm_eps) {
  const PoolTokens a{x, key_mask, norm_weight, norm_bias, scale, norm, norm_eps};
  check_pool("late_cls_pool", a, query);
  PoolInput input(a);
  PoolParams& p = input.params;
  set_query(p, query);
  Tensor pooled = empty_of(x, {p.batch, p.heads, p.queries, p.channels}, x.scalar_type());
  Tensor lse = empty_of(x, {p.batch, p.heads, p.queries}, compute_type(x));
  p.pooled = pooled.data_ptr();
  p.lse = lse.data_ptr();
  run_pool_forward(p, x);
  return {pooled, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> late_cls_pool_backward(
    const Tensor& grad, const OptionalTensor& grad_lse, const Tensor& x, const Tensor& query,
    const Tensor& pooled, const Tensor& lse, const OptionalTensor& key_mask,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double scale, int64_t norm,
    double norm_eps, bool need_x_grad) {
  const PoolTokens a{x, key_mask, norm_weight, norm_bias, scale, norm, norm_eps};
  check_pool_backward(a, query, grad, grad_lse, pooled, lse);
  const PoolInput input(a);
  const Tensor dense_pooled = torch::stable::contiguous(pooled);
  const Tensor dense_lse = torch::stable::contiguous(lse);
  PoolBackwardParams g{};
  PoolParams& p = g.forward;
  p = input.params;
  set_query(p, query);
  p.pooled = dense_pooled.data_ptr();
  p.lse = dense_lse.data_ptr();
  g.grad = view_of(grad);
  auto [dx, dweight, dbias] = make_gradients(a, grad_lse, need_x_grad, g);
  Tensor dquery = empty_of(x, {p.query_batch, p.heads, p.queries, p.channels}, x.scalar_type());
  g.dquery = dquery.data_ptr();
  if (p.batch == 0) {  // nothing to sum up
    for (Tensor* t : {&dquery, &dweight, &dbias}) torch::stable::zero_(*t);
    return {dx, dquery, dweight, dbias};
  }
  run_pool_backward(g, x);
  return {dx, dquery, dweight, dbias};
}

}  // namespace x_rope_cls::ops
