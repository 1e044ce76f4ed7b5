// The plan and memory of one attention forward call.
#pragma once

#include "../attention.h"
#include "attention_common.h"
#include "bounded.h"
#include "fixed_point.h"
#include "tasks.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

constexpr int64_t kMostRows = 96;        // of a query block
constexpr int64_t kLeastRows = 24;       // when there are too few blocks for the workers
constexpr int64_t kKeyBlock = 256;       // columns of scores held at a time
constexpr int64_t kPackKeys = 512;       // keys a packing task takes
constexpr int64_t kFewApart = 16;        // rows apart of a key head that are not worth raw panels
constexpr int64_t kApartKeys = 128;      // keys that rows apart read at a time
constexpr double kFlopsPerWorker = 1e6;  // less work is not worth another thread
constexpr int64_t kEqualHeads = 4;       // a worker: that stay whole where all have as many

// Sizes and choices of one call.
template <typename O>
struct ForwardPlan {
  const AttentionParams* p;
  int64_t workers;
  int64_t row_block;
  int64_t group;  // query heads a key head
  int64_t most_columns;
  int64_t key_width;    // head_dim padded to whole vectors
  int64_t key_stride;   // the same in operands
  int64_t depth;        // operands that hold head_dim
  int64_t value_width;  // value_dim padded to whole vectors
  int64_t value_panels;
  int64_t score_stride;
  int64_t slots;           // packed heads in flight
  int64_t packs, attends;  // tasks a key head
  bool whole;              // all tasks of a key head are one worker's
  bool raw_keys;           // rows without a position need ordinary keys unrotated
  bool keys_in_place;      // a few of them may read keys where they lie
  bool values_in_place;    // values need no conversion and no padding
  Splits queries, keys;
};

// What packing one key head leaves: keys as panels [column panel][channel][column], those with a
// position rotated in `keys` and, for many rows without one, as they are in `raw`; values as panels
// [value panel][column][2 vectors].
template <typename O>
struct PackedHead {
  using T = typename O::T;
  typename O::Score* keys;
  typename O::Score* raw;
  T* steps;      // of keys, by column, where they are integers
  T* raw_steps;  // of raw
  typename O::Value* values;
  T* reach;           // of its keys, by packing task: what Reach::value() says
  Counter* packed;    // packing tasks done, over all heads that used the slot
  Counter* attended;  // attending tasks done
};

// What a worker needs beside packed rows, whatever their operands are.
template <typename T>
struct WorkerScratch {
  T* apart;      // (kFewApart, key_width), rows that read keys where they lie
  T* keys;       // (kApartKeys, key_width), keys that those read
  T* scores;     // (rows, score_stride)
  T* out;        // (rows, value_width)
  T* maximum;    // (rows), log2
  T* sum;        // (rows)
  T* lane_sums;  // (rows, lanes), where weights need no maximum
  T* rows;       // (2 vectors, widest row)
  T* table;      // (2 * pairs)
  T* factors;    // (key block), dropout
};

template <typename O>
struct InFloats;

template <typename O>
struct RowScratch : WorkerScratch<typename O::T> {
  using T = typename O::T;
  using Q = typename O::Score;
  Q* query;  // (rows, key_stride), scaled by scale * log2(e); rotated where rows have a position
  Q* query_raw;         // the same, unrotated
  T* steps;             // (rows), of query, where that is integers
  T* raw_steps;         // (rows), of query_raw
  InFloats<O>* floats;  // where operands are integers
};

// What a worker scores in floats because lengths do not bound the scores: the keys of one head as
// panels of its own, beside the head's values.
template <typename O>
struct InFloats {
  using Floats = ForwardOperands<typename O::Value, typename O::Value>;
  ForwardPlan<Floats> plan;
  PackedHead<Floats> head;
  RowScratch<Floats> scratch;
  int64_t unit;  // the key head it holds; -1: none
};

