#include <cmath>
#include <cstdio>
#include <limits>

#include "arrays.h"
#include "cases.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cuda/pooling_plan.h"

namespace x_rope_cls::test {

namespace {

// One random case: the arrays that the naive loops take and the tensors that the kernels take.
struct Case {
  explicit Case(uint64_t seed);
  std::string name(uint64_t seed) const;
  PoolParams params() const;

  Random random;
  DType dtype;
  int64_t batch, tokens, channels, heads, queries;
  naive::Pool p;
  Tensor x, query, key_mask, weight, bias, pooled, lse;

 private:
  void choose_sizes();
  void make_mask();
};

Tensor3 without_heads(const Tensor& t) {
  const Tensor4 view = t.view();
  return {view.data, view.stride_b, view.stride_n, view.stride_d};
}

// Sizes that a call cuts in other ways: several parts a batch, several batches a task, many rows.
void Case::choose_sizes() {
  batch = random.integer(random.chance(0.1) ? 0 : 1, 3);
  tokens = random.integer(0, 70);
  channels = random.chance(0.25) ? 32 * random.integer(1, 4) : random.integer(1, 72);
  heads = random.integer(random.chance(0.05) ? 0 : 1, 4);
  queries = random.integer(1, 3);
  switch (random.integer(0, 9)) {
    case 0:
      tokens = random.integer(500, 1400);
      break;
    case 1:
      batch = random.integer(60, 140);
      tokens = random.integer(0, 12);
      break;
    case 2:
      channels = random.integer(200, 530);
      break;
    case 3:
      heads = random.integer(5, 24);
      break;
    default:
      break;
  }
}

Case::Case(uint64_t seed) : random(seed) {
  dtype = random.one_of({DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16});
  choose_sizes();
  p.norm = random.one_of({naive::Norm::kNone, naive::Norm::kLayer, naive::Norm::kRms});
  p.scale = random.chance(0.8) ? 1.0 / std::sqrt(static_cast<double>(channels)) : -0.1;
  // A spread near 0, as few channels may have, would magnify rounding errors.
  p.eps = channels >= 8 && random.chance(0.5) ? 1e-5 : 0.1;
  p.x = random.normal_array(batch, 1, tokens, channels);
  make_mask();
  x = Tensor::holding(random, dtype, p.x);
  p.query = random.normal_array(random.chance(0.5) ? 1 : batch, heads, queries, channels);
  query = Tensor::holding(random, dtype, p.query);
  const DType compute = compute_type(dtype);
  for (auto [values, tensor] : {std::pair{&p.weight, &weight}, std::pair{&p.bias, &bias}}) {
    if (p.norm != naive::Norm::kNone && random.chance(0.6)) {
      *values = random.normal_array(1, 1, 1, channels);
      *tensor = Tensor::holding(compute, *values);
    }
  }
  pooled = Tensor(dtype, batch, heads, queries, channels);
  lse = Tensor(compute, batch, heads, queries, 1);
}

// Masked tokens are NaN: a kernel that looks at them is found out.
void Case::make_mask() {
  if (!random.chance(0.5)) {
    return;
  }
  p.key_mask = random.bool_array(batch, 1, tokens, 1, random.one_of({0.0, 0.1, 0.5, 0.95}));
  key_mask = Tensor::holding(random, DType::kBool, p.key_mask);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t n = 0; n < tokens; ++n) {
      for (int64_t c = 0; c < channels && !p.counts(b, n); ++c) {
        p.x.at(b, 0, n, c) = std::numeric_limits<double>::quiet_NaN();
      }
    }
  }
}

std::string Case::name(uint64_t seed) const {
  char text[200];
  std::snprintf(text, sizeof(text),
                "pooling seed %llu on %s, %s (%d, %d, %d), %d queries a head of %d, norm %d%s",
                static_cast<unsigned long long>(seed), cpu::kernels().name, name_of(dtype),
                static_cast<int>(batch), static_cast<int>(tokens), static_cast<int>(channels),
                static_cast<int>(queries), static_cast<int>(heads), static_cast<int>(p.norm),
                p.key_mask.values.empty() ? "" : ", masked");
  return text;
}

