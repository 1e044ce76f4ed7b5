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
// (queries, channels), or (batch, queries, ..), with all that follows as one row.
HeadRows merged_rows(const Tensor& t) {
  if (t.dim() == 2) return {t.data_ptr(), 0, t.stride(0), 0};
  return {t.data_ptr(), t.stride(0), t.stride(1), 0};
}
HeadRows rows_by_head(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(2), t.stride(1)};
}

// What one call is about, and its products.
struct Projections {
  const Tensor& like;
  int64_t batch, query_batch, queries, heads, key_heads;
  int64_t channels, key_dim, value_dim;
  bool cyclic;

  Tensor empty(const std::vector<int64_t>& sizes) const {
    return empty_of(like, sizes, like.scalar_type());
  }
  // Rows of the heads; all heads of a token as one row.
  RowGroups by_head(int64_t rows_batch) const {
    return {dtype_of(like), rows_batch, queries, heads, key_heads, cyclic};
  }
  RowGroups merged(int64_t rows_batch) const {
    return {dtype_of(like), rows_batch, queries, 1, 1, false};
  }
};

void require(const std::string& op, bool fits, const char* what) {
  if (!fits) throw std::runtime_error(op + ": " + what);
}

Projections check_projections(const std::string& op, const ProjectedArguments& a) {
  require(op, a.x.dim() == 3, "x must be (batch, tokens, channels)");
  const int64_t dims = a.q.dim();
  const bool shared = a.q_weight && dims == 2;
  const int64_t query_batch = shared ? 1 : a.q.size(0);
  require(op,
          a.heads > 0 && (query_batch == 1 || query_batch == a.x.size(0)) &&
              (a.q_weight ? dims == 2 || dims == 3 : dims == 4 && a.q.size(2) == a.heads),
          "q must be (batch or 1, queries, heads, key_dim), or with q_weight (batch or 1, queries, "
          "dim) or (queries, dim)");
  const auto is_weight = [&](const Tensor& t, int64_t columns) {
    return t.dim() == 2 && t.size(1) == columns && t.scalar_type() == a.x.scalar_type();
  };
  require(op, a.q.scalar_type() == a.x.scalar_type(), "q must have the dtype of x");
  require(op, is_weight(a.k_weight, a.x.size(2)) && is_weight(a.v_weight, a.x.size(2)),
          "weights must be (rows, channels), dtype of x");
  require(op,
          !a.q_weight ||
              (is_weight(*a.q_weight, a.q.size(dims - 1)) && a.q_weight->size(0) % a.heads == 0),
          "q_weight must be (heads * key_dim, channels of q), dtype of x");
  const int64_t key_dim = a.q_weight ? a.q_weight->size(0) / a.heads : a.q.size(3);
  const int64_t key_heads = key_dim > 0 ? a.k_weight.size(0) / key_dim : 0;
  require(op,
          key_heads > 0 && key_heads * key_dim == a.k_weight.size(0) && a.heads % key_heads == 0 &&
              a.v_weight.size(0) % key_heads == 0,
          "rows of the weights must fit the heads");
  const int64_t value_dim = a.v_weight.size(0) / key_heads;
  require(op, !a.out_weight || is_weight(*a.out_weight, a.heads * value_dim),
          "out_weight must be (out_dim, heads * value_dim), dtype of x");
  return {a.x,       a.x.size(0), query_batch, a.q.size(shared ? 0 : 1),
          a.heads,   key_heads,   a.x.size(2), key_dim,
          value_dim, a.cyclic};
}

// out = rows times the matrix of their group, or its transpose.
void multiply(const RowGroups& by, const HeadRows& rows, int64_t inner, const Tensor& matrix,
              bool transposed, const HeadRows& out, int64_t columns) {
  const Tensor dense = dense_channels(matrix);
  RowsProductParams p{by, inner, columns, transposed, rows, dense.data_ptr(), dense.stride(0), out};
  run_rows_product(p, matrix);
}

