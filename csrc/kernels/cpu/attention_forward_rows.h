// How attention forward packs keys, values and rows of queries.
#pragma once

#include "attention_forward.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// -------------------------------------------------------------------------------------------------
// Keys and values.

// One panel of keys, `width` columns from `column`: `count` of them are keys, the rest padding.
template <typename S>
void pack_key_panel(const ForwardPlan<Operand<S>>& plan, int64_t b, int64_t h, const int32_t* index,
                    int64_t count, int64_t width, bool ordinary, bool rotated,
                    const RowScratch<Operand<S>>& scratch, Operand<S>* to,
                    Reach<Operand<S>>& reach) {
  using T = Compute<S>;
  using Ops = OperandTraits<Operand<S>>;
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
    Ops::round_row(row, plan.key_width);
  }
  transpose_panel(scratch.rows, plan.key_width, width, plan.depth, reinterpret_cast<T*>(to));
  reach.add_panel(to, width, plan.depth);
}

// Values of columns [first, last); padding columns become zero rows.
template <typename S>
void pack_values(const ForwardPlan<Operand<S>>& plan, const Columns& columns, const Split& split,
                 int64_t b, int64_t h, int64_t first, int64_t last,
                 const RowScratch<Operand<S>>& scratch, Operand<S>* values) {
  using T = Compute<S>;
  using Ops = OperandTraits<Operand<S>>;
  constexpr int64_t kWide = 2 * kLanes<T>;
  constexpr int64_t kRows = kTogether<Operand<S>>;
  const AttentionParams& p = *plan.p;
  // Elements next to each other are operands where the storage type is what products multiply.
  constexpr bool kSame = sizeof(S) * kRows == sizeof(Operand<S>);
  const bool are_operands = kSame && p.v.stride_d == 1 && p.value_dim % kLanes<T> == 0;
  const Operand<S>* rows[kRows];
  for (int64_t c = first; c < last; c += kRows) {
    for (int64_t r = 0; r < kRows; ++r) {
      T* row = scratch.rows + r * plan.value_width;
      const int64_t n = token_at(columns, split, c + r);
      if (n >= 0 && are_operands) {
        rows[r] = reinterpret_cast<const Operand<S>*>(row_at<const S>(p.v, b, h, n));
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
      Operand<S>* panel = values + (d / kWide * columns.total + c) / kRows * kWide;
      Ops::store_vector(panel + d % kWide,
                        Ops::stacked(rows[0] + d / kRows, rows[kRows - 1] + d / kRows));
    }
  }
}

// A few rows without a position score keys where they lie; for more of them raw panels are packed.
template <typename U>
bool few_apart(const ForwardPlan<U>& plan, int64_t b) {
  return plan.queries.of(b).special * plan.group <= kFewApart;
}

// Panels that start in columns [first, last) of the head, and the values of these columns. Returns
// how far these keys reach.
template <typename S>
Compute<S> pack_head(const ForwardPlan<Operand<S>>& plan, const PackedHead<Operand<S>>& head,
                     int64_t unit, int64_t first, int64_t last,
                     const RowScratch<Operand<S>>& scratch) {
  using T = Compute<S>;
  const AttentionParams& p = *plan.p;
  const int64_t b = unit / p.key_heads;
  const int64_t h = unit % p.key_heads;
  const Split split = plan.keys.of(b);
  const Columns columns = close_columns_of<T>(split);
  const bool raw_too = head.raw != nullptr && !few_apart(plan, b);
  Reach<Operand<S>> reach;
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
                        head.keys + at, reach);
      if (raw_too && ordinary) {
        pack_key_panel<S>(plan, b, h, index, count, panel.width, ordinary, false, scratch,
                          head.raw + at, reach);
      }
    }
    c += panel.columns;
  }
  pack_values<S>(plan, columns, split, b, h, first, min_of(last, columns.total), scratch,
                 head.values);
  return reach.value();
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

// The rows of a block; raw_too: of ordinary ones both ways. Returns how far they reach.
template <typename S>
Compute<S> pack_queries(const ForwardPlan<Operand<S>>& plan, const RowBlock& block, bool raw_too,
                        const RowScratch<Operand<S>>& s) {
  using T = Compute<S>;
  using U = Operand<S>;
  const AttentionParams& p = *plan.p;
  const T scale = static_cast<T>(p.scale * kLog2E);
  Reach<U> reach;
  for (int64_t r = 0; r < block.rows; ++r) {
    U* const query = s.query + r * plan.key_stride;
    U* const query_raw = raw_too ? s.query_raw + r * plan.key_stride : nullptr;
    T* const row = packed_in<U>(query, s.rows);
    T* const raw = packed_in<U>(query_raw, s.rows + plan.key_width);
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
      round_into(raw, plan.key_width, query_raw);
      reach.add_row(query_raw, plan.key_stride);
    }
    round_into(row, plan.key_width, query);
    reach.add_row(query, plan.key_stride);
  }
  return reach.value();
}

// A few rows without a position, packed in `apart`.
template <typename S>
void pack_apart(const ForwardPlan<Operand<S>>& plan, const RowBlock& block,
                const RowScratch<Operand<S>>& s) {
  using T = Compute<S>;
  const AttentionParams& p = *plan.p;
  for (int64_t r = 0; r < block.rows; ++r) {
    pack_row<S>(p, p.q, p.table_q, block.b, block.h, block.index[r], p.head_dim, plan.key_width,
                false, static_cast<T>(p.scale * kLog2E), s.apart + r * plan.key_width, s.table);
  }
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
