#include "checks.h"

#include <cmath>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace x_rope_cls::ops {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kMostTokens = 2147483647;  // indices of tokens are 32 bit in the kernels
const char* const kFloating = "float32, float64, bfloat16 or float16";

[[noreturn]] void refuse(const std::string& op, const std::string& what,
                         const std::string& expected, const std::string& got) {
  throw std::runtime_error(op + ": " + what + " must be " + expected + ", got " + got);
}

std::string text(int64_t value) { return std::to_string(value); }
std::string text(double value) {
  std::ostringstream stream;
  stream << value;
  return stream.str();
}

// As Python prints a tuple. -1 stands for any size.
std::string shape_text(const std::vector<int64_t>& sizes) {
  std::string s = "(";
  for (size_t i = 0; i < sizes.size(); ++i) {
    s += (i > 0 ? ", " : "") + (sizes[i] < 0 ? std::string("*") : std::to_string(sizes[i]));
  }
  return s + (sizes.size() == 1 ? ",)" : ")");
}
std::vector<int64_t> shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}
std::string shape_text(const Tensor& t) { return shape_text(shape_of(t)); }

std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Bool:
      return "torch.bool";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::ComplexFloat:
      return "torch.complex64";
    case ScalarType::ComplexDouble:
      return "torch.complex128";
    default:
      return "another dtype";
  }
}

std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return "another device";
}

bool is_floating(const Tensor& t) {
  const ScalarType s = t.scalar_type();
  return s == ScalarType::Float || s == ScalarType::Double || s == ScalarType::BFloat16 ||
         s == ScalarType::Half;
}

void check_device(const std::string& op, const std::string& what, const Tensor& t,
                  const Tensor& like) {
  if (device_text(t) != device_text(like)) {
    refuse(op, what, "on " + device_text(like), device_text(t));
  }
}

void check_dtype(const std::string& op, const std::string& what, const Tensor& t,
                 ScalarType expected) {
  if (t.scalar_type() != expected) {
    refuse(op, what, dtype_text(expected), dtype_text(t.scalar_type()));
  }
}

void check_token_count(const std::string& op, const std::string& what, int64_t tokens) {
  if (tokens > kMostTokens) {
    refuse(op, what, "of at most " + text(kMostTokens) + " tokens", text(tokens));
  }
}

void check_four_axes(const std::string& op, const std::string& what, const Tensor& t) {
  if (t.dim() != 4) refuse(op, what, "of shape (batch, heads, tokens, head_dim)", shape_text(t));
  check_token_count(op, what, t.size(2));
}

void check_values(const std::string& op, const std::string& what, const Tensor& t) {
  check_four_axes(op, what, t);
  if (!is_floating(t)) refuse(op, what, kFloating, dtype_text(t.scalar_type()));
}

// -1 in `expected`: any size.
void check_shape(const std::string& op, const std::string& what, const Tensor& t,
                 const std::vector<int64_t>& expected) {
  bool fits = t.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; fits && i < expected.size(); ++i) {
    fits = expected[i] < 0 || t.size(static_cast<int64_t>(i)) == expected[i];
  }
  if (!fits) refuse(op, what, "of shape " + shape_text(expected), shape_text(t));
}

// The same dtype, device and shape as something known.
void check_like(const std::string& op, const std::string& what, const Tensor& t, ScalarType dtype,
                const Tensor& device, const std::vector<int64_t>& shape) {
  check_dtype(op, what, t, dtype);
  check_device(op, what, t, device);
  check_shape(op, what, t, shape);
}

