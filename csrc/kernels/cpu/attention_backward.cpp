// Attention backward: weights are recomputed from the logsumexp, blocks of keys outside, blocks of
// rows inside.
//
// A task takes one block of keys of one key head, passes over all rows that read it and accumulates
// dK and dV in its own scratch. dQ is shared: tasks add to a block of its rows in the order of
// their keys, each waiting for its turn, so the sum is the same for any number of threads, and
// whoever adds last turns it back and stores it. Sums are in the space of rotated queries and keys
// where both tokens have a position and in the raw space elsewhere.
#include "attention_backward.h"

#include "isa.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// -------------------------------------------------------------------------------------------------
// Rows.

// Logsumexp in units of log2, so that exp2(score - it) is the weight; +infinity, and so weight 0,
// for rows with nothing to attend to and for those hidden by biases so large that nothing is left
// of the scores.
template <typename T>
X_ROPE_CLS_INLINE T weight_shift(T lse) {
  constexpr double kHidden = sizeof(T) == 8 ? -1e300 : -1e30;
  const T shift = lse * static_cast<T>(kLog2E);
  return shift < static_cast<T>(kHidden) ? kInfinity<T> : shift;
}

// Packs a block of rows of one query head and clears its gradient.
template <typename S>
void pack_rows(const BackwardPlan<Compute<S>>& plan, const Member& member, const Rows& rows,
               const HeadMemory<Compute<S>>& head, const WorkerMemory<Compute<S>>& scratch) {
  using T = Compute<S>;
  const AttentionBackwardParams& g = *plan.g;
  const AttentionParams& p = g.forward;
  const T scale = static_cast<T>(p.scale * kLog2E);
  const int64_t bh = member.b * p.heads + member.h;
  for (int64_t r = rows.first; r < rows.first + rows.count; ++r) {
    const int64_t n = rows.split.index[r];
    const bool turned = rows.ordinary && turns(p, p.table_q, member.b, n);
    pack_row<S>(p, p.q, p.table_q, member.b, member.h, n, p.head_dim, plan.key_width, turned, scale,
                head.q + r * plan.key_width, scratch.table);
    if (head.q_raw != nullptr) {
      pack_row<S>(p, p.q, p.table_q, member.b, member.h, n, p.head_dim, plan.key_width, false,
                  scale, head.q_raw + r * plan.key_width, scratch.table);
    }
    T* grad_out = head.grad_out + r * plan.value_width;
    pack_row<S>(p, g.grad_out, p.table_q, member.b, member.h, n, p.value_dim, plan.value_width,
                false, T{1}, grad_out, scratch.table);
    load_row(row_at<const S>(p.out, member.b, member.h, n), p.out.stride_d, p.value_dim,
             scratch.row);
    T delta = T{0};
    for (int64_t d = 0; d < p.value_dim; ++d) delta += grad_out[d] * scratch.row[d];
    if (g.grad_lse != nullptr) {
      delta -= static_cast<const T*>(
          g.grad_lse)[member.b * g.grad_lse_stride_b + member.h * g.grad_lse_stride_h +
                      n * g.grad_lse_stride_n];
    }
    head.delta[r] = delta;
    head.shift[r] = weight_shift(static_cast<const T*>(p.lse)[bh * p.queries + n]);
    for (int64_t d = 0; d < plan.key_width; ++d) {
      head.dq[r * plan.key_width + d] = T{0};
      if (head.dq_raw != nullptr) head.dq_raw[r * plan.key_width + d] = T{0};
    }
  }
}

