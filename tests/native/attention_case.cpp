#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "arrays.h"
#include "cases.h"
#include "kernels/cpu/dispatch.h"

namespace x_rope_cls::test {

namespace {

// One random case: the arrays that the naive loops take and the tensors that the kernels take.
struct Case {
  explicit Case(uint64_t seed);
  std::string name(uint64_t seed) const;
  AttentionParams params() const;

  Random random;
  DType dtype, bias_dtype = DType::kBool;
  int64_t batch, heads, key_heads, queries, keys, head_dim, value_dim, pairs;
  naive::Attention a;
  Tensor q, k, v, out, lse, key_mask, bias;
  RotaryTensors rotary_q, rotary_k;

 private:
  // Tensors whose rows are whole pieces of 16 bytes, in sizes around the tiles of the kernels.
  bool aligned = false;
  Tensor holding(DType type, naive::Array& values) {
    return aligned ? Tensor::holding(type, values) : Tensor::holding(random, type, values);
  }
  int64_t length() {
    if (aligned) {
      return random.one_of<int64_t>({1, 16, 17, 63, 64, 65, 127, 128, 129, 144, 192, 255, 257});
    }
    return any_length();
  }
  int64_t any_length() {
    return random.chance(0.1) ? random.integer(100, 600) : random.integer(0, 70);
  }
  void make_mask_and_bias();
};

Case::Case(uint64_t seed) : random(seed) {
  dtype = random.one_of({DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16});
  aligned = random.chance(0.15);
  batch = random.integer(random.chance(0.1) ? 0 : 1, 2);
  key_heads = random.integer(1, 2);
  heads = key_heads * random.integer(1, 3);
  queries = length();
  keys = random.chance(0.5) ? queries : length();
  head_dim = random.integer(1, 72);
  value_dim = random.chance(0.5) ? head_dim : random.integer(1, 72);
  if (aligned) {
    head_dim = random.one_of<int64_t>({32, 64, 80, 96, 128, 160, 256});
    value_dim = random.chance(0.8) ? head_dim : random.one_of<int64_t>({32, 64, 128, 264});
  }
  a.has_rotary = head_dim >= 2 && random.chance(0.9);
  pairs = a.has_rotary ? random.integer(1, head_dim / 2) : 0;
  a.mode = random.one_of(
      {naive::Mode::kRotate, naive::Mode::kSkip, naive::Mode::kMask, naive::Mode::kMask});
  a.interleaved = random.chance(0.5);
  a.scale = random.chance(0.8) ? 1.0 / std::sqrt(static_cast<double>(head_dim))
                               : random.one_of({0.3, -0.2, 0.0});
  a.dropout_p = random.chance(0.3) ? random.one_of({0.1, 0.5}) : 0.0;
  a.seed = static_cast<uint64_t>(random.integer(0, std::numeric_limits<int64_t>::max()));
  a.q = random.normal_array(batch, heads, queries, head_dim);
  a.k = random.normal_array(batch, key_heads, keys, head_dim);
  a.v = random.normal_array(batch, key_heads, keys, value_dim);
  q = holding(dtype, a.q);
  k = holding(dtype, a.k);
  v = holding(dtype, a.v);
  out = aligned ? Tensor(dtype, batch, heads, queries, value_dim)
                : Tensor(random, dtype, batch, heads, queries, value_dim);
  lse = Tensor(compute_type(dtype), batch, heads, queries, 1);
  if (a.has_rotary) {
    rotary_q = RotaryTensors(random, dtype, batch, heads, queries, pairs);
    rotary_k = RotaryTensors(random, dtype, batch, key_heads, keys, pairs);
    a.rotary_q = rotary_q.arrays;
    a.rotary_k = rotary_k.arrays;
  }
  make_mask_and_bias();
}

void Case::make_mask_and_bias() {
  if (random.chance(0.4)) {
    a.key_mask = random.bool_array(batch, 1, keys, 1, random.one_of({0.0, 0.5, 0.9}));
    key_mask = Tensor::holding(random, DType::kBool, a.key_mask);
  }
  if (!random.chance(0.4)) {
    return;
  }
  bias_dtype = random.one_of(
      {DType::kBool, DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16});
  const int64_t b = random.chance(0.5) ? batch : 1, h = random.chance(0.5) ? heads : 1;
  const int64_t n = random.chance(0.7) ? queries : 1;
  if (bias_dtype != DType::kBool) {
    a.bias = random.normal_array(b, h, n, keys);
    for (double& value : a.bias.values) {
      value = random.chance(0.05) ? -std::numeric_limits<double>::infinity() : value;
    }
    bias = Tensor::holding(random, bias_dtype, a.bias);
    return;
  }
  a.bias = random.bool_array(b, h, n, keys, 0.7);
  bias = Tensor::holding(random, bias_dtype, a.bias);
  for (double& value : a.bias.values) {
    value = value != 0.0 ? 0.0 : -std::numeric_limits<double>::infinity();
  }
}

std::string Case::name(uint64_t seed) const {
  char text[240];
  std::snprintf(text, sizeof(text),
                "attention seed %llu on %s, %s batch %d heads %d/%d tokens %d/%d channels %d/%d "
                "pairs %d mode %d",
                static_cast<unsigned long long>(seed), cpu::kernels().name, name_of(dtype),
                static_cast<int>(batch), static_cast<int>(heads), static_cast<int>(key_heads),
                static_cast<int>(queries), static_cast<int>(keys), static_cast<int>(head_dim),
                static_cast<int>(value_dim), static_cast<int>(pairs), static_cast<int>(a.mode));
  return text;
}

AttentionParams Case::params() const {
  AttentionParams p{};
  p.dtype = dtype;
  p.cls_rope = static_cast<ClsRope>(a.mode);
  p.interleaved = a.interleaved;
  p.has_rotary = a.has_rotary;
  p.batch = batch;
  p.heads = heads;
  p.key_heads = key_heads;
  p.queries = queries;
  p.keys = keys;
  p.head_dim = head_dim;
  p.value_dim = value_dim;
  p.pairs = pairs;
  p.q = q.view();
  p.k = k.view();
  p.v = v.view();
  p.out = out.view();
  p.lse = lse.data();
  if (a.has_rotary) {
    p.table_q = rotary_q.table();
    p.table_k = rotary_k.table();
  }
  if (!a.key_mask.values.empty()) {
    p.key_mask = static_cast<const uint8_t*>(key_mask.data());
    p.key_mask_stride_b = key_mask.stride(0);
    p.key_mask_stride_n = key_mask.view().stride_n;
  }
  if (!a.bias.values.empty()) {
    p.bias = bias.data();
    p.bias_dtype = bias_dtype;
    p.bias_stride_b = bias.stride(0);
    p.bias_stride_h = bias.stride(1);
    p.bias_stride_n = bias.stride(2);
    p.bias_stride_m = bias.view().stride_d;
  }
  p.scale = a.scale;
  p.dropout_p = a.dropout_p;
  p.seed = a.seed;
  return p;
}

void check_backward(Case& c, Workers& workers, Checker& checker) {
  const DType compute = compute_type(c.dtype);
  AttentionBackwardParams p{};
  p.forward = c.params();
  naive::Array grad_out = c.random.normal_array(c.batch, c.heads, c.queries, c.value_dim);
  const Tensor grad_out_tensor = Tensor::holding(c.random, c.dtype, grad_out);
  p.grad_out = grad_out_tensor.view();
  naive::Array grad_lse;
  Tensor grad_lse_tensor;
  if (c.random.chance(0.3)) {
    grad_lse = c.random.normal_array(c.batch, c.heads, c.queries, 1);
    grad_lse_tensor = Tensor::holding(c.random, compute, grad_lse);
    p.grad_lse = grad_lse_tensor.data();
    p.grad_lse_stride_b = grad_lse_tensor.view().stride_b;
    p.grad_lse_stride_h = grad_lse_tensor.view().stride_h;
    p.grad_lse_stride_n = grad_lse_tensor.view().stride_n;
  }
  const Tensor dq(c.random, c.dtype, c.batch, c.heads, c.queries, c.head_dim);
  const Tensor dk(c.random, c.dtype, c.batch, c.key_heads, c.keys, c.head_dim);
  const Tensor dv(c.random, c.dtype, c.batch, c.key_heads, c.keys, c.value_dim);
  p.dq = dq.view();
  p.dk = dk.view();
  p.dv = dv.view();
  Tensor dq_rotated, dk_rotated, dbias;
  const bool want_rotated = c.a.has_rotary && c.random.chance(0.5);
  if (want_rotated) {
    dq_rotated = Tensor(c.random, compute, c.batch, c.heads, c.queries, c.head_dim);
    dk_rotated = Tensor(c.random, compute, c.batch, c.key_heads, c.keys, c.head_dim);
    p.dq_rotated = dq_rotated.view();
    p.dk_rotated = dk_rotated.view();
  }
  const bool want_bias =
      !c.a.bias.values.empty() && c.bias_dtype != DType::kBool && c.random.chance(0.7);
  if (want_bias) {
    dbias = Tensor(compute, c.a.bias.b, c.a.bias.h, c.a.bias.n, c.a.bias.d);
    dbias.fill(0.0);
    p.dbias = dbias.data();
    p.dbias_stride_b = dbias.stride(0);
    p.dbias_stride_h = dbias.stride(1);
    p.dbias_stride_n = dbias.stride(2);
    p.dbias_stride_m = dbias.view().stride_d;
  }

  const cpu::KernelTable& kernels = cpu::kernels();
  const Workspace workspace(kernels.attention_backward_workspace(p, workers.count()));
  kernels.attention_backward(p, workers.parallel(), workspace.data());

  const naive::AttentionGrads expected = naive::attention_backward(c.a, grad_out, grad_lse);
  // Tensor cores take rotated queries and keys, weights and gradients of scores rounded to dtype,
  // as eager PyTorch does; the kernels for the CPU keep them in float32. Three times the tolerance.
  const bool rounds = std::strcmp(kernels.name, "cuda") == 0 && size_of(c.dtype) == 2;
  const int64_t summands = rounds ? 144 : 1;
  checker.values("dq", c.dtype, dq.values(), expected.dq, summands);
  checker.values("dk", c.dtype, dk.values(), expected.dk, summands);
  checker.values("dv", c.dtype, dv.values(), expected.dv, summands);
  checker.gaps("dq", dq);
  checker.gaps("dk", dk);
  checker.gaps("dv", dv);
  if (want_rotated) {
    checker.values("dq_rotated", compute, dq_rotated.values(), expected.dq_rotated, summands);
    checker.values("dk_rotated", compute, dk_rotated.values(), expected.dk_rotated, summands);
    checker.gaps("dq_rotated", dq_rotated);
    checker.gaps("dk_rotated", dk_rotated);
  }
  if (want_bias) {
    checker.values("dbias", compute, dbias.values(), expected.dbias, summands);
  }
}

}  // namespace

bool run_attention_case(uint64_t seed) {
  Case c(seed);
  Checker checker(c.name(seed), c.dtype);
  Workers workers(c.random);
  const cpu::KernelTable& kernels = cpu::kernels();
  const AttentionParams params = c.params();
  naive::AttentionResult expected = naive::attention(c.a);
  if (kernels.attention_forward != nullptr) {
    const Workspace workspace(kernels.attention_workspace(params, workers.count()));
    kernels.attention_forward(params, workers.parallel(), workspace.data());
  } else {
    c.out.set(expected.out);
    c.lse.set(expected.lse);
  }
  checker.values("out", c.dtype, c.out.values(), expected.out);
  checker.values("lse", compute_type(c.dtype), c.lse.values(), expected.lse);
  checker.gaps("out", c.out);
  if (kernels.attention_backward != nullptr) {
    check_backward(c, workers, checker);
  }
  return checker.passed();
}

}  // namespace x_rope_cls::test
