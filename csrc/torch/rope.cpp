// The operators rope and rope_table_grad on CPU.
#include "rope.h"

#include "../kernels/cpu/dispatch.h"
#include "params.h"

namespace x_rope_cls::ops {
namespace {

// `table`: cos, whose leading axes say what the sums run over.
RopeTableGradParams table_grad_params(const Tensor& grad, const Tensor& x, const Tensor& table,
                                      const OptionalTensor& rotate, bool interleaved,
                                      bool inverse) {
  RopeTableGradParams p{};
  p.dtype = dtype_of(x);
  p.grad_dtype = dtype_of(grad);
  p.grad = view_of(grad);
  p.x = view_of(x);
  const RotaryTable t = table_of(table, table, rotate);
  p.rotate = t.rotate;
  p.rotate_stride_b = t.rotate_stride_b;
  p.rotate_stride_n = t.rotate_stride_n;
  p.table_batch = table.dim() == 4 ? table.size(0) : 1;
  p.table_heads = table.dim() >= 3 ? table.size(table.dim() - 3) : 1;
  p.batch = x.size(0);
  p.heads = x.size(1);
  p.tokens = x.size(2);
  p.head_dim = x.size(3);
  p.pairs = table.size(table.dim() - 1);
  p.interleaved = interleaved;
  p.inverse = inverse;
  return p;
}

}  // namespace

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& rotate,
            bool interleaved, bool inverse) {
  check_rope(x, cos, sin, rotate);
  Tensor y = empty_heads_inside(x, x.size(0), x.size(1), x.size(2), x.size(3));
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
  cpu::kernels().rope(p, torch_threads());
  return y;
}

std::tuple<Tensor, Tensor> rope_table_grad(const Tensor& grad, const Tensor& x, const Tensor& cos,
                                           const OptionalTensor& rotate, bool interleaved,
                                           bool inverse) {
  check_rope_table_grad(grad, x, cos, rotate);
  return table_gradients(grad, x, cos, rotate, interleaved, inverse);
}

std::tuple<Tensor, Tensor> table_gradients(const Tensor& grad, const Tensor& x, const Tensor& cos,
                                           const OptionalTensor& rotate, bool interleaved,
                                           bool inverse) {
  const auto sizes = cos.sizes();
  const std::vector<int64_t> shape(sizes.begin(), sizes.end());
  Tensor dcos = empty_of(x, shape, compute_type(x));
  Tensor dsin = empty_of(x, shape, compute_type(x));
  RopeTableGradParams p = table_grad_params(grad, x, cos, rotate, interleaved, inverse);
  p.dcos = dcos.data_ptr();
  p.dsin = dsin.data_ptr();
  cpu::kernels().rope_table_grad(p, torch_threads());
  return {dcos, dsin};
}

}  // namespace x_rope_cls::ops
