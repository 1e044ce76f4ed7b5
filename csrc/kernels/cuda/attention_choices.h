// Launch choices of the attention kernels: pure functions of shapes, free of CUDA.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace x_rope_cls::cuda {

constexpr int32_t kWarpSize = 32;
constexpr int32_t kMostParts = 32;      // of the keys; a warp merges them, one a lane
constexpr int32_t kFewRows = 16;        // of a narrow tile: one mma tile
constexpr int32_t kMostFewRows = 64;    // rows of a key head that go through narrow tiles
constexpr int32_t kLeastPartTiles = 2;  // pieces of keys that are worth a block and a merge

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up_to(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Channels of the half-precision instances; the wider of head_dim and value_dim is padded to one of
// them. 0: there is none, the kernel on the FMA units takes it.
constexpr int32_t native_dim(int64_t head_dim, int64_t value_dim) {
  const int64_t wider = head_dim > value_dim ? head_dim : value_dim;
  for (const int32_t dim : {32, 64, 96, 128, 256}) {
    if (wider <= dim) return dim;
  }
  return 0;
}

// A block of the forward kernel. Wide: its warps share the keys and each has rows of its own.
// Narrow: all warps have the same 16 rows and each a quarter of a tile's keys.
struct ForwardShape {
  int32_t warps;
  int32_t row_tiles;     // mma tiles of 16 rows a warp
  int32_t rows;          // of a block
  int32_t keys;          // of a tile
  int32_t special_keys;  // of a tile of keys without a position, which are few
  int32_t warp_keys;     // of a tile, that one warp takes
};

// Wide: two row tiles a warp, so that every fragment of keys and values that comes from shared
// memory feeds two products; 32 rows * 256 channels of sums would not fit the registers, so there
// 8 warps have one row tile each, and tiles of 32 keys let a block fit the 99 KB of sm_86 and
// sm_89. Eight warps a multiprocessor, as FlashAttention-2 has, or more.
// 128 channels leave no registers for the scores of 64 keys, nor do 96 with biases or dropout, with
// which 128 leave none for two row tiles either.
constexpr ForwardShape forward_shape(int32_t dim, bool wide, bool general) {
  if (!wide) return {4, 1, kFewRows, 64, 64, 16};
  if (dim == 96 && general) return {4, 2, 128, 32, 16, 32};
  if (dim == 128 && general) return {8, 1, 128, 64, 16, 64};
  if (dim == 128) return {4, 2, 128, 32, 16, 32};
  return dim <= 128 ? ForwardShape{4, 2, 128, 64, 16, 64} : ForwardShape{8, 1, 128, 32, 16, 32};
}

// Row stride in floats of the sums that the warps of a narrow block merge: rows start 32 bytes
// apart in the banks, so that 8-byte stores of 8 rows do not conflict.
constexpr int32_t kMergePadding = 8;

// Queries, one tile of keys and one of values; the merge of a narrow block reuses the latter two.
constexpr int32_t forward_tile_bytes(int32_t dim, bool wide, bool general) {
  const ForwardShape s = forward_shape(dim, wide, general);
  const int32_t queries = s.rows * dim * 2;
  const int32_t tiles = 2 * s.keys * dim * 2;
  const int32_t merge = wide ? 0 : s.warps * s.rows * (dim + kMergePadding + 2) * 4;
  return queries + (tiles > merge ? tiles : merge);
}
// And the token of each row, behind what else the block has to remember.
constexpr int32_t kForwardNotes = 32;
constexpr int32_t forward_shared_bytes(int32_t dim, bool wide, bool general) {
  return forward_tile_bytes(dim, wide, general) + kForwardNotes +
         forward_shape(dim, wide, general).rows * 4;
}

// Whether all rows of a key head go through narrow tiles: for few queries a wide tile would be
// mostly empty, and the heads of a group can share what is loaded of their keys.
constexpr bool rows_are_few(int64_t queries, int64_t group) {
  return queries * group <= kMostFewRows;
}

// Pieces in which the keys are counted for that: tiles, joined where registers make them small.
constexpr int64_t key_pieces(int64_t keys, const ForwardShape& shape, int32_t dim) {
  const int32_t least = dim <= 128 ? 64 : 32;
  return ceil_div(keys, shape.keys > least ? shape.keys : least);
}

// Parts into which the keys are cut, so that `blocks` of them give every multiprocessor about two.
constexpr int32_t key_parts(int64_t blocks, int64_t pieces, int32_t multiprocessors) {
  const int64_t wanted =
      ceil_div(2 * static_cast<int64_t>(multiprocessors), blocks < 1 ? 1 : blocks);
  const int64_t most = pieces / kLeastPartTiles;
  int64_t parts = wanted < most ? wanted : most;

  if (blocks >= multiprocessors) parts = 1;  // a merge costs more than a part of a wave
  parts = parts < kMostParts ? parts : kMostParts;
  return static_cast<int32_t>(parts < 1 ? 1 : parts);
}

}  // namespace x_rope_cls::cuda
