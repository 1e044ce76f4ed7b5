// Attention with rotary positions for a sequence with a CLS token in front, from C++: the operator
// is called through torch's dispatcher and compared with plain scaled_dot_product_attention.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdio>
#include <optional>
#include <tuple>

namespace {

using OptionalTensor = std::optional<at::Tensor>;
using RopeAttention = std::tuple<at::Tensor, at::Tensor>(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    int64_t, bool, double, double);

constexpr int64_t kMask = 2;  // cls_rope: a pair with a token that has no position is not rotated

// x: (batch, heads, tokens, head_dim), channels (2i, 2i + 1) rotated by angle i of the token.
at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const at::Tensor pairs = x.unflatten(-1, {-1, 2});
  const at::Tensor a = pairs.select(-1, 0), b = pairs.select(-1, 1);
  return torch::stack({a * cos - b * sin, a * sin + b * cos}, -1).flatten(-2);
}

}  // namespace

int main() {
  const auto op = c10::Dispatcher::singleton()
                      .findSchemaOrThrow("x_rope_cls::rope_attention", "")
                      .typed<RopeAttention>();

  torch::manual_seed(0);
  const int64_t batch = 2, heads = 4, tokens = 17, head_dim = 32;
  const double scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
  const at::Tensor q = torch::randn({batch, heads, tokens, head_dim});
  const at::Tensor k = torch::randn({batch, heads, tokens, head_dim});
  const at::Tensor v = torch::randn({batch, heads, tokens, head_dim});

  // Rotary tables (tokens, head_dim / 2), as RotaryEmbedding makes them.
  const at::Tensor frequencies =
      torch::pow(10000.0, -torch::arange(0, head_dim, 2) / static_cast<double>(head_dim));
  const at::Tensor angles = torch::outer(torch::arange(tokens).to(torch::kFloat), frequencies);
  const at::Tensor cos = angles.cos(), sin = angles.sin();

  // Token 0 is a CLS token: it has no position.
  at::Tensor has_position = torch::ones({tokens}, torch::kBool);
  has_position[0] = false;

  const auto [out, lse] =
      op.call(q, k, v, cos, sin, cos, sin, has_position, has_position, std::nullopt, std::nullopt,
              std::nullopt, kMask, true, scale, 0.0);

  // The same with all scores in memory: rotated where both tokens have a position, else raw.
  const at::Tensor both = has_position.unsqueeze(1) & has_position.unsqueeze(0);
  const at::Tensor rotated =
      torch::matmul(rotate(q, cos, sin), rotate(k, cos, sin).transpose(-2, -1));
  const at::Tensor raw = torch::matmul(q, k.transpose(-2, -1));
  const at::Tensor expected =
      torch::matmul(torch::softmax(torch::where(both, rotated, raw) * scale, -1), v);

  const double error = (out - expected).abs().max().item<double>();
  std::printf("torch %s, output %s, largest difference from the plain computation: %.2g\n",
              TORCH_VERSION, c10::str(out.sizes()).c_str(), error);
  return error < 1e-5 ? 0 : 1;
}
