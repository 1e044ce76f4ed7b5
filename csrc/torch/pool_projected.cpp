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

// A given tensor (batch, queries, heads, channels).
HeadRows rows_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }
// (queries, channels), or (batch, queries, ..), with all that follows as one row.
HeadRows merged_rows(const Tensor& t) {
  if (t.dim() == 2) return {t.data_ptr(), 0, t.stride(0), 0};
  return {t.data_ptr(), t.stride(0), t.stride(1), 0};
}

// Parts of one tensor, one after the other, each on a cache line of its own.
class Parts {
 public:
  // Elements from the start to a part of so many.
  int64_t add(int64_t count) {
    constexpr int64_t kLine = 64;  // elements: a line or more of any dtype
    const int64_t first = size_;
    size_ += (count + kLine - 1) / kLine * kLine;
    return first;
  }
  int64_t size() const { return size_; }

 private:
  int64_t size_ = 0;
};

// What one call is about, and its products.
struct Projections {
  const Tensor& like;
  int64_t batch, query_batch, queries, heads, key_heads;
  int64_t channels, key_dim, value_dim;
  bool cyclic;

  Tensor empty(const std::vector<int64_t>& sizes) const {
    return empty_of(like, sizes, like.scalar_type());
  }
  // Dense rows: (batch, queries, heads, channels), the same with the heads as one row, and (batch,
  // heads, queries, channels).
  HeadRows by_token(void* data, int64_t row) const {
    return {data, queries * heads * row, heads * row, row};
  }
  HeadRows as_one(void* data, int64_t row) const { return {data, queries * row, row, 0}; }
  HeadRows heads_first(void* data) const {
    return {data, heads * queries * channels, channels, queries * channels};
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

// Gradient of a weight: the sum of a b^T over the rows of each group. written: see RowsOuterParams.
Tensor outer_sums(const Projections& s, const RowGroups& by, const HeadRows& a, int64_t a_columns,
                  const HeadRows& b, int64_t b_columns, int64_t written) {
  Tensor out = s.empty({by.groups * a_columns, b_columns});
  const RowsOuterParams p{by, a_columns, b_columns, a, b, out.data_ptr(), written};
  run_rows_outer(p, s.like);
  return out;
}

// What the forward pass leaves for the backward pass.
struct Saved {
  Saved(const Projections& s, bool has_q_weight, bool has_out_weight) {
    Parts parts;
    const int64_t rows = s.query_batch * s.queries * s.heads;
    const int64_t results = s.batch * s.queries * s.heads;
    projected = parts.add(has_q_weight ? rows * s.key_dim : 0);
    folded = parts.add(rows * s.channels);
    pooled = parts.add(results * s.channels);
    merged = parts.add(has_out_weight ? results * s.value_dim : 0);
    size = parts.size();
  }
  int64_t projected;  // queries by token
  int64_t folded;     // and what late_cls_pool takes of them, heads first
  int64_t pooled;     // what it returns
  int64_t merged;     // what out_weight is applied to, by token
  int64_t size;
};

void* part_of(const Tensor& t, int64_t first) {
  return static_cast<char*>(t.data_ptr()) + first * static_cast<int64_t>(t.element_size());
}

void set_query(const Projections& s, void* folded, PoolParams& p) {
  p.query_batch = s.query_batch;
  p.heads = s.heads;
  p.queries = s.queries;
  const HeadRows rows = s.heads_first(folded);
  p.query = {folded, s.query_batch == 1 ? 0 : rows.stride_b, rows.stride_h, rows.stride_n, 1};
}

// Gradients on their way, in one tensor.
struct ScratchRows {
  explicit ScratchRows(const Projections& s) {
    Parts parts;
    const int64_t results = s.batch * s.queries * s.heads;
    const int64_t rows = s.query_batch * s.queries * s.heads;
    const int64_t at_merged = parts.add(results * s.value_dim);
    const int64_t at_pooled = parts.add(results * s.channels);
    const int64_t at_folded = parts.add(rows * s.channels);
    const int64_t at_projected = parts.add(rows * s.key_dim);
    memory = s.empty({parts.size()});
    merged = s.by_token(part_of(memory, at_merged), s.value_dim);
    pooled = s.heads_first(part_of(memory, at_pooled));
    folded = s.heads_first(part_of(memory, at_folded));
    projected = s.by_token(part_of(memory, at_projected), s.key_dim);
  }
  Tensor memory;
  HeadRows merged, pooled, folded, projected;  // of what Saved has
};

// What a backward pass gets beside the arguments of the forward pass.
struct Returned {
  const Tensor& grad;
  const OptionalTensor& grad_lse;
  const Tensor& lse;
  const Tensor& saved;
};

void check_saved(const std::string& op, const ProjectedArguments& a, const Projections& s,
                 const Returned& r, int64_t saved_size) {
  const auto dtype = a.x.scalar_type();
  const int64_t columns = a.out_weight ? a.out_weight->size(0) : s.value_dim;
  const int64_t dims = a.out_weight ? 3 : 4;
  require(op, s.batch > 0, "x must have a batch");
  require(op,
          r.grad.dim() == dims && r.grad.size(0) == s.batch && r.grad.size(1) == s.queries &&
              (a.out_weight || r.grad.size(2) == s.heads) && r.grad.size(dims - 1) == columns &&
              r.grad.scalar_type() == dtype,
          "grad must have the shape and dtype of the output");
  const auto is_lse = [&](const Tensor& t) {
    return t.dim() == 3 && t.size(0) == s.batch && t.size(1) == s.heads && t.size(2) == s.queries &&
           t.scalar_type() == compute_type(a.x);
  };
  require(op, is_lse(r.lse) && r.lse.is_contiguous() && (!r.grad_lse || is_lse(*r.grad_lse)),
          "lse and its gradient must be (batch, heads, queries), as the forward pass returned it");
  require(op,
          r.saved.dim() == 1 && r.saved.size(0) == saved_size && r.saved.scalar_type() == dtype &&
              r.saved.is_contiguous(),
          "saved must be what the forward pass returned");
}

// What late_cls_pool was called with, and what it returned.
struct PooledRows {
  void* folded;
  void* pooled;
  void* lse;
};

// From the gradient of what was pooled to those of tokens, norm and folded queries.
TokenGradients pool_backward(const Projections& s, const PoolTokens& tokens,
                             const PooledRows& forward, const OptionalTensor& grad_lse,
                             bool need_x_grad, const ScratchRows& scratch) {
  const PoolInput input(tokens);
  PoolBackwardParams g{};
  g.forward = input.params;
  set_query(s, forward.folded, g.forward);
  g.forward.pooled = forward.pooled;
  g.forward.lse = forward.lse;
  const HeadRows& grad = scratch.pooled;
  g.grad = {grad.data, grad.stride_b, grad.stride_h, grad.stride_n, 1};
  g.dquery = scratch.folded.data;
  TokenGradients made = make_gradients(tokens, grad_lse, need_x_grad, g);
  run_pool_backward(g, tokens.x);
  return made;
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
  const PoolTokens tokens{x, key_mask, norm_weight, norm_bias, scale, norm, norm_eps};
  check_pool_tokens("late_cls_pool", tokens);
  const Tensor given = dense_channels(q);
  const Saved at(s, q_weight.has_value(), out_weight.has_value());
  Tensor saved = s.empty({at.size});
  Tensor lse = empty_of(x, {s.batch, heads, s.queries}, compute_type(x));
  Tensor out = out_weight ? s.empty({s.batch, s.queries, out_weight->size(0)})
                          : s.empty({s.batch, s.queries, heads, s.value_dim});

  void* const projected = part_of(saved, at.projected);
  if (q_weight) {
    multiply(s.merged(s.query_batch), merged_rows(given), q_weight->size(1), *q_weight, true,
             s.as_one(projected, heads * s.key_dim), heads * s.key_dim);
  }
  const HeadRows folded = s.heads_first(part_of(saved, at.folded));
  multiply(s.by_head(s.query_batch), q_weight ? s.by_token(projected, s.key_dim) : rows_of(given),
           s.key_dim, k_weight, false, folded, s.channels);
  PoolInput input(tokens);
  set_query(s, folded.data, input.params);
  input.params.pooled = part_of(saved, at.pooled);
  input.params.lse = lse.data_ptr();
  run_pool_forward(input.params, x);
  void* const merged = out_weight ? part_of(saved, at.merged) : out.data_ptr();
  multiply(s.by_head(s.batch), s.heads_first(input.params.pooled), s.channels, v_weight, true,
           s.by_token(merged, s.value_dim), s.value_dim);
  if (out_weight) {
    multiply(s.merged(s.batch), s.as_one(merged, heads * s.value_dim), heads * s.value_dim,
             *out_weight, true, merged_rows(out), out_weight->size(0));
  }
  return {out, lse, saved};
}

ProjectedGradients pool_projected_backward(
    const Tensor& grad, const OptionalTensor& grad_lse, const Tensor& lse, const Tensor& saved,
    const Tensor& x, const Tensor& q, const Tensor& k_weight, const Tensor& v_weight,
    const OptionalTensor& q_weight, const OptionalTensor& out_weight,
    const OptionalTensor& key_mask, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, int64_t heads, bool cyclic, double scale, int64_t norm,
    double norm_eps, bool need_x_grad, bool need_weight_grads) {
  const std::string op = "_pool_projected_backward";
  const ProjectedArguments a{x,        q,           k_weight,  v_weight, q_weight, out_weight,
                             key_mask, norm_weight, norm_bias, heads,    cyclic};
  const Projections s = check_projections(op, a);
  const PoolTokens tokens{x, key_mask, norm_weight, norm_bias, scale, norm, norm_eps};
  check_pool_tokens(op, tokens);
  const Saved at(s, q_weight.has_value(), out_weight.has_value());
  check_saved(op, a, s, {grad, grad_lse, lse, saved}, at.size);
  const Tensor given = dense_channels(q);
  const Tensor out_grad = dense_channels(grad);
  const ScratchRows scratch(s);
  int64_t written = (need_x_grad ? x.numel() : 0) + k_weight.numel() + v_weight.numel();
  for (const OptionalTensor* t : {&q_weight, &out_weight}) written += *t ? (*t)->numel() : 0;
  written *= static_cast<int64_t>(x.element_size());
  // Of shape (0,) where it is not asked for.
  const auto weight_grad = [&](bool wanted, const RowGroups& by, const HeadRows& a,
                               int64_t a_columns, const HeadRows& b, int64_t b_columns) {
    return need_weight_grads && wanted ? outer_sums(s, by, a, a_columns, b, b_columns, written)
                                       : s.empty({0});
  };

  const HeadRows merged = s.as_one(part_of(saved, at.merged), heads * s.value_dim);
  const int64_t out_columns = grad.size(grad.dim() - 1);
  Tensor dout_weight = weight_grad(out_weight.has_value(), s.merged(s.batch), merged_rows(out_grad),
                                   out_columns, merged, heads * s.value_dim);
  const HeadRows merged_grad = out_weight ? scratch.merged : rows_of(out_grad);
  if (out_weight) {
    multiply(s.merged(s.batch), merged_rows(out_grad), out_columns, *out_weight, false,
             s.as_one(merged_grad.data, heads * s.value_dim), heads * s.value_dim);
  }
  const RowGroups by_output = s.by_head(s.batch);
  multiply(by_output, merged_grad, s.value_dim, v_weight, false, scratch.pooled, s.channels);
  const HeadRows pooled = s.heads_first(part_of(saved, at.pooled));
  Tensor dv_weight = weight_grad(true, by_output, merged_grad, s.value_dim, pooled, s.channels);
  auto [dx, dnorm_weight, dnorm_bias] =
      pool_backward(s, tokens, {part_of(saved, at.folded), pooled.data, lse.data_ptr()}, grad_lse,
                    need_x_grad, scratch);

  const int64_t dim = given.size(given.dim() - 1);
  const std::vector<int64_t> sizes{s.query_batch, s.queries, dim};
  Tensor dq = q_weight ? s.empty({sizes.begin() + (q.dim() == 2 ? 1 : 0), sizes.end()})
                       : s.empty({s.query_batch, s.queries, heads, s.key_dim});
  const RowGroups by_query = s.by_head(s.query_batch);
  const HeadRows projected =
      q_weight ? s.by_token(part_of(saved, at.projected), s.key_dim) : rows_of(given);
  const HeadRows projected_grad =
      q_weight ? scratch.projected : s.by_token(dq.data_ptr(), s.key_dim);
  multiply(by_query, scratch.folded, s.channels, k_weight, true, projected_grad, s.key_dim);
  Tensor dk_weight = weight_grad(true, by_query, projected, s.key_dim, scratch.folded, s.channels);
  const HeadRows grad_row = s.as_one(projected_grad.data, heads * s.key_dim);
  Tensor dq_weight = weight_grad(q_weight.has_value(), s.merged(s.query_batch), grad_row,
                                 heads * s.key_dim, merged_rows(given), dim);
  if (q_weight) {
    multiply(s.merged(s.query_batch), grad_row, heads * s.key_dim, *q_weight, false,
             merged_rows(dq), dim);
  }
  return {dx, dq, dk_weight, dv_weight, dq_weight, dout_weight, dnorm_weight, dnorm_bias};
}

void define_pool_projected(torch::stable::detail::StableLibrary& m) {
  m.def(
      "_pool_projected(Tensor x, Tensor q, Tensor k_weight, Tensor v_weight, Tensor? q_weight, "
      "Tensor? out_weight, Tensor? key_mask, Tensor? norm_weight, Tensor? norm_bias, int heads, "
      "bool cyclic, float scale, int norm, float norm_eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_pool_projected_backward(Tensor grad, Tensor? grad_lse, Tensor lse, Tensor saved, "
      "Tensor x, Tensor q, Tensor k_weight, Tensor v_weight, Tensor? q_weight, Tensor? out_weight, "
      "Tensor? key_mask, Tensor? norm_weight, Tensor? norm_bias, int heads, bool cyclic, "
      "float scale, int norm, "
      "float norm_eps, bool need_x_grad, bool need_weight_grads) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

void implement_pool_projected(torch::stable::detail::StableLibrary& m) {
  m.impl("_pool_projected", TORCH_BOX(&pool_projected));
  m.impl("_pool_projected_backward", TORCH_BOX(&pool_projected_backward));
}

}  // namespace x_rope_cls::ops
