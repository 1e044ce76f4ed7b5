// Attention backward: weights are recomputed from the logsumexp, blocks of keys outside, blocks of
// rows inside.
//
// A task takes one block of keys of one key head, passes over all rows that read it and accumulates
// dK and dV in its own scratch. dQ is shared: tasks add to a block of its rows in the order of
// their keys, each waiting for its turn, so the sum is the same for any number of threads, and
// whoever adds last turns it back and stores it. Sums are in the space of rotated queries and keys
// where both tokens have a position and in the raw space elsewhere. Where there are many heads, all
// tasks of one are one worker's.
#include "attention_backward_rows.h"

#include "ahead.h"
#include "half_vectors.h"
#include "isa.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// -------------------------------------------------------------------------------------------------
// A block of keys against a block of rows.

// A stretch of the block's columns of one class, and what its pairs with a block of rows use.
template <typename U>
struct Stretch {
  int64_t at, columns;  // first column from the block's start, number of columns
  int64_t held;         // of these, with a key; the others follow
  const U* q;           // rows as these pairs see them
  const U* q_stack;
  const U* keys;         // stacked
  const U* keys_across;  // panels
  Sum<U>* dk;
  Sum<U>* dq;
};

template <typename U>
Stretch<U> make_stretch(const BackwardPlan<U>& plan, const Keys& keys, const Rows& rows,
                        const HeadMemory<U>& head, const WorkerMemory<U>& w, bool ordinary_keys) {
  const int64_t first = ordinary_keys ? keys.first : max_of(keys.first, keys.columns.special_start);
  const int64_t last = ordinary_keys ? min_of(keys.last, keys.columns.special_start) : keys.last;
  const int64_t end =
      ordinary_keys ? keys.columns.ordinary : keys.columns.special_start + keys.columns.special;
  const int64_t at = first - keys.first;
  const bool raw_rows = rows.ordinary && !ordinary_keys;
  const bool raw_keys = !rows.ordinary && ordinary_keys;
  return {at,
          last - first,
          min_of(last, end) - first,
          (raw_rows ? head.q_raw : head.q) + rows.first * plan.key_stride,
          (raw_rows ? head.q_raw_stack : head.q_stack) + stack_start(plan, rows) * plan.key_width,
          (raw_keys ? w.keys_raw : w.keys) + at / kTogether<U> * plan.key_width,
          (raw_keys ? w.keys_raw_across : w.keys_across) + at * plan.key_depth,
          (raw_keys ? w.dk_raw : w.dk) + at * plan.key_width,
          (raw_rows ? head.dq_raw : head.dq) + rows.first * plan.key_width};
}