// Gradient of a weight: the sum of a b^T over the rows of each group.
Tensor outer_sums(const Projections& s, const RowGroups& by, const HeadRows& a, int64_t a_columns,
                  const HeadRows& b, int64_t b_columns) {
  Tensor out = s.empty({by.groups * a_columns, b_columns});
  const RowsOuterParams p{by, a_columns, b_columns, a, b, out.data_ptr()};
  run_rows_outer(p, s.like);
  return out;
}

}  // namespace

Projected pool_projected(const Tensor& x, const Tensor& q, const Tensor& k_weight,
                         const Tensor& v_weight, const OptionalTensor& q_weight,
                         const OptionalTensor& out_weight, const OptionalTensor& key_mask,
                         const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                         int64_t heads, bool cyclic, double scale, int64_t norm, double norm_eps) {
  const ProjectedArguments a{x,        q,           k_weight,  v_weight, q_weight, out_weight,
                             key_mask, norm_weight, norm_bias, heads,    cyclic};
  const Projections s = check_projections("_pool_projected", a);
  const Tensor given = dense_channels(q);
  Tensor projected =
      q_weight ? s.empty({s.query_batch, s.queries, heads, s.key_dim}) : s.empty({0});
  if (q_weight) {
    multiply(s.merged(s.query_batch), merged_rows(given), q_weight->size(1), *q_weight, true,
             merged_rows(projected), heads * s.key_dim);
  }
  Tensor folded = s.empty({s.query_batch, heads, s.queries, s.channels});
  multiply(s.by_head(s.query_batch), rows_of(q_weight ? projected : given), s.key_dim, k_weight,
           false, rows_by_head(folded), s.channels);
  auto [pooled, lse] =
      late_cls_pool(x, folded, key_mask, norm_weight, norm_bias, scale, norm, norm_eps);
  Tensor merged = s.empty({s.batch, s.queries, heads, s.value_dim});
  multiply(s.by_head(s.batch), rows_by_head(pooled), s.channels, v_weight, true, rows_of(merged),
           s.value_dim);
  if (!out_weight) return {merged, projected, folded, pooled, lse, s.empty({0})};
  Tensor out = s.empty({s.batch, s.queries, out_weight->size(0)});
  multiply(s.merged(s.batch), merged_rows(merged), heads * s.value_dim, *out_weight, true,
           merged_rows(out), out_weight->size(0));
  return {out, projected, folded, pooled, lse, merged};
}

