// A block of attention forward: what it is given, and what it does, step by step.
#pragma once

#include <cstdint>

#include "attention_common.cuh"
#include "attention_rows.cuh"

namespace x_rope_cls::cuda {

// Sums of parts of the keys, for attention_merge.cuh; null: a block has all keys.
struct PartialSums {
  float* out;  // (units, parts, slots, width), divided by the part's sum of weights
  float* lse;  // (units, parts, slots), in log2
  int32_t parts, slots, width;
};

struct ForwardArgs {
  RowSet rows;
  TokenOrder keys;  // places of all tile rows
  TileRows key_rows, raw_key_rows, value_rows;
  Tensor4 q, out;
  float* lse;
  RotaryTable table_q;
  bool has_rotary, by_token, interleaved, q_whole, out_whole;
  int32_t head_dim, value_dim, pairs;
  int32_t key_group;  // units of rows a key head
  int64_t key_heads, queries;
  float scale_log2;    // |scale| * log2(e); 1 where scale is 0
  float query_factor;  // sign of scale
  ScoreBias bias;
  DropoutParams dropout;
  PartialSums partial;
};

// What a block remembers in shared memory: the main loop has no registers for it.
struct ForwardNotes {
  RowTile tile;
  int32_t key_head;
  TokenCounts keys;
};
static_assert(sizeof(ForwardNotes) == kForwardNotes);

template <typename T_, int kDim_, bool kWide_, bool kGeneral_>
struct ForwardKernel {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr bool kWide = kWide_;
  static constexpr bool kGeneral = kGeneral_;  // biases and dropout
  static constexpr ForwardShape kShape = forward_shape(kDim, kWide, kGeneral);
  static constexpr int kThreads = kShape.warps * kWarpSize;
  static constexpr int kRowTiles = kShape.row_tiles;
  static constexpr int kKeys = kShape.keys;
  // No register is left to carry addresses through the main loop: they are computed anew.
  static constexpr bool kShort = kDim >= 96;

  // A thread's part: of each of its warp's row tiles, rows lane / 4 (half 0) and lane / 4 + 8
  // (half 1), columns 2 * (lane % 4) + {0, 1} of every eight.
  struct State {
    float out[kRowTiles][kDim / 8][4];
    float maximum[kRowTiles][2];  // of the scores before (general: after) the factor scale_log2
    float sum[kRowTiles][2];      // of this thread's columns
  };

  const ForwardArgs& args;
  ForwardNotes& notes;  // shared memory, as the next four
  const RowTile& tile;
  int32_t* const row_tokens;
  uint32_t queries, keys, values;
  int lane, warp_row, warp_key;  // first row of the warp; first key of a tile

  __device__ __forceinline__ ForwardKernel(const ForwardArgs& args, char* memory)
      : args(args),
        notes(*reinterpret_cast<ForwardNotes*>(memory + forward_tile_bytes(kDim, kWide, kGeneral))),
        tile(notes.tile),
        row_tokens(reinterpret_cast<int32_t*>(memory + forward_tile_bytes(kDim, kWide, kGeneral) +
                                              kForwardNotes)),
        queries(shared_address(memory)) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    lane = static_cast<int>(threadIdx.x) % kWarpSize;
    keys = queries + kShape.rows * kDim * 2;
    values = keys + kKeys * kDim * 2;
    warp_row = kWide ? warp * kRowTiles * 16 : 0;
    warp_key = kWide ? 0 : warp * kShape.warp_keys;
  }

  // What there is to know of the block. Neighbouring threads look up the tokens of neighbouring
  // rows.
  __device__ __forceinline__ void note(const RowTile& own) const {
    static_assert(kThreads >= kShape.rows);
    const auto row = static_cast<int32_t>(threadIdx.x);
    if (row < own.rows) row_tokens[row] = place_of(args.rows, own, row).n;
    if (row == 0) notes = {own, own.unit_head / args.key_group, args.keys.counts_of(own.b)};
    __syncthreads();
  }
  __device__ __forceinline__ RowPlace place_of_row(int32_t row) const {
    return {head_of(args.rows, tile, row), row_tokens[row]};
  }