template <typename O>
struct ForwardMemory {
  ForwardPlan<O> plan;
  PackedHead<O>* heads;
  RowScratch<O>* scratch;
};

inline double forward_flops(const AttentionParams& p) {
  return 2.0 * static_cast<double>(p.batch * p.heads) * static_cast<double>(p.queries) *
         static_cast<double>(p.keys) * static_cast<double>(p.head_dim + p.value_dim);
}

inline bool heads_stay_whole(int64_t heads, int64_t workers) {
  return heads >= kHeadsPerWorker * workers ||
         (heads >= kEqualHeads * workers && heads % workers == 0);
}

// Balanced blocks of rows, each a whole number of register tiles where there are enough rows.
template <typename T>
int64_t choose_row_block(const AttentionParams& p, int64_t workers) {
  constexpr int64_t kTile = VecTraits<T>::kTileRows;
  const int64_t heads = max_of<int64_t>(1, p.batch * p.heads);
  int64_t blocks = ceil_div(max_of<int64_t>(p.queries, 1), kMostRows);
  while (workers > 1 && heads * blocks < 4 * workers && p.queries / blocks > kLeastRows) ++blocks;
  return max_of<int64_t>(1, min_of(p.queries, round_up(ceil_div(p.queries, blocks), kTile)));
}

template <typename O>
ForwardPlan<O> make_plan(const AttentionParams& p, int64_t most_workers, bool keys_in_place,
                         bool values_in_place) {
  using T = typename O::T;
  using Q = typename O::Score;
  ForwardPlan<O> plan{};
  plan.p = &p;
  plan.workers = useful_workers(most_workers, forward_flops(p), kFlopsPerWorker);
  plan.row_block = choose_row_block<T>(p, plan.workers);
  plan.group = p.key_heads == 0 ? 1 : p.heads / p.key_heads;
  plan.most_columns = most_columns<T>(p.keys);
  plan.key_width = round_up(p.head_dim, kLanes<T>);
  plan.key_stride = plan.key_width / kTogether<Q>;
  plan.depth = ceil_div(p.head_dim, kTogether<Q>);
  plan.value_width = round_up(p.value_dim, kLanes<T>);
  plan.value_panels = ceil_div(plan.value_width, 2 * kLanes<T>);
  const int64_t widest = min_of(kKeyBlock + kBlockExcess * kLanes<T>, plan.most_columns);
  // No power of two: rows must not share cache sets. Products may write a little beyond their end.
  plan.score_stride = widest + max_of<int64_t>(kLanes<T>, kDotTokens);
  plan.slots = min_of(p.batch * p.key_heads, plan.workers == 1 ? 1 : plan.workers + 1);
  plan.packs = ceil_div(p.keys, kPackKeys);
  plan.whole = heads_stay_whole(p.batch * p.key_heads, plan.workers);
  // One block more than the rows need where two classes of rows each end in a part of a block.
  plan.attends = plan.group * (ceil_div(p.queries, plan.row_block) + (sets_apart(p) ? 1 : 0));
  plan.raw_keys = sets_apart(p) && p.table_q.rotate != nullptr;
  plan.keys_in_place = keys_in_place;
  plan.values_in_place = values_in_place;
  return plan;
}

// s: of the same worker.
template <typename O>
InFloats<O>* take_floats(const ForwardPlan<O>& plan, const RowScratch<O>& s, Arena& arena) {
  using T = typename O::T;
  auto* const taken = arena.take<InFloats<O>>(1);
  InFloats<O> floats{};
  floats.plan = make_plan<typename InFloats<O>::Floats>(*plan.p, plan.workers, plan.keys_in_place,
                                                        plan.values_in_place);
  floats.plan.queries = plan.queries;
  floats.plan.keys = plan.keys;
  floats.plan.whole = true;
  const int64_t keys = plan.most_columns * floats.plan.depth;
  floats.head.keys = arena.take<T>(keys);
  floats.head.raw = plan.raw_keys ? arena.take<T>(keys) : nullptr;
  floats.head.reach = arena.take<T>(1);
  const int64_t rows = plan.row_block * floats.plan.key_stride;
  floats.scratch.query = arena.take<T>(rows);
  floats.scratch.query_raw = sets_apart(*plan.p) ? arena.take<T>(rows) : nullptr;
  static_cast<WorkerScratch<T>&>(floats.scratch) = s;
  floats.unit = -1;
  if (arena.base != nullptr) *taken = floats;
  return taken;
}

