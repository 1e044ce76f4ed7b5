// Attention backward on tensor cores: weights and gradients of the scores of a tile of partners,
// and what they add to the owners' sums.
#pragma once

#include "attention_backward_block.cuh"

namespace x_rope_cls::cuda {

template <typename T_, int kDim_, MmaSum kSum_, bool kGeneral_>
template <int kColumns>
__device__ __forceinline__ void BackwardKernel<T_, kDim_, kSum_, kGeneral_>::multiply(
    uint32_t owners, uint32_t partners, int32_t partner_count,
    float (&s)[kRowTiles][kColumns][4]) const {
  const bool both = warp_row + 16 < count;
  const bool right = kColumns > 2 || partner_count > 8;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;
    }
  }
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      load_matrices(a[m], left_address<kDim>(owners, warp_row + 16 * m, step, lane));
    }
#pragma unroll
    for (int n = 0; n < kColumns / 2; ++n) {
      uint32_t x[4];
      load_matrices(x, right_address<kDim>(partners, 16 * n, step, lane));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        if (m > 0 && !both) continue;
        multiply_add<T>(s[m][2 * n], a[m], x[0], x[1]);
        if (right) multiply_add<T>(s[m][2 * n + 1], a[m], x[2], x[3]);
      }
    }
  }
}

template <typename T_, int kDim_, MmaSum kSum_, bool kGeneral_>
template <int kColumns>
__device__ __forceinline__ void BackwardKernel<T_, kDim_, kSum_, kGeneral_>::add_products(
    const float (&s)[kRowTiles][kColumns][4], uint32_t partners,
    float (&sums)[kRowTiles][kDim / 8][4]) const {
  const bool both = warp_row + 16 < count;
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
      uint32_t x[4];
      load_matrices_transposed(x, left_address<kDim>(partners, 16 * step, n, lane));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        if (m > 0 && !both) continue;
        multiply_add<T>(sums[m][2 * n], a[m], x[0], x[1]);
        multiply_add<T>(sums[m][2 * n + 1], a[m], x[2], x[3]);
      }
    }
  }
}

template <typename T_, int kDim_, MmaSum kSum_, bool kGeneral_>
template <int kColumns>
__device__ __forceinline__ void BackwardKernel<T_, kDim_, kSum_, kGeneral_>::add_biases(
    int32_t at, int32_t rows, float (&s)[kRowTiles][kColumns][4]) const {
  const ScoreBias& bias = args.common.bias;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] *= args.scale_log2;
    }
  }
  if (bias.data == nullptr) return;
  with_bias(bias, [&](const auto* data) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t owner = owner_token(m, half);
        if (owner < 0) continue;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            // Columns that are kept cost spills on sm_100; with 256 channels it is the other way.
            const int mine = kDim <= 128 ? afresh(lane) : lane;
            const int column = 8 * n + 2 * (mine % 4) + c;
            if (column >= rows) continue;
            const int32_t partner = partner_token(at + column);
            const int32_t query = kOwnsQueries ? owner : partner;
            const int32_t key = kOwnsQueries ? partner : owner;
            add_bias(s[m][n][2 * half + c], data[bias.row(b, h, query) + key * bias.stride_m]);
          }
        }
      }
    }
  });
}

template <typename T_, int kDim_, MmaSum kSum_, bool kGeneral_>
template <int kColumns>
__device__ __forceinline__ void BackwardKernel<T_, kDim_, kSum_, kGeneral_>::drop(
    int32_t at, int32_t rows, float (&s)[kRowTiles][kColumns][4]) const {
  // Read each time: registers are short.
  const auto seed = static_cast<uint64_t>(*args.common.dropout.seed);
  const Dropout dropout{seed, args.common.dropout.threshold, 1.0f};
  const int64_t head = static_cast<int64_t>(b) * args.common.heads + h;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t owner = owner_token(m, half);
      if (owner < 0) continue;
      uint32_t dropped = 0;
#pragma unroll 1
      for (int i = 0; i < 2 * kColumns; ++i) {
        const int column = 8 * (i / 2) + 2 * (lane % 4) + i % 2;
        if (column >= rows) break;
        const int32_t partner = partner_token(at + column);
        const bool drops = dropout_factor(dropout, head, kOwnsQueries ? owner : partner,
                                          kOwnsQueries ? partner : owner) == 0.0f;
        dropped |= static_cast<uint32_t>(drops) << i;
      }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s[m][n][2 * half + c];
          x = __uint_as_float(__float_as_uint(x) | (dropped >> (2 * n + c) & 1) << 31);
        }
      }
    }
  }
}

