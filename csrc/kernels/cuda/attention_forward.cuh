// Attention forward in half precision: blocked online softmax on tensor cores, in the shape of
// FlashAttention-2. While the scores of a tile of keys are computed its values are copied, and
// while they are softened and multiplied the next keys are: one buffer each, two copies in turn.
//
// Tokens with and without a position are never in one tile. A block has rows of one kind. Rows with
// a position pass over the rotated keys first; then their queries are loaded again, unrotated, for
// the keys without a position, in narrow tiles because those are few. Rows without one pass over
// all keys, unrotated.
#pragma once

#include <cstdint>
#include <type_traits>

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

  // A thread's part: of each of its warp's row tiles, rows lane / 4 (half 0) and lane / 4 + 8
  // (half 1), columns 2 * (lane % 4) + {0, 1} of every eight.
  struct State {
    float out[kRowTiles][kDim / 8][4];
    float maximum[kRowTiles][2];  // of the scores before (general: after) the factor scale_log2
    float sum[kRowTiles][2];      // of this thread's columns
  };

  const ForwardArgs& args;
  const RowTile tile;
  int32_t* const row_tokens;  // shared memory, as all of these
  uint32_t queries, keys, values;
  int lane, warp_row, warp_key;  // first row of the warp; first key of a tile

  __device__ __forceinline__ ForwardKernel(const ForwardArgs& args, const RowTile& tile,
                                           char* memory)
      : args(args),
        tile(tile),
        row_tokens(reinterpret_cast<int32_t*>(memory + forward_tile_bytes(kDim, kWide, kGeneral))),
        queries(shared_address(memory)) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    lane = static_cast<int>(threadIdx.x) % kWarpSize;
    keys = queries + kShape.rows * kDim * 2;
    values = keys + kKeys * kDim * 2;
    warp_row = kWide ? warp * kRowTiles * 16 : 0;
    warp_key = kWide ? 0 : warp * kShape.warp_keys;
  }

  // Neighbouring threads look up the tokens of neighbouring rows.
  __device__ __forceinline__ void look_up_rows() const {
    static_assert(kThreads >= kShape.rows);
    const auto row = static_cast<int32_t>(threadIdx.x);
    if (row < tile.rows) row_tokens[row] = place_of(args.rows, tile, row).n;
    __syncthreads();
  }
  __device__ __forceinline__ RowPlace place_of_row(int32_t row) const {
    return {head_of(args.rows, tile, row), row_tokens[row]};
  }

  // All rows of the block to shared memory. kRotated: rotated where `rotated` says so.
  template <bool kRotated>
  __device__ __forceinline__ void load_queries(bool rotated) const {
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
          const bool turned =
              rotated && (!args.by_token || has_position(args.table_q, tile.b, at.n));
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

  // s = q k of the warp's rows and keys. Of 16 keys the second half may not be there.
  template <int kColumns>
  __device__ __forceinline__ void score(float (&s)[kRowTiles][kColumns][4], int32_t count) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;
      }
    }
    const bool second = kColumns > 2 || count > 8;
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        load_matrices(a[m], left_address<kDim>(queries, warp_row + 16 * m, step));
      }
