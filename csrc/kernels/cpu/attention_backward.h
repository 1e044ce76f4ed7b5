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
template <typename U>
struct BackwardPlan {
  const AttentionBackwardParams* g;
  int64_t workers;
  int64_t group;  // query heads a key head
  bool batches_together, heads_together;
  int64_t units, members;
  int64_t row_block, row_blocks;  // rows; blocks of a head, empty ones included
  int64_t stack_rows;             // of a block, stacked
  int64_t key_blocks;
  int64_t block_columns;             // that a block of keys may have
  int64_t key_width, value_width;    // padded to whole vectors
  int64_t key_stride, value_stride;  // the same in operands
  int64_t key_depth, value_depth;    // operands that hold head_dim, value_dim
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
  int64_t block, first, count;
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

  int64_t token(int64_t column) const { return token_at(columns, split, column); }
};

// One query head, rows in the split's order. `q` is as rows with a position meet keys with one.
template <typename U>
struct HeadMemory {
  using T = Sum<U>;
  U* q;         // (queries, key_stride), times scale * log2(e)
  U* q_raw;     // the same unrotated; null where every row or no key has a position of its own
  U* grad_out;  // (queries, value_stride)
  // The same stacked, for sums over rows: (row_blocks, stack_rows, key_width or value_width).
  U* q_stack;
  U* q_raw_stack;
  U* grad_out_stack;
  T* shift;  // logsumexp, log2
  T* delta;  // sum of grad_out * out
  T* dq;     // (queries, key_width)
  T* dq_raw;
  Counter* turns;  // per block of rows: key blocks added
};

template <typename U>
struct SlotMemory {
  HeadMemory<U>* heads;  // members
  Counter* packed;
  Counter* done;
};

template <typename U>
struct WorkerMemory {
  using T = Sum<U>;
  U* keys;  // stacked, for sums over keys: (columns / kTogether, key_width)
  U* keys_raw;
  U* keys_across;  // panels [panel][channel][column]
  U* keys_raw_across;
  U* values_across;
  T* dk;  // (columns, key_width)
  T* dk_raw;
  T* dv;            // (columns, value_width)
  T* scores;        // (rows, score_stride)
  T* grads;         // the same, gradient of the scores
  U* scores_stack;  // stacked: (stack_rows, score_stride)
  U* grads_stack;
  T* factors;  // (score_stride), dropout
  T* rows;     // (2 vectors, wider of key_width and value_width)
  T* table;    // (2 * pairs)
};

template <typename U>
struct BackwardMemory {
  BackwardPlan<U> plan;
  SlotMemory<U>* slots;
  WorkerMemory<U>* workers;
};

template <typename U>
Member member_of(const BackwardPlan<U>& plan, int64_t unit, int64_t i) {
  const AttentionParams& p = plan.g->forward;
  const int64_t unit_heads = plan.heads_together ? p.key_heads : 1;
  const int64_t key_head = i / plan.group;
  const int64_t b = plan.batches_together ? key_head / unit_heads
                                          : unit / (plan.heads_together ? 1 : p.key_heads);
  const int64_t kv = plan.heads_together ? key_head % unit_heads : unit % p.key_heads;
  return {b, kv * plan.group + i % plan.group, kv};
}

template <typename U>
Rows rows_of(const BackwardPlan<U>& plan, int64_t b, int64_t block) {
  const Split split = plan.queries.of(b);
  const int64_t ordinary_blocks = ceil_div(split.ordinary, plan.row_block);
  const bool ordinary = block < ordinary_blocks;
  const int64_t first = ordinary ? block * plan.row_block
                                 : split.ordinary + (block - ordinary_blocks) * plan.row_block;
  const int64_t end = ordinary ? split.ordinary : split.ordinary + split.special;
  return {split, block, first, max_of<int64_t>(0, min_of(plan.row_block, end - first)), ordinary};
}

template <typename U>
Keys keys_of(const BackwardPlan<U>& plan, int64_t b, int64_t h, int64_t block) {
  Keys keys{};
  keys.b = b;
  keys.h = h;
  keys.block = block;
  keys.split = plan.keys.of(b);
  keys.columns = columns_of<Sum<U>>(keys.split);
  keys.last = block_end<Sum<U>>(keys.columns, 0, kBackwardKeys);
  for (int64_t i = 0; i < block; ++i) {
    keys.first = keys.last;
    keys.last = block_end<Sum<U>>(keys.columns, keys.first, kBackwardKeys);
  }
  keys.raw_too = plan.queries.of(b).special > 0;
  keys.padding = has_padding(keys.columns, keys.first, keys.last);
  return keys;
}

template <typename U>
BackwardPlan<U> make_backward_plan(const AttentionBackwardParams& g, int64_t most_workers) {
  using T = Sum<U>;
  const AttentionParams& p = g.forward;
  BackwardPlan<U> plan{};
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
  plan.stack_rows = ceil_div(plan.row_block, kTogether<U>);
  const int64_t columns = most_columns<T>(p.keys);
  plan.key_blocks = ceil_div(columns, kBackwardKeys);
  plan.block_columns = min_of(columns, kBackwardKeys + kBlockExcess * kLanes<T>);
  plan.key_width = round_up(p.head_dim, kLanes<T>);
  plan.value_width = round_up(p.value_dim, kLanes<T>);
  plan.key_stride = plan.key_width / kTogether<U>;
  plan.value_stride = plan.value_width / kTogether<U>;
  plan.key_depth = ceil_div(p.head_dim, kTogether<U>);
  plan.value_depth = ceil_div(p.value_dim, kTogether<U>);
  plan.score_stride = plan.block_columns + kLanes<T>;
  plan.slots = min_of(plan.units, plan.workers == 1 ? 1 : plan.workers + 1);
  return plan;
}

