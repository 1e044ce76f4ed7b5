// How attention forward packs keys, values and rows of queries.
#pragma once

#include "attention_forward.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// -------------------------------------------------------------------------------------------------
// Keys and values.

// One panel of keys, `width` columns from `column`: `count` of them are keys, the rest padding.
template <typename S, typename O>
void pack_key_panel(const ForwardPlan<O>& plan, int64_t b, int64_t h, const int32_t* index,
                    int64_t count, int64_t width, bool ordinary, bool rotated,
                    const RowScratch<O>& scratch, typename O::Score* to, typename O::T* steps,
                    Reach<typename O::Score>& reach) {
  using T = typename O::T;
  using Q = typename O::Score;
  const AttentionParams& p = *plan.p;
  for (int64_t i = 0; i < width; ++i) {
    T* row = scratch.rows + i * plan.key_width;
    if (i < count) {
      const bool turned = rotated && ordinary && turns(p, p.table_k, b, index[i]);
      pack_row<S>(p, p.k, p.table_k, b, h, index[i], p.head_dim, plan.key_width, turned, T{1}, row,
                  scratch.table);
    } else {
      for (int64_t d = 0; d < plan.key_width; ++d) row[d] = T{0};
    }
    if constexpr (O::kFixed) {
      reach.add_square(fix_row(row, plan.key_width, reinterpret_cast<Q*>(row), steps[i]));
    } else {
      OperandTraits<Q>::round_row(row, plan.key_width);
    }
  }
  transpose_panel(scratch.rows, plan.key_width, width, plan.depth, reinterpret_cast<T*>(to));
  if constexpr (!O::kFixed) reach.add_panel(to, width, plan.depth);
}

// Values of columns [first, last); padding columns become zero rows.
template <typename S, typename O>
void pack_values(const ForwardPlan<O>& plan, const Columns& columns, const Split& split, int64_t b,
                 int64_t h, int64_t first, int64_t last, const RowScratch<O>& scratch,
                 typename O::Value* values) {
  using T = typename O::T;
  using V = typename O::Value;
  using Ops = OperandTraits<V>;
  constexpr int64_t kWide = 2 * kLanes<T>;
  constexpr int64_t kRows = kTogether<V>;
  const AttentionParams& p = *plan.p;
  // Elements next to each other are operands where the storage type is what products multiply.
  constexpr bool kSame = sizeof(S) * kRows == sizeof(V);
  const bool are_operands = kSame && p.v.stride_d == 1 && p.value_dim % kLanes<T> == 0;
  const V* rows[kRows];
  for (int64_t c = first; c < last; c += kRows) {
    for (int64_t r = 0; r < kRows; ++r) {
      T* row = scratch.rows + r * plan.value_width;
      const int64_t n = token_at(columns, split, c + r);
      if (n >= 0 && are_operands) {
        rows[r] = reinterpret_cast<const V*>(row_at<const S>(p.v, b, h, n));
        continue;
      }
      if (n >= 0) {
        pack_row<S>(p, p.v, p.table_k, b, h, n, p.value_dim, plan.value_width, false, T{1}, row,
                    scratch.table);
      } else {
        for (int64_t d = 0; d < plan.value_width; ++d) row[d] = T{0};
      }
      rows[r] = Ops::round_row(row, plan.value_width);
    }
    for (int64_t d = 0; d < plan.value_width; d += kLanes<T>) {
      V* panel = values + (d / kWide * columns.total + c) / kRows * kWide;
      Ops::store_vector(panel + d % kWide,
                        Ops::stacked(rows[0] + d / kRows, rows[kRows - 1] + d / kRows));
    }
  }
}

// A few rows without a position score keys where they lie; for more of them raw panels are packed.
template <typename O>
bool few_apart(const ForwardPlan<O>& plan, int64_t b) {
  return plan.queries.of(b).special * plan.group <= kFewApart;
}

// Panels that start in columns [first, last) of the head. Returns how far these keys reach.
template <typename S, typename O>
Compute<S> pack_keys(const ForwardPlan<O>& plan, const PackedHead<O>& head, int64_t unit,
                     int64_t first, int64_t last, const RowScratch<O>& scratch) {
  using T = typename O::T;
  const AttentionParams& p = *plan.p;
  const int64_t b = unit / p.key_heads;
  const int64_t h = unit % p.key_heads;
  const Split split = plan.keys.of(b);
  const Columns columns = close_columns_of<T>(split);
  const bool raw_too = head.raw != nullptr && !few_apart(plan, b);
  Reach<typename O::Score> reach;
  for (int64_t c = 0; c < min_of(last, columns.total);) {
    const Panel panel = panel_at<T>(columns, c);
    if (c >= first) {
      const bool ordinary = c < columns.special_start;
      const int64_t key = ordinary ? c : columns.ordinary + (c - columns.special_start);
      const int64_t end = ordinary ? columns.ordinary : columns.ordinary + columns.special;
      const int64_t count = min_of(panel.width, end - key);
      const int32_t* index = split.index + key;
      const int64_t at = panel.packed * plan.depth;
      pack_key_panel<S>(plan, b, h, index, count, panel.width, ordinary, true, scratch,
                        head.keys + at, head.steps + panel.packed, reach);
      if (raw_too && ordinary) {
        pack_key_panel<S>(plan, b, h, index, count, panel.width, ordinary, false, scratch,
                          head.raw + at, head.raw_steps + panel.packed, reach);
      }
    }
    c += panel.columns;
  }
  return reach.value();
}