// Turns a finished row or key gradient back: stores `main` (rotated space where `turned`) times
// `factor` plus `raw` (null: none) to `to`, and the rotated-space part to `rotated` where wanted.
template <typename S>
void store_gradient(const AttentionParams& p, const RotaryTable& table, int64_t b, int64_t h,
                    int64_t n, bool turned, Compute<S>* main, const Compute<S>* raw,
                    Compute<S> factor, const Tensor4& to, const Tensor4& rotated,
                    Compute<S>* table_buffer) {
  using T = Compute<S>;
  for (int64_t d = 0; d < p.head_dim; ++d) main[d] *= factor;
  if (rotated.data != nullptr) {
    T* row = row_at<T>(rotated, b, h, n);
    for (int64_t d = 0; d < p.head_dim; ++d) row[d * rotated.stride_d] = turned ? main[d] : T{0};
  }
  if (turned) {
    const TableRow<T> t = table_row<T>(table, b, h, n, p.pairs, table_buffer);
    rotate_row(main, main, t, p.pairs, p.interleaved, true);
  }
  if (raw != nullptr) {
    for (int64_t d = 0; d < p.head_dim; ++d) main[d] += raw[d] * factor;
  }
  store_row<S>(main, to.stride_d, p.head_dim, row_at<S>(to, b, h, n));
}

template <typename S>
void store_rows(const BackwardPlan<Compute<S>>& plan, const Member& member, const Rows& rows,
                const HeadMemory<Compute<S>>& head, const WorkerMemory<Compute<S>>& scratch) {
  using T = Compute<S>;
  const AttentionParams& p = plan.g->forward;
  for (int64_t r = rows.first; r < rows.first + rows.count; ++r) {
    const int64_t n = rows.split.index[r];
    const bool turned = rows.ordinary && turns(p, p.table_q, member.b, n);
    const T* raw =
        rows.ordinary && head.dq_raw != nullptr ? head.dq_raw + r * plan.key_width : nullptr;
    store_gradient<S>(p, p.table_q, member.b, member.h, n, turned, head.dq + r * plan.key_width,
                      raw, static_cast<T>(p.scale), plan.g->dq, plan.g->dq_rotated, scratch.table);
  }
}

// -------------------------------------------------------------------------------------------------
// Keys.

// Packs keys and values of the block, panel by panel, and clears their gradients.
template <typename S>
void pack_keys(const BackwardPlan<Compute<S>>& plan, const Keys& keys,
               const WorkerMemory<Compute<S>>& w) {
  using T = Compute<S>;
  const AttentionParams& p = plan.g->forward;
  T* const raw_block = keys.raw_too ? w.keys_raw : nullptr;
  for (int64_t c = keys.first; c < keys.last;) {
    const int64_t width = panel_width<T>(keys.columns, c);
    const bool ordinary = c < keys.columns.special_start;
    const int64_t at = c - keys.first;
    for (int64_t i = 0; i < width; ++i) {
      T* row = w.keys + (at + i) * plan.key_width;
      T* raw = raw_block == nullptr ? nullptr : raw_block + (at + i) * plan.key_width;
      T* value = w.row + i * plan.value_width;
      const int64_t n = keys.token(c + i);
      if (n >= 0) {
        const bool turned = ordinary && turns(p, p.table_k, keys.b, n);
        pack_row<S>(p, p.k, p.table_k, keys.b, keys.h, n, p.head_dim, plan.key_width, turned, T{1},
                    row, w.table);
        if (raw != nullptr) {
          pack_row<S>(p, p.k, p.table_k, keys.b, keys.h, n, p.head_dim, plan.key_width, false, T{1},
                      raw, w.table);
        }
        pack_row<S>(p, p.v, p.table_k, keys.b, keys.h, n, p.value_dim, plan.value_width, false,
                    T{1}, value, w.table);
      } else {
        for (int64_t d = 0; d < plan.key_width; ++d) row[d] = T{0};
        for (int64_t d = 0; raw != nullptr && d < plan.key_width; ++d) raw[d] = T{0};
        for (int64_t d = 0; d < plan.value_width; ++d) value[d] = T{0};
      }
    }
    transpose_panel(w.keys + at * plan.key_width, plan.key_width, width, p.head_dim,
                    w.keys_across + at * p.head_dim);
    if (raw_block != nullptr) {
      transpose_panel(raw_block + at * plan.key_width, plan.key_width, width, p.head_dim,
                      w.keys_raw_across + at * p.head_dim);
    }
    transpose_panel(w.row, plan.value_width, width, p.value_dim,
                    w.values_across + at * p.value_dim);
    c += width;
  }
  const int64_t count = keys.last - keys.first;
  for (int64_t i = 0; i < count * plan.key_width; ++i) w.dk[i] = T{0};
  for (int64_t i = 0; keys.raw_too && i < count * plan.key_width; ++i) w.dk_raw[i] = T{0};
  for (int64_t i = 0; i < count * plan.value_width; ++i) w.dv[i] = T{0};
}