// Where an operand is one element, a stack is the rows themselves.
template <typename U>
U* take_stack(U* rows, int64_t count, int64_t width, Arena& arena) {
  return kTogether<U> == 1 ? rows : arena.take<U>(count * width);
}

template <typename U>
HeadMemory<U> take_head(const BackwardPlan<U>& plan, Arena& arena) {
  using T = Sum<U>;
  const AttentionParams& p = plan.g->forward;
  const bool raw_rows = sets_apart(p) && p.table_k.rotate != nullptr;
  const int64_t stacked = plan.row_blocks * plan.stack_rows;
  HeadMemory<U> head{};
  head.q = arena.take<U>(p.queries * plan.key_stride);
  head.q_stack = take_stack(head.q, stacked, plan.key_width, arena);
  head.grad_out = arena.take<U>(p.queries * plan.value_stride);
  head.grad_out_stack = take_stack(head.grad_out, stacked, plan.value_width, arena);
  head.shift = arena.take<T>(p.queries);
  head.delta = arena.take<T>(p.queries);
  head.dq = arena.take<T>(p.queries * plan.key_width);
  if (raw_rows) {
    head.q_raw = arena.take<U>(p.queries * plan.key_stride);
    head.q_raw_stack = take_stack(head.q_raw, stacked, plan.key_width, arena);
    head.dq_raw = arena.take<T>(p.queries * plan.key_width);
  }
  head.turns = arena.take<Counter>(plan.row_blocks);
  return head;
}

template <typename U>
WorkerMemory<U> take_worker(const BackwardPlan<U>& plan, Arena& arena) {
  using T = Sum<U>;
  const AttentionParams& p = plan.g->forward;
  const bool raw_keys = sets_apart(p) && p.table_q.rotate != nullptr;
  const int64_t columns = plan.block_columns;
  WorkerMemory<U> w{};
  w.keys = arena.take<U>(columns / kTogether<U> * plan.key_width);
  w.keys_across = arena.take<U>(columns * plan.key_depth);
  w.values_across = arena.take<U>(columns * plan.value_depth);
  w.dk = arena.take<T>(columns * plan.key_width);
  w.dv = arena.take<T>(columns * plan.value_width);
  if (raw_keys) {
    w.keys_raw = arena.take<U>(columns / kTogether<U> * plan.key_width);
    w.keys_raw_across = arena.take<U>(columns * plan.key_depth);
    w.dk_raw = arena.take<T>(columns * plan.key_width);
  }
  w.scores = arena.take<T>(plan.row_block * plan.score_stride);
  w.grads = arena.take<T>(plan.row_block * plan.score_stride);
  w.scores_stack =
      take_stack(reinterpret_cast<U*>(w.scores), plan.stack_rows, plan.score_stride, arena);
  w.grads_stack =
      take_stack(reinterpret_cast<U*>(w.grads), plan.stack_rows, plan.score_stride, arena);
  w.factors = p.dropout_p > 0 ? arena.take<T>(plan.score_stride) : nullptr;
  w.rows = arena.take<T>(2 * kLanes<T> * max_of(plan.key_width, plan.value_width));
  w.table = arena.take<T>(2 * p.pairs);
  return w;
}

template <typename U>
BackwardMemory<U> take_backward_memory(const AttentionBackwardParams& g, int64_t workers,
                                       Arena& arena) {
  BackwardMemory<U> m{};
  m.plan = make_backward_plan<U>(g, workers);
  BackwardPlan<U>& plan = m.plan;
  plan.queries = take_splits(arena, query_source(g.forward));
  plan.keys = take_splits(arena, key_source(g.forward));
  m.slots = arena.take<SlotMemory<U>>(plan.slots);
  m.workers = arena.take<WorkerMemory<U>>(plan.workers);
  for (int64_t i = 0; i < plan.slots; ++i) {
    SlotMemory<U> slot{};
    slot.heads = arena.take<HeadMemory<U>>(plan.members);
    slot.packed = arena.take<Counter>(1);
    slot.done = arena.take<Counter>(1);
    for (int64_t j = 0; j < plan.members; ++j) {
      const HeadMemory<U> head = take_head(plan, arena);
      if (arena.base != nullptr) slot.heads[j] = head;
    }
    if (arena.base != nullptr) m.slots[i] = slot;
  }
  constexpr int64_t kTileRows = VecTraits<Sum<U>>::kTileRows;
  for (int64_t i = 0; i < plan.workers; ++i) {
    if (i > 0) arena.separate(kTileRows * plan.score_stride * static_cast<int64_t>(sizeof(U)));
    const WorkerMemory<U> w = take_worker(plan, arena);
    if (arena.base != nullptr) m.workers[i] = w;
  }
  return m;
}

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