// These panels and the values of these columns.
template <typename S, typename O>
Compute<S> pack_head(const ForwardPlan<O>& plan, const PackedHead<O>& head, int64_t unit,
                     int64_t first, int64_t last, const RowScratch<O>& scratch) {
  const AttentionParams& p = *plan.p;
  const int64_t b = unit / p.key_heads;
  const Split split = plan.keys.of(b);
  const Columns columns = close_columns_of<typename O::T>(split);
  const Compute<S> reach = pack_keys<S>(plan, head, unit, first, last, scratch);
  pack_values<S>(plan, columns, split, b, unit % p.key_heads, first, min_of(last, columns.total),
                 scratch, head.values);
  return reach;
}

// -------------------------------------------------------------------------------------------------
// Rows.

// A block of query rows of one class.
struct RowBlock {
  int64_t b, h, unit;
  const int32_t* index;  // of its rows
  int64_t rows;
  bool ordinary;
};

// A row becomes operands, those of row r of the block in `to`. `row`: packed_in(to, a buffer).
template <typename O>
X_ROPE_CLS_INLINE void finish_row(const ForwardPlan<O>& plan, typename O::T* row, int64_t r,
                                  typename O::Score* to, typename O::T* steps,
                                  Reach<typename O::Score>& reach) {
  if constexpr (O::kFixed) {
    reach.add_square(fix_row(row, plan.key_width, to, steps[r]));
  } else {
    round_into(row, plan.key_width, to);
    reach.add_row_by_lanes(to, plan.key_stride);
  }
}

// The rows of a block; raw_too: of ordinary ones both ways. Returns how far they reach, or more.
template <typename S, typename O>
Compute<S> pack_queries(const ForwardPlan<O>& plan, const RowBlock& block, bool raw_too,
                        const RowScratch<O>& s) {
  using T = typename O::T;
  using Q = typename O::Score;
  const AttentionParams& p = *plan.p;
  const T scale = static_cast<T>(p.scale * kLog2E);
  Reach<Q> reach;
  for (int64_t r = 0; r < block.rows; ++r) {
    Q* const query = s.query + r * plan.key_stride;
    Q* const query_raw = raw_too ? s.query_raw + r * plan.key_stride : nullptr;
    T* const row = packed_in<Q>(query, s.rows);
    T* const raw = packed_in<Q>(query_raw, s.rows + plan.key_width);
    const int64_t n = block.index[r];
    const bool turned = block.ordinary && turns(p, p.table_q, block.b, n);
    pack_row<S>(p, p.q, p.table_q, block.b, block.h, n, p.head_dim, plan.key_width,
                turned && !raw_too, scale, row, s.table);
    if (raw_too) {
      for (int64_t d = 0; d < plan.key_width; ++d) raw[d] = row[d];
      if (turned) {
        rotate_row(raw, row, table_row<T>(p.table_q, block.b, block.h, n, p.pairs, s.table),
                   p.pairs, p.interleaved, false);
      }
      finish_row(plan, raw, r, query_raw, s.raw_steps, reach);
    }
    finish_row(plan, row, r, query, s.steps, reach);
  }
  return reach.value();
}

// How far packed rows reach.
template <typename O>
typename O::T reach_of_rows(const ForwardPlan<O>& plan, const RowBlock& block, bool raw_too,
                            const RowScratch<O>& s) {
  Reach<typename O::Score> reach;
  for (int64_t r = 0; r < block.rows; ++r) {
    reach.add_row(s.query + r * plan.key_stride, plan.key_stride);
    if (raw_too) reach.add_row(s.query_raw + r * plan.key_stride, plan.key_stride);
  }
  return reach.value();
}

// The rows of a block in `apart`, rotated if they have a position and this is wanted.
template <typename S, typename O>
void pack_apart(const ForwardPlan<O>& plan, const RowBlock& block, bool rotated,
                const RowScratch<O>& s) {
  using T = typename O::T;
  const AttentionParams& p = *plan.p;
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t n = block.index[r];
    pack_row<S>(p, p.q, p.table_q, block.b, block.h, n, p.head_dim, plan.key_width,
                rotated && turns(p, p.table_q, block.b, n), static_cast<T>(p.scale * kLog2E),
                s.apart + r * plan.key_width, s.table);
  }
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
