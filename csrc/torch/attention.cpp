// The operators rope_attention and rope_attention_backward.
#include "attention.h"

#include "backend.h"
#include "params.h"
#include "rope.h"

namespace x_rope_cls::ops {
namespace {

using torch::headeronly::ScalarType;

// Stride of axis `axis` of four, of a tensor broadcast to four axes.
int64_t stride_of_four(const Tensor& t, int64_t axis) {
  const int64_t own = axis - (4 - t.dim());
  return own < 0 || t.size(own) == 1 ? 0 : t.stride(own);
}

void set_bias(const Tensor& mask, AttentionParams& p) {
  p.bias = mask.data_ptr();
  p.bias_dtype = dtype_of(mask);
  p.bias_stride_b = stride_of_four(mask, 0);
  p.bias_stride_h = stride_of_four(mask, 1);
  p.bias_stride_n = stride_of_four(mask, 2);
  p.bias_stride_m = stride_of_four(mask, 3);
}

void set_masks(const AttentionArguments& a, AttentionParams& p) {
  if (a.key_mask) {
    p.key_mask = static_cast<const uint8_t*>(a.key_mask->data_ptr());
    p.key_mask_stride_b = a.key_mask->stride(0);
    p.key_mask_stride_n = a.key_mask->stride(1);
  }
  if (!a.attn_mask) return;
  set_bias(*a.attn_mask, p);
  // A bool mask that depends on the key alone is a key mask: its keys are left out, not masked.
  const bool keys_only = p.bias_stride_h == 0 && p.bias_stride_n == 0;
  if (p.bias_dtype == DType::kBool && keys_only && p.key_mask == nullptr) {
    p.key_mask = static_cast<const uint8_t*>(p.bias);
    p.key_mask_stride_b = p.bias_stride_b;
    p.key_mask_stride_n = p.bias_stride_m;
    p.bias = nullptr;
  }
}

AttentionParams make_params(const AttentionArguments& a) {
  AttentionParams p{};
  p.dtype = dtype_of(a.q);
  p.cls_rope = static_cast<ClsRope>(a.cls_rope);
  p.interleaved = a.interleaved;
  p.has_rotary = a.cos_q.has_value();
  p.batch = a.q.size(0);
  p.heads = a.q.size(1);
  p.queries = a.q.size(2);
  p.head_dim = a.q.size(3);
  p.key_heads = a.k.size(1);
  p.keys = a.k.size(2);
  p.value_dim = a.v.size(3);
  p.q = view_of(a.q);
  p.k = view_of(a.k);
  p.v = view_of(a.v);
  if (p.has_rotary) {
    p.pairs = a.cos_q->size(a.cos_q->dim() - 1);
    p.table_q = table_of(*a.cos_q, *a.sin_q, a.rotate_q);
    p.table_k = table_of(*a.cos_k, *a.sin_k, a.rotate_k);
    if (p.cls_rope == ClsRope::kRotate) p.table_q.rotate = p.table_k.rotate = nullptr;
  }
  set_masks(a, p);
  p.scale = a.scale;
  p.dropout_p = a.dropout_p;
  if (a.dropout_p > 0.0) set_seed(*a.seed, p);
  return p;
}

// What the gradient of a bias is summed into: (batch, heads, queries, keys) with 1 where the bias
// is broadcast, but never along the keys.
Tensor zero_bias_gradient(const Tensor& mask, const AttentionParams& p) {
  std::vector<int64_t> sizes(4, 1);
  for (int64_t i = 0; i < mask.dim(); ++i) {
    sizes[static_cast<size_t>(4 - mask.dim() + i)] = mask.size(i);
  }
  sizes[3] = p.keys;
  Tensor grad =
      empty_of(mask, sizes, p.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float);
  torch::stable::zero_(grad);
  return grad;
}

Tensor like_bias(const Tensor& grad, const Tensor& mask) {
  const bool along_keys = mask.dim() == 0 || mask.size(mask.dim() - 1) != grad.size(3);
  const std::vector<int64_t> last{3};
  const auto sizes = mask.sizes();
  const std::vector<int64_t> shape(sizes.begin(), sizes.end());
  return torch::stable::reshape(along_keys ? torch::stable::sum(grad, last, true) : grad, shape);
}

void set_bias_gradient(const Tensor& grad, AttentionBackwardParams& g) {
  g.dbias = grad.data_ptr();
  g.dbias_stride_b = stride_of_four(grad, 0);
  g.dbias_stride_h = stride_of_four(grad, 1);
  g.dbias_stride_n = stride_of_four(grad, 2);
  g.dbias_stride_m = grad.stride(3);
}

}  // namespace

std::tuple<Tensor, Tensor> rope_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& cos_q,
    const OptionalTensor& sin_q, const OptionalTensor& cos_k, const OptionalTensor& sin_k,
    const OptionalTensor& rotate_q, const OptionalTensor& rotate_k, const OptionalTensor& attn_mask,
    const OptionalTensor& key_mask, const OptionalTensor& seed, int64_t cls_rope, bool interleaved,
    double scale, double dropout_p) {
  const AttentionArguments a{q,        k,           v,        cos_q,     sin_q,    cos_k,
                             sin_k,    rotate_q,    rotate_k, attn_mask, key_mask, seed,
                             cls_rope, interleaved, scale,    dropout_p};
  check_attention("rope_attention", a);
  AttentionParams p = make_params(a);
  Tensor out = empty_heads_inside(q, p.batch, p.heads, p.queries, p.value_dim);
  Tensor lse = empty_of(q, {p.batch, p.heads, p.queries}, compute_type(q));
  p.out = view_of(out);
  p.lse = lse.data_ptr();
  run_attention_forward(p, q);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rope_attention_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const OptionalTensor& cos_q,
    const OptionalTensor& sin_q, const OptionalTensor& cos_k, const OptionalTensor& sin_k,
    const OptionalTensor& rotate_q, const OptionalTensor& rotate_k, const OptionalTensor& attn_mask,
    const OptionalTensor& key_mask, const OptionalTensor& seed, int64_t cls_rope, bool interleaved,
    double scale, double dropout_p, bool need_bias_grad, bool need_table_grad) {
  const AttentionArguments a{q,        k,           v,        cos_q,     sin_q,    cos_k,
                             sin_k,    rotate_q,    rotate_k, attn_mask, key_mask, seed,
                             cls_rope, interleaved, scale,    dropout_p};
  check_attention_backward(a, {grad_out, grad_lse, out, lse, need_bias_grad, need_table_grad});
  AttentionBackwardParams g{};
  AttentionParams& p = g.forward;
  p = make_params(a);
  const Tensor dense_lse = torch::stable::contiguous(lse);
  p.out = view_of(out);
  p.lse = dense_lse.data_ptr();
  g.grad_out = view_of(grad_out);
  if (grad_lse) {
    g.grad_lse = grad_lse->data_ptr();
    g.grad_lse_stride_b = grad_lse->stride(0);
    g.grad_lse_stride_h = grad_lse->stride(1);
    g.grad_lse_stride_n = grad_lse->stride(2);
  }
  const ScalarType compute = compute_type(q);
  Tensor dq = empty_heads_inside(q, p.batch, p.heads, p.queries, p.head_dim);
  Tensor dk = empty_heads_inside(k, p.batch, p.key_heads, p.keys, p.head_dim);
  Tensor dv = empty_heads_inside(v, p.batch, p.key_heads, p.keys, p.value_dim);
  g.dq = view_of(dq);
  g.dk = view_of(dk);
  g.dv = view_of(dv);
  // A fresh one each time: outputs of an operator must not share memory.
  const auto nothing = [&] { return empty_of(q, {0}, compute); };
  OptionalTensor dq_rotated;
  OptionalTensor dk_rotated;
  if (need_table_grad) {
    dq_rotated = empty_of(q, {p.batch, p.heads, p.queries, p.head_dim}, compute);
    dk_rotated = empty_of(q, {p.batch, p.key_heads, p.keys, p.head_dim}, compute);
    g.dq_rotated = view_of(*dq_rotated);
    g.dk_rotated = view_of(*dk_rotated);
  }
  OptionalTensor bias_gradient;
  if (need_bias_grad) {
    bias_gradient = zero_bias_gradient(*attn_mask, p);
    set_bias_gradient(*bias_gradient, g);
  }

  run_attention_backward(g, q);

  Tensor dbias = need_bias_grad ? like_bias(*bias_gradient, *attn_mask) : nothing();
  if (!need_table_grad) return {dq, dk, dv, dbias, nothing(), nothing(), nothing(), nothing()};
  const RotaryTable& tq = p.table_q;
  const RotaryTable& tk = p.table_k;
  auto [dcos_q, dsin_q] =
      table_gradients(*dq_rotated, q, *cos_q, {tq.rotate, tq.rotate_stride_b, tq.rotate_stride_n},
                      {}, interleaved, false);
  auto [dcos_k, dsin_k] =
      table_gradients(*dk_rotated, k, *cos_k, {tk.rotate, tk.rotate_stride_b, tk.rotate_stride_n},
                      {p.key_mask, p.key_mask_stride_b, p.key_mask_stride_n}, interleaved, false);
  return {dq, dk, dv, dbias, dcos_q, dsin_q, dcos_k, dsin_k};
}

}  // namespace x_rope_cls::ops