// Calls f with the flag as a constant.
template <typename F>
X_ROPE_CLS_INLINE void with_flag(bool flag, F&& f) {
  if (flag) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

// C = A B for the panels of a stretch; B's panels are [panel][depth][column].
template <typename U, typename F>
X_ROPE_CLS_INLINE void multiply_panels(int64_t rows, const Stretch<U>& s, int64_t depth, const U* a,
                                       int64_t a_stride, const U* panels, Sum<U>* c,
                                       int64_t c_stride, F&& beside) {
  for (int64_t j = 0; j < s.columns;) {
    const int64_t width = min_of<int64_t>(2 * kLanes<Sum<U>>, s.columns - j);
    if (multiply_half_panel(s.held - j, rows, depth, a, a_stride, panels + j * depth, c + j,
                            c_stride, beside, Written{})) {
      return;
    }
    if (width == 2 * kLanes<Sum<U>>) {
      multiply_panel<U, Left::kByRow, false, 2>(rows, depth, a, a_stride, panels + j * depth, width,
                                                c + j, c_stride, beside);
    } else {
      multiply_panel<U, Left::kByRow, false, 1>(rows, depth, a, a_stride, panels + j * depth, width,
                                                c + j, c_stride, beside);
    }
    j += width;
  }
}

template <typename T>
void add_bias_gradient(const AttentionBackwardParams& g, const Member& member, const Keys& keys,
                       int64_t n, const T* row) {
  T* to = static_cast<T*>(g.dbias) + member.b * g.dbias_stride_b + member.h * g.dbias_stride_h +
          n * g.dbias_stride_n;
  for_each_run(keys.columns, keys.split, keys.first, keys.last,
               [&](int64_t at, const int32_t* index, int64_t count) {
                 for (int64_t j = 0; j < count; ++j) to[index[j] * g.dbias_stride_m] += row[at + j];
               });
}

// Row r: scores become dropped-out weights, and `grad` (dO V^T) becomes the gradient of the scores.
template <typename U, typename T = Sum<U>>
void differentiate_row(const BackwardPlan<U>& plan, const Member& member, const Keys& keys,
                       int64_t n, Sum<U> shift, Sum<U> delta, Sum<U>* scores, Sum<U>* grad,
                       Sum<U>* factors) {
  const AttentionParams& p = plan.g->forward;
  const int64_t columns = keys.last - keys.first;
  if (p.bias != nullptr) {
    const ScoreBias bias = bias_of(p, member.b, member.h, n);
    for_each_run(keys.columns, keys.split, keys.first, keys.last,
                 [&](int64_t at, const int32_t* index, int64_t count) {
                   add_bias(bias, index, count, scores + at);
                 });
  }
  if (keys.padding) hide_padding(keys.columns, keys.first, keys.last, scores);
  const Vec<T> shifts = broadcast<T>(shift);
  const Vec<T> deltas = broadcast<T>(delta);
  if (p.dropout_p > 0) {
    const Dropout dropout = make_dropout(p.dropout_p, p.seed);
    for (int64_t j = 0; j < columns; ++j) factors[j] = T{0};
    for_each_run(keys.columns, keys.split, keys.first, keys.last,
                 [&](int64_t at, const int32_t* index, int64_t count) {
                   dropout_factors(dropout, member.b * p.heads + member.h, n, index, count,
                                   factors + at);
                 });
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      const Vec<T> weight = exp2<T>(load<T>(scores + j) - shifts);
      const Vec<T> factor = load<T>(factors + j);
      store<T>(grad + j, weight * (load<T>(grad + j) * factor - deltas));
      store<T>(scores + j, weight * factor);
    }
  } else {
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      const Vec<T> weight = exp2<T>(load<T>(scores + j) - shifts);
      store<T>(grad + j, weight * (load<T>(grad + j) - deltas));
      store<T>(scores + j, weight);
    }
  }
  if (plan.g->dbias != nullptr) add_bias_gradient(*plan.g, member, keys, n, grad);
}

// Scores and their gradients become weights and gradients of scores, as operands along the columns
// (gradients) and stacked.
template <typename U>
void differentiate_block(const BackwardPlan<U>& plan, const Member& member, const Keys& keys,
                         const Rows& rows, const HeadMemory<U>& head, const WorkerMemory<U>& w) {
  const int64_t columns = keys.last - keys.first;
  for (int64_t r = 0; r < rows.count; ++r) {
    Sum<U>* scores = w.scores + r * plan.score_stride;
    Sum<U>* grads = w.grads + r * plan.score_stride;
    differentiate_row(plan, member, keys, rows.split.index[rows.first + r],
                      head.shift[rows.first + r], head.delta[rows.first + r], scores, grads,
                      w.factors);
    OperandTraits<U>::round_row(scores, columns);
    OperandTraits<U>::round_row(grads, columns);
  }
  if constexpr (kTogether<U> > 1) {
    stack_rows(reinterpret_cast<const U*>(w.scores), plan.score_stride, rows.count, columns,
               w.scores_stack, plan.score_stride);
    stack_rows(reinterpret_cast<const U*>(w.grads), plan.score_stride, rows.count, columns,
               w.grads_stack, plan.score_stride);
  }
}

