// Sums of attention backward for float32, float64 and whatever the tensor core kernels leave: any
// size, any strides. A block has 64 tokens (keys for dK and dV, queries for dQ) and 64 channels of
// their sum, passes over all their partners and recomputes the weights.
#include <cstdint>

#include "attention_backward_plain.cuh"

namespace x_rope_cls::cuda {
namespace {

enum class Sum { kQueries, kKeys, kValues };

struct PlainLaunch {
  PlainBackwardArgs args;
  int32_t tiles;   // of a head's tokens, enough for any split
  int32_t slices;  // of 64 channels
};

template <typename T, Sum kSum>
struct PlainKernel {
  using C = Compute<T>;
  using Tile = PlainTileOf<T>;
  using Rows = PlainRowsAt<T>;
  static constexpr bool kOwnsQueries = kSum == Sum::kQueries;

  const PlainBackwardArgs& args;
  typename Tile::Shared& shared;
  int64_t b, h, key_head;
  uint64_t seed;
  int32_t channel;

  // A tile of owners against partners at places [first, last), rotated or not.
  __device__ void meet(const PlainRows& q_from, const PlainRows& k_from, int32_t own_first,
                       int32_t own_count, int32_t first, int32_t last, C (&sums)[4][4]) const {
    const BackwardCommon& p = args.common;
    for (int32_t place = first; place < last; place += kPlainTile) {
      const int32_t count = min(kPlainTile, last - place);
      const int32_t q_first = kOwnsQueries ? own_first : place;
      const int32_t q_count = kOwnsQueries ? own_count : count;
      const int32_t k_first = kOwnsQueries ? place : own_first;
      const int32_t k_count = kOwnsQueries ? count : own_count;
      const Rows q = rows_at<T>(q_from, b, h, p.queries, q_first, q_count);
      const Rows k = rows_at<T>(k_from, b, key_head, p.keys, k_first, k_count);
      const Rows v = rows_at<T>(args.v, b, key_head, p.keys, k_first, k_count);
      const Rows grad = rows_at<T>(args.grad_out, b, h, p.queries, q_first, q_count);
      C weights[4][4];
      C grads[4][4];
      Tile::scores(kOwnsQueries ? q : k, kOwnsQueries ? k : q, shared, weights);
      if (kSum != Sum::kValues) {
        Tile::scores(kOwnsQueries ? grad : v, kOwnsQueries ? v : grad, shared, grads);
      }
      __syncthreads();  // the weights before have been used
      const PairTile pairs{b, h, q_first, q_count, k_first, k_count};
      weigh<T, kOwnsQueries, kSum == Sum::kValues>(p, pairs, seed, shared, weights, grads);
      Tile::store_weights(weights, shared);
      Tile::add_products(kSum == Sum::kQueries ? k
                         : kSum == Sum::kKeys  ? q
                                               : grad,
                         channel, shared, sums);
    }
  }

  __device__ void store(void* to, int32_t width, int64_t first, int32_t count,
                        C (&sums)[4][4]) const {
    const int y = static_cast<int>(threadIdx.x) / 16;
    const int x = static_cast<int>(threadIdx.x) % 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 4 * y + i;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int32_t c = channel + 4 * x + j;
        if (row < count && c < width) {
          static_cast<C*>(to)[(first + row) * width + c] = sums[i][j];
        }
        sums[i][j] = C{0};
      }
    }
  }
};

