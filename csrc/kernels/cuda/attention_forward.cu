// Launcher of attention forward: which kernels run, and what lies where in the workspace.
#include "attention_forward.cuh"

#include <cmath>
#include <cstdint>

#include "attention_merge.cuh"
#include "attention_tiled.cuh"
#include "launch.h"

namespace x_rope_cls::cuda {
namespace {

constexpr int64_t kAlignment = 256;

int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

bool whole(const AttentionParams& p, const Tensor4& x, int64_t channels) {
  return with_dtype(p.dtype,
                    [&](auto element) { return rows_are_whole<decltype(element)>(x, channels); });
}

// A launch of the half-precision kernel: its rows, and the parts of its keys.
struct Launch {
  bool wide;
  RowSet rows;
  int64_t units;
  int32_t parts;
  int64_t partial_out, partial_lse;  // bytes from the workspace; used where parts > 1
};

// Everything about a call that follows from its arguments. Offsets in bytes; -1: not needed.
struct Plan {
  int32_t dim;  // 0: the kernel on the FMA units
  int64_t query_order = -1, key_order = -1, keys = -1, raw_keys = -1, values = -1, queries = -1;
  Launch launches[2];
  int launch_count = 0;
  int64_t bytes = 0;

  int64_t take(int64_t size) {
    const int64_t at = bytes;
    bytes += round_up_to(size, kAlignment);
    return at;
  }
};

PackParams packing(const AttentionParams& p, const Tensor4& from, int64_t heads, int64_t tokens,
                   int64_t channels) {
  PackParams k{};
  k.dtype = p.dtype;
  k.from = from;
  k.rule = rotation_rule(p);
  k.batch = p.batch;
  k.heads = heads;
  k.tokens = tokens;
  k.head_dim = channels;
  k.padded_dim = round_up_to(channels, 16 / element_bytes(p.dtype));
  k.pairs = p.pairs;
  k.interleaved = p.interleaved;
  return k;
}
PackParams key_packing(const AttentionParams& p) {
  return packing(p, p.k, p.key_heads, p.keys, p.head_dim);
}

bool is_general(const AttentionParams& p) { return p.bias != nullptr || p.dropout_p > 0; }

void add_launch(const AttentionParams& p, const Device& device, bool wide, int64_t group,
                bool ordinary, int64_t special_above, int64_t special_up_to, Plan& plan) {
  Launch l{};
  l.wide = wide;
  const ForwardShape shape = forward_shape(plan.dim, wide, is_general(p));
  RowSet& rows = l.rows;
  rows.heads = static_cast<int32_t>(p.heads);
  rows.group = static_cast<int32_t>(group);
  rows.tile_rows = shape.rows;
  rows.ordinary = ordinary;
  rows.special_above = static_cast<int32_t>(special_above);
  rows.special_up_to = static_cast<int32_t>(special_up_to);
  // Two kinds of rows may each end in a part of a tile.
  const int64_t most = (ordinary || p.queries < special_up_to ? p.queries : special_up_to) * group;
  rows.tiles =
      static_cast<int32_t>(ceil_div(most, shape.rows)) + (ordinary && orders_queries(p) ? 1 : 0);
  l.units = p.batch * p.heads / group;
  const int64_t expected = ceil_div(most, shape.rows) * l.units;
  l.parts = key_parts(expected, key_pieces(p.keys, shape, plan.dim), device.multiprocessors);
  if (l.parts > 1) {
    const int64_t slots = l.units * l.parts * rows.tiles * rows.tile_rows;
    l.partial_out = plan.take(slots * round_up_to(p.value_dim, 4) * 4);
    l.partial_lse = plan.take(slots * 4);
  }
  plan.launches[plan.launch_count++] = l;
}

void plan_half(const AttentionParams& p, const Device& device, Plan& plan) {
  const bool k_whole = whole(p, p.k, p.head_dim);
  const PackParams pack = key_packing(p);
  if (p.has_rotary || !k_whole) plan.keys = plan.take(packed_bytes(pack));
  if (orders_queries(p) && !k_whole) plan.raw_keys = plan.take(packed_bytes(pack));
  if (!whole(p, p.v, p.value_dim)) {
    plan.values = plan.take(packed_bytes(packing(p, p.v, p.key_heads, p.keys, p.value_dim)));
  }
  const int64_t group = p.heads / p.key_heads;
  if (rows_are_few(p.queries, group)) {
    add_launch(p, device, false, group, true, 0, p.queries, plan);
    return;
  }
  if (orders_queries(p)) add_launch(p, device, false, group, false, 0, kFewRows, plan);
  add_launch(p, device, true, 1, true, orders_queries(p) ? kFewRows : 0, p.queries, plan);
}

bool nothing_to_do(const AttentionParams& p) {
  return p.batch == 0 || p.heads == 0 || p.queries == 0;
}

Plan make_plan(const AttentionParams& p, const Device& device) {
  Plan plan;
  if (nothing_to_do(p)) return plan;
  const bool half = element_bytes(p.dtype) == 2;
  plan.dim = half ? native_dim(p.head_dim, p.value_dim) : 0;
  if (plan.dim != 0 && (forward_shared_bytes(plan.dim, true, false) > device.shared_per_block ||
                        forward_shared_bytes(plan.dim, false, true) > device.shared_per_block)) {
    plan.dim = 0;
  }
  if (orders_keys(p)) plan.key_order = plan.take(order_bytes(p.batch, p.keys));
  if (orders_queries(p)) plan.query_order = plan.take(order_bytes(p.batch, p.queries));
  if (plan.dim != 0) {
    plan_half(p, device, plan);
  } else if (p.has_rotary) {
    plan.keys = plan.take(packed_bytes(key_packing(p)));
    plan.queries = plan.take(packed_bytes(packing(p, p.q, p.heads, p.queries, p.head_dim)));
  }
  return plan;
}

// A call under way: the first error ends it.
struct Call {
  const AttentionParams& p;
  const Plan& plan;
  char* workspace;
  cudaStream_t stream;
  TokenOrder queries, keys;

