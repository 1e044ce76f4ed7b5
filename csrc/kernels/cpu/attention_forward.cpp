// Attention forward: blocked online softmax over packed keys.
//
// Keys and values of one key head are packed once into panels of the compute type, keys rotated and
// transposed on the way; then blocks of query rows pass over them. Rows with a position meet
// rotated panels of keys with a position and raw panels of the others; rows without one meet raw
// panels only. Where there are many heads, each is one worker's; otherwise tasks (pack a range of
// keys, attend with a block of rows) are handed out in order from one counter, and a ring of packed
// heads bounds the memory.
#include "ahead.h"
#include "attention_forward_scores.h"
#include "convert_vec.h"
#include "isa.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// -------------------------------------------------------------------------------------------------
// Attending.

template <typename O>
void drop_row(const ForwardPlan<O>& plan, const Columns& columns, const Split& split,
              const RowBlock& block, int64_t first, int64_t last, int64_t n, typename O::T* row,
              typename O::T* factors) {
  const Dropout dropout = make_dropout(plan.p->dropout_p, plan.p->seed);
  const int64_t bh = block.b * plan.p->heads + block.h;
  for_each_run(columns, split, first, last, [&](int64_t at, const int32_t* index, int64_t count) {
    dropout_factors(dropout, bh, n, index, count, factors);
    for (int64_t j = 0; j < count; ++j) row[at + j] *= factors[j];
  });
}

// Biases, softmax and dropout of the scores in columns [first, last), which become operands.
template <typename O>
void soften_block(const ForwardPlan<O>& plan, const Columns& columns, const Split& split,
                  const RowBlock& block, int64_t first, int64_t last, const RowScratch<O>& s) {
  using T = typename O::T;
  const AttentionParams& p = *plan.p;
  const bool padding = has_padding(columns, first, last);
  constexpr int64_t kAtOnce = 4;  // rows: nobody waits for the maximum of a single one
  for (int64_t start = 0; start < block.rows; start += kAtOnce) {
    const int64_t end = min_of(block.rows, start + kAtOnce);
    T largest[kAtOnce];
    for (int64_t r = start; r < end; ++r) {
      T* row = s.scores + r * plan.score_stride;
      if (p.bias != nullptr) {
        const ScoreBias bias = bias_of(p, block.b, block.h, block.index[r]);
        for_each_run(columns, split, first, last,
                     [&](int64_t at, const int32_t* index, int64_t count) {
                       add_bias(bias, index, count, row + at);
                     });
      }
      if (padding) hide_padding(columns, first, last, row);
      largest[r - start] = row_maximum(row, last - first);
    }
    for (int64_t r = start; r < end; ++r) {
      T* row = s.scores + r * plan.score_stride;
      soften_row(row, last - first, largest[r - start], s.maximum[r], s.sum[r],
                 s.out + r * plan.value_width, plan.value_width);
      if (p.dropout_p > 0) {
        drop_row(plan, columns, split, block, first, last, block.index[r], row, s.factors);
      }
      OperandTraits<typename O::Value>::round_row(row, last - first);
    }
  }
}

template <typename S, typename O>
void store_block(const ForwardPlan<O>& plan, const RowBlock& block, const RowScratch<O>& s) {
  using T = typename O::T;
  const AttentionParams& p = *plan.p;
  T* lse = static_cast<T*>(p.lse) + (block.b * p.heads + block.h) * p.queries;
  T logs[kLanes<T>], inverses[kLanes<T>];
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t lane = r % kLanes<T>;
    if (lane == 0) {
      const Vec<T> sum = load<T>(s.sum + r);
      store<T>(logs, log_sums(load<T>(s.maximum + r), sum));
      store<T>(inverses, sum == T{0} ? Vec<T>{} : T{1} / sum);
    }
    const int64_t n = block.index[r];
    T* const out = s.out + r * plan.value_width;
    S* const to = row_at<S>(p.out, block.b, block.h, n);
    if (p.out.stride_d == 1) {
      store_scaled<S>(out, inverses[lane], p.value_dim, to);
    } else {
      for (int64_t d = 0; d < p.value_dim; ++d) out[d] *= inverses[lane];
      store_row<S>(out, p.out.stride_d, p.value_dim, to);
    }
    lse[n] = logs[lane];
  }
}