// Everything one block of keys and one block of rows owe each other. The order of dQ's sums is kept
// by `turn`, the number of key blocks already added to these rows.
template <typename U, typename F>
void meet(const BackwardPlan<U>& plan, const Member& member, const Keys& keys, const Rows& rows,
          const HeadMemory<U>& head, const WorkerMemory<U>& w, Counter& turn, bool first,
          F&& beside) {
  constexpr int64_t kWide = 2 * kLanes<Sum<U>>;
  const int64_t stacked = ceil_div(rows.count, kTogether<U>);
  Stretch<U> stretches[2];
  int count = 0;
  for (const bool ordinary : {true, false}) {
    stretches[count] = make_stretch(plan, keys, rows, head, w, ordinary);
    if (stretches[count].columns > 0) ++count;
  }
  for (int i = 0; i < count; ++i) {
    const Stretch<U>& s = stretches[i];
    multiply_panels(rows.count, s, plan.key_depth, s.q, plan.key_stride, s.keys_across,
                    w.scores + s.at, plan.score_stride, beside);
    multiply_panels(rows.count, s, plan.value_depth, head.grad_out + rows.first * plan.value_stride,
                    plan.value_stride, w.values_across + s.at * plan.value_depth, w.grads + s.at,
                    plan.score_stride, beside);
  }
  differentiate_block(plan, member, keys, rows, head, w);
  const U* const grad_out = head.grad_out_stack + stack_start(plan, rows) * plan.value_width;
  for (int i = 0; i < count; ++i) {
    const Stretch<U>& s = stretches[i];
    with_flag(!first, [&](auto accumulate) {
      multiply<U, Left::kByColumn, decltype(accumulate)::value>(
          s.held, plan.value_width, stacked, w.scores_stack + s.at, plan.score_stride, grad_out,
          plan.value_width, kWide, w.dv + s.at * plan.value_width, plan.value_width, beside);
      multiply<U, Left::kByColumn, decltype(accumulate)::value>(
          s.held, plan.key_width, stacked, w.grads_stack + s.at, plan.score_stride, s.q_stack,
          plan.key_width, kWide, s.dk, plan.key_width, beside);
    });
  }
  wait_until(turn, keys.block);
  for (int i = 0; i < count; ++i) {
    const Stretch<U>& s = stretches[i];
    with_flag(!writes_dq(head) || keys.block > 0, [&](auto accumulate) {
      multiply<U, Left::kByRow, decltype(accumulate)::value>(
          rows.count, plan.key_width, ceil_div(s.held, kTogether<U>),
          reinterpret_cast<const U*>(w.grads) + s.at / kTogether<U>, plan.score_stride, s.keys,
          plan.key_width, kWide, s.dq, plan.key_width, beside);
    });
  }
}

// -------------------------------------------------------------------------------------------------
// Tasks.

template <typename S>
void pack_task(const BackwardPlan<Operand<S>>& plan, int64_t unit, int64_t local,
               const SlotMemory<Operand<S>>& slot, const WorkerMemory<Operand<S>>& w) {
  using U = Operand<S>;
  const int64_t i = local / plan.row_blocks;
  const int64_t block = local % plan.row_blocks;
  const Member member = member_of(plan, unit, i);
  const Rows rows = rows_of(plan, member.b, block);
  const HeadMemory<U>& head = slot.heads[i];
  head.turns[block].value = 0;
  pack_rows<S>(plan, member, rows, head, w);
  // Without keys nobody else finishes these rows.
  if (columns_of<Compute<S>>(plan.keys.of(member.b)).total == 0)
    store_rows<S>(plan, member, rows, head, w);
}

template <typename S>
void key_task(const BackwardPlan<Operand<S>>& plan, int64_t unit, int64_t block,
              const SlotMemory<Operand<S>>& slot, const WorkerMemory<Operand<S>>& w,
              Ahead<S>& ahead) {
  using U = Operand<S>;
  for (int64_t i = 0; i < plan.members; i += plan.group) {
    const Member first = member_of(plan, unit, i);
    if (block == 0) clear_masked_keys<S>(*plan.g, first.b, first.kv);
    const Keys keys = keys_of(plan, first.b, first.kv, block);
    if (keys.first == keys.last) continue;
    pack_keys<S>(plan, keys, w);
    bool first_rows = writes_dk(plan, keys);
    for (int64_t j = i; j < i + plan.group; ++j) {
      const Member member = member_of(plan, unit, j);
      const HeadMemory<U>& head = slot.heads[j];
      for (int64_t r = 0; r < plan.row_blocks; ++r) {
        const Rows rows = rows_of(plan, member.b, r);
        if (rows.count == 0) continue;
        meet(plan, member, keys, rows, head, w, head.turns[r], first_rows, ahead);
        first_rows = false;
        if (keys.last == keys.columns.total) store_rows<S>(plan, member, rows, head, w);
        add(head.turns[r], 1);
      }
    }
    store_keys<S>(plan, keys, w);
  }
}

