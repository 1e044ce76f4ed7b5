// How attention backward reads rows and keys, and how it stores their gradients.
#pragma once

#include "attention_backward.h"

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

// Row of a head's stacks at which those of a block start.
template <typename U>
X_ROPE_CLS_INLINE int64_t stack_start(const BackwardPlan<U>& plan, const Rows& rows) {
  return kTogether<U> == 1 ? rows.first : rows.block * plan.stack_rows;
}

// A row of q, turned or not, as operands.
template <typename S>
void pack_query(const BackwardPlan<Operand<S>>& plan, const Member& member, int64_t n, bool turned,
                Operand<S>* to, const WorkerMemory<Operand<S>>& scratch) {
  using T = Compute<S>;
  const AttentionParams& p = plan.g->forward;
  T* const row = packed_in<Operand<S>>(to, scratch.rows);
  pack_row<S>(p, p.q, p.table_q, member.b, member.h, n, p.head_dim, plan.key_width, turned,
              static_cast<T>(p.scale * kLog2E), row, scratch.table);
  round_into(row, plan.key_width, to);
}

// A row of the output's gradient as operands, and its product with the output.
template <typename S>
Compute<S> pack_grad(const BackwardPlan<Operand<S>>& plan, const Member& member, int64_t n,
                     Operand<S>* to, const WorkerMemory<Operand<S>>& scratch) {
  using T = Compute<S>;
  const AttentionBackwardParams& g = *plan.g;
  const AttentionParams& p = g.forward;
  T* grad_out = packed_in<Operand<S>>(to, scratch.rows);
  T* out = scratch.rows + plan.value_width;
  pack_row<S>(p, g.grad_out, p.table_q, member.b, member.h, n, p.value_dim, plan.value_width, false,
              T{1}, grad_out, scratch.table);
  load_row(row_at<const S>(p.out, member.b, member.h, n), p.out.stride_d, p.value_dim, out);
  for (int64_t d = p.value_dim; d < plan.value_width; ++d) out[d] = T{0};
  Vec<T> products{};
  for (int64_t d = 0; d < plan.value_width; d += kLanes<T>) {
    products += load<T>(grad_out + d) * load<T>(out + d);
  }
  const T delta = sum_lanes<T>(products);
  round_into(grad_out, plan.value_width, to);
  if (g.grad_lse == nullptr) return delta;
  return delta - static_cast<const T*>(
                     g.grad_lse)[member.b * g.grad_lse_stride_b + member.h * g.grad_lse_stride_h +
                                 n * g.grad_lse_stride_n];
}

// The stacks of a block of packed rows.
template <typename U>
void stack_block(const BackwardPlan<U>& plan, const Rows& rows, const HeadMemory<U>& head) {
  if constexpr (kTogether<U> > 1) {
    const int64_t key = stack_start(plan, rows) * plan.key_width;
    const int64_t value = stack_start(plan, rows) * plan.value_width;
    stack_rows(head.q + rows.first * plan.key_stride, plan.key_stride, rows.count, plan.key_width,
               head.q_stack + key, plan.key_width);
    if (head.q_raw != nullptr) {
      stack_rows(head.q_raw + rows.first * plan.key_stride, plan.key_stride, rows.count,
                 plan.key_width, head.q_raw_stack + key, plan.key_width);
    }
    stack_rows(head.grad_out + rows.first * plan.value_stride, plan.value_stride, rows.count,
               plan.value_width, head.grad_out_stack + value, plan.value_width);
  }
}

// Whether the first block of keys writes all of dQ, which need not be cleared then.
template <typename U>
X_ROPE_CLS_INLINE bool writes_dq(const HeadMemory<U>& head) {
  return head.dq_raw == nullptr;
}
// Whether the first block of rows writes all of dK and dV.
template <typename U>
X_ROPE_CLS_INLINE bool writes_dk(const BackwardPlan<U>& plan, const Keys& keys) {
  return !keys.raw_too && plan.g->forward.queries > 0;
}

// Packs a block of rows of one query head and clears its gradient where that is added to.
template <typename S>
void pack_rows(const BackwardPlan<Operand<S>>& plan, const Member& member, const Rows& rows,
               const HeadMemory<Operand<S>>& head, const WorkerMemory<Operand<S>>& scratch) {
  using T = Compute<S>;
  const AttentionParams& p = plan.g->forward;
  const int64_t bh = member.b * p.heads + member.h;
  const bool clear = !writes_dq(head) || columns_of<T>(plan.keys.of(member.b)).total == 0;
  for (int64_t r = rows.first; r < rows.first + rows.count; ++r) {
    const int64_t n = rows.split.index[r];
    const bool turned = rows.ordinary && turns(p, p.table_q, member.b, n);
    pack_query<S>(plan, member, n, turned, head.q + r * plan.key_stride, scratch);
    if (head.q_raw != nullptr) {
      pack_query<S>(plan, member, n, false, head.q_raw + r * plan.key_stride, scratch);
    }
    head.delta[r] = pack_grad<S>(plan, member, n, head.grad_out + r * plan.value_stride, scratch);
    head.shift[r] = weight_shift(static_cast<const T*>(p.lse)[bh * p.queries + n]);
    for (int64_t d = 0; d < plan.key_width && clear; ++d) {
      head.dq[r * plan.key_width + d] = T{0};
      if (head.dq_raw != nullptr) head.dq_raw[r * plan.key_width + d] = T{0};
    }
  }
  stack_block(plan, rows, head);
}

