// The operators _pool_projected and _pool_projected_backward.
#include "pool_projected.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "backend.h"
#include "params.h"
#include "pooling.h"

namespace x_rope_cls::ops {
namespace {

// Copied where channels are not next to each other.
Tensor dense_channels(const Tensor& t) {
  return t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

// (batch, queries, heads, channels), and (batch, heads, queries, channels).
HeadRows rows_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }
HeadRows rows_by_head(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(2), t.stride(1)};
}

// Shapes of one call.
struct Projections {
  int64_t batch, query_batch, queries, heads, key_heads;
  int64_t channels, key_dim, value_dim;
  bool cyclic;

  RowGroups groups(const Tensor& like, int64_t rows_batch) const {
    return {dtype_of(like), rows_batch, queries, heads, key_heads, cyclic};
  }
};

Projections check_projections(const std::string& op, const Tensor& x, const Tensor& q,
                              const Tensor& k_weight, const Tensor& v_weight, bool cyclic) {
  const auto require = [&](bool fits, const char* what) {
    if (!fits) throw std::runtime_error(op + ": " + what);
  };
  require(x.dim() == 3, "x must be (batch, tokens, channels)");
  require(q.dim() == 4 && (q.size(0) == 1 || q.size(0) == x.size(0)) && q.size(3) > 0,
          "q must be (batch or 1, queries, heads, key_dim)");
  Projections s{};
  s.batch = x.size(0);
  s.channels = x.size(2);
  s.query_batch = q.size(0);
  s.queries = q.size(1);
  s.heads = q.size(2);
  s.key_dim = q.size(3);
  s.cyclic = cyclic;
  for (const Tensor* t : {&q, &k_weight, &v_weight}) {
    require(t->scalar_type() == x.scalar_type(), "q and weights must have the dtype of x");
  }
  for (const Tensor* t : {&k_weight, &v_weight}) {
    require(t->dim() == 2 && t->size(1) == s.channels, "weights must be (rows, channels)");
  }
  s.key_heads = k_weight.size(0) / s.key_dim;
  require(s.key_heads > 0 && s.key_heads * s.key_dim == k_weight.size(0) &&
              s.heads % s.key_heads == 0 && v_weight.size(0) % s.key_heads == 0,
          "rows of the weights must fit the heads");
  s.value_dim = v_weight.size(0) / s.key_heads;
  return s;
}

// out = rows times the matrix of their key head, or its transpose.
void multiply(const RowGroups& by, const HeadRows& rows, int64_t inner, const Tensor& matrix,
              bool transposed, const HeadRows& out, int64_t columns) {
  RowsProductParams p{};
  p.by = by;
  p.inner = inner;
  p.columns = columns;
  p.transposed = transposed;
  p.rows = rows;
  p.matrix = matrix.data_ptr();
  p.matrix_stride = matrix.stride(0);
  p.out = out;
  run_rows_product(p, matrix);
}

// Gradient of a weight: the sum of a b^T over the rows of each key head.
Tensor outer_sums(const RowGroups& by, const HeadRows& a, int64_t a_columns, const HeadRows& b,
                  int64_t b_columns, const Tensor& like) {
  Tensor out = empty_of(like, {by.groups * a_columns, b_columns}, like.scalar_type());
  RowsOuterParams p{by, a_columns, b_columns, a, b, out.data_ptr()};
  run_rows_outer(p, like);
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> pool_projected(
    const Tensor& x, const Tensor& q, const Tensor& k_weight, const Tensor& v_weight,
    const OptionalTensor& key_mask, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, double scale, int64_t norm, double norm_eps, bool cyclic) {
  const Projections s = check_projections("_pool_projected", x, q, k_weight, v_weight, cyclic);
  const Tensor rows = dense_channels(q);
  const Tensor keys = dense_channels(k_weight);
  const Tensor values = dense_channels(v_weight);
  Tensor folded = empty_of(x, {s.query_batch, s.heads, s.queries, s.channels}, x.scalar_type());
  multiply(s.groups(x, s.query_batch), rows_of(rows), s.key_dim, keys, false, rows_by_head(folded),
           s.channels);
  auto [pooled, lse] =
      late_cls_pool(x, folded, key_mask, norm_weight, norm_bias, scale, norm, norm_eps);
  Tensor out = empty_of(x, {s.batch, s.queries, s.heads, s.value_dim}, x.scalar_type());
  multiply(s.groups(x, s.batch), rows_by_head(pooled), s.channels, values, true, rows_of(out),
           s.value_dim);
  return {out, folded, pooled, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> pool_projected_backward(
    const Tensor& grad, const OptionalTensor& grad_lse, const Tensor& x, const Tensor& q,
    const Tensor& k_weight, const Tensor& v_weight, const Tensor& folded, const Tensor& pooled,
    const Tensor& lse, const OptionalTensor& key_mask, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, double scale, int64_t norm, double norm_eps, bool cyclic,
    bool need_x_grad, bool need_weight_grads) {
  const std::string op = "_pool_projected_backward";
  const Projections s = check_projections(op, x, q, k_weight, v_weight, cyclic);
  if (grad.dim() != 4 || grad.size(0) != s.batch || grad.size(1) != s.queries ||
      grad.size(2) != s.heads || grad.size(3) != s.value_dim ||
      grad.scalar_type() != x.scalar_type()) {
    throw std::runtime_error(op + ": grad must be (batch, queries, heads, value_dim), dtype of x");
  }
  const Tensor out_grad = dense_channels(grad);
  const Tensor rows = dense_channels(q);
  const Tensor keys = dense_channels(k_weight);
  const Tensor values = dense_channels(v_weight);
  const RowGroups by_output = s.groups(x, s.batch);
  const RowGroups by_query = s.groups(x, s.query_batch);
  Tensor pooled_grad = empty_of(x, {s.batch, s.heads, s.queries, s.channels}, x.scalar_type());
  multiply(by_output, rows_of(out_grad), s.value_dim, values, false, rows_by_head(pooled_grad),
           s.channels);
  auto [dx, dfolded, dnorm_weight, dnorm_bias] =
      late_cls_pool_backward(pooled_grad, grad_lse, x, folded, pooled, lse, key_mask, norm_weight,
                             norm_bias, scale, norm, norm_eps, need_x_grad);
  Tensor dq = empty_of(x, {s.query_batch, s.queries, s.heads, s.key_dim}, x.scalar_type());
  multiply(by_query, rows_by_head(dfolded), s.channels, keys, true, rows_of(dq), s.key_dim);
  Tensor dk_weight = empty_of(x, {0}, x.scalar_type());
  Tensor dv_weight = dk_weight;
  if (need_weight_grads) {
    dk_weight =
        outer_sums(by_query, rows_of(rows), s.key_dim, rows_by_head(dfolded), s.channels, x);
    dv_weight =
        outer_sums(by_output, rows_of(out_grad), s.value_dim, rows_by_head(pooled), s.channels, x);
  }
  return {dx, dq, dk_weight, dv_weight, dnorm_weight, dnorm_bias};
}

void define_pool_projected(torch::stable::detail::StableLibrary& m) {
  m.def(
      "_pool_projected(Tensor x, Tensor q, Tensor k_weight, Tensor v_weight, Tensor? key_mask, "
      "Tensor? norm_weight, Tensor? norm_bias, float scale, int norm, float norm_eps, bool cyclic) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_pool_projected_backward(Tensor grad, Tensor? grad_lse, Tensor x, Tensor q, "
      "Tensor k_weight, Tensor v_weight, Tensor folded, Tensor pooled, Tensor lse, "
      "Tensor? key_mask, Tensor? norm_weight, Tensor? norm_bias, float scale, int norm, "
      "float norm_eps, bool cyclic, bool need_x_grad, bool need_weight_grads) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

void implement_pool_projected(torch::stable::detail::StableLibrary& m) {
  m.impl("_pool_projected", TORCH_BOX(&pool_projected));
  m.impl("_pool_projected_backward", TORCH_BOX(&pool_projected_backward));
}

}  // namespace x_rope_cls::ops
