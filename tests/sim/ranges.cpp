#include "ranges.h"

#include <cudasim.h>

#include <stdexcept>

namespace x_rope_cls::sim {
namespace {

const char kNothing = 0;

int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kBool:
      return 1;
    default:
      return 2;
  }
}

DType compute_of(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

}  // namespace

Ranges::Ranges() { add(&kNothing, 1, {}); }

Ranges::~Ranges() {
  for (const void* start : starts_) cudasim_unregister_host(start);
}

void Ranges::add(const void* data, int64_t element_size, std::initializer_list<Axis> axes) {
  if (data == nullptr) return;
  int64_t last = 0;
  for (const Axis& axis : axes) {
    if (axis.size == 0) return;
    last += (axis.size - 1) * axis.stride;
  }
  if (cudasim_register_host(data, static_cast<size_t>((last + 1) * element_size)) != 0) {
    throw std::runtime_error("the simulator refuses a range of host memory");
  }
  starts_.push_back(data);
}

void Ranges::add(DType dtype, const Tensor4& t, int64_t batch, int64_t heads, int64_t tokens,
                 int64_t channels) {
  add(t.data, size_of(dtype),
      {{batch, t.stride_b}, {heads, t.stride_h}, {tokens, t.stride_n}, {channels, t.stride_d}});
}

void Ranges::add(DType dtype, const Tensor3& t, int64_t batch, int64_t tokens, int64_t channels) {
  add(t.data, size_of(dtype), {{batch, t.stride_b}, {tokens, t.stride_n}, {channels, t.stride_c}});
}

void Ranges::add(DType compute, const RotaryTable& t, int64_t batch, int64_t heads, int64_t tokens,
                 int64_t pairs) {
  const int64_t size = size_of(compute);
  add(t.cos, size,
      {{batch, t.cos_stride_b},
       {heads, t.cos_stride_h},
       {tokens, t.cos_stride_n},
       {pairs, t.cos_stride_i}});
  add(t.sin, size,
      {{batch, t.sin_stride_b},
       {heads, t.sin_stride_h},
       {tokens, t.sin_stride_n},
       {pairs, t.sin_stride_i}});
  add(t.rotate, 1, {{batch, t.rotate_stride_b}, {tokens, t.rotate_stride_n}});
}

Ranges::Ranges(const RopeParams* calls, int count) : Ranges() {
  for (const RopeParams* p = calls; p != calls + count; ++p) {
    add(p->dtype, p->x, p->batch, p->heads, p->tokens, p->head_dim);
    add(p->dtype, p->y, p->batch, p->heads, p->tokens, p->head_dim);
    add(compute_of(p->dtype), p->table, p->batch, p->heads, p->tokens, p->pairs);
  }
}

Ranges::Ranges(const RopeTableGradParams& p) : Ranges() {
  add(p.grad_dtype, p.grad, p.batch, p.heads, p.tokens, p.head_dim);
  add(p.dtype, p.x, p.batch, p.heads, p.tokens, p.head_dim);
  add(p.rotate, 1, {{p.batch, p.rotate_stride_b}, {p.tokens, p.rotate_stride_n}});
  add(p.keep, 1, {{p.batch, p.keep_stride_b}, {p.tokens, p.keep_stride_n}});
  for (const void* gradient : {p.dcos, p.dsin}) {
    add(gradient, size_of(compute_of(p.dtype)),
        {{p.table_batch, p.table_heads * p.tokens * p.pairs},
         {p.table_heads, p.tokens * p.pairs},
         {p.tokens, p.pairs},
         {p.pairs, 1}});
  }
}

Ranges::Ranges(const AttentionParams& p) : Ranges() {
  const DType compute = compute_of(p.dtype);
  add(p.dtype, p.q, p.batch, p.heads, p.queries, p.head_dim);
  add(p.dtype, p.k, p.batch, p.key_heads, p.keys, p.head_dim);
  add(p.dtype, p.v, p.batch, p.key_heads, p.keys, p.value_dim);
  add(p.dtype, p.out, p.batch, p.heads, p.queries, p.value_dim);
  add(p.lse, size_of(compute), {{p.batch * p.heads, p.queries}, {p.queries, 1}});
  if (p.has_rotary) {
    add(compute, p.table_q, p.batch, p.heads, p.queries, p.pairs);
    add(compute, p.table_k, p.batch, p.key_heads, p.keys, p.pairs);
  }
  add(p.key_mask, 1, {{p.batch, p.key_mask_stride_b}, {p.keys, p.key_mask_stride_n}});
  add(p.bias, size_of(p.bias_dtype),
      {{p.batch, p.bias_stride_b},
       {p.heads, p.bias_stride_h},
       {p.queries, p.bias_stride_n},
       {p.keys, p.bias_stride_m}});
  add(p.seed_data, sizeof(int64_t), {});
}

Ranges::Ranges(const AttentionBackwardParams& g) : Ranges(g.forward) {
  const AttentionParams& p = g.forward;
  const DType compute = compute_of(p.dtype);
  add(p.dtype, g.grad_out, p.batch, p.heads, p.queries, p.value_dim);
  add(g.grad_lse, size_of(compute),
      {{p.batch, g.grad_lse_stride_b},
       {p.heads, g.grad_lse_stride_h},
       {p.queries, g.grad_lse_stride_n}});
  add(p.dtype, g.dq, p.batch, p.heads, p.queries, p.head_dim);
  add(p.dtype, g.dk, p.batch, p.key_heads, p.keys, p.head_dim);
  add(p.dtype, g.dv, p.batch, p.key_heads, p.keys, p.value_dim);
  add(compute, g.dq_rotated, p.batch, p.heads, p.queries, p.head_dim);
  add(compute, g.dk_rotated, p.batch, p.key_heads, p.keys, p.head_dim);
  add(g.dbias, size_of(compute),
      {{p.batch, g.dbias_stride_b},
       {p.heads, g.dbias_stride_h},
       {p.queries, g.dbias_stride_n},
       {p.keys, g.dbias_stride_m}});
}

Ranges::Ranges(const PoolParams& p) : Ranges() {
  const int64_t compute = size_of(compute_of(p.dtype));
  add(p.dtype, p.x, p.batch, p.tokens, p.channels);
  add(p.dtype, p.query, p.query_batch, p.heads, p.queries, p.channels);
  const int64_t rows = p.batch * p.heads * p.queries;
  add(p.pooled, size_of(p.dtype), {{rows, p.channels}, {p.channels, 1}});
  add(p.lse, compute, {{rows, 1}});
  add(p.key_mask, 1, {{p.batch, p.key_mask_stride_b}, {p.tokens, p.key_mask_stride_n}});
  add(p.norm_weight, compute, {{p.channels, 1}});
  add(p.norm_bias, compute, {{p.channels, 1}});
}

Ranges::Ranges(const PoolBackwardParams& g) : Ranges(g.forward) {
  const PoolParams& p = g.forward;
  const int64_t compute = size_of(compute_of(p.dtype));
  add(p.dtype, g.grad, p.batch, p.heads, p.queries, p.channels);
  add(g.grad_lse, compute,
      {{p.batch, g.grad_lse_stride_b},
       {p.heads, g.grad_lse_stride_h},
       {p.queries, g.grad_lse_stride_m}});
  add(p.dtype, g.dx, p.batch, p.tokens, p.channels);
  add(g.dquery, size_of(p.dtype),
      {{p.query_batch * p.heads * p.queries, p.channels}, {p.channels, 1}});
  add(g.dweight, compute, {{p.channels, 1}});
  add(g.dbias, compute, {{p.channels, 1}});
}

}  // namespace x_rope_cls::sim