#pragma unroll
      for (int n = 0; n < kColumns / 2; ++n) {
        uint32_t b[4];
        load_matrices(b, right_address<kDim>(keys, warp_key + 16 * n, step));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) multiply_add<T>(s[m][2 * n], a[m], b[0], b[1]);
        if (!second) continue;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) multiply_add<T>(s[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }

  __device__ __forceinline__ int row_of_half(int m, int half) const {
    return warp_row + 16 * m + 8 * half + lane / 4;
  }

  // Biases of the scores, which become units of log2; `first`: place of the warp's first key.
  template <int kColumns>
  __device__ __forceinline__ void add_biases(const int32_t* tokens, int32_t first, int32_t count,
                                             float (&s)[kRowTiles][kColumns][4]) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) s[m][n][2 * half + c] *= args.scale_log2;
        }
        const int row = row_of_half(m, half);
        if (args.bias.data == nullptr || row >= tile.rows) continue;
        const RowPlace at = place_of_row(row);
        const int64_t offset = args.bias.row(tile.b, at.h, at.n);
        with_bias(args.bias, [&](const auto* bias) {
#pragma unroll
          for (int n = 0; n < kColumns; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const int column = 8 * n + 2 * (lane % 4) + c;
              if (column >= count) continue;
              const int32_t token = tokens == nullptr ? first + column : tokens[first + column];
              add_bias(s[m][n][2 * half + c], bias[offset + token * args.bias.stride_m]);
            }
          }
        });
      }
    }
  }

  // Weights become 0 where dropout drops them: bit (2 n + c) of a row says so. The loop that draws
  // is not unrolled; its code is long enough once.
  template <int kColumns>
  __device__ __forceinline__ void drop(const int32_t* tokens, int32_t first, int32_t count,
                                       float (&s)[kRowTiles][kColumns][4]) const {
    const auto seed = static_cast<uint64_t>(*args.dropout.seed);
    const Dropout dropout{seed, args.dropout.threshold, args.dropout.kept};
    // Where keys are in natural order and the tile has 64, key m and m + 32 share their numbers.
    const bool shared = kColumns == 8 && tokens == nullptr && first % 64 == 0;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of_half(m, half);
        if (row >= tile.rows) continue;
        const RowPlace at = place_of_row(row);
        const int64_t head = static_cast<int64_t>(tile.b) * args.rows.heads + at.h;
        uint32_t kept = 0;
#pragma unroll 1
        for (int i = 0; i < (shared ? kColumns : 2 * kColumns); ++i) {
          const int column = 8 * (i / 2) + 2 * (lane % 4) + i % 2;
          if (column >= count) break;
          const int32_t token = tokens == nullptr ? first + column : tokens[first + column];
          const uint4 words = dropout_words(seed, dropout_counter(token), at.n, head);
          const bool upper = dropout_word(token) >= 2;
          const bool odd = dropout_word(token) % 2 != 0;
          const uint32_t even_word = upper ? words.z : words.x;
          const uint32_t odd_word = upper ? words.w : words.y;
          kept |= static_cast<uint32_t>(dropout_keeps(dropout, odd ? odd_word : even_word)) << i;
          if (shared) {
            kept |= static_cast<uint32_t>(dropout_keeps(dropout, odd_word)) << (i + kColumns);
          }
        }
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            if ((kept >> (2 * n + c) & 1) == 0) s[m][n][2 * half + c] = 0.0f;
          }
        }
      }
    }
  }

  // Scores become weights relative to the rows' maxima so far; earlier sums are rescaled.
  template <int kColumns>
  __device__ __forceinline__ void soften(float (&s)[kRowTiles][kColumns][4], State& state) const {
    const float scale = kGeneral ? 1.0f : args.scale_log2;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = state.maximum[m][half];
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          largest = fmaxf(largest, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        }
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffU, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffU, largest, 2));
        // Without a finite score there is nothing to be relative to.
        const float shift = largest == negative_infinity() ? 0.0f : largest * scale;
        const float factor = power_of_two(fmaf(state.maximum[m][half], scale, -shift));
        state.maximum[m][half] = largest;
        float sum = state.sum[m][half] * factor;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& x = s[m][n][2 * half + c];
            x = power_of_two(fmaf(x, scale, -shift));
            sum += x;
          }
        }
        state.sum[m][half] = sum;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          state.out[m][n][2 * half] *= factor;
          state.out[m][n][2 * half + 1] *= factor;
        }
      }
    }
  }

  // out += weights * values.
  template <int kColumns>
  __device__ __forceinline__ void sum_values(const float (&s)[kRowTiles][kColumns][4],
                                             State& state) const {
#pragma unroll
    for (int step = 0; step < kColumns / 2; ++step) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const float (&left)[4] = s[m][2 * step];
        const float (&right)[4] = s[m][2 * step + 1];
        a[m][0] = pack_pair<T>(left[0], left[1]);
        a[m][1] = pack_pair<T>(left[2], left[3]);
        a[m][2] = pack_pair<T>(right[0], right[1]);
        a[m][3] = pack_pair<T>(right[2], right[3]);
      }
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        uint32_t b[4];
        load_matrices_transposed(b, left_address<kDim>(values, warp_key + 16 * step, n));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          multiply_add<T>(state.out[m][2 * n], a[m], b[0], b[1]);
          multiply_add<T>(state.out[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // What a warp does between the two barriers of a tile and after the second.
  template <int kColumns>
  __device__ __forceinline__ void finish_scores(const int32_t* tokens, int32_t first, int32_t count,
                                                float (&s)[kRowTiles][kColumns][4],
                                                State& state) const {
    if constexpr (kGeneral) add_biases(tokens, first, count, s);
    if (count < 8 * kColumns) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool there = 8 * n + 2 * (lane % 4) + i % 2 < count;
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            s[m][n][i] = there ? s[m][n][i] : negative_infinity();
          }
        }
      }
    }
    soften(s, state);
    if constexpr (kGeneral) {
      if (args.dropout.seed != nullptr) drop(tokens, first, count, s);
    }
  }

  // The rows' pass over keys at places [first, last). All threads call it, after the queries are
  // in shared memory of this thread; the first barrier makes them visible.
  template <int kTile>
  __device__ __forceinline__ void attend(const TileRows& from, int32_t first, int32_t last,
                                         State& state) const {
    if (first >= last) return;
    constexpr int kColumns = kWide ? kTile / 8 : 2;
    const int32_t key_head = tile.unit_head / args.key_group;
    const T* const k =
        static_cast<const T*>(from.data) + tile.b * from.stride_b + key_head * from.stride_h;
    const TileRows& vr = args.value_rows;
    const T* const v =
        static_cast<const T*>(vr.data) + tile.b * vr.stride_b + key_head * vr.stride_h;
    const int32_t* const tokens = args.keys.list(tile.b);
    const int32_t* const key_tokens = from.gathered ? tokens : nullptr;
    const int32_t* const value_tokens = vr.gathered ? tokens : nullptr;
    load_tile<T, kDim, kTile, kThreads>(keys, k, from.stride_n, key_tokens, first,
                                        min(kTile, last - first), from.pieces);
    copy_async_commit();
#pragma unroll 1
    for (int32_t place = first; place < last; place += kTile) {
      const int32_t count = min(kTile, last - place);
      const int32_t own = kWide ? count : min(kShape.warp_keys, count - warp_key);
      const bool works = own > 0 && warp_row < tile.rows;  // the same in the whole warp
      copy_async_wait<0>();
      __syncthreads();  // the keys are there, the values before have been used
      load_tile<T, kDim, kTile, kThreads>(values, v, vr.stride_n, value_tokens, place, count,
                                          vr.pieces);
      copy_async_commit();
      float s[kRowTiles][kColumns][4];
      if (works) score(s, own);
      copy_async_wait<0>();
      __syncthreads();  // the values are there, the keys have been used
      if (place + kTile < last) {
        load_tile<T, kDim, kTile, kThreads>(keys, k, from.stride_n, key_tokens, place + kTile,
                                            min(kTile, last - place - kTile), from.pieces);
        copy_async_commit();
      }
      if (!works) continue;
      finish_scores(tokens, place + warp_key, own, s, state);
      sum_values(s, state);
    }
  }

  // Part `part` of the keys for all rows.
  __device__ __forceinline__ void run(int32_t part, State& state) const {
    look_up_rows();
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
    const auto [with, without] = args.keys.counts_of(tile.b);
    const int32_t all = with + without;
    const int32_t in_parts = tile.special ? all : with;
    const int32_t tiles = (in_parts + kKeys - 1) / kKeys;
    const int32_t each = (tiles + args.partial.parts - 1) / args.partial.parts * kKeys;
    const int32_t first = min(in_parts, part * each);
    attend<kKeys>(tile.special ? args.raw_key_rows : args.key_rows, first,
                  min(in_parts, first + each), state);
    if (tile.special || with == all || part + 1 < args.partial.parts) return;
    __syncthreads();
    load_queries<false>(false);
    attend<kShape.special_keys>(args.key_rows, with, all, state);
  }

  // Sums of the four threads that share a row.
  __device__ __forceinline__ void join_sums(State& state) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& sum = state.sum[m][half];
        sum += __shfl_xor_sync(0xffffffffU, sum, 1);
        sum += __shfl_xor_sync(0xffffffffU, sum, 2);
      }
    }
  }

  // Logarithm to base 2 of a row's sum of weights.
  __device__ __forceinline__ float log2_sum(float maximum, float sum) const {
    if (sum == 0.0f) return negative_infinity();
    return fmaf(maximum, kGeneral ? 1.0f : args.scale_log2, log2f(sum));
  }
  __device__ __forceinline__ void store_lse(int row, float lse2, int64_t slot) const {
    if (args.partial.out != nullptr) {
      args.partial.lse[slot] = lse2;
    } else {
      const RowPlace at = place_of_row(row);
      args.lse[(static_cast<int64_t>(tile.b) * args.rows.heads + at.h) * args.queries + at.n] =
          lse2 * kLn2;
    }
  }
  __device__ __forceinline__ T* out_row(int row) const {
    const RowPlace at = place_of_row(row);
    return static_cast<T*>(args.out.data) + tile.b * args.out.stride_b + at.h * args.out.stride_h +
           at.n * args.out.stride_n;
  }

  // A wide block: every warp has its rows' sums. Through shared memory (each warp uses that of its
  // own queries, which nobody else reads), so that memory is written in pieces of 16 bytes.
  __device__ __forceinline__ void store_wide(int64_t slot, State& state) const {
    join_sums(state);
    __syncthreads();  // without keys nobody has waited for those who loaded the queries
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of_half(m, half);
        const float sum = state.sum[m][half];
        const float factor = sum == 0.0f ? 0.0f : args.dropout.kept / sum;
        if (row < tile.rows && lane % 4 == 0) {
          store_lse(row, log2_sum(state.maximum[m][half], sum), slot + row);
        }
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          const float x = state.out[m][n][2 * half] * factor;
          const float y = state.out[m][n][2 * half + 1] * factor;
          if (args.partial.out == nullptr) {
            asm volatile(
                "st.shared.b32 [%0], %1;" ::"r"(queries + tile_offset<kDim>(row, n) + lane % 4 * 4),
                "r"(pack_pair<T>(x, y))
                : "memory");
          } else if (row < tile.rows && 8 * n + lane % 4 * 2 < args.partial.width) {
            *reinterpret_cast<float2*>(args.partial.out + (slot + row) * args.partial.width +
                                       8 * n + lane % 4 * 2) = make_float2(x, y);
          }
        }
      }
    }
    if (args.partial.out != nullptr) return;
    __syncwarp();
    constexpr int kPieces = kDim / 8;
