// What the operators refuse, once for all devices. Every message reads
// "<operator>: <what> must be <expected>, got <value>"; x_rope_cls/_op_checks.py says the same of
// fake tensors, and a test compares the two.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>

namespace x_rope_cls::ops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct AttentionArguments {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const OptionalTensor& cos_q;
  const OptionalTensor& sin_q;
  const OptionalTensor& cos_k;
  const OptionalTensor& sin_k;
  const OptionalTensor& rotate_q;
  const OptionalTensor& rotate_k;
  const OptionalTensor& attn_mask;
  const OptionalTensor& key_mask;
  const OptionalTensor& seed;
  int64_t cls_rope;
  bool interleaved;
  double scale;
  double dropout_p;
};

// Of pooling, all but the queries.
struct PoolTokens {
  const Tensor& x;
  const OptionalTensor& key_mask;
  const OptionalTensor& norm_weight;
  const OptionalTensor& norm_bias;
  double scale;
  int64_t norm;
  double norm_eps;
};

struct AttentionGradients {
  const Tensor& grad_out;
  const OptionalTensor& grad_lse;
  const Tensor& out;
  const Tensor& lse;
  bool need_bias_grad;
  bool need_table_grad;
};

// dtype of tables, logsumexp and accumulation for tensors such as t.
torch::headeronly::ScalarType compute_type(const Tensor& t);

void check_rope(const Tensor& x, const Tensor& cos, const Tensor& sin,
                const OptionalTensor& rotate);
void check_rope_qk(const Tensor& q, const Tensor& k, const Tensor& cos_q, const Tensor& sin_q,
                   const Tensor& cos_k, const Tensor& sin_k, const OptionalTensor& rotate_q,
                   const OptionalTensor& rotate_k);
void check_rope_table_grad(const Tensor& grad, const Tensor& x, const Tensor& cos,
                           const OptionalTensor& rotate);
void check_attention(const std::string& op, const AttentionArguments& a);
void check_attention_backward(const AttentionArguments& a, const AttentionGradients& g);
void check_pool_tokens(const std::string& op, const PoolTokens& a);
void check_pool(const std::string& op, const PoolTokens& a, const Tensor& query);
void check_pool_backward(const PoolTokens& a, const Tensor& query, const Tensor& grad,
                         const OptionalTensor& grad_lse, const Tensor& pooled, const Tensor& lse);

}  // namespace x_rope_cls::ops
