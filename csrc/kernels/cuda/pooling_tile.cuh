// Tiles of 16 tokens for the tensor-core kernels. A block has all rows of a group and all channels;
// each of its warps has kSlab channels of every tile to itself: it fetches them, multiplies them
// and lets go of them without waiting for the others. Only scores, which sum over all channels, and
// the moments of a normalisation go through the block.
#pragma once

#include "pooling_blocks.cuh"

namespace x_rope_cls::cuda {
namespace {

template <typename S>
__device__ __forceinline__ float2 unpack_pair(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack_pair<bf16>(uint32_t pair) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}
template <>
__device__ __forceinline__ float2 unpack_pair<fp16>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

template <typename S, int kSlab>
struct TokenTiles {
  static constexpr int kPieces = kSlab / 8;
  static constexpr int kTokensAtOnce = 32 / kPieces;  // that a warp's lanes reach, a piece each
  static constexpr int kTileBytes = kPoolTokens * kSlab * 2;

  const PoolCall<S>& call;
  const PoolPlace& place;
  char* memory;  // stage 0 of this warp
  int channel;
  int lane, warp;
  bool whole;
  uint64_t pending = 0;  // bits of the tokens that count, of the tiles under way

  __device__ char* stage(int i) const {
    return memory + i % call.plan.stages * call.plan.warps * kTileBytes;
  }
  __device__ int piece() const { return lane % kPieces; }
  __device__ int token(int i) const { return i * kTokensAtOnce + lane / kPieces; }

  // Starts to fetch tile i; nothing where there is none. Tokens that do not count become zeros.
  __device__ void fetch(int i) {
    const int64_t start = place.first + static_cast<int64_t>(i) * kPoolTokens;
    uint32_t counts = 0;
    if (start < place.last) {
      const bool mine = lane < kPoolTokens && start + lane < place.last;
      counts = __ballot_sync(kAllLanes, mine && call.counts(place.b, start + lane));
      fetch_tile(start, counts, stage(i));
    }
    copy_async_commit();
    pending = pending << 16 | counts;
  }

  __device__ void fetch_tile(int64_t start, uint32_t counts, char* to) const {
    const PoolParams& p = call.p();
    const int64_t c = channel + piece() * 8;
    if (!whole) {
      fetch_elements(start, counts, to);
      return;
    }
    const S* from = call.token(place.b, start + token(0)) + c;
    if (c >= p.channels) counts = 0;
#pragma unroll
    for (int i = 0; i < kPoolTokens / kTokensAtOnce; ++i) {
      const bool there = (counts >> token(i) & 1) != 0;
      copy_async(shared_address(to) + tile_offset<kSlab>(token(i), piece()),
                 there ? from : static_cast<const S*>(p.x.data), there);
      from += kTokensAtOnce * p.x.stride_n;
    }
  }
  __device__ void fetch_elements(int64_t start, uint32_t counts, char* to) const {
    const PoolParams& p = call.p();
    const int64_t c = channel + piece() * 8;
#pragma unroll 1
    for (int i = 0; i < kPoolTokens / kTokensAtOnce; ++i) {
      const S* const from = call.token(place.b, start + token(i));
      auto* const piece_to = reinterpret_cast<S*>(to + tile_offset<kSlab>(token(i), piece()));
#pragma unroll 1
      for (int e = 0; e < 8; ++e) {
        const bool there = (counts >> token(i) & 1) != 0 && c + e < p.channels;
        piece_to[e] = there ? from[(c + e) * p.x.stride_c] : from_compute<S>(0.0F);
      }
    }
  }

