// Sums of parts of the keys become results.
#pragma once

#include <cstdint>

#include "attention_forward.cuh"

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

struct MergeRow {
  int64_t b, h, n;  // n: -1 where the slot has no row
};
__device__ __forceinline__ MergeRow merge_row(const MergeArgs& args, int64_t unit, int32_t slot) {
  const RowTile tile = find_tile(args.rows, unit, slot / args.rows.tile_rows);
  const int32_t row = slot % args.rows.tile_rows;
  if (row >= tile.rows) return {0, 0, -1};
  const RowPlace at = place_of(args.rows, tile, row);
  return {tile.b, at.h, at.n};
}

// Where part `part` of row `row` lies: neither the rows of four parts nor all parts of a row meet
// in a bank.
__device__ __forceinline__ int merge_offset(int part, int row) {
  static_assert(kMergeRows == 8 && kMostParts == 32);
  return part * kMergeRows + (row ^ (part / 4));
}

// kMergeRows neighbouring rows a block: their logsumexps are read and written by neighbouring
// threads, their sums by one warp a row, whose lane i has the weight of part i.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads)
    attention_merge_kernel(const __grid_constant__ MergeArgs args) {
  __shared__ float part_lse[kMostParts * kMergeRows];
  __shared__ float row_lse[kMergeRows];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int32_t parts = args.partial.parts;
  const int32_t slots = args.partial.slots;
  const int64_t blocks = slots / kMergeRows + (slots % kMergeRows != 0);  // of a unit
  const int64_t unit = blockIdx.x / blocks;
  const int32_t first = static_cast<int32_t>(blockIdx.x % blocks) * kMergeRows;
  const int32_t rows = min(kMergeRows, slots - first);
  for (int i = static_cast<int>(threadIdx.x); i < parts * kMergeRows; i += kMergeThreads) {
    const int part = i / kMergeRows;
    const int row = i % kMergeRows;
    // Rows that nobody has written are there, but not used.
    if (row < rows) {
      part_lse[merge_offset(part, row)] =
          args.partial.lse[(unit * parts + part) * slots + first + row];
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x) / kWarpSize; i < rows; i += kMergeWarps) {
    const MergeRow at = merge_row(args, unit, first + i);
    if (at.n < 0) continue;
    const float own = lane < parts ? part_lse[merge_offset(lane, i)] : negative_infinity();
    float largest = own;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffU, largest, step));
    }
    const float shift = largest == negative_infinity() ? 0.0f : largest;
    const float weight = power_of_two(own - shift);
    float sum = weight;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffU, sum, step);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    if (lane == 0) {
      row_lse[i] = sum == 0.0f ? negative_infinity() : (shift + log2f(sum)) * kLn2;
    }
    T* const to = static_cast<T*>(args.out.data) + at.b * args.out.stride_b +
                  at.h * args.out.stride_h + at.n * args.out.stride_n;
    for (int32_t base = 0; base < args.value_dim; base += kWarpSize) {
      const int32_t c = base + lane;
      float x = 0.0f;
      for (int32_t part = 0; part < parts; ++part) {
        const float factor = __shfl_sync(0xffffffffU, weight, part);
        if (c >= args.value_dim) continue;
        const int64_t slot = (unit * parts + part) * slots + first + i;
        x = fmaf(args.partial.out[slot * args.partial.width + c], factor, x);
      }
      if (c < args.value_dim) to[c * args.out.stride_d] = from_compute<T>(x * inverse);
    }
  }
  __syncthreads();
  const int own = static_cast<int>(threadIdx.x);
  if (own >= rows) return;
  const MergeRow at = merge_row(args, unit, first + own);
  if (at.n < 0) return;
  args.lse[(at.b * args.rows.heads + at.h) * args.queries + at.n] = row_lse[own];
}

}  // namespace x_rope_cls::cuda
