#include <cstdio>

#include "arrays.h"
#include "cases.h"
#include "kernels/cpu/dispatch.h"

namespace x_rope_cls::test {

bool run_rope_case(uint64_t seed) {
  Random random(seed);
  const DType dtype =
      random.one_of({DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16});
  const int64_t batch = random.integer(0, 3), heads = random.integer(0, 3);
  // Half of the rows are what fast paths want: whole vectors, with some channels not rotated.
  const bool regular = random.chance(0.5);
  const int64_t tokens = random.integer(0, 40);
  const int64_t head_dim = regular ? 16 * random.integer(1, 5) : random.integer(2, 80);
  const int64_t pairs =
      regular ? 8 * random.integer(1, head_dim / 16) : random.integer(1, head_dim / 2);
  const bool interleaved = random.chance(0.5), inverse = random.chance(0.5);
  const cpu::KernelTable& kernels = cpu::kernels();
  char name[160];
  std::snprintf(name, sizeof(name), "rope seed %llu on %s, %s (%lld, %lld, %lld, %lld), %lld pairs",
                static_cast<unsigned long long>(seed), kernels.name, name_of(dtype),
                static_cast<long long>(batch), static_cast<long long>(heads),
                static_cast<long long>(tokens), static_cast<long long>(head_dim),
                static_cast<long long>(pairs));
  Checker checker(name, dtype);

  naive::Array x_values = random.normal_array(batch, heads, tokens, head_dim);
  const Tensor x = Tensor::holding(random, dtype, x_values);
  const RotaryTensors rotary(random, dtype, batch, heads, tokens, pairs);
  const bool in_place = random.chance(0.25);
  const Tensor x_copy = Tensor::holding(random, dtype, x_values);  // rotated where it lies
  const Tensor separate(random, dtype, batch, heads, tokens, head_dim);
  const Tensor& y = in_place ? x_copy : separate;
  Workers workers(random);
  // A second call in the same region: the same tensor to another place, the other way.
  const Tensor back(random, dtype, batch, heads, tokens, head_dim);
  const RopeParams calls[] = {{dtype, x.view(), back.view(), rotary.table(), batch, heads, tokens,
                               head_dim, pairs, interleaved, !inverse},
                              {dtype, (in_place ? y : x).view(), y.view(), rotary.table(), batch,
                               heads, tokens, head_dim, pairs, interleaved, inverse}};
  const int64_t first = random.integer(0, 1);
  kernels.rope(calls + first, 2 - first, workers.parallel());
  checker.values("y", dtype, y.values(),
                 naive::rope(x_values, rotary.arrays, interleaved, inverse));
  checker.gaps("y", y);
  if (first == 0) {
    checker.values("back", dtype, back.values(),
                   naive::rope(x_values, rotary.arrays, interleaved, !inverse));
    checker.gaps("back", back);
  }

  const DType grad_dtype = random.chance(0.5) ? dtype : compute_type(dtype);
  naive::Array grad_values = random.normal_array(batch, heads, tokens, head_dim);
  const Tensor grad = Tensor::holding(random, grad_dtype, grad_values);
  const naive::Array& cos = rotary.arrays.cos;
  const Tensor dcos(compute_type(dtype), cos.b, cos.h, cos.n, cos.d);
  const Tensor dsin(compute_type(dtype), cos.b, cos.h, cos.n, cos.d);
  const RotaryTable table = rotary.table();
  RopeTableGradParams params{};
  params.dtype = dtype;
  params.grad_dtype = grad_dtype;
  params.grad = grad.view();
  params.x = x.view();
  params.rotate = table.rotate;
  params.rotate_stride_b = table.rotate_stride_b;
  params.rotate_stride_n = table.rotate_stride_n;
  params.dcos = dcos.data();
  params.dsin = dsin.data();
  params.table_batch = cos.b;
  params.table_heads = cos.h;
  params.batch = batch;
  params.heads = heads;
  params.tokens = tokens;
  params.head_dim = head_dim;
  params.pairs = pairs;
  params.interleaved = interleaved;
  params.inverse = inverse;
  kernels.rope_table_grad(params, workers.parallel());
  const naive::TableGrads expected =
      naive::rope_table_grad(grad_values, x_values, rotary.arrays, interleaved, inverse);
  checker.values("dcos", compute_type(dtype), dcos.values(), expected.cos);
  checker.values("dsin", compute_type(dtype), dsin.values(), expected.sin);
  return checker.passed();
}

}  // namespace x_rope_cls::test
