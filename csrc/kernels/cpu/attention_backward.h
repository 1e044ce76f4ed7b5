// The plan and memory of one attention backward call.
#pragma once

#include "../attention.h"
#include "attention_common.h"
#include "tasks.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

constexpr int64_t kBackwardRows = 96;   // of a block
constexpr int64_t kBackwardKeys = 128;  // columns of a block
constexpr double kBackwardFlopsPerWorker = 1e6;

// Sizes and choices of one call. A unit is what must not be split further between tasks that run in
// any order: one key head with its group of query heads; or, where the gradient of a bias is wanted
// that several heads or batches share, all of those. Its query heads are its members.
template <typename T>
struct BackwardPlan {
  const AttentionBackwardParams* g;
  int64_t workers;
  int64_t group;  // query heads a key head
  bool batches_together, heads_together;
  int64_t units, members;
  int64_t row_block, row_blocks;  // rows; blocks of a head, empty ones included
  int64_t key_blocks;
  int64_t block_columns;           // that a block of keys may have
  int64_t key_width, value_width;  // padded to whole vectors
  int64_t score_stride;
  int64_t slots;
  Splits queries, keys;
};

// A query head of a unit.
struct Member {
  int64_t b, h, kv;
};

// A block of rows of one class: positions [first, first + count) in the split's order.
struct Rows {
  Split split;
  int64_t first, count;
  bool ordinary;
};

// A block of keys: columns [first, last).
struct Keys {
  int64_t b, h, block;
  Split split;
  Columns columns;
  int64_t first, last;
  bool raw_too;  // rows without a position need the ordinary keys unrotated
  bool padding;

  // The key in a column, or -1 in padding.
  int64_t token(int64_t column) const {
    if (column < columns.special_start) return column < columns.ordinary ? split.index[column] : -1;
    const int64_t i = column - columns.special_start;
    return i < columns.special ? split.index[columns.ordinary + i] : -1;
  }
};

// One query head, rows in the split's order. `q` is as rows with a position meet keys with one.
template <typename T>
struct HeadMemory {
  T* q;         // (queries, key_width), times scale * log2(e)
  T* q_raw;     // the same unrotated; null where every row or no key has a position of its own
  T* grad_out;  // (queries, value_width)
  T* shift;     // logsumexp, log2
  T* delta;     // sum of grad_out * out
  T* dq;        // (queries, key_width)
  T* dq_raw;
  Counter* turns;  // per block of rows: key blocks added
};

template <typename T>
struct SlotMemory {
  HeadMemory<T>* heads;  // members
  Counter* packed;
  Counter* done;
};

template <typename T>
struct WorkerMemory {
  T* keys;  // (columns, key_width)
  T* keys_raw;
  T* keys_across;  // panels [panel][channel][column]
  T* keys_raw_across;
  T* values_across;
  T* dk;  // (columns, key_width)
  T* dk_raw;
  T* dv;       // (columns, value_width)
  T* scores;   // (rows, score_stride)
  T* grads;    // the same, gradient of the scores
  T* factors;  // (score_stride), dropout
  T* row;      // (2 vectors, value_width)
  T* table;    // (2 * pairs)
};

template <typename T>
struct BackwardMemory {
  BackwardPlan<T> plan;
  SlotMemory<T>* slots;
  WorkerMemory<T>* workers;
};

template <typename T>
Member member_of(const BackwardPlan<T>& plan, int64_t unit, int64_t i) {
  const AttentionParams& p = plan.g->forward;
  const int64_t unit_heads = plan.heads_together ? p.key_heads : 1;
  const int64_t key_head = i / plan.group;
  const int64_t b = plan.batches_together ? key_head / unit_heads
                                          : unit / (plan.heads_together ? 1 : p.key_heads);
  const int64_t kv = plan.heads_together ? key_head % unit_heads : unit % p.key_heads;
  return {b, kv * plan.group + i % plan.group, kv};
}

template <typename T>
Rows rows_of(const BackwardPlan<T>& plan, int64_t b, int64_t block) {
  const Split split = plan.queries.of(b);
  const int64_t ordinary_blocks = ceil_div(split.ordinary, plan.row_block);
  const bool ordinary = block < ordinary_blocks;
  const int64_t first = ordinary ? block * plan.row_block
                                 : split.ordinary + (block - ordinary_blocks) * plan.row_block;
  const int64_t end = ordinary ? split.ordinary : split.ordinary + split.special;
  return {split, first, max_of<int64_t>(0, min_of(plan.row_block, end - first)), ordinary};
}

template <typename T>
Keys keys_of(const BackwardPlan<T>& plan, int64_t b, int64_t h, int64_t block) {
  Keys keys{};
  keys.b = b;
  keys.h = h;
  keys.block = block;
  keys.split = plan.keys.of(b);
  keys.columns = columns_of<T>(keys.split);
  keys.last = block_end<T>(keys.columns, 0, kBackwardKeys);
  for (int64_t i = 0; i < block; ++i) {
    keys.first = keys.last;
    keys.last = block_end<T>(keys.columns, keys.first, kBackwardKeys);
  }
  keys.raw_too = plan.queries.of(b).special > 0;
  keys.padding = has_padding(keys.columns, keys.first, keys.last);
  return keys;
}

