// Attention forward in half precision: blocked online softmax on tensor cores, in the shape of
// FlashAttention-2. While the scores of a tile of keys are computed its values are copied, and
// while they are softened and multiplied the next keys are: one buffer each, two copies in turn.
//
// Tokens with and without a position are never in one tile. A block has rows of one kind. Rows with
// a position pass over the rotated keys first; then their queries are loaded again, unrotated, for
// the keys without a position, in narrow tiles because those are few. Rows without one pass over
// all keys, unrotated.
#pragma once

#include "attention_forward_scores.cuh"
#include "attention_forward_store.cuh"

namespace x_rope_cls::cuda {

template <typename T_, int kDim_, bool kWide_, bool kGeneral_>
template <bool kRotated>
__device__ __forceinline__ void ForwardKernel<T_, kDim_, kWide_, kGeneral_>::load_queries(
    bool rotated) const {
  constexpr int kPieces = kDim / 8;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kShape.rows * kPieces; i += kThreads) {
    const int row = i / kPieces;
    const int piece = i % kPieces;
    uint32_t packed[4] = {0, 0, 0, 0};
    if (row < tile.rows && piece * 8 < args.head_dim) {
      const RowPlace at = place_of_row(row);
      const Row<T> from = row_of<T>(args.q, tile.b, at.h, at.n, args.head_dim, args.q_whole);
      float x[8];
      if constexpr (kRotated) {
        const bool turned = rotated && (!args.by_token || has_position(args.table_q, tile.b, at.n));
        load_rotated_piece(from,
                           angles_of<float>(args.table_q, tile.b, at.h, at.n, args.pairs,
                                            args.interleaved, turned),
                           piece * 8, x);
      } else {
        load_piece(from, piece * 8, x);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        packed[j] = pack_pair<T>(x[2 * j] * args.query_factor, x[2 * j + 1] * args.query_factor);
      }
    }
    asm volatile(
        "st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(queries + tile_offset<kDim>(row, piece)),
        "r"(packed[0]), "r"(packed[1]), "r"(packed[2]), "r"(packed[3])
        : "memory");
  }
}

template <typename T_, int kDim_, bool kWide_, bool kGeneral_>
template <int kTile>
__device__ __forceinline__ void ForwardKernel<T_, kDim_, kWide_, kGeneral_>::load(
    const TileRows& from, uint32_t to, int32_t place, int32_t last) const {
  const int32_t batch = tile.b;
  const auto own = static_cast<int32_t>(threadIdx.x);
  load_tile<T, kDim, kTile, kThreads>(
      to, static_cast<const T*>(from.data) + batch * from.stride_b + notes.key_head * from.stride_h,
      from.stride_n, from.gathered ? args.keys.list(batch) : nullptr, place,
      min(kTile, last - place), from.pieces, kShort ? afresh(own) : own);
  copy_async_commit();
}

template <typename T_, int kDim_, bool kWide_, bool kGeneral_>
template <int kTile>
__device__ __forceinline__ void ForwardKernel<T_, kDim_, kWide_, kGeneral_>::attend(
    const TileRows& from, int32_t first, int32_t last, State& state) const {
  if (first >= last) return;
  constexpr int kColumns = kWide ? kTile / 8 : 2;
  [[maybe_unused]] const int32_t* const tokens = args.keys.list(tile.b);
  load<kTile>(from, keys, first, last);
#pragma unroll 1
  for (int32_t place = first; place < last; place += kTile) {
    const int32_t count = min(kTile, last - place);
    const int32_t own = kWide ? count : min(kShape.warp_keys, count - warp_key);
    const bool works = own > 0 && warp_row < tile.rows;  // the same in the whole warp
    copy_async_wait<0>();
    __syncthreads();  // the keys are there, the values before have been used
    load<kTile>(args.value_rows, values, place, last);
    float s[kRowTiles][kColumns][4];
    if (works) score(s, own);
    copy_async_wait<0>();
    __syncthreads();  // the values are there, the keys have been used
    if (place + kTile < last) load<kTile>(from, keys, place + kTile, last);
    if (!works) continue;
    finish_scores(tokens, place + warp_key, own, s, state);
    sum_values(s, state);
  }
}

template <typename T_, int kDim_, bool kWide_, bool kGeneral_>
__device__ __forceinline__ void ForwardKernel<T_, kDim_, kWide_, kGeneral_>::run(
    int32_t part, State& state) const {
  load_queries<true>(args.has_rotary && !tile.special);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      state.maximum[m][half] = negative_infinity();
      state.sum[m][half] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) state.out[m][n][i] = 0.0f;
    }
  }
  const int32_t in_parts = tile.special ? notes.keys.all() : notes.keys.with;
  const int32_t tiles = (in_parts + kKeys - 1) / kKeys;
  const int32_t each = (tiles + args.partial.parts - 1) / args.partial.parts * kKeys;
  const int32_t first = min(in_parts, part * each);
  attend<kKeys>(tile.special ? args.raw_key_rows : args.key_rows, first,
                min(in_parts, first + each), state);
  if (tile.special || notes.keys.without == 0 || part + 1 < args.partial.parts) return;
  __syncthreads();
  load_queries<false>(false);
  attend<kShape.special_keys>(args.key_rows, notes.keys.with, notes.keys.all(), state);
}

// Of the block's rows among the partial sums.
__device__ __forceinline__ int64_t first_slot(const ForwardArgs& args) {
  const int32_t part = static_cast<int32_t>(blockIdx.x) % args.partial.parts;
  const int32_t index = static_cast<int32_t>(blockIdx.x) / args.partial.parts;
  const int64_t unit = index / args.rows.tiles;
  return (unit * args.partial.parts + part) * args.partial.slots +
         index % args.rows.tiles * args.rows.tile_rows;
}

template <typename T, int kDim, bool kWide, bool kGeneral>
__global__ void __launch_bounds__(ForwardKernel<T, kDim, kWide, kGeneral>::kThreads,
                                  ForwardKernel<T, kDim, kWide, kGeneral>::kShape.warps <= 4 ? 2
                                                                                             : 1)
    attention_forward_kernel(const __grid_constant__ ForwardArgs args) {
  using Kernel = ForwardKernel<T, kDim, kWide, kGeneral>;
  extern __shared__ __align__(128) char shared[];
  const int32_t index = static_cast<int32_t>(blockIdx.x) / args.partial.parts;
  const RowTile rows = find_tile(args.rows, index / args.rows.tiles, index % args.rows.tiles);
  if (rows.rows == 0) return;
  const Kernel kernel(args, shared);
  kernel.note(rows);
  typename Kernel::State state;
  kernel.run(static_cast<int32_t>(blockIdx.x) % args.partial.parts, state);
  const int64_t slot = first_slot(args);
  if constexpr (kWide) {
    kernel.store_wide(slot, state);
  } else {
    kernel.store_narrow(slot, state,
                        reinterpret_cast<float*>(shared + Kernel::kShape.rows * kDim * 2));
  }
}

}  // namespace x_rope_cls::cuda