  void* at(int64_t offset) const { return offset < 0 ? nullptr : workspace + offset; }
};

cudaError_t order_all(Call& c) {
  const AttentionParams& p = c.p;
  c.queries = {nullptr, nullptr, p.queries};
  c.keys = {nullptr, nullptr, p.keys};
  cudaError_t error = cudaSuccess;
  if (c.plan.query_order >= 0) {
    const RotaryTable& t = p.table_q;
    error = order_tokens(p.batch, p.queries, t.rotate, t.rotate_stride_b, t.rotate_stride_n,
                         nullptr, 0, 0, c.at(c.plan.query_order), &c.queries, c.stream);
  }
  if (error == cudaSuccess && c.plan.key_order >= 0) {
    const RotaryTable& t = p.table_k;
    const uint8_t* const rotate = splits_tokens(p, t) ? t.rotate : nullptr;
    error = order_tokens(p.batch, p.keys, rotate, t.rotate_stride_b, t.rotate_stride_n, p.key_mask,
                         p.key_mask_stride_b, p.key_mask_stride_n, c.at(c.plan.key_order), &c.keys,
                         c.stream);
  }
  return error;
}

cudaError_t pack(const Call& c, PackParams k, int64_t offset, const TokenOrder& order,
                 const RotaryTable* table) {
  if (offset < 0) return cudaSuccess;
  k.to = c.at(offset);
  k.order = order;
  k.table = table;
  return pack_rows(k, c.stream);
}

// Rows where they lie, or packed.
TileRows tile_rows(const Call& c, const Tensor4& x, const PackParams& k, int64_t offset) {
  const int32_t pieces = static_cast<int32_t>(k.padded_dim / 8);
  if (offset < 0) {
    return {x.data,     x.stride_b,
            x.stride_h, static_cast<int32_t>(x.stride_n),
            pieces,     c.keys.tokens != nullptr};
  }
  return {c.at(offset),
          k.heads * k.tokens * k.padded_dim,
          k.tokens * k.padded_dim,
          static_cast<int32_t>(k.padded_dim),
          pieces,
          false};
}

ForwardArgs make_args(const Call& c) {
  const AttentionParams& p = c.p;
  ForwardArgs a{};
  a.keys = c.keys;
  const PackParams keys = key_packing(p);
  a.key_rows = tile_rows(c, p.k, keys, c.plan.keys);
  a.raw_key_rows = tile_rows(c, p.k, keys, c.plan.raw_keys);
  a.value_rows =
      tile_rows(c, p.v, packing(p, p.v, p.key_heads, p.keys, p.value_dim), c.plan.values);
  a.q = p.q;
  a.out = p.out;
  a.lse = static_cast<float*>(p.lse);
  a.table_q = p.table_q;
  a.has_rotary = p.has_rotary;
  a.by_token = rotation_rule(p).by_token;
  a.interleaved = p.interleaved;
  a.q_whole = whole(p, p.q, p.head_dim);
  a.out_whole = whole(p, p.out, p.value_dim);
  a.head_dim = static_cast<int32_t>(p.head_dim);
  a.value_dim = static_cast<int32_t>(p.value_dim);
  a.pairs = static_cast<int32_t>(p.pairs);
  a.key_heads = p.key_heads;
  a.queries = p.queries;
  // The sign goes to the queries, exactly, so that the largest score is the largest before the
  // factor too. So does 0: a score of -infinity, which hides a key, must not be multiplied by it.
  a.scale_log2 = p.scale == 0 ? 1.0f : static_cast<float>(std::abs(p.scale) * 1.4426950408889634);
  a.query_factor = p.scale > 0 ? 1.0f : p.scale < 0 ? -1.0f : 0.0f;
  a.bias = score_bias(p);
  a.dropout = dropout_params(p);
  return a;
}

template <typename T, int kDim, bool kWide, bool kGeneral>
cudaError_t launch_kernel(const ForwardArgs& args, int64_t grid, cudaStream_t stream) {
  const auto kernel = attention_forward_kernel<T, kDim, kWide, kGeneral>;
  constexpr int kBytes = forward_shared_bytes(kDim, kWide, kGeneral);
  if (kBytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
  }
  constexpr int kThreads = ForwardKernel<T, kDim, kWide, kGeneral>::kThreads;
  kernel<<<static_cast<unsigned>(grid), kThreads, kBytes, stream>>>(args);
  return cudaGetLastError();
}

// Instances: two dtypes, five widths; wide with and without biases and dropout, which cost the main
// loop registers; narrow always with them, because few rows wait for memory.
template <typename T, int kDim>
cudaError_t launch_dim(const ForwardArgs& args, bool wide, int64_t grid, cudaStream_t stream) {
  const bool general = args.bias.data != nullptr || args.dropout.seed != nullptr;
  if (!wide) return launch_kernel<T, kDim, false, true>(args, grid, stream);
  return general ? launch_kernel<T, kDim, true, true>(args, grid, stream)
                 : launch_kernel<T, kDim, true, false>(args, grid, stream);
}

template <typename T>
cudaError_t launch_half(int32_t dim, const ForwardArgs& args, bool wide, int64_t grid,
                        cudaStream_t stream) {
  switch (dim) {
    case 32:
      return launch_dim<T, 32>(args, wide, grid, stream);
    case 64:
      return launch_dim<T, 64>(args, wide, grid, stream);
    case 96:
      return launch_dim<T, 96>(args, wide, grid, stream);
    case 128:
      return launch_dim<T, 128>(args, wide, grid, stream);
    default:
      return launch_dim<T, 256>(args, wide, grid, stream);
  }
}

template <typename T>
cudaError_t merge_parts(const ForwardArgs& args, int64_t units, cudaStream_t stream) {
  MergeArgs m{args.rows, args.partial, args.out, args.lse, args.queries, units, args.value_dim};
  const int64_t grid = units * ceil_div(args.partial.slots, kMergeRows);
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  attention_merge_kernel<T><<<static_cast<unsigned>(grid), kMergeThreads, 0, stream>>>(m);
  return cudaGetLastError();
}

cudaError_t run_launch(const Call& c, const Launch& l, ForwardArgs args) {
  args.rows = l.rows;
  args.rows.order = c.queries;
  args.key_group = static_cast<int32_t>(c.p.heads / c.p.key_heads / l.rows.group);
  args.partial.parts = l.parts;
  args.partial.slots = l.rows.tiles * l.rows.tile_rows;
  args.partial.width = static_cast<int32_t>(round_up_to(c.p.value_dim, 4));
  if (l.parts > 1) {
    args.partial.out = static_cast<float*>(c.at(l.partial_out));
    args.partial.lse = static_cast<float*>(c.at(l.partial_lse));
  }
  const int64_t grid = l.units * l.rows.tiles * l.parts;
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto run = [&](auto element) {
    using T = decltype(element);
    const cudaError_t error = launch_half<T>(c.plan.dim, args, l.wide, grid, c.stream);
    if (error != cudaSuccess || l.parts == 1) return error;
    return merge_parts<T>(args, l.units, c.stream);
  };
  return c.p.dtype == DType::kBFloat16 ? run(bf16{}) : run(fp16{});
}

cudaError_t forward_half(const Call& c) {
  const AttentionParams& p = c.p;
  const PackParams keys = key_packing(p);
  cudaError_t error = pack(c, keys, c.plan.keys, c.keys, p.has_rotary ? &p.table_k : nullptr);
  if (error == cudaSuccess) error = pack(c, keys, c.plan.raw_keys, c.keys, nullptr);
  if (error == cudaSuccess) {
    error =
        pack(c, packing(p, p.v, p.key_heads, p.keys, p.value_dim), c.plan.values, c.keys, nullptr);
  }
  if (error != cudaSuccess) return error;
  const ForwardArgs args = make_args(c);
  for (int i = 0; i < c.plan.launch_count; ++i) {
    error = run_launch(c, c.plan.launches[i], args);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t forward_tiled(const Call& c) {
  const AttentionParams& p = c.p;
  TiledArgs args{};
  args.p = p;
  args.keys = c.keys;
  if (p.has_rotary) {
    const PackParams keys = key_packing(p);
    const PackParams queries = packing(p, p.q, p.heads, p.queries, p.head_dim);
    const TokenOrder as_they_are{nullptr, nullptr, p.queries};
    cudaError_t error = pack(c, keys, c.plan.keys, c.keys, &p.table_k);
    if (error == cudaSuccess) error = pack(c, queries, c.plan.queries, as_they_are, &p.table_q);
    if (error != cudaSuccess) return error;
    const auto packed = [&](const PackParams& k, int64_t offset) {
      return Tensor4{c.at(offset), k.heads * k.tokens * k.padded_dim, k.tokens * k.padded_dim,
                     k.padded_dim, 1};
    };
    args.k_turned = packed(keys, c.plan.keys);
    args.q_turned = packed(queries, c.plan.queries);
  }
  args.rows.order = c.queries;
  args.rows.heads = static_cast<int32_t>(p.heads);
  args.rows.group = 1;
  args.rows.tile_rows = kTiledRows;
  args.rows.tiles =
      static_cast<int32_t>(ceil_div(p.queries, kTiledRows)) + (orders_queries(p) ? 1 : 0);
  args.rows.ordinary = true;
  args.rows.special_up_to = static_cast<int32_t>(p.queries);
  args.dropout_threshold = dropout_threshold(p.dropout_p);
  args.kept = p.dropout_p > 0 ? dropout_kept(p.dropout_p) : 1.0;
  const int64_t blocks = ceil_div(p.value_dim, kTiledChannels);
  args.value_blocks = static_cast<int32_t>(blocks < 1 ? 1 : blocks);
  const int64_t grid = p.batch * p.heads * args.rows.tiles * args.value_blocks;
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  return with_dtype(p.dtype, [&](auto element) {
    attention_tiled_kernel<decltype(element)>
        <<<static_cast<unsigned>(grid), kTiledThreads, 0, c.stream>>>(args);
    return cudaGetLastError();
  });
}

}  // namespace

int64_t attention_workspace(const AttentionParams& params, const Device& device) {
  return make_plan(params, device).bytes;
}

cudaError_t attention_forward(const AttentionParams& params, const Device& device, void* workspace,
                              cudaStream_t stream) {
  if (nothing_to_do(params)) return cudaSuccess;
  const Plan plan = make_plan(params, device);
  Call call{params, plan, static_cast<char*>(workspace), stream, {}, {}};
  const cudaError_t error = order_all(call);
  if (error != cudaSuccess) return error;
  return plan.dim != 0 ? forward_half(call) : forward_tiled(call);
}

}  // namespace x_rope_cls::cuda
