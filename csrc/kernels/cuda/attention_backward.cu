// Attention backward: what is prepared, which kernels sum, and where all of it lies.
#include <cstdint>

#include "attention_backward.cuh"
#include "attention_backward_choices.h"
#include "launch.h"
#include "rotate.cuh"

namespace x_rope_cls::cuda {
namespace {

int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}
int64_t compute_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

// Hands out pieces of the workspace; without memory it only counts.
struct Pieces {
  char* base;
  int64_t used;

  void* take(int64_t bytes) {
    void* const piece = base == nullptr ? nullptr : base + used;
    used += round_up_to(bytes, 256);
    return piece;
  }
};

// Where everything of a call lies.
struct BackwardMemory {
  int32_t dim;        // of the tensor core kernels; 0: the plain ones sum
  void* query_order;  // null: natural
  void* key_order;
  void* q;  // packed; null: q itself will do
  void* k;
  // For the tensor cores, which want rows in pieces of 16 bytes: copies of those that are not.
  void* q_raw;
  void* k_raw;
  void* v;
  void* grad_out;
  void* stats;
  GradSums dq, dk, dv;
  void* natural_q;  // for the gradient of the bias where tokens are ordered
  void* natural_k;
  void* natural_stats;
};

int64_t padded(const AttentionParams& p, int64_t channels) {
  return round_up_to(channels, 16 / element_bytes(p.dtype));
}

// Whether the tensor core kernels can read x where it lies.
bool lies_well(DType dtype, const Tensor4& x, int64_t channels) {
  return with_dtype(dtype,
                    [&](auto element) { return rows_are_whole<decltype(element)>(x, channels); }) &&
         x.stride_n >= INT32_MIN && x.stride_n <= INT32_MAX;
}

bool splits_any(const AttentionParams& p) {
  return splits_tokens(p, p.table_q) || splits_tokens(p, p.table_k);
}

BackwardMemory lay_out(const AttentionBackwardParams& g, const Device& device, Pieces& pieces) {
  const AttentionParams& p = g.forward;
  const int64_t compute = compute_bytes(p.dtype);
  const int64_t query_rows = p.batch * p.heads * p.queries;
  const int64_t key_rows = p.batch * p.key_heads * p.keys;
  const int64_t width = padded(p, p.head_dim);
  const int64_t value_width = padded(p, p.value_dim);
  const int64_t row_bytes = width * element_bytes(p.dtype);
  BackwardMemory m{};
  if (element_bytes(p.dtype) == 2) {
    m.dim = backward_dim(p.head_dim, p.value_dim, device.shared_per_block);
  }
  if (orders_queries(p)) m.query_order = pieces.take(order_bytes(p.batch, p.queries));
  if (orders_keys(p)) m.key_order = pieces.take(order_bytes(p.batch, p.keys));
  const bool q_lies_well = m.dim == 0 || lies_well(p.dtype, p.q, p.head_dim);
  const bool k_lies_well = m.dim == 0 || lies_well(p.dtype, p.k, p.head_dim);
  if (p.has_rotary || !q_lies_well) m.q = pieces.take(query_rows * row_bytes);
  if (p.has_rotary || !k_lies_well) m.k = pieces.take(key_rows * row_bytes);
  if (splits_any(p) && !q_lies_well) m.q_raw = pieces.take(query_rows * row_bytes);
  if (splits_any(p) && !k_lies_well) m.k_raw = pieces.take(key_rows * row_bytes);
  const int64_t value_bytes = value_width * element_bytes(p.dtype);
  if (m.dim != 0 && !lies_well(p.dtype, p.v, p.value_dim))
    m.v = pieces.take(key_rows * value_bytes);
  if (m.dim != 0 && !lies_well(p.dtype, g.grad_out, p.value_dim)) {
    m.grad_out = pieces.take(query_rows * value_bytes);
  }
  m.stats = pieces.take(query_rows * 2 * compute);
  m.dq.main = pieces.take(query_rows * width * compute);
  m.dk.main = pieces.take(key_rows * width * compute);
  m.dv.main = pieces.take(key_rows * value_width * compute);
  m.dq.width = m.dk.width = static_cast<int32_t>(width);
  m.dv.width = static_cast<int32_t>(value_width);
  if (p.has_rotary && splits_tokens(p, p.table_k)) {
    m.dq.raw = pieces.take(query_rows * width * compute);
  }
  if (p.has_rotary && splits_tokens(p, p.table_q)) {
    m.dk.raw = pieces.take(key_rows * width * compute);
  }
  if (g.dbias != nullptr) {
    if (p.has_rotary && orders_queries(p)) m.natural_q = pieces.take(query_rows * row_bytes);
    if (p.has_rotary && orders_keys(p)) m.natural_k = pieces.take(key_rows * row_bytes);
    if (orders_queries(p) || m.dim != 0) m.natural_stats = pieces.take(query_rows * 2 * compute);
  }
  return m;
}

PackParams pack_params(const AttentionParams& p, bool queries, const TokenOrder& order, void* to) {
  PackParams k{};
  k.dtype = p.dtype;
  k.from = queries ? p.q : p.k;
  k.to = to;
  k.order = order;
  k.table = !p.has_rotary ? nullptr : queries ? &p.table_q : &p.table_k;
  k.rule = rotation_rule(p);
  k.batch = p.batch;
  k.heads = queries ? p.heads : p.key_heads;
  k.tokens = queries ? p.queries : p.keys;
  k.head_dim = p.head_dim;
  k.padded_dim = padded(p, p.head_dim);
  k.pairs = p.pairs;
  k.interleaved = p.interleaved;
  return k;
}

PlainRows plain_rows(DType dtype, const Tensor4& x, int64_t channels, bool gathered) {
  const bool whole = with_dtype(
      dtype, [&](auto element) { return rows_are_whole<decltype(element)>(x, channels); });
  return {x, static_cast<int32_t>(channels), whole, gathered};
}
// Of memory that pack_rows filled; null: the tensor itself.
PlainRows packed_rows(const AttentionParams& p, bool queries, void* memory) {
  const Tensor4& x = queries ? p.q : p.k;
  if (memory == nullptr) return plain_rows(p.dtype, x, p.head_dim, true);
  const int64_t width = padded(p, p.head_dim);
  const int64_t tokens = queries ? p.queries : p.keys;
  const int64_t heads = queries ? p.heads : p.key_heads;
  const Tensor4 rows{memory, heads * tokens * width, tokens * width, width, 1};
  return {rows, static_cast<int32_t>(p.head_dim), p.head_dim == width, false};
}

struct Orders {
  TokenOrder queries, keys;
};

cudaError_t make_orders(const AttentionParams& p, const BackwardMemory& m, Orders* orders,
                        cudaStream_t stream) {
  *orders = {{nullptr, nullptr, p.queries}, {nullptr, nullptr, p.keys}};
  if (m.query_order != nullptr) {
    const RotaryTable& t = p.table_q;
    const cudaError_t error =
        order_tokens(p.batch, p.queries, t.rotate, t.rotate_stride_b, t.rotate_stride_n, nullptr, 0,
                     0, m.query_order, &orders->queries, stream);
    if (error != cudaSuccess) return error;
  }
  if (m.key_order == nullptr) return cudaSuccess;
  const RotaryTable& t = p.table_k;
  return order_tokens(p.batch, p.keys, splits_tokens(p, t) ? t.rotate : nullptr, t.rotate_stride_b,
                      t.rotate_stride_n, p.key_mask, p.key_mask_stride_b, p.key_mask_stride_n,
                      m.key_order, &orders->keys, stream);
}

BackwardCommon common_of(const AttentionParams& p, const Orders& orders, const void* stats) {
  BackwardCommon c{};
  c.queries = orders.queries;
  c.keys = orders.keys;
  c.batch = p.batch;
  c.heads = p.heads;
  c.key_heads = p.key_heads;
  c.query_count = p.queries;
  c.key_count = p.keys;
  c.stats = stats;
  c.bias = score_bias(p);
  c.dropout = dropout_params(p);
  c.scale = p.scale;
  c.kept = p.dropout_p > 0 ? dropout_kept(p.dropout_p) : 1.0;
  return c;
}

cudaError_t sum_plain(const AttentionBackwardParams& g, const BackwardMemory& m,
                      const Orders& orders, cudaStream_t stream) {
  const AttentionParams& p = g.forward;
  PlainBackwardArgs a{};
  a.common = common_of(p, orders, m.stats);
  a.q = packed_rows(p, true, m.q);
  a.k = packed_rows(p, false, m.k);
  a.q_raw = plain_rows(p.dtype, p.q, p.head_dim, true);
  a.k_raw = plain_rows(p.dtype, p.k, p.head_dim, true);
  a.v = plain_rows(p.dtype, p.v, p.value_dim, true);
  a.grad_out = plain_rows(p.dtype, g.grad_out, p.value_dim, true);
  a.dq = m.dq;
  a.dk = m.dk;
  a.dv = m.dv;
  return plain_backward(p.dtype, a, stream);
}

// A tensor as the tensor core kernels read it. `copy`: where it was packed; null: it lies well.
TileRows tile_rows(const Tensor4& x, void* copy, int64_t heads, int64_t tokens, int64_t channels,
                   bool ordered) {
  const int64_t width = round_up_to(channels, 8);
  const auto pieces = static_cast<int32_t>(width / 8);
  if (copy == nullptr) {
    return {x.data, x.stride_b, x.stride_h, static_cast<int32_t>(x.stride_n), pieces, ordered};
  }
  return {copy, heads * tokens * width, tokens * width, static_cast<int32_t>(width), pieces, false};
}

// Copies x in the order of its tokens, unrotated; `to` null: not needed.
cudaError_t pack_plain(const AttentionParams& p, const Tensor4& x, bool queries, int64_t channels,
                       const TokenOrder& order, void* to, cudaStream_t stream) {
  if (to == nullptr) return cudaSuccess;
  PackParams k = pack_params(p, queries, order, to);
  k.from = x;
  k.table = nullptr;
  k.head_dim = channels;
  k.padded_dim = padded(p, channels);
  return pack_rows(k, stream);
}

cudaError_t sum_mma(const AttentionBackwardParams& g, const BackwardMemory& m, const Orders& orders,
                    cudaStream_t stream) {
  const AttentionParams& p = g.forward;
  const TokenOrder& queries = orders.queries;
  const TokenOrder& keys = orders.keys;
  cudaError_t error = pack_plain(p, p.q, true, p.head_dim, queries, m.q_raw, stream);
  if (error == cudaSuccess) error = pack_plain(p, p.k, false, p.head_dim, keys, m.k_raw, stream);
  if (error == cudaSuccess) error = pack_plain(p, p.v, false, p.value_dim, keys, m.v, stream);
  if (error == cudaSuccess) {
    error = pack_plain(p, g.grad_out, true, p.value_dim, queries, m.grad_out, stream);
  }
  if (error != cudaSuccess) return error;
  const auto q_rows = [&](const Tensor4& x, void* copy, int64_t channels) {
    return tile_rows(x, copy, p.heads, p.queries, channels, queries.tokens != nullptr);
  };
  const auto k_rows = [&](const Tensor4& x, void* copy, int64_t channels) {
    return tile_rows(x, copy, p.key_heads, p.keys, channels, keys.tokens != nullptr);
  };
  MmaBackwardArgs a{};
  a.common = common_of(p, orders, m.stats);
  a.q = q_rows(p.q, m.q, p.head_dim);
  a.k = k_rows(p.k, m.k, p.head_dim);
  a.q_raw = q_rows(p.q, m.q_raw, p.head_dim);
  a.k_raw = k_rows(p.k, m.k_raw, p.head_dim);
  a.v = k_rows(p.v, m.v, p.value_dim);
  a.grad_out = q_rows(g.grad_out, m.grad_out, p.value_dim);
  a.dq = m.dq;
  a.dk = m.dk;
  a.dv = m.dv;
  a.group = static_cast<int32_t>(p.heads / p.key_heads);
  a.scale_log2 = static_cast<float>(p.scale * kLog2E);
  const int64_t owners = backward_shape(m.dim).owners;
  a.query_tiles =
      static_cast<int32_t>(ceil_div(p.queries, owners)) + (queries.counts == nullptr ? 0 : 1);
  a.key_tiles = static_cast<int32_t>(ceil_div(p.keys, owners)) + (keys.counts == nullptr ? 0 : 1);
  switch (m.dim) {
    case 32:
      return mma_backward<32>(p.dtype, a, stream);
    case 64:
      return mma_backward<64>(p.dtype, a, stream);
    case 96:
      return mma_backward<96>(p.dtype, a, stream);
    case 128:
      return mma_backward<128>(p.dtype, a, stream);
    default:
      return mma_backward<256>(p.dtype, a, stream);
  }
}

cudaError_t sum_bias(const AttentionBackwardParams& g, const BackwardMemory& m,
                     cudaStream_t stream) {
  const AttentionParams& p = g.forward;
  const Orders natural{{nullptr, nullptr, p.queries}, {nullptr, nullptr, p.keys}};
  cudaError_t error = cudaSuccess;
  void* stats = m.stats;
  if (m.natural_stats != nullptr) {
    stats = m.natural_stats;
    error = row_stats(g, natural.queries, false, stats, stream);
  }
  if (error == cudaSuccess && m.natural_q != nullptr) {
    error = pack_rows(pack_params(p, true, natural.queries, m.natural_q), stream);
  }
  if (error == cudaSuccess && m.natural_k != nullptr) {
    error = pack_rows(pack_params(p, false, natural.keys, m.natural_k), stream);
  }
  if (error != cudaSuccess) return error;
  BiasGradArgs a{};
  a.common = common_of(p, natural, stats);
  // Where tokens are ordered, what was packed for the sums does not do.
  a.q = packed_rows(p, true, orders_queries(p) ? m.natural_q : m.q);
  a.k = packed_rows(p, false, orders_keys(p) ? m.natural_k : m.k);
  if (splits_any(p)) {
    a.q_raw = plain_rows(p.dtype, p.q, p.head_dim, true);
    a.k_raw = plain_rows(p.dtype, p.k, p.head_dim, true);
    a.rotate_q = p.table_q.rotate;
    a.rotate_q_stride_b = p.table_q.rotate_stride_b;
    a.rotate_q_stride_n = p.table_q.rotate_stride_n;
    a.rotate_k = p.table_k.rotate;
    a.rotate_k_stride_b = p.table_k.rotate_stride_b;
    a.rotate_k_stride_n = p.table_k.rotate_stride_n;
  }
  a.v = plain_rows(p.dtype, p.v, p.value_dim, true);
  a.grad_out = plain_rows(p.dtype, g.grad_out, p.value_dim, true);
  a.key_mask = p.key_mask;
  a.key_mask_stride_b = p.key_mask_stride_b;
  a.key_mask_stride_n = p.key_mask_stride_n;
  a.dbias = g.dbias;
  a.dbias_stride_b = g.dbias_stride_b;
  a.dbias_stride_h = g.dbias_stride_h;
  a.dbias_stride_n = g.dbias_stride_n;
  a.dbias_stride_m = g.dbias_stride_m;
  return bias_grad(p.dtype, a, stream);
}

FinishParams finish_params(const AttentionBackwardParams& g, bool queries, const GradSums& sums,
                           const Orders& orders) {
  const AttentionParams& p = g.forward;
  FinishParams f{};
  f.dtype = p.dtype;
  f.sums = sums;
  f.order = queries ? orders.queries : orders.keys;
  f.partners = queries ? orders.keys : orders.queries;
  f.to = queries ? g.dq : g.dk;
  f.rotated = queries ? g.dq_rotated : g.dk_rotated;
  f.table = !p.has_rotary ? nullptr : queries ? &p.table_q : &p.table_k;
  f.rule = rotation_rule(p);
  f.interleaved = p.interleaved;
  f.pairs = p.pairs;
  f.factor = p.scale;
  f.batch = p.batch;
  f.heads = queries ? p.heads : p.key_heads;
  f.tokens = queries ? p.queries : p.keys;
  f.channels = p.head_dim;
  return f;
}

cudaError_t finish(const AttentionBackwardParams& g, const BackwardMemory& m, const Orders& orders,
                   double value_factor, cudaStream_t stream) {
  const AttentionParams& p = g.forward;
  cudaError_t error = finish_sums(finish_params(g, true, m.dq, orders), stream);
  if (error == cudaSuccess) error = finish_sums(finish_params(g, false, m.dk, orders), stream);
  FinishParams values = finish_params(g, false, m.dv, orders);
  values.to = g.dv;
  values.rotated = {};
  values.table = nullptr;
  values.factor = value_factor;
  values.channels = p.value_dim;
  if (error == cudaSuccess) error = finish_sums(values, stream);
  const DType compute = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  if (error == cudaSuccess) error = clear_masked(p.dtype, g.dk, p, p.head_dim, stream);
  if (error == cudaSuccess) error = clear_masked(p.dtype, g.dv, p, p.value_dim, stream);
  if (error == cudaSuccess) error = clear_masked(compute, g.dk_rotated, p, p.head_dim, stream);
  return error;
}

}  // namespace