template <typename T, Sum kSum>
__global__ void __launch_bounds__(kPlainThreads, 1) plain_kernel(const PlainLaunch launch) {
  using Kernel = PlainKernel<T, kSum>;
  using C = Compute<T>;
  constexpr bool kOwnsQueries = kSum == Sum::kQueries;
  __shared__ typename PlainTileOf<T>::Shared shared;
  const PlainBackwardArgs& args = launch.args;
  const BackwardCommon& p = args.common;
  int64_t index = blockIdx.x;
  const auto channel = static_cast<int32_t>(index % launch.slices) * kPlainTile;
  index /= launch.slices;
  const auto tile = static_cast<int32_t>(index % launch.tiles);
  const int64_t unit = index / launch.tiles;
  const int64_t own_heads = kOwnsQueries ? p.heads : p.key_heads;
  const int64_t b = unit / own_heads;
  const int64_t own_head = unit % own_heads;
  const int64_t group = p.heads / p.key_heads;

  const TokenOrder& own = kOwnsQueries ? p.queries : p.keys;
  const TokenOrder& other = kOwnsQueries ? p.keys : p.queries;
  const auto [with, without] = own.counts_of(b);
  const int32_t ordinary_tiles = (with + kPlainTile - 1) / kPlainTile;
  const bool special = tile >= ordinary_tiles;
  const int32_t first = special ? with + (tile - ordinary_tiles) * kPlainTile : tile * kPlainTile;
  const int32_t end = special ? with + without : with;
  const int32_t count = min(kPlainTile, end - first);
  if (count <= 0) return;

  const uint64_t seed = p.dropout.seed == nullptr ? 0 : static_cast<uint64_t>(*p.dropout.seed);
  const TokenCounts others = other.counts_of(b);
  const GradSums& to = kOwnsQueries ? args.dq : kSum == Sum::kKeys ? args.dk : args.dv;
  const int64_t own_count = kOwnsQueries ? p.query_count : p.key_count;
  const int64_t row = (b * own_heads + own_head) * own_count + first;
  C sums[4][4] = {};
  const int64_t heads = kOwnsQueries ? 1 : group;
  // Tokens without a position meet all partners unrotated; the others first the rotated ones, then,
  // unrotated themselves, those without. Packed rows of tokens without a position are unrotated
  // already. dV is the same in both frames.
  for (int phase = 0; phase < (special ? 1 : 2); ++phase) {
    const bool raw = special || phase == 1;
    const int32_t start = phase == 0 ? 0 : others.with;
    const int32_t stop = raw ? others.all() : others.with;
    if (kSum != Sum::kValues && phase == 1 && start == stop) return;
    const bool raw_queries = raw && special != kOwnsQueries;
    const bool raw_keys = raw && special == kOwnsQueries;
    for (int64_t i = 0; i < heads; ++i) {
      const int64_t h = kOwnsQueries ? own_head : own_head * group + i;
      const Kernel kernel{args, shared, b, h, h / group, seed, channel};
      kernel.meet(raw_queries ? args.q_raw : args.q, raw_keys ? args.k_raw : args.k, first, count,
                  start, stop, sums);
    }
    if (kSum == Sum::kValues && !raw) continue;
    const Kernel kernel{args, shared, b, 0, 0, seed, channel};
    kernel.store(kSum == Sum::kValues || phase == 0 ? to.main : to.raw, to.width, row, count, sums);
  }
}

template <typename T, Sum kSum>
cudaError_t launch(const PlainBackwardArgs& args, cudaStream_t stream) {
  const BackwardCommon& p = args.common;
  const bool queries = kSum == Sum::kQueries;
  const TokenOrder& order = queries ? p.queries : p.keys;
  const GradSums& sums = queries ? args.dq : kSum == Sum::kKeys ? args.dk : args.dv;
  PlainLaunch l{};
  l.args = args;
  l.tiles = static_cast<int32_t>(ceil_div(queries ? p.query_count : p.key_count, kPlainTile)) +
            (order.counts == nullptr ? 0 : 1);
  l.slices = static_cast<int32_t>(ceil_div(sums.width, kPlainTile));
  const int64_t blocks = p.batch * (queries ? p.heads : p.key_heads) * l.tiles * l.slices;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  plain_kernel<T, kSum><<<static_cast<unsigned>(blocks), kPlainThreads, 0, stream>>>(l);
  return cudaGetLastError();
}

}  // namespace

cudaError_t plain_backward(DType dtype, const PlainBackwardArgs& args, cudaStream_t stream) {
  return with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    cudaError_t error = launch<T, Sum::kQueries>(args, stream);
    if (error == cudaSuccess) error = launch<T, Sum::kKeys>(args, stream);
    if (error == cudaSuccess) error = launch<T, Sum::kValues>(args, stream);
    return error;
  });
}

}  // namespace x_rope_cls::cuda