template <typename S, typename O>
ForwardMemory<O> take_memory(const AttentionParams& p, int64_t workers, Arena& arena) {
  using T = typename O::T;
  using V = typename O::Value;
  using Q = typename O::Score;
  ForwardMemory<O> m{};
  m.plan = make_plan<O>(p, workers, in_place<S>(p.k, p.head_dim), in_place<S>(p.v, p.value_dim));
  ForwardPlan<O>& plan = m.plan;
  plan.queries = take_splits(arena, query_source(p));
  plan.keys = take_splits(arena, key_source(p));
  m.heads = arena.take<PackedHead<O>>(plan.slots);
  m.scratch = arena.take<RowScratch<O>>(plan.workers);
  for (int64_t i = 0; i < plan.slots; ++i) {
    PackedHead<O> head{};
    head.keys = arena.take<Q>(plan.most_columns * plan.depth);
    head.raw = plan.raw_keys ? arena.take<Q>(plan.most_columns * plan.depth) : nullptr;
    if (O::kFixed) {
      head.steps = arena.take<T>(plan.most_columns);
      head.raw_steps = plan.raw_keys ? arena.take<T>(plan.most_columns) : nullptr;
    }
    head.values =
        arena.take<V>(plan.value_panels * 2 * kLanes<T> * plan.most_columns / kTogether<V>);
    head.reach = arena.take<T>(max_of<int64_t>(plan.packs, 1));
    head.packed = arena.take<Counter>(1);
    head.attended = arena.take<Counter>(1);
    if (arena.base != nullptr) m.heads[i] = head;
  }
  constexpr int64_t kTileRows = VecTraits<T>::kTileRows;
  const int64_t widest_row = max_of(plan.key_width, plan.value_width);
  for (int64_t i = 0; i < plan.workers; ++i) {
    RowScratch<O> s{};
    if (i > 0) arena.separate(kTileRows * plan.score_stride * static_cast<int64_t>(sizeof(V)));
    s.query = arena.take<Q>(plan.row_block * plan.key_stride);
    s.query_raw = sets_apart(p) ? arena.take<Q>(plan.row_block * plan.key_stride) : nullptr;
    if (O::kFixed) {
      s.steps = arena.take<T>(plan.row_block);
      s.raw_steps = sets_apart(p) ? arena.take<T>(plan.row_block) : nullptr;
    }
    s.apart = arena.take<T>(plan.raw_keys ? kFewApart * plan.key_width : 0);
    s.keys = arena.take<T>(plan.raw_keys ? kApartKeys * plan.key_width : 0);
    s.scores = arena.take<T>(plan.row_block * plan.score_stride);
    s.out = arena.take<T>(plan.row_block * plan.value_width);
    s.maximum = arena.take<T>(plan.row_block);
    s.sum = arena.take<T>(plan.row_block);
    s.lane_sums = arena.take<T>(plan.row_block * kLanes<T>);
    s.rows = arena.take<T>(2 * kLanes<T> * widest_row);
    s.table = arena.take<T>(2 * p.pairs);
    s.factors = p.dropout_p > 0 ? arena.take<T>(plan.score_stride) : nullptr;
    if constexpr (O::kFixed) s.floats = take_floats(plan, s, arena);
    if (arena.base != nullptr) m.scratch[i] = s;
  }
  return m;
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
