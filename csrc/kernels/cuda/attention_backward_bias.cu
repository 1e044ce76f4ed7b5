// The gradient of the bias: the gradients of the scores themselves, summed over what the bias is
// broadcast along. A block has a tile of the bias and passes over batches, heads and queries that
// share it, recomputing their scores, so that no sum depends on the order of blocks. It costs as
// much as dQ does, and only calls that want it pay.
//
// Tokens are in their natural order here, because different batches, which may share a bias, have
// different orders; where pairs differ in their rotation both kinds of scores are computed.
#include <cstdint>

#include "attention_backward_plain.cuh"

namespace x_rope_cls::cuda {
namespace {

struct BiasLaunch {
  BiasGradArgs args;
  int32_t key_tiles, query_tiles;
  int64_t heads, batches;  // of the bias
};

__device__ __forceinline__ bool flag_at(const uint8_t* flags, int64_t stride_b, int64_t stride_n,
                                        int64_t b, int64_t n) {
  return flags == nullptr || flags[b * stride_b + n * stride_n] != 0;
}

// Adds the gradients of the scores of 64 keys by 64 queries of one head.
template <typename T>
__device__ void add_tile(const BiasGradArgs& args, typename PlainTileOf<T>::Shared& shared,
                         uint64_t seed, int64_t b, int64_t h, int32_t query, int32_t key,
                         Compute<T> (&sums)[4][4]) {
  using C = Compute<T>;
  using Tile = PlainTileOf<T>;
  const BackwardCommon& p = args.common;
  const int64_t key_head = h / (p.heads / p.key_heads);
  const auto queries =
      static_cast<int32_t>(min(static_cast<int64_t>(kPlainTile), p.query_count - query));
  const auto keys = static_cast<int32_t>(min(static_cast<int64_t>(kPlainTile), p.key_count - key));
  const auto q_rows = [&](const PlainRows& x) {
    return rows_at<T>(x, b, h, p.queries, query, queries);
  };
  const auto k_rows = [&](const PlainRows& x) {
    return rows_at<T>(x, b, key_head, p.keys, key, keys);
  };
  C scores[4][4];
  C raw[4][4];
  C grads[4][4];
  Tile::scores(k_rows(args.k), q_rows(args.q), shared, scores);
  const bool differ = args.q_raw.rows.data != nullptr;
  if (differ) Tile::scores(k_rows(args.k_raw), q_rows(args.q_raw), shared, raw);
  Tile::scores(k_rows(args.v), q_rows(args.grad_out), shared, grads);
  const int y = static_cast<int>(threadIdx.x) / 16;
  const int x = static_cast<int>(threadIdx.x) % 16;
  bool counts[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t m = key + 4 * y + i;
    counts[i] = m < p.key_count &&
                flag_at(args.key_mask, args.key_mask_stride_b, args.key_mask_stride_n, b, m);
    if (!differ || !counts[i]) continue;
    const bool has_k = flag_at(args.rotate_k, args.rotate_k_stride_b, args.rotate_k_stride_n, b, m);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t n = query + 4 * x + j;
      const bool rotated =
          has_k && n < p.query_count &&
          flag_at(args.rotate_q, args.rotate_q_stride_b, args.rotate_q_stride_n, b, n);
      if (!rotated) scores[i][j] = raw[i][j];
    }
  }
  __syncthreads();
  const PairTile pairs{b, h, query, queries, key, keys};
  weigh<T, false, false>(p, pairs, seed, shared, scores, grads);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[i][j] += counts[i] ? scores[i][j] : C{0};
  }
}

template <typename T>
__global__ void __launch_bounds__(kPlainThreads, 1) bias_kernel(const BiasLaunch launch) {
  using C = Compute<T>;
  using Tile = PlainTileOf<T>;
  __shared__ typename Tile::Shared shared;
  const BiasGradArgs& args = launch.args;
  const BackwardCommon& p = args.common;
  int64_t index = blockIdx.x;
  const auto key = static_cast<int32_t>(index % launch.key_tiles) * kPlainTile;
  index /= launch.key_tiles;
  const bool all_queries = args.dbias_stride_n == 0;
  const auto query = static_cast<int32_t>(index % launch.query_tiles) * kPlainTile;
  index /= launch.query_tiles;
  const int64_t bias_head = index % launch.heads;
  const int64_t bias_batch = index / launch.heads;
  const uint64_t seed = p.dropout.seed == nullptr ? 0 : static_cast<uint64_t>(*p.dropout.seed);
  C sums[4][4] = {};
  const int64_t batches = launch.batches == 1 ? p.batch : 1;
  const int64_t heads = launch.heads == 1 ? p.heads : 1;
  for (int64_t b = bias_batch; b < bias_batch + batches; ++b) {
    for (int64_t h = bias_head; h < bias_head + heads; ++h) {
      const int64_t last = all_queries ? p.query_count : query + 1;
      for (int64_t n = query; n < last; n += kPlainTile) {
        add_tile<T>(args, shared, seed, b, h, static_cast<int32_t>(n), key, sums);
      }
    }
  }
  const int y = static_cast<int>(threadIdx.x) / 16;
  const int x = static_cast<int>(threadIdx.x) % 16;
  C* const to = static_cast<C*>(args.dbias) + bias_batch * args.dbias_stride_b +
                bias_head * args.dbias_stride_h;
  if (!all_queries) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t m = key + 4 * y + i;
        const int64_t n = query + 4 * x + j;
        if (m < p.key_count && n < p.query_count) {
          to[n * args.dbias_stride_n + m * args.dbias_stride_m] = sums[i][j];
        }
      }
    }
    return;
  }
  Tile::store_weights(sums, shared);
  __syncthreads();
  const auto own = static_cast<int>(threadIdx.x);
  if (own >= kPlainTile || key + own >= p.key_count) return;
  C sum = 0;
  for (int n = 0; n < kPlainTile; ++n) {
    sum += shared.weights[Tile::weight_at(n, own / 4 * 4) + own % 4];
  }
  to[(key + own) * args.dbias_stride_m] = sum;
}

}  // namespace

cudaError_t bias_grad(DType dtype, const BiasGradArgs& args, cudaStream_t stream) {
  return with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const BackwardCommon& p = args.common;
    BiasLaunch l{};
    l.args = args;
    l.key_tiles = static_cast<int32_t>(ceil_div(p.key_count, kPlainTile));
    l.query_tiles =
        args.dbias_stride_n == 0 ? 1 : static_cast<int32_t>(ceil_div(p.query_count, kPlainTile));
    l.heads = args.dbias_stride_h == 0 ? 1 : p.heads;
    l.batches = args.dbias_stride_b == 0 ? 1 : p.batch;
    const int64_t blocks = l.batches * l.heads * l.query_tiles * l.key_tiles;
    if (blocks == 0 || p.query_count == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    bias_kernel<T><<<static_cast<unsigned>(blocks), kPlainThreads, 0, stream>>>(l);
    return cudaGetLastError();
  });
}

}  // namespace x_rope_cls::cuda