template <typename T>
BackwardPlan<T> make_backward_plan(const AttentionBackwardParams& g, int64_t most_workers) {
  const AttentionParams& p = g.forward;
  BackwardPlan<T> plan{};
  plan.g = &g;
  const double flops = static_cast<double>(p.batch * p.heads) * static_cast<double>(p.queries) *
                       static_cast<double>(p.keys) *
                       static_cast<double>(6 * p.head_dim + 4 * p.value_dim);
  plan.workers = useful_workers(most_workers, flops, kBackwardFlopsPerWorker);
  plan.group = p.key_heads == 0 ? 1 : p.heads / p.key_heads;
  plan.batches_together = g.dbias != nullptr && g.dbias_stride_b == 0;
  plan.heads_together = g.dbias != nullptr && g.dbias_stride_h == 0;
  plan.units = (plan.batches_together ? min_of<int64_t>(p.batch, 1) : p.batch) *
               (plan.heads_together ? min_of<int64_t>(p.key_heads, 1) : p.key_heads);
  plan.members =
      (plan.batches_together ? p.batch : 1) * (plan.heads_together ? p.key_heads : 1) * plan.group;
  const int64_t blocks = ceil_div(max_of<int64_t>(p.queries, 1), kBackwardRows);
  plan.row_block = max_of<int64_t>(
      1, min_of(p.queries, round_up(ceil_div(p.queries, blocks), VecTraits<T>::kTileRows)));
  plan.row_blocks = ceil_div(p.queries, plan.row_block) + (sets_apart(p) ? 1 : 0);
  const int64_t columns = most_columns<T>(p.keys);
  plan.key_blocks = ceil_div(columns, kBackwardKeys);
  plan.block_columns = min_of(columns, kBackwardKeys + 2 * kLanes<T>);
  plan.key_width = round_up(p.head_dim, kLanes<T>);
  plan.value_width = round_up(p.value_dim, kLanes<T>);
  plan.score_stride = plan.block_columns + kLanes<T>;
  plan.slots = min_of(plan.units, plan.workers == 1 ? 1 : plan.workers + 1);
  return plan;
}

template <typename T>
HeadMemory<T> take_head(const BackwardPlan<T>& plan, Arena& arena) {
  const AttentionParams& p = plan.g->forward;
  const bool raw_rows = sets_apart(p) && p.table_k.rotate != nullptr;
  HeadMemory<T> head{};
  head.q = arena.take<T>(p.queries * plan.key_width);
  head.q_raw = raw_rows ? arena.take<T>(p.queries * plan.key_width) : nullptr;
  head.grad_out = arena.take<T>(p.queries * plan.value_width);
  head.shift = arena.take<T>(p.queries);
  head.delta = arena.take<T>(p.queries);
  head.dq = arena.take<T>(p.queries * plan.key_width);
  head.dq_raw = raw_rows ? arena.take<T>(p.queries * plan.key_width) : nullptr;
  head.turns = arena.take<Counter>(plan.row_blocks);
  return head;
}

template <typename T>
WorkerMemory<T> take_worker(const BackwardPlan<T>& plan, Arena& arena) {
  const AttentionParams& p = plan.g->forward;
  const bool raw_keys = sets_apart(p) && p.table_q.rotate != nullptr;
  const int64_t columns = plan.block_columns;
  WorkerMemory<T> w{};
  w.keys = arena.take<T>(columns * plan.key_width);
  w.keys_across = arena.take<T>(columns * p.head_dim);
  w.values_across = arena.take<T>(columns * p.value_dim);
  w.dk = arena.take<T>(columns * plan.key_width);
  w.dv = arena.take<T>(columns * plan.value_width);
  if (raw_keys) {
    w.keys_raw = arena.take<T>(columns * plan.key_width);
    w.keys_raw_across = arena.take<T>(columns * p.head_dim);
    w.dk_raw = arena.take<T>(columns * plan.key_width);
  }
  w.scores = arena.take<T>(plan.row_block * plan.score_stride);
  w.grads = arena.take<T>(plan.row_block * plan.score_stride);
  w.factors = p.dropout_p > 0 ? arena.take<T>(plan.score_stride) : nullptr;
  w.row = arena.take<T>(2 * kLanes<T> * plan.value_width);
  w.table = arena.take<T>(2 * p.pairs);
  return w;
}

template <typename T>
BackwardMemory<T> take_backward_memory(const AttentionBackwardParams& g, int64_t workers,
                                       Arena& arena) {
  BackwardMemory<T> m{};
  m.plan = make_backward_plan<T>(g, workers);
  BackwardPlan<T>& plan = m.plan;
  plan.queries = take_splits(arena, query_source(g.forward));
  plan.keys = take_splits(arena, key_source(g.forward));
  m.slots = arena.take<SlotMemory<T>>(plan.slots);
  m.workers = arena.take<WorkerMemory<T>>(plan.workers);
  for (int64_t i = 0; i < plan.slots; ++i) {
    SlotMemory<T> slot{};
    slot.heads = arena.take<HeadMemory<T>>(plan.members);
    slot.packed = arena.take<Counter>(1);
    slot.done = arena.take<Counter>(1);
    for (int64_t j = 0; j < plan.members; ++j) {
      const HeadMemory<T> head = take_head(plan, arena);
      if (arena.base != nullptr) slot.heads[j] = head;
    }
    if (arena.base != nullptr) m.slots[i] = slot;
  }
  for (int64_t i = 0; i < plan.workers; ++i) {
    const WorkerMemory<T> w = take_worker(plan, arena);
    if (arena.base != nullptr) m.workers[i] = w;
  }
  return m;
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
