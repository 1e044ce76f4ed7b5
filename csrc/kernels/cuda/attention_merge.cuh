// Sums of parts of the keys become results.
#pragma once

#include <cstdint>

#include "attention_forward_block.cuh"

namespace x_rope_cls::cuda {

constexpr int kMergeWarps = 4;
constexpr int kMergeThreads = kMergeWarps * kWarpSize;
// Of a block: 32 bytes of neighbouring numbers, the least that memory moves.
constexpr int32_t kMergeRows = 8;

struct MergeArgs {
  RowSet rows;
  PartialSums partial;
  Tensor4 out;
  float* lse;
  int64_t queries, units;
  int32_t value_dim;
};

// Of a slot; n: -1 where it has no row.
__device__ __forceinline__ RowPlace merge_row(const MergeArgs& args, int64_t unit, int32_t slot) {
  const RowTile tile = find_tile(args.rows, unit, slot / args.rows.tile_rows);
  const int32_t row = slot % args.rows.tile_rows;
  return row < tile.rows ? place_of(args.rows, tile, row) : RowPlace{0, -1};
}

// Where part `part` of row `row` lies: neither the rows of four parts nor all parts of a row meet
// in a bank.
__device__ __forceinline__ int merge_offset(int part, int row) {
  static_assert(kMergeRows == 8 && kMostParts == 32);
  return part * kMergeRows + (row ^ (part / 4));
}

// kMergeRows neighbouring rows a block: their tokens are looked up and their logsumexps read and
// written by neighbouring threads, their sums by one warp a row, whose lane i has the weight of
// part i.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads)
    attention_merge_kernel(const __grid_constant__ MergeArgs args) {
  __shared__ float part_lse[kMostParts * kMergeRows];
  __shared__ float row_lse[kMergeRows];
  __shared__ RowPlace places[kMergeRows];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int32_t parts = args.partial.parts;
  const int32_t slots = args.partial.slots;
  const int32_t blocks = slots / kMergeRows + (slots % kMergeRows != 0);  // of a unit
  const auto block = static_cast<int32_t>(blockIdx.x);
  const int32_t unit = block / blocks;
  const int32_t first = block % blocks * kMergeRows;
  const int32_t rows = min(kMergeRows, slots - first);
  const int32_t b = unit / (args.rows.heads / args.rows.group);
  const int own = static_cast<int>(threadIdx.x);
  if (own < rows) places[own] = merge_row(args, unit, first + own);
  for (int i = static_cast<int>(threadIdx.x); i < parts * kMergeRows; i += kMergeThreads) {
    const int part = i / kMergeRows;
    const int row = i % kMergeRows;
    // Rows that nobody has written are there, but not used.
    if (row < rows) {
      part_lse[merge_offset(part, row)] =
          args.partial.lse[(static_cast<int64_t>(unit) * parts + part) * slots + first + row];
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x) / kWarpSize; i < rows; i += kMergeWarps) {
    const RowPlace at = places[i];
    if (at.n < 0) continue;
    const float lse = lane < parts ? part_lse[merge_offset(lane, i)] : negative_infinity();
    float largest = lse;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffU, largest, step));
    }
    const float shift = largest == negative_infinity() ? 0.0f : largest;
    const float weight = power_of_two(lse - shift);
    float sum = weight;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffU, sum, step);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    if (lane == 0) {
      row_lse[i] = sum == 0.0f ? negative_infinity() : (shift + log2f(sum)) * kLn2;
    }
    T* const to = static_cast<T*>(args.out.data) + b * args.out.stride_b +
                  at.h * args.out.stride_h + at.n * args.out.stride_n;
    const float* const sums =
        args.partial.out +
        (static_cast<int64_t>(unit) * parts * slots + first + i) * args.partial.width;
    const int64_t pitch = static_cast<int64_t>(slots) * args.partial.width;  // of parts
    for (int32_t base = 0; base < args.value_dim; base += kWarpSize) {
      const int32_t c = base + lane;
      float x = 0.0f;
      const float* from = sums + c;
#pragma unroll 2
      for (int32_t part = 0; part < parts; ++part, from += pitch) {
        const float factor = __shfl_sync(0xffffffffU, weight, part);
        if (c < args.value_dim) x = fmaf(*from, factor, x);
      }
      if (c < args.value_dim) to[c * args.out.stride_d] = from_compute<T>(x * inverse);
    }
  }
  __syncthreads();
  if (own >= rows || places[own].n < 0) return;
  args.lse[(static_cast<int64_t>(b) * args.rows.heads + places[own].h) * args.queries +
           places[own].n] = row_lse[own];
}

}  // namespace x_rope_cls::cuda
