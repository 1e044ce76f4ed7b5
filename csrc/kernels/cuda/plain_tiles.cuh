// Products of tiles on the FMA units, for the attention kernels that take any dtype and size.
//
// 256 threads make a tile of 64 owners by 64 partners: thread (y, x) of 16 by 16 has owners
// 4 y ... 4 y + 3 and partners (or channels) 4 x ... 4 x + 3.
#pragma once

#include <cstdint>

#include "numeric.cuh"
#include "rotate.cuh"

namespace x_rope_cls::cuda {

constexpr int kPlainTile = 64;
constexpr int kPlainThreads = 256;

// Rows first ... first + count - 1 of one head.
template <typename T>
struct PlainRowsAt {
  const T* data;
  int64_t stride_n, stride_d;
  const int32_t* tokens;  // null: the place is the row
  int32_t first, count, channels;
  bool whole;
};

template <typename T>
struct PlainTileOf {
  using C = Compute<T>;
  static constexpr int kStep = sizeof(C) == 8 ? 8 : 16;  // channels, or partners, at a time
  static constexpr int kVector = kStep / 4;              // that a thread loads

  struct Shared {
    alignas(16) C left[kStep * kPlainTile];
    alignas(16) C right[kStep * kPlainTile];
    alignas(16) C weights[kPlainTile * kPlainTile];
  };

  // Place of owner group `row` of partner `p` in `weights`: rows of 64, pieces of 4 permuted so
  // that the threads of a quarter warp, whose partners are 4 apart, store to different banks.
  static __device__ __forceinline__ int weight_at(int p, int owner) {
    return p * kPlainTile + (owner ^ (4 * ((p >> 2) & 7)));
  }

  // kVector channels of a row, zeros where there are none.
  static __device__ __forceinline__ void load(const PlainRowsAt<T>& rows, int32_t row, int32_t c,
                                              C (&x)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = C{0};
    if (row >= rows.count || c >= rows.channels) return;
    const int32_t place = rows.first + row;
    const int64_t n = rows.tokens == nullptr ? place : rows.tokens[place];
    const T* const from = rows.data + n * rows.stride_n;
    if (rows.whole) {
      struct alignas(kVector * sizeof(T)) Vector {
        T values[kVector];
      };
      const Vector v = *reinterpret_cast<const Vector*>(from + c);
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[i] = to_compute(v.values[i]);
      return;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (c + i < rows.channels) x[i] = to_compute(from[(c + i) * rows.stride_d]);
    }
  }

  // Channels c ... c + kStep - 1 of 64 rows to to[channel][row], rows permuted per group of
  // channels so that neither the stores nor the reads of four rows conflict.
  static __device__ __forceinline__ int across_shift(int channel) {
    return channel / kVector * (32 / static_cast<int>(sizeof(C)));
  }
  static __device__ __forceinline__ void load_across(const PlainRowsAt<T>& rows, int32_t c, C* to) {
    const int row = static_cast<int>(threadIdx.x) / 4;
    const int part = static_cast<int>(threadIdx.x) % 4 * kVector;
    C x[kVector];
    load(rows, row, c + part, x);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      to[(part + i) * kPlainTile + (row ^ across_shift(part))] = x[i];
    }
  }

  static __device__ __forceinline__ void read_four(const C* from, C (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = from[i];
  }

  // sums[owner][partner] = inner products over the channels.
  static __device__ __forceinline__ void scores(const PlainRowsAt<T>& owners,
                                                const PlainRowsAt<T>& partners, Shared& shared,
                                                C (&sums)[4][4]) {
    const int y = static_cast<int>(threadIdx.x) / 16;
    const int x = static_cast<int>(threadIdx.x) % 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] = C{0};
    }
    for (int32_t c = 0; c < owners.channels; c += kStep) {
      __syncthreads();  // what was there has been used
      load_across(owners, c, shared.left);
      load_across(partners, c, shared.right);
      __syncthreads();
#pragma unroll
      for (int step = 0; step < kStep; ++step) {
        C a[4];
        C b[4];
        read_four(shared.left + step * kPlainTile + (4 * y ^ across_shift(step)), a);
        read_four(shared.right + step * kPlainTile + (4 * x ^ across_shift(step)), b);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[i][j] += a[i] * b[j];
        }
      }
    }
  }

  static __device__ __forceinline__ void store_weights(const C (&w)[4][4], Shared& shared) {
    const int y = static_cast<int>(threadIdx.x) / 16;
    const int x = static_cast<int>(threadIdx.x) % 16;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) shared.weights[weight_at(4 * x + j, 4 * y) + i] = w[i][j];
    }
  }

  // sums[owner][channel] += weights (as stored) times 64 channels of the partners from `channel`.
  static __device__ __forceinline__ void add_products(const PlainRowsAt<T>& partners,
                                                      int32_t channel, Shared& shared,
                                                      C (&sums)[4][4]) {
    constexpr int kParts = kPlainTile / kVector;  // of a row
    const int y = static_cast<int>(threadIdx.x) / 16;
    const int x = static_cast<int>(threadIdx.x) % 16;
    for (int32_t first = 0; first < partners.count; first += kStep) {
      __syncthreads();
      const int row = static_cast<int>(threadIdx.x) / kParts;
      const int part = static_cast<int>(threadIdx.x) % kParts * kVector;
      C loaded[kVector];
      load(partners, first + row, channel + part, loaded);
#pragma unroll
      for (int i = 0; i < kVector; ++i) shared.left[row * kPlainTile + part + i] = loaded[i];
      __syncthreads();
#pragma unroll
      for (int step = 0; step < kStep; ++step) {
        C a[4];
        C b[4];
        read_four(shared.weights + weight_at(first + step, 4 * y), a);
        read_four(shared.left + step * kPlainTile + 4 * x, b);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[i][j] += a[i] * b[j];
        }
      }
    }
  }
};

}  // namespace x_rope_cls::cuda