#pragma unroll 1
    for (int i = lane; i < kRowTiles * 16 * kPieces; i += kWarpSize) {
      const int row = warp_row + i / kPieces;
      const int first = i % kPieces * 8;
      if (row >= tile.rows || first >= args.value_dim) continue;
      uint32_t packed[4];
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(packed[0]), "=r"(packed[1]), "=r"(packed[2]), "=r"(packed[3])
                   : "r"(queries + tile_offset<kDim>(row, i % kPieces))
                   : "memory");
      T* const to = out_row(row);
      if (args.out_whole) {
        *reinterpret_cast<uint4*>(to + first) =
            make_uint4(packed[0], packed[1], packed[2], packed[3]);
        continue;
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (first + j < args.value_dim) {
          to[(first + j) * args.out.stride_d] = reinterpret_cast<const T*>(packed)[j];
        }
      }
    }
  }

  // A narrow block: its warps' sums are merged in shared memory, where keys and values were.
  __device__ __forceinline__ void store_narrow(int64_t slot, State& state, float* sums) const {
    constexpr int kPitch = kDim + kMergePadding;
    constexpr int kWarps = kShape.warps;
    float* const maxima = sums + kWarps * 16 * kPitch;  // (warps, 16)
    float* const totals = maxima + kWarps * 16;         // (warps, 16)
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    join_sums(state);
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + 8 * half + lane / 4;
      if (lane % 4 == 0) {
        maxima[row] = state.maximum[0][half] * (kGeneral ? 1.0f : args.scale_log2);
        totals[row] = state.sum[0][half];
      }
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(
                         keys + (row * kPitch + 8 * n + lane % 4 * 2) * 4),
                     "f"(state.out[0][n][2 * half]), "f"(state.out[0][n][2 * half + 1])
                     : "memory");
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < 16 * kDim / 4; i += kThreads) {
      const int row = i / (kDim / 4);
      const int first = i % (kDim / 4) * 4;
      if (row >= tile.rows || first >= args.partial.width) continue;
      float largest = negative_infinity();
#pragma unroll
      for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, maxima[w * 16 + row]);
      const float shift = largest == negative_infinity() ? 0.0f : largest;
      float sum = 0.0f;
      float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float factor = power_of_two(maxima[w * 16 + row] - shift);
        const float4 part =
            *reinterpret_cast<const float4*>(sums + (w * 16 + row) * kPitch + first);
        sum = fmaf(totals[w * 16 + row], factor, sum);
        x[0] = fmaf(part.x, factor, x[0]);
        x[1] = fmaf(part.y, factor, x[1]);
        x[2] = fmaf(part.z, factor, x[2]);
        x[3] = fmaf(part.w, factor, x[3]);
      }
      const float inverse = sum == 0.0f ? 0.0f : args.dropout.kept / sum;
#pragma unroll
      for (float& value : x) value *= inverse;
      if (first == 0) {
        store_lse(row, sum == 0.0f ? negative_infinity() : shift + log2f(sum), slot + row);
      }
      if (args.partial.out != nullptr) {
        *reinterpret_cast<float4*>(args.partial.out + (slot + row) * args.partial.width + first) =
            make_float4(x[0], x[1], x[2], x[3]);
      } else if (args.out_whole) {
        *reinterpret_cast<uint2*>(out_row(row) + first) =
            make_uint2(pack_pair<T>(x[0], x[1]), pack_pair<T>(x[2], x[3]));
      } else {
        T* const to = out_row(row);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (first + j < args.value_dim) {
            to[(first + j) * args.out.stride_d] = from_compute<T>(x[j]);
          }
        }
      }
    }
  }
};

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
  const Kernel kernel(args, rows, shared);
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