// Turns a finished row or key gradient back: stores `main` (rotated space where `turned`) times
// `factor` plus `raw` (null: none) to `to`, and the rotated-space part to `rotated` where wanted.
template <typename S>
void store_gradient(const AttentionParams& p, const RotaryTable& table, int64_t b, int64_t h,
                    int64_t n, bool turned, Compute<S>* main, const Compute<S>* raw,
                    Compute<S> factor, const Tensor4& to, const Tensor4& rotated,
                    Compute<S>* table_buffer) {
  using T = Compute<S>;
  S* const row = row_at<S>(to, b, h, n);
  T* turned_back = main;  // where it goes before it is stored: to its place, if that can be
  if constexpr (__is_same(S, T)) {
    if (to.stride_d == 1) turned_back = row;
  }
  if (rotated.data != nullptr) {
    T* row = row_at<T>(rotated, b, h, n);
    for (int64_t d = 0; d < p.head_dim; ++d) {
      row[d * rotated.stride_d] = turned ? main[d] * factor : T{0};
    }
  }
  if (turned) {
    const TableRow<T> t = table_row<T>(table, b, h, n, p.pairs, table_buffer);
    rotate_row(main, turned_back, t, p.pairs, p.interleaved, true, factor);
  }
  for (int64_t d = turned ? 2 * p.pairs : 0; d < p.head_dim; ++d) turned_back[d] = main[d] * factor;
  if (raw != nullptr) {
    for (int64_t d = 0; d < p.head_dim; ++d) turned_back[d] += raw[d] * factor;
  }
  if (turned_back == main) store_row<S>(main, to.stride_d, p.head_dim, row);
}

template <typename S>
void store_rows(const BackwardPlan<Operand<S>>& plan, const Member& member, const Rows& rows,
                const HeadMemory<Operand<S>>& head, const WorkerMemory<Operand<S>>& scratch) {
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

// One panel of k or v: `width` rows from column `c`, turned where they are to be; stacked in
// `stack` (null: not wanted) and across in `across`.
template <typename S>
void pack_panel(const BackwardPlan<Operand<S>>& plan, const Keys& keys, const Tensor4& x,
                int64_t channels, int64_t c, int64_t width, bool turn, Operand<S>* stack,
                Operand<S>* across, const WorkerMemory<Operand<S>>& w) {
  using T = Compute<S>;
  using U = Operand<S>;
  const AttentionParams& p = plan.g->forward;
  const int64_t padded = round_up(channels, kLanes<T>);
  // Operands that are elements are packed where the stack is.
  T* const rows = kTogether<U> == 1 && stack != nullptr ? reinterpret_cast<T*>(stack) : w.rows;
  for (int64_t i = 0; i < width; ++i) {
    T* row = rows + i * padded;
    const int64_t n = keys.token(c + i);
    if (n >= 0) {
      pack_row<S>(p, x, p.table_k, keys.b, keys.h, n, channels, padded,
                  turn && turns(p, p.table_k, keys.b, n), T{1}, row, w.table);
    } else {
      for (int64_t d = 0; d < padded; ++d) row[d] = T{0};
    }
    OperandTraits<U>::round_row(row, padded);
  }
  if constexpr (kTogether<U> > 1) {
    if (stack != nullptr) {
      stack_rows(reinterpret_cast<const U*>(rows), padded, width, padded, stack, padded);
    }
  }
  transpose_panel(rows, padded, width, ceil_div(channels, kTogether<U>),
                  reinterpret_cast<T*>(across));
}

// Packs keys and values of the block, panel by panel, and clears their gradients where these are
// added to.
template <typename S>
void pack_keys(const BackwardPlan<Operand<S>>& plan, const Keys& keys,
               const WorkerMemory<Operand<S>>& w) {
  using T = Compute<S>;
  using U = Operand<S>;
  const AttentionParams& p = plan.g->forward;
  for (int64_t c = keys.first; c < keys.last;) {
    const int64_t width = panel_at<T>(keys.columns, c).width;
    const bool ordinary = c < keys.columns.special_start;
    const int64_t at = c - keys.first;
    const int64_t stack = at / kTogether<U> * plan.key_width;
    pack_panel<S>(plan, keys, p.k, p.head_dim, c, width, ordinary, w.keys + stack,
                  w.keys_across + at * plan.key_depth, w);
    if (keys.raw_too) {
      pack_panel<S>(plan, keys, p.k, p.head_dim, c, width, false, w.keys_raw + stack,
                    w.keys_raw_across + at * plan.key_depth, w);
    }
    pack_panel<S>(plan, keys, p.v, p.value_dim, c, width, false, nullptr,
                  w.values_across + at * plan.value_depth, w);
    c += width;
  }
  if (writes_dk(plan, keys)) return;
  const int64_t count = keys.last - keys.first;
  for (int64_t i = 0; i < count * plan.key_width; ++i) w.dk[i] = T{0};
  for (int64_t i = 0; keys.raw_too && i < count * plan.key_width; ++i) w.dk_raw[i] = T{0};
  for (int64_t i = 0; i < count * plan.value_width; ++i) w.dv[i] = T{0};
}

template <typename S>
void store_keys(const BackwardPlan<Operand<S>>& plan, const Keys& keys,
                const WorkerMemory<Operand<S>>& w) {
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

}  // namespace
}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
