#include "prepare.cuh"

#include <cstdint>

#include "rotate.cuh"

namespace x_rope_cls::cuda {
namespace {

constexpr int kOrderThreads = 1024;
constexpr int kPackThreads = 128;

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

struct TokenFlags {
  const uint8_t* rotate;
  int64_t rotate_stride_b, rotate_stride_n;
  const uint8_t* keep;
  int64_t keep_stride_b, keep_stride_n;

  // 0: with a position, 1: without, 2: dropped.
  __device__ int kind(int64_t b, int64_t n) const {
    if (keep != nullptr && keep[b * keep_stride_b + n * keep_stride_n] == 0) return 2;
    return rotate != nullptr && rotate[b * rotate_stride_b + n * rotate_stride_n] == 0 ? 1 : 0;
  }
};

// How many threads of the block before this one have `flag`, and how many have it at all. All
// threads call it; `sums` has 33 places.
__device__ int32_t count_before(bool flag, int32_t* sums, int32_t* total) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const uint32_t votes = __ballot_sync(0xffffffffU, flag);
  __syncthreads();  // the places may still be read from the call before
  if (lane == 0) sums[warp] = __popc(votes);
  __syncthreads();
  int32_t before = __popc(votes & ((1U << lane) - 1));
  int32_t all = 0;
  for (int w = 0; w < kOrderThreads / 32; ++w) {
    before += w < warp ? sums[w] : 0;
    all += sums[w];
  }
  *total = all;
  return before;
}

// One block a batch: a stable partition, those with a position in a pass before those without. What
// is placed waits in shared memory until it fills kOrderThreads neighbouring places.
__global__ void __launch_bounds__(kOrderThreads)
    order_kernel(TokenFlags flags, int64_t tokens, int32_t* order, TokenCounts* counts) {
  constexpr int kWaiting = 2 * kOrderThreads;
  __shared__ int32_t sums[kOrderThreads / 32];
  __shared__ int32_t waiting[kWaiting];  // place i is at i % kWaiting
  const int64_t b = blockIdx.x;
  int32_t* const list = order + b * TokenOrder::pitch(tokens);
  const auto own = static_cast<int32_t>(threadIdx.x);
  int32_t placed = 0;
  int32_t stored = 0;
  TokenCounts result{};
  for (int k = 0; k < 2; ++k) {
    for (int64_t first = 0; first < tokens; first += kOrderThreads) {
      const int64_t n = first + own;
      const bool here = n < tokens && flags.kind(b, n) == k;
      int32_t total;
      // The barriers in here also keep places from being overwritten while they are stored.
      const int32_t before = count_before(here, sums, &total);
      if (here) waiting[(placed + before) % kWaiting] = static_cast<int32_t>(n);
      placed += total;
      if (placed - stored < kOrderThreads) continue;
      __syncthreads();
      list[stored + own] = waiting[(stored + own) % kWaiting];
      stored += kOrderThreads;
    }
    if (k == 0) result.with = placed;
  }
  __syncthreads();
  if (stored + own < placed) list[stored + own] = waiting[(stored + own) % kWaiting];
  result.without = placed - result.with;
  if (own == 0) counts[b] = result;
}

struct PackKernelParams {
  Tensor4 from;
  TokenOrder order;
  RotaryTable table;
  bool has_table, by_token, whole, interleaved;
  int64_t heads, tokens;
  int32_t head_dim, pieces, pairs;
  uint32_t blocks;
};

// One piece a thread; `blocks` of them a head. The grid has one axis, which has room for all.
template <typename T>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(PackKernelParams p, Piece<T>* to) {
  __shared__ PlacedTokens<kPackThreads> placed;
  const int64_t start = static_cast<int64_t>(blockIdx.x % p.blocks) * kPackThreads;
  const int64_t h = blockIdx.x / p.blocks % p.heads;
  const int64_t b = blockIdx.x / p.blocks / p.heads;
  const auto first_place = static_cast<int32_t>(start / p.pieces);
  placed.look_up(
      p.order, b, first_place, static_cast<int32_t>((start + kPackThreads - 1) / p.pieces),
      [&](int32_t n) { return p.has_table && (!p.by_token || has_position(p.table, b, n)); });
  const int64_t index = start + threadIdx.x;
  const auto place = static_cast<int32_t>(index / p.pieces);
  if (place >= placed.counts.all()) return;
  const int32_t first = static_cast<int32_t>(index % p.pieces) * kPiece<T>;
  const int32_t n = placed.tokens[place - first_place];
  const bool rotated = placed.turned[place - first_place];
  const auto angles = angles_of<Compute<T>>(p.table, b, h, n, p.pairs, p.interleaved, rotated);
  Compute<T> x[kPiece<T>];
  load_rotated_piece(row_of<T>(p.from, b, h, n, p.head_dim, p.whole), angles, first, x);
  Piece<T> piece;
#pragma unroll
  for (int i = 0; i < kPiece<T>; ++i) piece.values[i] = from_compute<T>(x[i]);
  to[((b * p.heads + h) * p.tokens + place) * p.pieces + first / kPiece<T>] = piece;
}

}  // namespace