ProjectedGradients pool_projected_backward(
    const Tensor& grad, const OptionalTensor& grad_lse, const Tensor& projected_q,
    const Tensor& folded, const Tensor& pooled, const Tensor& lse, const Tensor& merged,
    const Tensor& x, const Tensor& q, const Tensor& k_weight, const Tensor& v_weight,
    const OptionalTensor& q_weight, const OptionalTensor& out_weight,
    const OptionalTensor& key_mask, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, int64_t heads, bool cyclic, double scale, int64_t norm,
    double norm_eps, bool need_x_grad, bool need_weight_grads) {
  const std::string op = "_pool_projected_backward";
  const ProjectedArguments a{x,        q,           k_weight,  v_weight, q_weight, out_weight,
                             key_mask, norm_weight, norm_bias, heads,    cyclic};
  const Projections s = check_projections(op, a);
  const int64_t columns = out_weight ? out_weight->size(0) : s.value_dim;
  const int64_t dims = out_weight ? 3 : 4;
  require(op,
          grad.dim() == dims && grad.size(0) == s.batch && grad.size(1) == s.queries &&
              (out_weight || grad.size(2) == heads) && grad.size(dims - 1) == columns &&
              grad.scalar_type() == x.scalar_type(),
          "grad must have the shape and dtype of the output");
  const RowGroups by_output = s.by_head(s.batch);
  const RowGroups by_query = s.by_head(s.query_batch);
  const Tensor given = dense_channels(q);
  const Tensor& used = q_weight ? projected_q : given;
  // Of shape (0,) where it is not asked for.
  const auto weight_grad = [&](bool wanted, const RowGroups& by, const HeadRows& a,
                               int64_t a_columns, const HeadRows& b, int64_t b_columns) {
    return wanted ? outer_sums(s, by, a, a_columns, b, b_columns) : s.empty({0});
  };

  Tensor merged_grad = dense_channels(grad);
  Tensor dout_weight =
      weight_grad(need_weight_grads && out_weight, s.merged(s.batch), merged_rows(merged_grad),
                  columns, out_weight ? merged_rows(merged) : HeadRows{}, heads * s.value_dim);
  if (out_weight) {
    const Tensor out_grad = merged_grad;
    merged_grad = s.empty({s.batch, s.queries, heads, s.value_dim});
    multiply(s.merged(s.batch), merged_rows(out_grad), columns, *out_weight, false,
             merged_rows(merged_grad), heads * s.value_dim);
  }
  Tensor pooled_grad = s.empty({s.batch, heads, s.queries, s.channels});
  multiply(by_output, rows_of(merged_grad), s.value_dim, v_weight, false, rows_by_head(pooled_grad),
           s.channels);
  auto [dx, dfolded, dnorm_weight, dnorm_bias] =
      late_cls_pool_backward(pooled_grad, grad_lse, x, folded, pooled, lse, key_mask, norm_weight,
                             norm_bias, scale, norm, norm_eps, need_x_grad);
  Tensor dq = s.empty({s.query_batch, s.queries, heads, s.key_dim});
  multiply(by_query, rows_by_head(dfolded), s.channels, k_weight, true, rows_of(dq), s.key_dim);
  Tensor dk_weight = weight_grad(need_weight_grads, by_query, rows_of(used), s.key_dim,
                                 rows_by_head(dfolded), s.channels);
  Tensor dv_weight = weight_grad(need_weight_grads, by_output, rows_of(merged_grad), s.value_dim,
                                 rows_by_head(pooled), s.channels);
  const int64_t dim = given.size(given.dim() - 1);
  Tensor dq_weight = weight_grad(need_weight_grads && q_weight, s.merged(s.query_batch),
                                 merged_rows(dq), heads * s.key_dim, merged_rows(given), dim);
  if (q_weight) {
    const Tensor projected_grad = dq;
    const std::vector<int64_t> sizes{s.query_batch, s.queries, dim};
    dq = s.empty({sizes.begin() + (q.dim() == 2 ? 1 : 0), sizes.end()});
    multiply(s.merged(s.query_batch), merged_rows(projected_grad), heads * s.key_dim, *q_weight,
             false, merged_rows(dq), dim);
  }
  return {dx, dq, dk_weight, dv_weight, dq_weight, dout_weight, dnorm_weight, dnorm_bias};
}

void define_pool_projected(torch::stable::detail::StableLibrary& m) {
  m.def(
      "_pool_projected(Tensor x, Tensor q, Tensor k_weight, Tensor v_weight, Tensor? q_weight, "
      "Tensor? out_weight, Tensor? key_mask, Tensor? norm_weight, Tensor? norm_bias, int heads, "
      "bool cyclic, float scale, int norm, float norm_eps) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_pool_projected_backward(Tensor grad, Tensor? grad_lse, Tensor projected_q, Tensor folded, "
      "Tensor pooled, Tensor lse, Tensor merged, Tensor x, Tensor q, Tensor k_weight, "
      "Tensor v_weight, Tensor? q_weight, Tensor? out_weight, Tensor? key_mask, "
      "Tensor? norm_weight, Tensor? norm_bias, int heads, bool cyclic, float scale, int norm, "
      "float norm_eps, bool need_x_grad, bool need_weight_grads) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

void implement_pool_projected(torch::stable::detail::StableLibrary& m) {
  m.impl("_pool_projected", TORCH_BOX(&pool_projected));
  m.impl("_pool_projected_backward", TORCH_BOX(&pool_projected_backward));
}

}  // namespace x_rope_cls::ops