PoolParams Case::params() const {
  PoolParams q{};
  q.dtype = dtype;
  q.norm = static_cast<PoolNorm>(p.norm);
  q.batch = batch;
  q.tokens = tokens;
  q.channels = channels;
  q.heads = heads;
  q.queries = queries;
  q.query_batch = p.query.b;
  q.x = without_heads(x);
  q.query = query.view();
  if (q.query_batch == 1) {
    q.query.stride_b = 0;
  }
  q.pooled = pooled.data();
  q.lse = lse.data();
  if (!p.key_mask.values.empty()) {
    q.key_mask = static_cast<const uint8_t*>(key_mask.data());
    q.key_mask_stride_b = key_mask.view().stride_b;
    q.key_mask_stride_n = key_mask.view().stride_n;
  }
  q.norm_weight = p.weight.values.empty() ? nullptr : weight.data();
  q.norm_bias = p.bias.values.empty() ? nullptr : bias.data();
  q.scale = p.scale;
  q.norm_eps = p.eps;
  return q;
}

void check_backward(Case& c, Workers& workers, Checker& checker) {
  const DType compute = compute_type(c.dtype);
  PoolBackwardParams g{};
  g.forward = c.params();
  naive::Array grad = c.random.normal_array(c.batch, c.heads, c.queries, c.channels), grad_lse;
  const Tensor grad_tensor = Tensor::holding(c.random, c.dtype, grad);
  g.grad = grad_tensor.view();
  Tensor grad_lse_tensor;
  if (c.random.chance(0.5)) {
    grad_lse = c.random.normal_array(c.batch, c.heads, c.queries, 1);
    grad_lse_tensor = Tensor::holding(c.random, compute, grad_lse);
    g.grad_lse = grad_lse_tensor.data();
    g.grad_lse_stride_b = grad_lse_tensor.view().stride_b;
    g.grad_lse_stride_h = grad_lse_tensor.view().stride_h;
    g.grad_lse_stride_m = grad_lse_tensor.view().stride_n;
  }
  const Tensor dx(c.random, c.dtype, c.batch, 1, c.tokens, c.channels);
  const Tensor dquery(c.dtype, c.p.query.b, c.heads, c.queries, c.channels);
  const Tensor dweight(compute, 1, 1, 1, c.channels), dbias(compute, 1, 1, 1, c.channels);
  const bool norm = c.p.norm != naive::Norm::kNone;
  const bool want_x = c.random.chance(0.8);
  const bool want_weight = norm && c.random.chance(0.6), want_bias = norm && c.random.chance(0.6);
  g.dx = want_x ? without_heads(dx) : Tensor3{};
  g.dquery = dquery.data();
  g.dweight = want_weight ? dweight.data() : nullptr;
  g.dbias = want_bias ? dbias.data() : nullptr;

  const cpu::KernelTable& kernels = cpu::kernels();
  const Workspace workspace(kernels.pool_backward_workspace(g, workers.count()));
  kernels.pool_backward(g, workers.parallel(), workspace.data());

  const naive::PoolGrads expected = naive::pool_backward(c.p, grad, grad_lse);
  // Every gradient depends on <grad, pooled>, in which each channel of pooled has been rounded.
  const int64_t own = c.channels, all = c.channels * c.batch;
  checker.values("dquery", c.dtype, dquery.values(), expected.dquery, c.p.query.b == 1 ? all : own);
  if (want_x) {
    checker.values("dx", c.dtype, dx.values(), expected.dx, own);
    checker.gaps("dx", dx);
  }
  if (want_weight) {
    checker.values("dweight", c.dtype, dweight.values(), expected.dweight, all);
  }
  if (want_bias) {
    checker.values("dbias", c.dtype, dbias.values(), expected.dbias, all);
  }
}