// Whether weights may be made of scores while these are in registers.
X_ROPE_CLS_INLINE bool weights_in_registers(const AttentionParams& p) {
  return p.bias == nullptr && p.dropout_p == 0;
}

template <typename O>
typename O::T reach_of_keys(const ForwardPlan<O>& plan, const PackedHead<O>& head) {
  typename O::T reach{0};
  for (int64_t i = 0; i < (plan.whole ? 1 : plan.packs); ++i) reach = max_of(reach, head.reach[i]);
  return reach;
}

template <typename S, typename O>
void attend_block(const ForwardPlan<O>& plan, const PackedHead<O>& head, const RowBlock& block,
                  Ahead<S>& ahead, const RowScratch<O>& s);

// The same with keys and rows in floats, where integers were packed.
template <typename S, typename O>
void attend_in_floats(const PackedHead<O>& head, const RowBlock& block, Ahead<S>& ahead,
                      InFloats<O>& floats) {
  floats.head.values = head.values;
  if (floats.unit != block.unit) {
    floats.head.reach[0] = pack_keys<S>(floats.plan, floats.head, block.unit, 0,
                                        floats.plan.most_columns, floats.scratch);
    floats.unit = block.unit;
  }
  attend_block<S>(floats.plan, floats.head, block, ahead, floats.scratch);
}

template <typename S, typename O>
void attend_block(const ForwardPlan<O>& plan, const PackedHead<O>& head, const RowBlock& block,
                  Ahead<S>& ahead, const RowScratch<O>& s) {
  using T = typename O::T;
  using V = typename O::Value;
  constexpr int64_t kWide = 2 * kLanes<T>;
  const Split split = plan.keys.of(block.b);
  const Columns columns = close_columns_of<T>(split);
  const bool apart = !block.ordinary && few_apart(plan, block.b);
  bool bounded = false;
  if (!apart) {
    const bool raw_too = block.ordinary && columns.special > 0;
    const T rows = pack_queries<S>(plan, block, raw_too, s);
    const T keys = reach_of_keys(plan, head);
    bounded = weights_in_registers(*plan.p) && is_bounded(rows, keys);
    if constexpr (O::kFixed) {
      // Errors of integers grow with the lengths of rows and keys, whatever their score.
      if (!is_bounded(rows, keys)) return attend_in_floats<S>(head, block, ahead, *s.floats);
    } else {
      bounded = bounded || (weights_in_registers(*plan.p) &&
                            is_bounded(reach_of_rows(plan, block, raw_too, s), keys));
    }
  }
  bool turned = false;
  if (apart) pack_apart<S>(plan, block, turned, s);
  if (columns.total == 0) {
    for (int64_t i = 0; i < block.rows * plan.value_width; ++i) s.out[i] = T{0};
  }
  for (int64_t r = 0; r < block.rows; ++r) {
    s.maximum[r] = bounded ? T{0} : -kInfinity<T>;
    s.sum[r] = T{0};
    if (bounded) store<T>(s.lane_sums + r * kLanes<T>, Vec<T>{});
  }
  const int64_t end =
      columns.special > 0 ? columns.special_start + columns.special : columns.ordinary;
  for (int64_t first = 0; first < columns.total;) {
    const int64_t last = block_end<T>(columns, first, kKeyBlock);
    if (bounded) {
      weigh_block(plan, columns, head, block, first, last, s, ahead);
    } else {
      if (apart) {
        score_apart<S>(plan, columns, split, block, first, last, turned, s);
      } else {
        score_block(plan, columns, head, block, first, last, s, ahead);
      }
      soften_block(plan, columns, split, block, first, last, s);
    }
    const int64_t weights = min_of(last, end) - first;  // without the padding behind the last key
    const auto sum_values = [&](auto accumulate) {
      multiply<V, Left::kByRow, decltype(accumulate)::value>(
          block.rows, plan.value_width, ceil_div(weights, kTogether<V>),
          reinterpret_cast<const V*>(s.scores), plan.score_stride,
          head.values + first / kTogether<V> * kWide, kWide, columns.total / kTogether<V> * kWide,
          s.out, plan.value_width, ahead);
    };
    if (first == 0) {
      sum_values(std::false_type{});
    } else {
      sum_values(std::true_type{});
    }
    first = last;
  }
  for (int64_t r = 0; bounded && r < block.rows; ++r) {
    s.sum[r] = sum_lanes<T>(load<T>(s.lane_sums + r * kLanes<T>));
  }
  store_block<S>(plan, block, s);
}