// cos of x's rotation: (tokens, pairs) with optional axes for heads and batches in front.
void check_cos(const std::string& op, const std::string& what, const Tensor& cos, const Tensor& x) {
  check_dtype(op, what, cos, compute_type(x));
  check_device(op, what, cos, x);
  const int64_t dims = cos.dim();
  bool fits = dims >= 2 && dims <= 4 && cos.size(dims - 2) == x.size(2) &&
              cos.size(dims - 1) >= 1 && 2 * cos.size(dims - 1) <= x.size(3);
  fits = fits && (dims < 3 || cos.size(dims - 3) == 1 || cos.size(dims - 3) == x.size(1));
  fits = fits && (dims < 4 || cos.size(0) == 1 || cos.size(0) == x.size(0));
  if (fits) return;
  refuse(op, what,
         "of shape (tokens, pairs), (heads, tokens, pairs) or (batch, heads, tokens, pairs) with "
         "batch " +
             text(x.size(0)) + " or 1, heads " + text(x.size(1)) + " or 1, tokens " +
             text(x.size(2)) + " and 1 to " + text(x.size(3) / 2) + " pairs",
         shape_text(cos));
}

void check_rotate(const std::string& op, const std::string& what, const OptionalTensor& rotate,
                  const Tensor& x) {
  if (!rotate) return;
  check_dtype(op, what, *rotate, ScalarType::Bool);
  check_device(op, what, *rotate, x);
  const int64_t batch = x.size(0);
  const int64_t tokens = x.size(2);
  const bool fits = (rotate->dim() == 1 && rotate->size(0) == tokens) ||
                    (rotate->dim() == 2 && rotate->size(0) == batch && rotate->size(1) == tokens);
  if (!fits) {
    refuse(op, what, "of shape " + shape_text({tokens}) + " or " + shape_text({batch, tokens}),
           shape_text(*rotate));
  }
}

void check_queries_keys_values(const std::string& op, const AttentionArguments& a) {
  check_values(op, "q", a.q);
  for (const auto& [what, t] : {std::pair<const char*, const Tensor&>{"k", a.k}, {"v", a.v}}) {
    check_four_axes(op, what, t);
    check_dtype(op, what, t, a.q.scalar_type());
    check_device(op, what, t, a.q);
  }
  check_shape(op, "k", a.k, {a.q.size(0), -1, -1, a.q.size(3)});
  check_shape(op, "v", a.v, {a.q.size(0), a.k.size(1), a.k.size(2), -1});
  if (a.q.size(3) < 1) refuse(op, "head_dim", "at least 1", text(a.q.size(3)));
  if (a.v.size(3) < 1) refuse(op, "head_dim of v", "at least 1", text(a.v.size(3)));
  const int64_t heads = a.q.size(1);
  const int64_t key_heads = a.k.size(1);
  if (key_heads == 0 ? heads != 0 : heads % key_heads != 0) {
    refuse(op, "heads of q", "a multiple of the heads of k",
           text(heads) + " and " + text(key_heads));
  }
}

void check_tables(const std::string& op, const AttentionArguments& a) {
  const int given = static_cast<int>(a.cos_q.has_value()) + static_cast<int>(a.sin_q.has_value()) +
                    static_cast<int>(a.cos_k.has_value()) + static_cast<int>(a.sin_k.has_value());
  if (given != 0 && given != 4) {
    refuse(op, "cos_q, sin_q, cos_k and sin_k", "given together or not at all",
           text(static_cast<int64_t>(given)) + " of them");
  }
  if (given == 0) {
    if (a.rotate_q) refuse(op, "rotate_q", "None where there are no tables", "a tensor");
    if (a.rotate_k) refuse(op, "rotate_k", "None where there are no tables", "a tensor");
    return;
  }
  const ScalarType dtype = compute_type(a.q);
  check_cos(op, "cos_q", *a.cos_q, a.q);
  check_like(op, "sin_q", *a.sin_q, dtype, a.q, shape_of(*a.cos_q));
  check_cos(op, "cos_k", *a.cos_k, a.k);
  check_like(op, "sin_k", *a.sin_k, dtype, a.q, shape_of(*a.cos_k));
  const int64_t pairs = a.cos_q->size(a.cos_q->dim() - 1);
  const int64_t pairs_k = a.cos_k->size(a.cos_k->dim() - 1);
  if (pairs != pairs_k) refuse(op, "pairs of cos_k", text(pairs), text(pairs_k));
  check_rotate(op, "rotate_q", a.rotate_q, a.q);
  check_rotate(op, "rotate_k", a.rotate_k, a.k);
}

