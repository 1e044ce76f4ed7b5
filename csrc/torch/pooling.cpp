// The operators late_cls_pool and late_cls_pool_backward.
#include "pooling.h"

#include <vector>

#include "backend.h"
#include "params.h"

namespace x_rope_cls::ops {
namespace {

std::vector<int64_t> pooled_shape(const PoolArguments& a) {
  return {a.x.size(0), a.query.size(1), a.query.size(2), a.x.size(2)};
}

Tensor3 view3_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// `weight` and `bias`: contiguous copies that must outlive the parameters.
PoolParams make_params(const PoolArguments& a, const OptionalTensor& weight,
                       const OptionalTensor& bias) {
  PoolParams p{};
  p.dtype = dtype_of(a.x);
  p.norm = static_cast<PoolNorm>(a.norm);
  p.batch = a.x.size(0);
  p.tokens = a.x.size(1);
  p.channels = a.x.size(2);
  p.heads = a.query.size(1);
  p.queries = a.query.size(2);
  p.query_batch = a.query.size(0);
  p.x = view3_of(a.x);
  p.query = view_of(a.query);
  if (p.query_batch == 1) p.query.stride_b = 0;
  if (a.key_mask) {
    p.key_mask = static_cast<const uint8_t*>(a.key_mask->data_ptr());
    p.key_mask_stride_b = a.key_mask->stride(0);
    p.key_mask_stride_n = a.key_mask->stride(1);
  }
  p.norm_weight = weight ? weight->data_ptr() : nullptr;
  p.norm_bias = bias ? bias->data_ptr() : nullptr;
  p.scale = a.scale;
  p.norm_eps = a.norm_eps;
  return p;
}

OptionalTensor contiguous(const OptionalTensor& t) {
  if (!t) return {};
  return torch::stable::contiguous(*t);
}

}  // namespace

std::tuple<Tensor, Tensor> late_cls_pool(const Tensor& x, const Tensor& query,
                                         const OptionalTensor& key_mask,
                                         const OptionalTensor& norm_weight,
                                         const OptionalTensor& norm_bias, double scale,
                                         int64_t norm, double norm_eps) {
  const PoolArguments a{x, query, key_mask, norm_weight, norm_bias, scale, norm, norm_eps};
  check_pool("late_cls_pool", a);
  const OptionalTensor weight = contiguous(norm_weight);
  const OptionalTensor bias = contiguous(norm_bias);
  PoolParams p = make_params(a, weight, bias);
  Tensor pooled = empty_of(x, pooled_shape(a), x.scalar_type());
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
  const PoolArguments a{x, query, key_mask, norm_weight, norm_bias, scale, norm, norm_eps};
  check_pool_backward(a, grad, grad_lse, pooled, lse);
  const OptionalTensor weight = contiguous(norm_weight);
  const OptionalTensor bias = contiguous(norm_bias);
  const Tensor dense_pooled = torch::stable::contiguous(pooled);
  const Tensor dense_lse = torch::stable::contiguous(lse);
  PoolBackwardParams g{};
  PoolParams& p = g.forward;
  p = make_params(a, weight, bias);
  p.pooled = dense_pooled.data_ptr();
  p.lse = dense_lse.data_ptr();
  g.grad = view_of(grad);
  if (grad_lse) {
    g.grad_lse = grad_lse->data_ptr();
    g.grad_lse_stride_b = grad_lse->stride(0);
    g.grad_lse_stride_h = grad_lse->stride(1);
    g.grad_lse_stride_m = grad_lse->stride(2);
  }
  const std::vector<int64_t> nothing{0};
  const std::vector<int64_t> channels{p.channels};
  const auto compute = compute_type(x);
  Tensor dx =
      empty_of(x, need_x_grad ? std::vector<int64_t>{p.batch, p.tokens, p.channels} : nothing,
               x.scalar_type());
  if (need_x_grad) {
    prepare_output(dx);
    g.dx = view3_of(dx);
  }
  Tensor dquery = empty_of(x, {p.query_batch, p.heads, p.queries, p.channels}, x.scalar_type());
  Tensor dweight = empty_of(x, weight ? channels : nothing, compute);
  Tensor dbias = empty_of(x, bias ? channels : nothing, compute);
  g.dquery = dquery.data_ptr();
  g.dweight = weight ? dweight.data_ptr() : nullptr;
  g.dbias = bias ? dbias.data_ptr() : nullptr;
  if (p.batch == 0) {  // nothing to sum up
    for (Tensor* t : {&dquery, &dweight, &dbias}) torch::stable::zero_(*t);
    return {dx, dquery, dweight, dbias};
  }
  run_pool_backward(g, x);
  return {dx, dquery, dweight, dbias};
}

}  // namespace x_rope_cls::ops