// Rows of attending task `task` of a key head: blocks of ordinary rows, then of special ones.
template <typename O>
RowBlock find_rows(const ForwardPlan<O>& plan, int64_t unit, int64_t task) {
  const AttentionParams& p = *plan.p;
  const int64_t blocks = plan.attends / plan.group;
  RowBlock block{};
  block.b = unit / p.key_heads;
  block.unit = unit;
  block.h = unit % p.key_heads * plan.group + task / blocks;
  const int64_t i = task % blocks;
  const Split rows = plan.queries.of(block.b);
  const int64_t ordinary_blocks = ceil_div(rows.ordinary, plan.row_block);
  block.ordinary = i < ordinary_blocks;
  const int64_t start =
      block.ordinary ? i * plan.row_block : rows.ordinary + (i - ordinary_blocks) * plan.row_block;
  const int64_t end = block.ordinary ? rows.ordinary : rows.ordinary + rows.special;
  block.index = rows.index + start;
  block.rows = max_of<int64_t>(0, min_of(plan.row_block, end - start));
  return block;
}

template <typename S, typename O>
void run_task(const ForwardMemory<O>& m, int64_t task, int64_t worker) {
  const ForwardPlan<O>& plan = m.plan;
  const int64_t tasks = plan.packs + plan.attends;
  const int64_t unit = task / tasks;
  const int64_t local = task % tasks;
  const int64_t round = unit / plan.slots;  // how many heads used the slot before
  const PackedHead<O>& head = m.heads[unit % plan.slots];
  if (local < plan.packs) {
    wait_until(*head.attended, round * plan.attends);
    // A split may leave fewer columns than keys, and special ones start a vector of their own.
    const int64_t last = local + 1 == plan.packs ? plan.most_columns : (local + 1) * kPackKeys;
    head.reach[local] = pack_head<S>(plan, head, unit, local * kPackKeys, last, m.scratch[worker]);
    add(*head.packed, 1);
  } else {
    wait_until(*head.packed, (round + 1) * plan.packs);
    const RowBlock block = find_rows(plan, unit, local - plan.packs);
    Ahead<S> nothing;
    if (block.rows > 0) attend_block<S>(plan, head, block, nothing, m.scratch[worker]);
    add(*head.attended, 1);
  }
}

// What block `i` of a head stores, and what the same worker reads next: the next block's rows, and
// a share of the next head's keys and values (next: -1 if there is none).
template <typename S, typename O>
Ahead<S> ahead_of(const ForwardPlan<O>& plan, const RowBlock& block, int64_t i, int64_t next) {
  using T = Compute<S>;
  const AttentionParams& p = *plan.p;
  Ahead<S> ahead;
  ahead.add(p.out, block.b, block.h, block.index, block.rows, p.value_dim);
  const bool last = i + 1 == plan.attends;
  if (!last || next >= 0) {
    const RowBlock rows = last ? find_rows(plan, next, 0) : find_rows(plan, block.unit, i + 1);
    ahead.add(p.q, rows.b, rows.h, rows.index, rows.rows, p.head_dim);
  }
  if (next >= 0) {
    const int64_t b = next / p.key_heads;
    const int64_t h = next % p.key_heads;
    const Split keys = plan.keys.of(b);
    const int64_t count = keys.ordinary + keys.special;
    const int64_t from = count * i / plan.attends;
    const int64_t share = count * (i + 1) / plan.attends - from;
    ahead.add(p.k, b, h, keys.index + from, share, p.head_dim);
    ahead.add(p.v, b, h, keys.index + from, share, p.value_dim);
  }
  const int64_t panels = ceil_div(p.keys, 2 * kLanes<T>) + plan.value_panels;
  ahead.spread(block.rows / VecTraits<T>::kTileRows * panels);
  return ahead;
}