void check_masks(const std::string& op, const AttentionArguments& a) {
  const std::vector<int64_t> full{a.q.size(0), a.q.size(1), a.q.size(2), a.k.size(2)};
  if (a.attn_mask) {
    const Tensor& mask = *a.attn_mask;
    if (mask.scalar_type() != ScalarType::Bool && !is_floating(mask)) {
      refuse(op, "attn_mask", std::string("bool, ") + kFloating, dtype_text(mask.scalar_type()));
    }
    check_device(op, "attn_mask", mask, a.q);
    bool fits = mask.dim() <= 4;
    for (int64_t i = 1; fits && i <= mask.dim(); ++i) {
      const int64_t size = mask.size(mask.dim() - i);
      fits = size == 1 || size == full[static_cast<size_t>(4 - i)];
    }
    if (!fits) refuse(op, "attn_mask", "broadcastable to " + shape_text(full), shape_text(mask));
  }
  if (a.key_mask) {
    check_like(op, "key_mask", *a.key_mask, ScalarType::Bool, a.q, {full[0], full[3]});
  }
}

void check_options(const std::string& op, const AttentionArguments& a) {
  if (a.cls_rope < 0 || a.cls_rope > 2) refuse(op, "cls_rope", "0, 1 or 2", text(a.cls_rope));
  if (!std::isfinite(a.scale)) refuse(op, "scale", "finite", text(a.scale));
  if (!(a.dropout_p >= 0.0 && a.dropout_p <= 1.0)) {
    refuse(op, "dropout_p", "between 0 and 1", text(a.dropout_p));
  }
  if (a.dropout_p > 0.0) {
    if (!a.seed) refuse(op, "seed", "given where dropout_p is above 0", "None");
    check_like(op, "seed", *a.seed, ScalarType::Long, a.q, {});
  }
}

}  // namespace

ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_rope(const Tensor& x, const Tensor& cos, const Tensor& sin,
                const OptionalTensor& rotate) {
  const std::string op = "rope";
  check_values(op, "x", x);
  check_cos(op, "cos", cos, x);
  check_like(op, "sin", sin, compute_type(x), x, shape_of(cos));
  check_rotate(op, "rotate", rotate, x);
}

void check_rope_qk(const Tensor& q, const Tensor& k, const Tensor& cos_q, const Tensor& sin_q,
                   const Tensor& cos_k, const Tensor& sin_k, const OptionalTensor& rotate_q,
                   const OptionalTensor& rotate_k) {
  const std::string op = "rope_qk";
  check_values(op, "q", q);
  check_dtype(op, "k", k, q.scalar_type());
  check_device(op, "k", k, q);
  check_values(op, "k", k);
  check_cos(op, "cos_q", cos_q, q);
  check_like(op, "sin_q", sin_q, compute_type(q), q, shape_of(cos_q));
  check_cos(op, "cos_k", cos_k, k);
  check_like(op, "sin_k", sin_k, compute_type(q), q, shape_of(cos_k));
  check_rotate(op, "rotate_q", rotate_q, q);
  check_rotate(op, "rotate_k", rotate_k, k);
}

void check_rope_table_grad(const Tensor& grad, const Tensor& x, const Tensor& cos,
                           const OptionalTensor& rotate) {
  const std::string op = "rope_table_grad";
  check_values(op, "x", x);
  check_like(op, "grad", grad, x.scalar_type(), x, shape_of(x));
  check_cos(op, "cos", cos, x);
  check_rotate(op, "rotate", rotate, x);
}

void check_attention(const std::string& op, const AttentionArguments& a) {
  check_queries_keys_values(op, a);
  check_tables(op, a);
  check_masks(op, a);
  check_options(op, a);
}

