// Rows of an attention launch: which queries of which heads a block has.
#pragma once

#include <cstdint>

#include "attention_choices.h"
#include "prepare.cuh"

namespace x_rope_cls::cuda {

// Rows are taken apart by (batch, head / group) "units". A unit's rows are its queries, in their
// order, times the `group` heads: row r is head r % group of the query at place r / group. Those
// with a position fill whole tiles, then those without do: no tile is mixed.
struct RowSet {
  TokenOrder order;  // of the queries
  int32_t heads;
  int32_t group;
  int32_t tile_rows;
  int32_t tiles;          // of a unit, enough for any split
  bool ordinary;          // rows with a position are in the set
  int32_t special_above;  // rows without one are where a unit has more of their queries than this
  int32_t special_up_to;  // and not more than this
};

// One tile. The rows' query places are first / group and on.
struct RowTile {
  int32_t b, unit_head;  // heads unit_head * group ... + group - 1
  int32_t first;         // row of the unit
  int32_t rows;          // 0: the tile is not needed
  bool special;
};

__device__ __forceinline__ RowTile find_tile(const RowSet& set, int32_t unit, int32_t tile) {
  RowTile t{};
  const int32_t units = set.heads / set.group;
  t.b = unit / units;
  t.unit_head = unit % units;
  const auto [with, without] = set.order.counts_of(t.b);
  const int32_t ordinary_rows = set.ordinary ? with * set.group : 0;
  const int32_t ordinary_tiles = (ordinary_rows + set.tile_rows - 1) / set.tile_rows;
  t.special = tile >= ordinary_tiles;
  int32_t start = tile * set.tile_rows;
  int32_t end = ordinary_rows;
  if (t.special) {
    const bool wanted = without > set.special_above && without <= set.special_up_to;
    start = with * set.group + (tile - ordinary_tiles) * set.tile_rows;
    end = wanted ? (with + without) * set.group : 0;
  }
  t.first = start;
  t.rows = max(0, min(set.tile_rows, end - start));
  return t;
}

// Query and head of row `row` of the tile.
struct RowPlace {
  int32_t h, n;
};
__device__ __forceinline__ int32_t head_of(const RowSet& set, const RowTile& tile, int32_t row) {
  return tile.unit_head * set.group + (tile.first + row) % set.group;
}
__device__ __forceinline__ RowPlace place_of(const RowSet& set, const RowTile& tile, int32_t row) {
  return {head_of(set, tile, row), set.order.token(tile.b, (tile.first + row) / set.group)};
}

}  // namespace x_rope_cls::cuda