template <typename S>
void store_keys(const BackwardPlan<Compute<S>>& plan, const Keys& keys,
                const WorkerMemory<Compute<S>>& w) {
  using T = Compute<S>;
  const AttentionBackwardParams& g = *plan.g;
  const AttentionParams& p = g.forward;
  for (int64_t c = keys.first; c < keys.last; ++c) {
    const int64_t n = keys.token(c);
    if (n < 0) continue;
    const int64_t at = c - keys.first;
    const bool ordinary = c < keys.columns.special_start;
    const bool turned = ordinary && turns(p, p.table_k, keys.b, n);
    const T* raw = ordinary && keys.raw_too ? w.dk_raw + at * plan.key_width : nullptr;
    // Queries were packed with scale * log2(e); dK wants the scale alone.
    store_gradient<S>(p, p.table_k, keys.b, keys.h, n, turned, w.dk + at * plan.key_width, raw,
                      static_cast<T>(kLn2), g.dk, g.dk_rotated, w.table);
    store_row<S>(w.dv + at * plan.value_width, g.dv.stride_d, p.value_dim,
                 row_at<S>(g.dv, keys.b, keys.h, n));
  }
}

// Gradients of masked keys are zero; no block holds them.
template <typename S>
void clear_masked_keys(const AttentionBackwardParams& g, int64_t b, int64_t h) {
  using T = Compute<S>;
  const AttentionParams& p = g.forward;
  if (p.key_mask == nullptr) return;
  for (int64_t n = 0; n < p.keys; ++n) {
    if (p.key_mask[b * p.key_mask_stride_b + n * p.key_mask_stride_n] != 0) continue;
    S* dk = row_at<S>(g.dk, b, h, n);
    S* dv = row_at<S>(g.dv, b, h, n);
    for (int64_t d = 0; d < p.head_dim; ++d) dk[d * g.dk.stride_d] = from_compute<S>(T{0});
    for (int64_t d = 0; d < p.value_dim; ++d) dv[d * g.dv.stride_d] = from_compute<S>(T{0});
    if (g.dk_rotated.data == nullptr) continue;
    T* rotated = row_at<T>(g.dk_rotated, b, h, n);
    for (int64_t d = 0; d < p.head_dim; ++d) rotated[d * g.dk_rotated.stride_d] = T{0};
  }
}

// -------------------------------------------------------------------------------------------------
// A block of keys against a block of rows.

// A stretch of the block's columns of one class, and what its pairs with a block of rows use.
template <typename T>
struct Stretch {
  int64_t at, columns;   // first column from the block's start, number of columns
  const T* q;            // rows as these pairs see them
  const T* keys;         // (columns, key_width)
  const T* keys_across;  // panels
  T* dk;
  T* dq;
};

template <typename T>
Stretch<T> make_stretch(const BackwardPlan<T>& plan, const Keys& keys, const Rows& rows,
                        const HeadMemory<T>& head, const WorkerMemory<T>& w, bool ordinary_keys) {
  const int64_t first = ordinary_keys ? keys.first : max_of(keys.first, keys.columns.special_start);
  const int64_t last = ordinary_keys ? min_of(keys.last, keys.columns.special_start) : keys.last;
  const int64_t at = first - keys.first;
  const int64_t offset = rows.first * plan.key_width;
  const bool raw_rows = rows.ordinary && !ordinary_keys;
  const bool raw_keys = !rows.ordinary && ordinary_keys;
  return {at,
          last - first,
          (raw_rows ? head.q_raw : head.q) + offset,
          (raw_keys ? w.keys_raw : w.keys) + at * plan.key_width,
          (raw_keys ? w.keys_raw_across : w.keys_across) + at * plan.g->forward.head_dim,
          (raw_keys ? w.dk_raw : w.dk) + at * plan.key_width,
          (raw_rows ? head.dq_raw : head.dq) + offset};
}

