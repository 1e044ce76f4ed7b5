// Sums of parts of the keys become results.
#pragma once

#include <cstdint>

#include "attention_forward.cuh"

namespace x_rope_cls::cuda {

constexpr int kMergeWarps = 4;

struct MergeArgs {
  RowSet rows;
  PartialSums partial;
  Tensor4 out;
  float* lse;
  int64_t queries, units;
  int32_t value_dim;
};

// One row a warp; lane i has the weight of part i.
template <typename T>
__global__ void __launch_bounds__(kMergeWarps* kWarpSize)
    attention_merge_kernel(const __grid_constant__ MergeArgs args) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t index =
      static_cast<int64_t>(blockIdx.x) * kMergeWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t unit = index / args.partial.slots;
  const int32_t slot = static_cast<int32_t>(index % args.partial.slots);
  if (unit >= args.units) return;
  const RowTile tile = find_tile(args.rows, static_cast<int32_t>(unit), slot / args.rows.tile_rows);
  const int32_t row = slot % args.rows.tile_rows;
  if (row >= tile.rows) return;
  const int32_t parts = args.partial.parts;
  const int64_t first = unit * parts * args.partial.slots + slot;
  const float own =
      lane < parts ? args.partial.lse[first + lane * args.partial.slots] : negative_infinity();
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

  const RowPlace at = place_of(args.rows, tile, row);
  if (lane == 0) {
    args.lse[(static_cast<int64_t>(tile.b) * args.rows.heads + at.h) * args.queries + at.n] =
        sum == 0.0f ? negative_infinity() : (shift + log2f(sum)) * kLn2;
  }
  T* const to = static_cast<T*>(args.out.data) + tile.b * args.out.stride_b +
                at.h * args.out.stride_h + at.n * args.out.stride_n;
  for (int32_t base = 0; base < args.value_dim; base += kWarpSize) {
    const int32_t c = base + lane;
    float x = 0.0f;
    for (int32_t part = 0; part < parts; ++part) {
      const float factor = __shfl_sync(0xffffffffU, weight, part);
      if (c >= args.value_dim) continue;
      const int64_t from = (first + part * args.partial.slots) * args.partial.width + c;
      x = fmaf(args.partial.out[from], factor, x);
    }
    if (c < args.value_dim) to[c * args.out.stride_d] = from_compute<T>(x * inverse);
  }
}

}  // namespace x_rope_cls::cuda