// What must hold for the launch choices of the CUDA kernels, on an A100, an H100 or a smaller one.
void check_plan(Random& random, bool backward, Checker& checker) {
  PoolParams p{};
  p.dtype = random.one_of({DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16});
  p.norm = random.one_of({PoolNorm::kNone, PoolNorm::kLayer, PoolNorm::kRms});
  p.batch = random.integer(1, 300);
  p.tokens = random.integer(0, random.chance(0.5) ? 300 : 300000);
  p.channels = random.integer(1, random.chance(0.5) ? 1024 : 5000);
  p.heads = random.integer(0, 30);
  p.queries = random.integer(0, 20);
  p.query_batch = random.chance(0.5) ? 1 : p.batch;
  const cuda::Device device =
      random.one_of({cuda::Device{108, 166912, 167936}, cuda::Device{132, 232448, 233472},
                     cuda::Device{16, 101376, 102400}});
  const cuda::PoolPlan plan = cuda::make_pool_plan(p, device, backward, random.chance(0.5));
  const bool half = size_of(p.dtype) == 2;
  const bool any = plan.rows > 0 && p.tokens > 0;
  const bool large = device.shared_per_block > 110000;
  const bool few = backward && p.norm != PoolNorm::kNone && p.channels < 8;
  using Kernels = cuda::PoolKernels;
  const bool tensor_cores = plan.kernels == Kernels::kTensorCores;
  const bool fma = plan.kernels == Kernels::kFma, simple = plan.kernels == Kernels::kSimple;
  const int64_t size = p.dtype == DType::kFloat64 ? 8 : 4;
  checker.holds("tensor cores for 16-bit tokens",
                tensor_cores == (half && any && !few) || !half || !large || p.channels > 1024);
  checker.holds("no tensor cores for others", half || !tensor_cores);
  checker.holds("FMA units for others, tokens read once",
                fma == (!half && any) || half || !large || p.channels * size > 5120);
  checker.holds("shared memory", simple || plan.shared_bytes <= device.shared_per_block);
  checker.holds("stages", simple || (plan.stages >= 1 && plan.stages <= (fma ? 2 : 3)));
  checker.holds("every token in a split", !any || plan.splits * plan.split_tokens >= p.tokens);
  checker.holds("tokens in every split", !any || (plan.splits - 1) * plan.split_tokens < p.tokens);
  checker.holds("splits", plan.splits >= 1 && plan.splits <= cuda::kPoolMostSplits);
  checker.holds("whole tiles",
                plan.split_tokens % (fma ? cuda::kFmaTokens : cuda::kPoolTokens) == 0);
  checker.holds("all rows", plan.groups * plan.group_rows >= plan.rows);
  checker.holds("all channels", simple || plan.padded >= p.channels);
  if (fma && backward && plan.groups > 1) {
    const int64_t tiles = (p.tokens + cuda::kFmaTokens - 1) / cuda::kFmaTokens;
    const int64_t records = p.batch * tiles * plan.groups * cuda::kFmaRecord * size;
    checker.holds("room for records", plan.sums - plan.records >= records);
  }
  const int64_t sums = plan.splits * p.batch * plan.rows * plan.kinds * p.channels * size;
  checker.holds("room for sums", plan.sums % 256 == 0 && plan.stats - plan.sums >= sums);
  checker.holds("room for the rest", plan.bytes >= plan.stats && plan.bytes >= plan.merged);
}

}  // namespace

bool run_pooling_case(uint64_t seed) {
  Case c(seed);
  Checker checker(c.name(seed), c.dtype);
  Workers workers(c.random);
  const cpu::KernelTable& kernels = cpu::kernels();
  const PoolParams params = c.params();
  {
    const Workspace workspace(kernels.pool_workspace(params, workers.count()));
    kernels.pool_forward(params, workers.parallel(), workspace.data());
  }
  const naive::PoolResult expected = naive::pool(c.p);
  checker.values("pooled", c.dtype, c.pooled.values(), expected.pooled);
  checker.values("lse", compute_type(c.dtype), c.lse.values(), expected.lse);
  if (c.batch > 0) {  // the operator does not call the kernel otherwise
    check_backward(c, workers, checker);
  }
  Random choices(seed);
  check_plan(choices, false, checker);
  check_plan(choices, true, checker);
  return checker.passed();
}

}  // namespace x_rope_cls::test