// C = A B for the panels of a stretch; B's panels are [panel][depth][column].
template <typename T>
X_ROPE_CLS_INLINE void multiply_panels(int64_t rows, int64_t columns, int64_t depth, const T* a,
                                       int64_t a_stride, const T* panels, T* c, int64_t c_stride) {
  for (int64_t j = 0; j < columns;) {
    const int64_t width = min_of<int64_t>(2 * kLanes<T>, columns - j);
    if (width == 2 * kLanes<T>) {
      multiply_panel<T, Left::kByRow, false, 2>(rows, depth, a, a_stride, panels + j * depth, width,
                                                c + j, c_stride);
    } else {
      multiply_panel<T, Left::kByRow, false, 1>(rows, depth, a, a_stride, panels + j * depth, width,
                                                c + j, c_stride);
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
template <typename T>
void differentiate_row(const BackwardPlan<T>& plan, const Member& member, const Keys& keys,
                       int64_t n, T shift, T delta, T* scores, T* grad, T* factors) {
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

// Everything one block of keys and one block of rows owe each other. The order of dQ's sums is kept
// by `turn`, the number of key blocks already added to these rows.
template <typename T>
void meet(const BackwardPlan<T>& plan, const Member& member, const Keys& keys, const Rows& rows,
          const HeadMemory<T>& head, const WorkerMemory<T>& w, Counter& turn) {
  const AttentionParams& p = plan.g->forward;
  const int64_t columns = keys.last - keys.first;
  const T* grad_out = head.grad_out + rows.first * plan.value_width;
  Stretch<T> stretches[2];
  int count = 0;
  for (const bool ordinary : {true, false}) {
    stretches[count] = make_stretch(plan, keys, rows, head, w, ordinary);
    if (stretches[count].columns > 0) ++count;
  }
  for (int i = 0; i < count; ++i) {
    const Stretch<T>& s = stretches[i];
    multiply_panels(rows.count, s.columns, p.head_dim, s.q, plan.key_width, s.keys_across,
                    w.scores + s.at, plan.score_stride);
    multiply_panels(rows.count, s.columns, p.value_dim, grad_out, plan.value_width,
                    w.values_across + s.at * p.value_dim, w.grads + s.at, plan.score_stride);
  }
  for (int64_t r = 0; r < rows.count; ++r) {
    differentiate_row(plan, member, keys, rows.split.index[rows.first + r],
                      head.shift[rows.first + r], head.delta[rows.first + r],
                      w.scores + r * plan.score_stride, w.grads + r * plan.score_stride, w.factors);
  }
  multiply<T, Left::kByColumn, true>(columns, plan.value_width, rows.count, w.scores,
                                     plan.score_stride, grad_out, plan.value_width, 2 * kLanes<T>,
                                     w.dv, plan.value_width);
  for (int i = 0; i < count; ++i) {
    const Stretch<T>& s = stretches[i];
    multiply<T, Left::kByColumn, true>(s.columns, plan.key_width, rows.count, w.grads + s.at,
                                       plan.score_stride, s.q, plan.key_width, 2 * kLanes<T>, s.dk,
                                       plan.key_width);
  }
  wait_until(turn, keys.block);
  for (int i = 0; i < count; ++i) {
    const Stretch<T>& s = stretches[i];
    multiply<T, Left::kByRow, true>(rows.count, plan.key_width, s.columns, w.grads + s.at,
                                    plan.score_stride, s.keys, plan.key_width, 2 * kLanes<T>, s.dq,
                                    plan.key_width);
  }
}

// -------------------------------------------------------------------------------------------------
// Tasks.

template <typename S>
void pack_task(const BackwardPlan<Compute<S>>& plan, int64_t unit, int64_t local,
               const SlotMemory<Compute<S>>& slot, const WorkerMemory<Compute<S>>& w) {
  using T = Compute<S>;
  const int64_t i = local / plan.row_blocks;
  const int64_t block = local % plan.row_blocks;
  const Member member = member_of(plan, unit, i);
  const Rows rows = rows_of(plan, member.b, block);
  const HeadMemory<T>& head = slot.heads[i];
  head.turns[block].value = 0;
  pack_rows<S>(plan, member, rows, head, w);
  // Without keys nobody else finishes these rows.
  if (columns_of<T>(plan.keys.of(member.b)).total == 0) store_rows<S>(plan, member, rows, head, w);
}

template <typename S>
void key_task(const BackwardPlan<Compute<S>>& plan, int64_t unit, int64_t block,
              const SlotMemory<Compute<S>>& slot, const WorkerMemory<Compute<S>>& w) {
  using T = Compute<S>;
  for (int64_t i = 0; i < plan.members; i += plan.group) {
    const Member first = member_of(plan, unit, i);
    if (block == 0) clear_masked_keys<S>(*plan.g, first.b, first.kv);
    const Keys keys = keys_of(plan, first.b, first.kv, block);
    if (keys.first == keys.last) continue;
    pack_keys<S>(plan, keys, w);
    for (int64_t j = i; j < i + plan.group; ++j) {
      const Member member = member_of(plan, unit, j);
      const HeadMemory<T>& head = slot.heads[j];
      for (int64_t r = 0; r < plan.row_blocks; ++r) {
        const Rows rows = rows_of(plan, member.b, r);
        if (rows.count == 0) continue;
        meet(plan, member, keys, rows, head, w, head.turns[r]);
        if (keys.last == keys.columns.total) store_rows<S>(plan, member, rows, head, w);
        add(head.turns[r], 1);
      }
    }
    store_keys<S>(plan, keys, w);
  }
}

template <typename S>
void backward_typed(const AttentionBackwardParams& g, const Parallel& parallel, void* workspace) {
  using T = Compute<S>;
  Arena arena{static_cast<char*>(workspace), 0};
  const auto m = take_backward_memory<T>(g, parallel.workers, arena);
  const BackwardPlan<T>& plan = m.plan;
  fill_splits(plan.queries, query_source(g.forward));
  fill_splits(plan.keys, key_source(g.forward));
  for (int64_t i = 0; i < plan.slots; ++i) m.slots[i].packed->value = m.slots[i].done->value = 0;
  const int64_t packs = plan.members * plan.row_blocks;
  const int64_t per_unit = packs + plan.key_blocks;
  run_tasks(parallel, plan.workers, plan.units * per_unit, [&](int64_t task, int64_t worker) {
    const int64_t unit = task / per_unit;
    const int64_t local = task % per_unit;
    const int64_t round = unit / plan.slots;
    const SlotMemory<T>& slot = m.slots[unit % plan.slots];
    if (local < packs) {
      wait_until(*slot.done, round * plan.key_blocks);
      pack_task<S>(plan, unit, local, slot, m.workers[worker]);
      add(*slot.packed, 1);
    } else {
      wait_until(*slot.packed, (round + 1) * packs);
      key_task<S>(plan, unit, local - packs, slot, m.workers[worker]);
      add(*slot.done, 1);
    }
  });
}

}  // namespace

int64_t attention_backward_workspace(const AttentionBackwardParams& params, int64_t workers) {
  int64_t bytes = 0;
  with_storage_type(params.forward.dtype, [&](auto type) {
    Arena arena{nullptr, 0};
    take_backward_memory<Compute<decltype(type)>>(params, workers, arena);
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