  // Waits for the oldest tile, of all lanes; returns which of its tokens count.
  __device__ uint32_t wait() const {
    const int stages = call.plan.stages;
    if (stages == 3) {
      copy_async_wait<2>();
    } else if (stages == 2) {
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncwarp();
    return static_cast<uint32_t>(pending >> (16 * (stages - 1))) & 0xffffU;
  }

  __device__ int64_t width(int w) const {
    const int64_t left = call.p().channels - static_cast<int64_t>(w) * kSlab;
    return left < kSlab ? left : kSlab;
  }

  // Normalises a tile in place, without weight and bias. Returns the inverse spread of token
  // lane % 16, 0 where it does not count. Sums are around each warp's own mean, so that a large
  // mean costs no accuracy. moments: (warps, 16).
  __device__ float normalise(char* tile, uint32_t counts, float2* moments) const {
    const bool centred = call.p().norm == PoolNorm::kLayer;
    const int own = static_cast<int>(width(warp));
#pragma unroll 1
    for (int i = 0; i < kPoolTokens / kTokensAtOnce; ++i) {
      const uint4 values = load_piece(tile + tile_offset<kSlab>(token(i), piece()));
      const float2 x[4] = {unpack_pair<S>(values.x), unpack_pair<S>(values.y),
                           unpack_pair<S>(values.z), unpack_pair<S>(values.w)};
      float mean = 0.0F, squares = 0.0F;
      if (centred) {
#pragma unroll
        for (const float2& pair : x) mean += pair.x + pair.y;
        mean = slab_sum(mean) / static_cast<float>(own);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float left = x[e].x - mean, right = x[e].y - mean;
        squares += piece() * 8 + 2 * e < own ? left * left : 0.0F;
        squares += piece() * 8 + 2 * e + 1 < own ? right * right : 0.0F;
      }
      squares = slab_sum(squares);
      if (piece() == 0) moments[warp * kPoolTokens + token(i)] = make_float2(mean, squares);
    }
    __syncthreads();
    const int at = lane % kPoolTokens;
    const auto channels = static_cast<float>(call.p().channels);
    float mean = 0.0F, squares = 0.0F;
    for (int w = 0; w < call.plan.warps && centred; ++w) {
      mean += moments[w * kPoolTokens + at].x * (static_cast<float>(width(w)) / channels);
    }
    for (int w = 0; w < call.plan.warps; ++w) {
      const float2 m = moments[w * kPoolTokens + at];
      squares += m.y + (m.x - mean) * (m.x - mean) * static_cast<float>(width(w));
    }
    float inverse = 1.0F / sqrtf(squares / channels + static_cast<float>(call.p().norm_eps));
    if ((counts >> at & 1) == 0) mean = inverse = 0.0F;
#pragma unroll 1
    for (int i = 0; i < kPoolTokens / kTokensAtOnce; ++i) {
      char* const to = tile + tile_offset<kSlab>(token(i), piece());
      const float from = __shfl_sync(kAllLanes, mean, token(i));
      const float by = __shfl_sync(kAllLanes, inverse, token(i));
      const auto normal = [&](uint32_t pair) {
        const float2 x = unpack_pair<S>(pair);
        return pack_pair<S>((x.x - from) * by, (x.y - from) * by);
      };
      const uint4 x = load_piece(to);
      store_piece(to, make_uint4(normal(x.x), normal(x.y), normal(x.z), normal(x.w)));
    }
    __syncwarp();
    return inverse;
  }
  __device__ float slab_sum(float x) const {
#pragma unroll
    for (int by = kPieces / 2; by > 0; by /= 2) x += __shfl_xor_sync(kAllLanes, x, by);
    return x;
  }
};

// Row and piece whose address a lane gives to ldmatrix for two by two 8x8 matrices: those of the
// same pieces first (the left operand of an mma, and transposed the right one), or those of the
// same rows first (the right operand, not transposed).
struct MatrixLane {
  int row, piece;
};
__device__ __forceinline__ MatrixLane rows_first(int lane) {
  return {lane / 8 % 2 * 8 + lane % 8, lane / 16};
}
__device__ __forceinline__ MatrixLane pieces_first(int lane) {
  return {lane / 16 * 8 + lane % 8, lane / 8 % 2};
}

// Where a lane's part of the first two pieces of a tile is; those of piece 2 k are at `^ 32 k`,
// because the permutation is an exclusive or and tiles are aligned to their rows.
template <int kSlab>
__device__ __forceinline__ uint32_t lane_address(const char* tile, MatrixLane at) {
  return shared_address(tile) + tile_offset<kSlab>(at.row, at.piece);
}

// Matrices of weights (16 rows, 16 tokens) lie one 8-token piece of all rows after the other.
__device__ __forceinline__ uint32_t weight_offset(int row, int token) {
  return static_cast<uint32_t>((token / 8 * kPoolRows + row) * 16 + token % 8 * 2);
}
// So do partial scores, in float32.
__device__ __forceinline__ int score_index(int row, int token) {
  return token / 8 * kPoolRows * 8 + row * 8 + token % 8;
}

// 8 bytes in one instruction; the compiler may make two of them, which conflict.
__device__ __forceinline__ void store_shared_pair(float* to, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared_address(to)), "f"(a), "f"(b)
               : "memory");
}

// A 16x8 result of an mma to a warp's partial scores.
__device__ __forceinline__ void store_scores(const float (&d)[4], int lane, int octet, float* to) {
  const int at = score_index(lane / 4, octet * 8 + lane % 4 * 2);
  store_shared_pair(to + at, d[0], d[1]);
  store_shared_pair(to + at + 64, d[2], d[3]);
}

// Sums over tokens of one row, 8 channels a quad, to scratch memory.
__device__ __forceinline__ void store_sums(float a, float b, int64_t c, int64_t channels,
                                           float* to) {
  if (channels % 2 == 0) {
    if (c < channels) *reinterpret_cast<float2*>(to + c) = make_float2(a, b);
    return;
  }
  if (c < channels) to[c] = a;
  if (c + 1 < channels) to[c + 1] = b;
}

// Sum over the 8 lanes with the same row.
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
  for (int by = 4; by > 0; by /= 2) x += __shfl_xor_sync(kAllLanes, x, by);
  return x;
}

}  // namespace
}  // namespace x_rope_cls::cuda