template <typename T_, int kDim_, MmaSum kSum_, bool kGeneral_>
__device__ __forceinline__ void BackwardKernel<T_, kDim_, kSum_, kGeneral_>::load_stats(
    uint32_t stage, int n, float (&shifts)[2], float (&deltas)[2]) const {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(shifts[0]), "=f"(deltas[0]), "=f"(shifts[1]), "=f"(deltas[1])
               : "r"(stage + 2 * kPartners * kDim * 2 + (8 * n + 2 * (lane % 4)) * 8)
               : "memory");
}

template <typename T_, int kDim_, MmaSum kSum_, bool kGeneral_>
template <int kColumns>
__device__ __forceinline__ void BackwardKernel<T_, kDim_, kSum_, kGeneral_>::soften(
    const Owners& owners, uint32_t stage, int32_t at, int32_t rows,
    float (&s)[kRowTiles][kColumns][4]) const {
  if constexpr (kGeneral) add_biases(at, rows, s);
  const float scale = kGeneral ? 1.0f : args.scale_log2;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    float shifts[2];
    float deltas[2];
    if constexpr (!kOwnsQueries) load_stats(stage, n, shifts, deltas);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float shift = kOwnsQueries ? owners.shift[m][i / 2] : shifts[i % 2];
        s[m][n][i] = power_of_two(fmaf(s[m][n][i], scale, -shift));
        // Zeros in place of absent keys have no logsumexp that bounds their weights.
        if (kOwnsQueries && 8 * n + 2 * (lane % 4) + i % 2 >= rows) s[m][n][i] = 0.0f;
      }
    }
  }
  if constexpr (kGeneral) {
    if (args.common.dropout.seed != nullptr) drop(at, rows, s);
  }
}

template <typename T_, int kDim_, MmaSum kSum_, bool kGeneral_>
template <int kColumns>
__device__ __forceinline__ void BackwardKernel<T_, kDim_, kSum_, kGeneral_>::differentiate(
    const Owners& owners, uint32_t stage, float (&s)[kRowTiles][kColumns][4],
    float (&grads)[kRowTiles][kColumns][4]) const {
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    float shifts[2];
    float deltas[2];
    if constexpr (!kOwnsQueries) load_stats(stage, n, shifts, deltas);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float delta = kOwnsQueries ? owners.delta[m][i / 2] : deltas[i % 2];
        float grad = grads[m][n][i];
        float& weight = s[m][n][i];
        if constexpr (kGeneral) {
          const bool keeps = !signbit(weight);
          grad = keeps ? grad * args.common.dropout.kept : 0.0f;
          grads[m][n][i] = fabsf(weight) * (grad - delta);
          weight = keeps ? weight : 0.0f;
        } else {
          grads[m][n][i] = weight * (grad - delta);
        }
      }
    }
  }
}

template <typename T_, int kDim_, MmaSum kSum_, bool kGeneral_>
template <int kColumns>
__device__ __forceinline__ void BackwardKernel<T_, kDim_, kSum_, kGeneral_>::keep(
    float (&s)[kRowTiles][kColumns][4]) const {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] = signbit(s[m][n][i]) ? 0.0f : s[m][n][i];
    }
  }
}

template <typename T_, int kDim_, MmaSum kSum_, bool kGeneral_>
template <int kTile>
__device__ __forceinline__ void BackwardKernel<T_, kDim_, kSum_, kGeneral_>::meet(
    const Owners& owners, uint32_t stage, int32_t at, int32_t rows, Sums& sums) const {
  constexpr int kColumns = kTile / 8;
  const uint32_t partners = stage;
  const uint32_t second = stage + kPartners * kDim * 2;
  float s[kRowTiles][kColumns][4];
  [[maybe_unused]] float grads[kRowTiles][kColumns][4];
  multiply(own_first, partners, rows, s);
  soften(owners, stage, at, rows, s);
  if constexpr (kFirst) {
    multiply(own_second, second, rows, grads);
    differentiate(owners, stage, s, grads);
  } else if constexpr (kGeneral) {
    keep(s);
  }
  if constexpr (kSecond) add_products(s, second, sums.second);
  if constexpr (kFirst) add_products(grads, partners, sums.first);
}

}  // namespace x_rope_cls::cuda