int64_t attention_backward_workspace(const AttentionBackwardParams& params, const Device& device) {
  Pieces pieces{nullptr, 0};
  lay_out(params, device, pieces);
  return pieces.used;
}

cudaError_t attention_backward(const AttentionBackwardParams& params, const Device& device,
                               void* workspace, cudaStream_t stream) {
  const AttentionParams& p = params.forward;
  if (p.batch == 0 || p.heads == 0) return cudaSuccess;
  Pieces pieces{static_cast<char*>(workspace), 0};
  const BackwardMemory m = lay_out(params, device, pieces);
  Orders orders{};
  cudaError_t error = make_orders(p, m, &orders, stream);
  if (error == cudaSuccess && m.q != nullptr) {
    error = pack_rows(pack_params(p, true, orders.queries, m.q), stream);
  }
  if (error == cudaSuccess && m.k != nullptr) {
    error = pack_rows(pack_params(p, false, orders.keys, m.k), stream);
  }
  const bool half = m.dim != 0;
  if (error == cudaSuccess) error = row_stats(params, orders.queries, half, m.stats, stream);
  if (error == cudaSuccess) {
    error = half ? sum_mma(params, m, orders, stream) : sum_plain(params, m, orders, stream);
  }
  if (error == cudaSuccess && params.dbias != nullptr) error = sum_bias(params, m, stream);
  if (error == cudaSuccess) {
    // The tensor core kernels leave dropout's factor of the kept weights out of dV.
    const double kept = half && p.dropout_p > 0 ? dropout_kept(p.dropout_p) : 1.0;
    error = finish(params, m, orders, kept, stream);
  }
  return error;
}

}  // namespace x_rope_cls::cuda