int64_t order_bytes(int64_t batch, int64_t tokens) {
  const auto lists = batch * TokenOrder::pitch(tokens) * static_cast<int64_t>(sizeof(int32_t));
  return round_up(lists + batch * static_cast<int64_t>(sizeof(TokenCounts)), 256);
}

cudaError_t order_tokens(int64_t batch, int64_t tokens, const uint8_t* rotate,
                         int64_t rotate_stride_b, int64_t rotate_stride_n, const uint8_t* keep,
                         int64_t keep_stride_b, int64_t keep_stride_n, void* memory,
                         TokenOrder* order, cudaStream_t stream) {
  auto* const places = static_cast<int32_t*>(memory);
  auto* const counts = reinterpret_cast<TokenCounts*>(places + batch * TokenOrder::pitch(tokens));
  *order = {places, counts, tokens};
  if (batch == 0) return cudaSuccess;
  const TokenFlags flags{rotate, rotate_stride_b, rotate_stride_n,
                         keep,   keep_stride_b,   keep_stride_n};
  order_kernel<<<static_cast<unsigned>(batch), kOrderThreads, 0, stream>>>(flags, tokens, places,
                                                                           counts);
  return cudaGetLastError();
}

int64_t packed_bytes(const PackParams& p) {
  const int64_t size = p.dtype == DType::kFloat64 ? 8 : p.dtype == DType::kFloat32 ? 4 : 2;
  return round_up(p.batch * p.heads * p.tokens * p.padded_dim * size, 256);
}

cudaError_t pack_rows(const PackParams& p, cudaStream_t stream) {
  if (p.batch == 0 || p.heads == 0 || p.tokens == 0) return cudaSuccess;
  return with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    PackKernelParams k{};
    k.from = p.from;
    k.order = p.order;
    k.has_table = p.table != nullptr;
    if (k.has_table) k.table = *p.table;
    k.by_token = p.rule.by_token;
    k.whole = rows_are_whole<T>(p.from, p.head_dim);
    k.interleaved = p.interleaved;
    k.heads = p.heads;
    k.tokens = p.tokens;
    k.head_dim = static_cast<int32_t>(p.head_dim);
    k.pieces = static_cast<int32_t>(p.padded_dim) / kPiece<T>;
    k.pairs = static_cast<int32_t>(p.pairs);
    k.blocks = static_cast<uint32_t>((p.tokens * k.pieces + kPackThreads - 1) / kPackThreads);
    const int64_t grid = k.blocks * p.batch * p.heads;
    if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
    pack_kernel<T>
        <<<static_cast<unsigned>(grid), kPackThreads, 0, stream>>>(k, static_cast<Piece<T>*>(p.to));
    return cudaGetLastError();
  });
}

}  // namespace x_rope_cls::cuda