  // All rows of the block to shared memory. kRotated: rotated where `rotated` says so.
  template <bool kRotated>
  __device__ __forceinline__ void load_queries(bool rotated) const;

  // s = q k of the warp's rows and keys. Of 16 keys the second half may not be there.
  template <int kColumns>
  __device__ __forceinline__ void score(float (&s)[kRowTiles][kColumns][4], int32_t count) const;

  __device__ __forceinline__ int row_of_half(int m, int half) const {
    return warp_row + 16 * m + 8 * half + lane / 4;
  }

  // Biases of the scores, which become units of log2; `first`: place of the warp's first key.
  template <int kColumns>
  __device__ __forceinline__ void add_biases(const int32_t* tokens, int32_t first, int32_t count,
                                             float (&s)[kRowTiles][kColumns][4]) const;

  // Weights become 0 where dropout drops them: bit (2 n + c) of a row says so. The loop that draws
  // is not unrolled; its code is long enough once.
  template <int kColumns>
  __device__ __forceinline__ void drop(const int32_t* tokens, int32_t first, int32_t count,
                                       float (&s)[kRowTiles][kColumns][4]) const;

  // Scores become weights relative to the rows' maxima so far; earlier sums are rescaled.
  template <int kColumns>
  __device__ __forceinline__ void soften(float (&s)[kRowTiles][kColumns][4], State& state) const;

  // out += weights * values.
  template <int kColumns>
  __device__ __forceinline__ void sum_values(const float (&s)[kRowTiles][kColumns][4],
                                             State& state) const;

  // What a warp does between the two barriers of a tile and after the second.
  template <int kColumns>
  __device__ __forceinline__ void finish_scores(const int32_t* tokens, int32_t first, int32_t count,
                                                float (&s)[kRowTiles][kColumns][4],
                                                State& state) const;

  // Starts copies of the rows at places [place, last), as many as a tile has.
  template <int kTile>
  __device__ __forceinline__ void load(const TileRows& from, uint32_t to, int32_t place,
                                       int32_t last) const;

  // The rows' pass over keys at places [first, last). All threads call it, after the queries are
  // in shared memory of this thread; the first barrier makes them visible.
  template <int kTile>
  __device__ __forceinline__ void attend(const TileRows& from, int32_t first, int32_t last,
                                         State& state) const;

  // Part `part` of the keys for all rows.
  __device__ __forceinline__ void run(int32_t part, State& state) const;

  // Sums of the four threads that share a row.
  __device__ __forceinline__ void join_sums(State& state) const;

  // Logarithm to base 2 of a row's sum of weights.
  __device__ __forceinline__ float log2_sum(float maximum, float sum) const {
    if (sum == 0.0f) return negative_infinity();
    return fmaf(maximum, kGeneral ? 1.0f : args.scale_log2, log2f(sum));
  }
  __device__ __forceinline__ void store_lse(int row, float lse2, int64_t slot) const;
  __device__ __forceinline__ T* out_row(int row) const {
    const RowPlace at = place_of_row(row);
    return static_cast<T*>(args.out.data) + tile.b * args.out.stride_b + at.h * args.out.stride_h +
           at.n * args.out.stride_n;
  }

  // A wide block: every warp has its rows' sums. Through shared memory (each warp uses that of its
  // own queries, which nobody else reads), so that memory is written in pieces of 16 bytes.
  __device__ __forceinline__ void store_wide(int64_t slot, State& state) const;

  // A narrow block: its warps' sums are merged in shared memory, where keys and values were.
  __device__ __forceinline__ void store_narrow(int64_t slot, State& state, float* sums) const;
};

}  // namespace x_rope_cls::cuda
