// Attention forward: the scores of a tile of keys, their weights, and the sums of its values.
#pragma once

#include "attention_forward_block.cuh"

namespace x_rope_cls::cuda {

template <typename T_, int kDim_, bool kWide_, bool kGeneral_>
template <int kColumns>
__device__ __forceinline__ void ForwardKernel<T_, kDim_, kWide_, kGeneral_>::score(
    float (&s)[kRowTiles][kColumns][4], int32_t count) const {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;
    }
  }
  const bool second = kColumns > 2 || count > 8;
  const int at = kShort ? afresh(lane) : lane;
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      load_matrices(a[m], left_address<kDim>(queries, warp_row + 16 * m, step, at));
    }
#pragma unroll
    for (int n = 0; n < kColumns / 2; ++n) {
      uint32_t b[4];
      load_matrices(b, right_address<kDim>(keys, warp_key + 16 * n, step, at));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) multiply_add<T>(s[m][2 * n], a[m], b[0], b[1]);
      if (!second) continue;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) multiply_add<T>(s[m][2 * n + 1], a[m], b[2], b[3]);
    }
  }
}

template <typename T_, int kDim_, bool kWide_, bool kGeneral_>
template <int kColumns>
__device__ __forceinline__ void ForwardKernel<T_, kDim_, kWide_, kGeneral_>::add_biases(
    const int32_t* tokens, int32_t first, int32_t count, float (&s)[kRowTiles][kColumns][4]) const {
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

template <typename T_, int kDim_, bool kWide_, bool kGeneral_>
template <int kColumns>
__device__ __forceinline__ void ForwardKernel<T_, kDim_, kWide_, kGeneral_>::drop(
    const int32_t* tokens, int32_t first, int32_t count, float (&s)[kRowTiles][kColumns][4]) const {
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

template <typename T_, int kDim_, bool kWide_, bool kGeneral_>
template <int kColumns>
__device__ __forceinline__ void ForwardKernel<T_, kDim_, kWide_, kGeneral_>::soften(
    float (&s)[kRowTiles][kColumns][4], State& state) const {
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

template <typename T_, int kDim_, bool kWide_, bool kGeneral_>
template <int kColumns>
__device__ __forceinline__ void ForwardKernel<T_, kDim_, kWide_, kGeneral_>::sum_values(
    const float (&s)[kRowTiles][kColumns][4], State& state) const {
  const int at = kShort ? afresh(lane) : lane;
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
      load_matrices_transposed(b, left_address<kDim>(values, warp_key + 16 * step, n, at));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        multiply_add<T>(state.out[m][2 * n], a[m], b[0], b[1]);
        multiply_add<T>(state.out[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

template <typename T_, int kDim_, bool kWide_, bool kGeneral_>
template <int kColumns>
__device__ __forceinline__ void ForwardKernel<T_, kDim_, kWide_, kGeneral_>::finish_scores(
    const int32_t* tokens, int32_t first, int32_t count, float (&s)[kRowTiles][kColumns][4],
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

}  // namespace x_rope_cls::cuda