// What a unit stores, and what the next one reads (next: -1 if there is none); of its first head.
template <typename S>
Ahead<S> ahead_of(const BackwardPlan<Operand<S>>& plan, int64_t unit, int64_t next) {
  using T = Compute<S>;
  const AttentionBackwardParams& g = *plan.g;
  const AttentionParams& p = g.forward;
  Ahead<S> ahead;
  const auto add_keys = [&](const Member& m, const Tensor4& t, int64_t channels) {
    const Split keys = plan.keys.of(m.b);
    ahead.add(t, m.b, m.kv, keys.index, keys.ordinary + keys.special, channels);
  };
  const auto add_rows = [&](const Member& m, const Tensor4& t, int64_t channels) {
    const Split rows = plan.queries.of(m.b);
    ahead.add(t, m.b, m.h, rows.index, rows.ordinary + rows.special, channels);
  };
  const Member own = member_of(plan, unit, 0);
  add_keys(own, g.dk, p.head_dim);
  add_keys(own, g.dv, p.value_dim);
  add_rows(own, g.dq, p.head_dim);
  if (next >= 0) {
    const Member member = member_of(plan, next, 0);
    add_rows(member, p.q, p.head_dim);
    add_rows(member, g.grad_out, p.value_dim);
    add_rows(member, p.out, p.value_dim);
    add_keys(member, p.k, p.head_dim);
    add_keys(member, p.v, p.value_dim);
  }
  constexpr int64_t kRows = VecTraits<T>::kTileRows;
  constexpr int64_t kWide = 2 * kLanes<T>;
  const int64_t panels = ceil_div(plan.key_width, kWide);
  ahead.spread(plan.members * (p.queries / kRows * (2 * (p.keys / kWide) + panels) +
                               plan.row_blocks * (p.keys / kRows) * 2 * panels));
  return ahead;
}

// All of a unit. next: the one that the same worker does next; -1: none that is known.
template <typename S>
void run_unit(const BackwardMemory<Operand<S>>& m, int64_t unit, int64_t next, int64_t worker) {
  const BackwardPlan<Operand<S>>& plan = m.plan;
  const SlotMemory<Operand<S>>& slot = m.slots[worker];
  for (int64_t i = 0; i < plan.members * plan.row_blocks; ++i) {
    pack_task<S>(plan, unit, i, slot, m.workers[worker]);
  }
  Ahead<S> ahead = ahead_of<S>(plan, unit, next);
  for (int64_t i = 0; i < plan.key_blocks; ++i) {
    key_task<S>(plan, unit, i, slot, m.workers[worker], ahead);
  }
}

template <typename S>
void backward_typed(const AttentionBackwardParams& g, const Parallel& parallel, void* workspace) {
  using U = Operand<S>;
  Arena arena{static_cast<char*>(workspace), 0};
  const auto m = take_backward_memory<U>(g, parallel.workers, arena);
  const BackwardPlan<U>& plan = m.plan;
  fill_splits(plan.queries, query_source(g.forward));
  fill_splits(plan.keys, key_source(g.forward));
  for (int64_t i = 0; i < plan.slots; ++i) m.slots[i].packed->value = m.slots[i].done->value = 0;
  const int64_t packs = plan.members * plan.row_blocks;
  const int64_t per_unit = packs + plan.key_blocks;
  if (plan.units >= kHeadsPerWorker * plan.workers) {
    run_shares(parallel, plan.workers, plan.units, [&](int64_t unit, int64_t next, int64_t worker) {
      run_unit<S>(m, unit, next, worker);
    });
    return;
  }
  run_tasks(parallel, plan.workers, plan.units * per_unit, [&](int64_t task, int64_t worker) {
    const int64_t unit = task / per_unit;
    const int64_t local = task % per_unit;
    const int64_t round = unit / plan.slots;
    const SlotMemory<U>& slot = m.slots[unit % plan.slots];
    if (local < packs) {
      wait_until(*slot.done, round * plan.key_blocks);
      pack_task<S>(plan, unit, local, slot, m.workers[worker]);
      add(*slot.packed, 1);
    } else {
      wait_until(*slot.packed, (round + 1) * packs);
      Ahead<S> nothing;
      key_task<S>(plan, unit, local - packs, slot, m.workers[worker], nothing);
      add(*slot.done, 1);
    }
  });
}

}  // namespace

int64_t attention_backward_workspace(const AttentionBackwardParams& params, int64_t workers) {
  int64_t bytes = 0;
  with_storage_type(params.forward.dtype, [&](auto type) {
    Arena arena{nullptr, 0};
    take_backward_memory<Operand<decltype(type)>>(params, workers, arena);
    bytes = arena.used;
  });
  return bytes;
}

void attention_backward(const AttentionBackwardParams& params, const Parallel& parallel,
                        void* workspace) {
  with_storage_type(params.forward.dtype, [&](auto type) {
    backward_typed<decltype(type)>(params, parallel, workspace);
  });
}

}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
