// The operators rope, rope_qk and rope_table_grad.
#include "rope.h"

#include "backend.h"
#include "params.h"

namespace x_rope_cls::ops {
namespace {

RopeParams rope_params(const Tensor& x, const Tensor& y, const Tensor& cos, const Tensor& sin,
                       const OptionalTensor& rotate, bool interleaved, bool inverse) {
  RopeParams p{};
  p.dtype = dtype_of(x);
  p.x = view_of(x);
  p.y = view_of(y);
  p.table = table_of(cos, sin, rotate);
  p.batch = x.size(0);
  p.heads = x.size(1);
  p.tokens = x.size(2);
  p.head_dim = x.size(3);
  p.pairs = cos.size(cos.dim() - 1);
  p.interleaved = interleaved;
  p.inverse = inverse;
  return p;
}

Tensor empty_for(const Tensor& x) {
  return empty_heads_inside(x, x.size(0), x.size(1), x.size(2), x.size(3));
}

}  // namespace

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& rotate,
            bool interleaved, bool inverse) {
  check_rope(x, cos, sin, rotate);
  Tensor y = empty_for(x);
  const RopeParams call = rope_params(x, y, cos, sin, rotate, interleaved, inverse);
  run_rope(&call, 1, x);
  return y;
}

std::tuple<Tensor, Tensor> rope_qk(const Tensor& q, const Tensor& k, const Tensor& cos_q,
                                   const Tensor& sin_q, const Tensor& cos_k, const Tensor& sin_k,
                                   const OptionalTensor& rotate_q, const OptionalTensor& rotate_k,
                                   bool interleaved, bool inverse) {
  check_rope_qk(q, k, cos_q, sin_q, cos_k, sin_k, rotate_q, rotate_k);
  Tensor rotated_q = empty_for(q);
  Tensor rotated_k = empty_for(k);
  const RopeParams calls[] = {
      rope_params(q, rotated_q, cos_q, sin_q, rotate_q, interleaved, inverse),
      rope_params(k, rotated_k, cos_k, sin_k, rotate_k, interleaved, inverse)};
  run_rope(calls, 2, q);
  return {rotated_q, rotated_k};
}

std::tuple<Tensor, Tensor> rope_table_grad(const Tensor& grad, const Tensor& x, const Tensor& cos,
                                           const OptionalTensor& rotate, bool interleaved,
                                           bool inverse) {
  check_rope_table_grad(grad, x, cos, rotate);
  const RotaryTable t = table_of(cos, cos, rotate);
  return table_gradients(grad, x, cos, {t.rotate, t.rotate_stride_b, t.rotate_stride_n}, {},
                         interleaved, inverse);
}

std::tuple<Tensor, Tensor> table_gradients(const Tensor& grad, const Tensor& x, const Tensor& cos,
                                           const TokenMask& rotate, const TokenMask& keep,
                                           bool interleaved, bool inverse) {
  const auto sizes = cos.sizes();
  const std::vector<int64_t> shape(sizes.begin(), sizes.end());
  Tensor dcos = empty_of(x, shape, compute_type(x));
  Tensor dsin = empty_of(x, shape, compute_type(x));
  RopeTableGradParams p{};
  p.dtype = dtype_of(x);
  p.grad_dtype = dtype_of(grad);
  p.grad = view_of(grad);
  p.x = view_of(x);
  p.rotate = rotate.data;
  p.rotate_stride_b = rotate.stride_b;
  p.rotate_stride_n = rotate.stride_n;
  p.keep = keep.data;
  p.keep_stride_b = keep.stride_b;
  p.keep_stride_n = keep.stride_n;
  p.dcos = dcos.data_ptr();
  p.dsin = dsin.data_ptr();
  p.table_batch = cos.dim() == 4 ? cos.size(0) : 1;
  p.table_heads = cos.dim() >= 3 ? cos.size(cos.dim() - 3) : 1;
  p.batch = x.size(0);
  p.heads = x.size(1);
  p.tokens = x.size(2);
  p.head_dim = x.size(3);
  p.pairs = cos.size(cos.dim() - 1);
  p.interleaved = interleaved;
  p.inverse = inverse;
  run_rope_table_grad(p, x);
  return {dcos, dsin};
}

}  // namespace x_rope_cls::ops
