// Scores of a block of rows with panels of keys, and weights in their place.
#pragma once

#include "attention_forward_rows.h"
#include "half_vectors.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// Keys of the class that column c belongs to, from there on.
X_ROPE_CLS_INLINE int64_t keys_from(const Columns& columns, int64_t c) {
  return (c < columns.special_start ? columns.ordinary : columns.special_start + columns.special) -
         c;
}

// Products of all rows with the panel of keys at column c, given to `finish` in units of log2.
// kPart: it may have fewer keys than columns.
template <bool kPart, typename O, typename F, typename E>
X_ROPE_CLS_INLINE void score_panel(const ForwardPlan<O>& plan, const Columns& columns,
                                   const Panel& panel, int64_t c, const PackedHead<O>& head,
                                   const RowBlock& block, const RowScratch<O>& s, typename O::T* to,
                                   F&& beside, const E& finish) {
  using Q = typename O::Score;
  constexpr int64_t kL = kLanes<typename O::T>;
  const int64_t d = plan.depth;
  // Special rows are packed raw already; ordinary ones meet special keys raw.
  const bool ordinary_keys = c < columns.special_start;
  const bool raw_rows = block.ordinary && !ordinary_keys;
  const bool raw_keys = !block.ordinary && ordinary_keys;
  const Q* query = raw_rows ? s.query_raw : s.query;
  const Q* keys = (raw_keys ? head.raw : head.keys) + panel.packed * d;
  const auto multiply_all = [&](const auto& finish) __attribute__((always_inline)) {
    if constexpr (kPart) {
      if (multiply_half_panel(keys_from(columns, c), block.rows, d, query, plan.key_stride, keys,
                              to, plan.score_stride, beside, finish)) {
        return;
      }
    }
    if (panel.width == 2 * kL) {
      multiply_panel<Q, Left::kByRow, false, 2>(block.rows, d, query, plan.key_stride, keys,
                                                panel.width, to, plan.score_stride, beside, finish);
    } else {
      multiply_panel<Q, Left::kByRow, false, 1>(block.rows, d, query, plan.key_stride, keys,
                                                panel.width, to, plan.score_stride, beside, finish);
    }
  };
  if constexpr (O::kFixed) {
    const auto* rows = raw_rows ? s.raw_steps : s.steps;
    const auto* steps = (raw_keys ? head.raw_steps : head.steps) + panel.packed;
    multiply_all(Scaled<E>{rows, steps, finish});
  } else {
    multiply_all(finish);
  }
}

// Scores of all rows with the keys in columns [first, last).
template <typename O, typename F>
void score_block(const ForwardPlan<O>& plan, const Columns& columns, const PackedHead<O>& head,
                 const RowBlock& block, int64_t first, int64_t last, const RowScratch<O>& s,
                 F&& beside) {
  for (int64_t c = first; c < last;) {
    const Panel panel = panel_at<typename O::T>(columns, c);
    score_panel<true>(plan, columns, panel, c, head, block, s, s.scores + (c - first), beside,
                      Written{});
    c += panel.columns;
  }
}

// The same, with weights in place of scores that are bounded.
template <typename O, typename F>
void weigh_block(const ForwardPlan<O>& plan, const Columns& columns, const PackedHead<O>& head,
                 const RowBlock& block, int64_t first, int64_t last, const RowScratch<O>& s,
                 F&& beside) {
  using T = typename O::T;
  using V = typename O::Value;
  for (int64_t c = first; c < last;) {
    const Panel panel = panel_at<T>(columns, c);
    const int64_t keys = keys_from(columns, c);
    const auto weigh = [&](auto part, const T* keep) {
      constexpr bool kPart = decltype(part)::value;
      if constexpr (kManyRegisters) {
        score_panel<kPart>(plan, columns, panel, c, head, block, s, s.scores, beside,
                           Weighted<V, kPart>{c - first, s.lane_sums, keep});
      } else {
        int64_t weighed = 0;
        const WeightedLater<V, kPart> later{c - first, s.lane_sums, keep, &weighed};
        score_panel<kPart>(plan, columns, panel, c, head, block, s, s.scores, beside, later);
        if (panel.width == kLanes<T>) {
          later.template weigh_up_to<1>(block.rows, s.scores, plan.score_stride);
        } else {
          later.template weigh_up_to<2>(block.rows, s.scores, plan.score_stride);
        }
      }
    };
    if (keys >= panel.width) {
      weigh(std::false_type{}, nullptr);
    } else {
      T keep[2 * kLanes<T>];
      for (int64_t j = 0; j < panel.width; ++j) keep[j] = j < keys ? T{1} : T{0};
      weigh(std::true_type{}, keep);
    }
    c += panel.columns;
  }
}

// Scores with the keys in columns [first, last) of rows in `apart`, whose keys are read where they
// lie. turned: whether the rows are rotated now.
template <typename S, typename O>
void score_apart(const ForwardPlan<O>& plan, const Columns& columns, const Split& split,
                 const RowBlock& block, int64_t first, int64_t last, bool& turned,
                 const RowScratch<O>& s) {
  const AttentionParams& p = *plan.p;
  const int64_t h = block.unit % p.key_heads;
  for_each_run(columns, split, first, last, [&](int64_t at, const int32_t* index, int64_t count) {
    const bool rotated = block.ordinary && index < split.index + split.ordinary;
    if (rotated != turned) pack_apart<S>(plan, block, rotated, s);
    turned = rotated;
    for (int64_t i = 0; i < count; i += kApartKeys) {
      const auto keys =
          read_rows<S>(p, p.k, block.b, h, index + i, min_of(kApartKeys, count - i), p.head_dim,
                       plan.key_width, plan.keys_in_place, rotated, s.keys, s.table);
      dot_rows(s.apart, plan.key_width, block.rows, keys, plan.key_width, 0, s.scores + at + i,
               plan.score_stride);
    }
  });
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
