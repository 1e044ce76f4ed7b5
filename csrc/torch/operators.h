// Schemas of the operators, and their kernels of the backend that is linked. Fake kernels,
// derivatives and autocast rules are registered in x_rope_cls/ops.py.
#pragma once

#include <torch/csrc/stable/library.h>

#include "attention.h"
#include "pooling.h"
#include "rope.h"

namespace x_rope_cls::ops {

inline void define_operators(torch::stable::detail::StableLibrary& m) {
  // x (B, H, N, D) rotated by the tables; see x_rope_cls/functional.py for shapes.
  m.def(
      "rope(Tensor x, Tensor cos, Tensor sin, Tensor? rotate, bool interleaved, bool inverse) -> "
      "Tensor");
  // Both rotated in one go.
  m.def(
      "rope_qk(Tensor q, Tensor k, Tensor cos_q, Tensor sin_q, Tensor cos_k, Tensor sin_k, "
      "Tensor? rotate_q, Tensor? rotate_k, bool interleaved, bool inverse) -> (Tensor, Tensor)");
  // Gradients of sum(grad * rope(x)) to cos and sin, in the shape of cos.
  m.def(
      "rope_table_grad(Tensor grad, Tensor x, Tensor cos, Tensor? rotate, bool interleaved, "
      "bool inverse) -> (Tensor, Tensor)");
  // (out, logsumexp); cls_rope: 0 rotate, 1 skip, 2 mask; seed: given where dropout_p > 0.
  m.def(
      "rope_attention(Tensor q, Tensor k, Tensor v, Tensor? cos_q, Tensor? sin_q, Tensor? cos_k, "
      "Tensor? sin_k, Tensor? rotate_q, Tensor? rotate_k, Tensor? attn_mask, Tensor? key_mask, "
      "Tensor? seed, int cls_rope, bool interleaved, float scale, float dropout_p) -> "
      "(Tensor, Tensor)");
  // dq, dk, dv, dbias, dcos_q, dsin_q, dcos_k, dsin_k; of shape (0,) where not asked for.
  m.def(
      "rope_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, Tensor? cos_q, Tensor? sin_q, Tensor? cos_k, Tensor? sin_k, "
      "Tensor? rotate_q, Tensor? rotate_k, Tensor? attn_mask, Tensor? key_mask, Tensor? seed, "
      "int cls_rope, bool interleaved, float scale, float dropout_p, bool need_bias_grad, "
      "bool need_table_grad) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // (pooled, logsumexp); norm: 0 none, 1 layer norm, 2 root mean square norm.
  m.def(
      "late_cls_pool(Tensor x, Tensor query, Tensor? key_mask, Tensor? norm_weight, "
      "Tensor? norm_bias, float scale, int norm, float norm_eps) -> (Tensor, Tensor)");
  // dx, dquery, gradients of norm_weight and norm_bias; of shape (0,) where not asked for or given.
  m.def(
      "late_cls_pool_backward(Tensor grad, Tensor? grad_lse, Tensor x, Tensor query, Tensor "
      "pooled, "
      "Tensor lse, Tensor? key_mask, Tensor? norm_weight, Tensor? norm_bias, float scale, int "
      "norm, "
      "float norm_eps, bool need_x_grad) -> (Tensor, Tensor, Tensor, Tensor)");
}

inline void implement_operators(torch::stable::detail::StableLibrary& m) {
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("rope_qk", TORCH_BOX(&rope_qk));
  m.impl("rope_table_grad", TORCH_BOX(&rope_table_grad));
  m.impl("rope_attention", TORCH_BOX(&rope_attention));
  m.impl("rope_attention_backward", TORCH_BOX(&rope_attention_backward));
  m.impl("late_cls_pool", TORCH_BOX(&late_cls_pool));
  m.impl("late_cls_pool_backward", TORCH_BOX(&late_cls_pool_backward));
}

}  // namespace x_rope_cls::ops