void check_attention_backward(const AttentionArguments& a, const AttentionGradients& g) {
  const std::string op = "rope_attention_backward";
  check_attention(op, a);
  const std::vector<int64_t> rows{a.q.size(0), a.q.size(1), a.q.size(2)};
  const std::vector<int64_t> values{rows[0], rows[1], rows[2], a.v.size(3)};
  check_like(op, "grad_out", g.grad_out, a.q.scalar_type(), a.q, values);
  if (g.grad_lse) check_like(op, "grad_lse", *g.grad_lse, compute_type(a.q), a.q, rows);
  check_like(op, "out", g.out, a.q.scalar_type(), a.q, values);
  check_like(op, "lse", g.lse, compute_type(a.q), a.q, rows);
  if (g.need_bias_grad && (!a.attn_mask || !is_floating(*a.attn_mask))) {
    refuse(op, "attn_mask", "floating where need_bias_grad is set",
           a.attn_mask ? dtype_text(a.attn_mask->scalar_type()) : "None");
  }
  if (g.need_table_grad && !a.cos_q) {
    refuse(op, "cos_q", "given where need_table_grad is set", "None");
  }
}

void check_pool_tokens(const std::string& op, const PoolTokens& a) {
  if (a.x.dim() != 3) refuse(op, "x", "of shape (batch, tokens, channels)", shape_text(a.x));
  if (!is_floating(a.x)) refuse(op, "x", kFloating, dtype_text(a.x.scalar_type()));
  const int64_t batch = a.x.size(0);
  const int64_t channels = a.x.size(2);
  check_token_count(op, "x", a.x.size(1));
  if (channels < 1) refuse(op, "channels of x", "at least 1", text(channels));
  if (a.key_mask) {
    check_like(op, "key_mask", *a.key_mask, ScalarType::Bool, a.x, {batch, a.x.size(1)});
  }
  const auto check_norm = [&](const std::string& what, const OptionalTensor& t) {
    if (!t) return;
    if (a.norm == 0) refuse(op, what, "None where norm is 0", "a tensor");
    check_like(op, what, *t, compute_type(a.x), a.x, {channels});
  };
  check_norm("norm_weight", a.norm_weight);
  check_norm("norm_bias", a.norm_bias);
  if (a.norm < 0 || a.norm > 2) refuse(op, "norm", "0, 1 or 2", text(a.norm));
  if (!std::isfinite(a.scale)) refuse(op, "scale", "finite", text(a.scale));
  if (!(a.norm_eps >= 0.0) || !std::isfinite(a.norm_eps)) {
    refuse(op, "norm_eps", "finite and at least 0", text(a.norm_eps));
  }
}

void check_pool(const std::string& op, const PoolTokens& a, const Tensor& query) {
  check_pool_tokens(op, a);
  check_dtype(op, "query", query, a.x.scalar_type());
  check_device(op, "query", query, a.x);
  const int64_t batch = a.x.size(0);
  const int64_t channels = a.x.size(2);
  const bool fits = query.dim() == 4 && query.size(3) == channels &&
                    (query.size(0) == 1 || query.size(0) == batch);
  if (!fits) {
    refuse(op, "query",
           "of shape (batch, heads, queries, channels) with batch " + text(batch) + " or 1 and " +
               text(channels) + " channels",
           shape_text(query));
  }
}

void check_pool_backward(const PoolTokens& a, const Tensor& query, const Tensor& grad,
                         const OptionalTensor& grad_lse, const Tensor& pooled, const Tensor& lse) {
  const std::string op = "late_cls_pool_backward";
  check_pool(op, a, query);
  const std::vector<int64_t> rows{a.x.size(0), query.size(1), query.size(2)};
  const std::vector<int64_t> shape{rows[0], rows[1], rows[2], a.x.size(2)};
  check_like(op, "grad", grad, a.x.scalar_type(), a.x, shape);
  if (grad_lse) check_like(op, "grad_lse", *grad_lse, compute_type(a.x), a.x, rows);
  check_like(op, "pooled", pooled, a.x.scalar_type(), a.x, shape);
  check_like(op, "lse", lse, compute_type(a.x), a.x, rows);
}

}  // namespace x_rope_cls::ops