// All of a head. next: the one that the same worker does next; -1: none that is known.
template <typename S, typename O>
void run_head(const ForwardMemory<O>& m, int64_t unit, int64_t next, int64_t worker) {
  const ForwardPlan<O>& plan = m.plan;
  const PackedHead<O>& head = m.heads[worker];
  head.reach[0] = pack_head<S>(plan, head, unit, 0, plan.most_columns, m.scratch[worker]);
  for (int64_t i = 0; i < plan.attends; ++i) {
    const RowBlock block = find_rows(plan, unit, i);
    if (block.rows == 0) continue;
    Ahead<S> ahead = ahead_of<S>(plan, block, i, next);
    attend_block<S>(plan, head, block, ahead, m.scratch[worker]);
  }
}

template <typename S, typename O>
void forward_typed(const AttentionParams& p, const Parallel& parallel, void* workspace) {
  Arena arena{static_cast<char*>(workspace), 0};
  const auto m = take_memory<S, O>(p, parallel.workers, arena);
  fill_splits(m.plan.queries, query_source(p));
  fill_splits(m.plan.keys, key_source(p));
  for (int64_t i = 0; i < m.plan.slots; ++i) {
    m.heads[i].packed->value = 0;
    m.heads[i].attended->value = 0;
  }
  if (m.plan.whole) {
    run_shares(
        parallel, m.plan.workers, p.batch * p.key_heads,
        [&](int64_t unit, int64_t next, int64_t worker) { run_head<S>(m, unit, next, worker); });
    return;
  }
  const int64_t tasks = p.batch * p.key_heads * (m.plan.packs + m.plan.attends);
  run_tasks(parallel, m.plan.workers, tasks,
            [&](int64_t task, int64_t worker) { run_task<S>(m, task, worker); });
}

// Calls f with a value of the storage type and one of what is multiplied.
template <typename F>
void with_operands(const AttentionParams& p, F&& f) {
  with_storage_type(p.dtype, [&](auto type) {
    using S = decltype(type);
    using U = Operand<S>;
#ifdef X_ROPE_CLS_HAVE_INT16
    // Where nothing is rotated, products of float16 would be exact elsewhere too.
    if constexpr (__is_same(S, Float16) || (__is_same(S, BFloat16) && kTogether<U> == 1)) {
      if (p.has_rotary) return f(type, ForwardOperands<U, Int16Pair>{});
    }
#endif
    f(type, ForwardOperands<U, U>{});
  });
}

}  // namespace

int64_t attention_workspace(const AttentionParams& params, int64_t workers) {
  if (attention_is_few(params)) return attention_few_workspace(params, workers);
  int64_t bytes = 0;
  with_operands(params, [&](auto type, auto operands) {
    Arena arena{nullptr, 0};
    take_memory<decltype(type), decltype(operands)>(params, workers, arena);
    bytes = arena.used;
  });
  return bytes;
}

void attention_forward(const AttentionParams& params, const Parallel& parallel, void* workspace) {
  if (attention_is_few(params)) return attention_few(params, parallel, workspace);
  with_operands(params, [&](auto type, auto operands) {
    forward_typed<decltype(type), decltype(operands)>(params, parallel, workspace);
  });
}

}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
