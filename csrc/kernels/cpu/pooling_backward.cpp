// Pooling backward: one read of the token states, one write of their gradient.
//
// With s = scale <q, x_n>, p = exp(s - lse) and g the gradient of the pooled row, ds = p (<g, x_n>
// - <g, pooled> + grad_lse), dx_n = sum over rows of p g + scale ds q, dq = scale sum over n of ds
// x_n. Scaled queries and g are stacked, so that one pass of inner products gives both kinds of
// scores, and one product of the stacked weights with the stacked rows gives dx. Sums over tokens
// are kept by task and added up in order at the end: the same bits for any number of threads.
#include "isa.h"
#include "pooling_common.h"
#include "pooling_grads.h"
#include "quad_rows.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

constexpr int64_t kGradTokens = 12;  // whose gradients wait in L1 for what else is done to them

template <typename S>
struct PoolGradScratch {
  using T = Compute<S>;
  T* stack;   // (2 * rows, stride): queries times scale * log2(e), then gradients of pooled
  T* quads;   // the same as quad_rows.h has it, where plan.quads
  T* scores;  // (2 * rows, columns)
  T* shift;   // (rows): logsumexp in units of log2; infinity where there was nothing to attend to
  T* delta;   // (rows): <g, pooled> - grad_lse
  T* excess;  // (rows): what ds * ln 2 - p * grad_lse * ln 2 sums up to; it would be 0
  T* buffer;  // (block, width)
  T* grads;   // (kGradTokens, width): gradients of the (normalised) tokens
  T* raw;     // (width): one token before its normalisation
  TokenMoments<T>* moments;
  DotScratch dots;
  Operand<S>* pair_weights;  // (rows, columns), where plan.dots: scores in pairs of rows
  Operand<S>* pair_stack;    // (rows, width): queries, and gradients of pooled, in pairs of rows
  int64_t fetched;           // part whose first block has been asked for; -1: none
};

template <typename S>
struct PoolGradMemory {
  using T = Compute<S>;
  PoolPlan plan;
  PoolGradScratch<S>* scratch;
  T* sums;  // (slots, rows + 2, width): dq / (scale * log2 e), gradients of norm weight and bias
  int64_t slots;
};

// Whether dx goes from registers to memory, and past the caches.
template <typename S>
void choose_stores(const PoolBackwardParams& g, PoolPlan& plan) {
  const auto size = static_cast<int64_t>(sizeof(S));
  plan.direct_grads = g.dx.data != nullptr && g.forward.norm == PoolNorm::kNone &&
                      g.dx.stride_c == 1 && plan.width == g.forward.channels;
  const int64_t offsets = g.dx.stride_b | g.dx.stride_n | g.forward.channels;
  const auto bytes = static_cast<double>(g.forward.batch * g.forward.tokens) *
                     static_cast<double>(g.forward.channels * size);
  plan.stream_grads = plan.direct_grads && rows_stream(bytes, g.dx.data, offsets * size);
}

// Queries of their own sum up by batch, everything shared by task.
template <typename S>
PoolGradMemory<S> take_pool_grad_memory(const PoolBackwardParams& g, int64_t workers,
                                        Arena& arena) {
  using T = Compute<S>;
  PoolGradMemory<S> m{};
  m.plan = make_pool_plan<S>(g.forward, workers, 7);
  if (g.forward.query_batch != 1 && m.plan.group > 1) {
    m.plan.group = 1;
    m.plan.tasks = g.forward.batch;
  }
  choose_stores<S>(g, m.plan);
  m.plan.quads = !m.plan.dots && fills_quads<T>(2 * m.plan.rows);
  const PoolPlan& plan = m.plan;
  take_kept(m.plan, arena);
  m.slots = plan.tasks;
  m.sums = arena.take<T>(m.slots * (plan.rows + 2) * plan.width);
  m.scratch = arena.take<PoolGradScratch<S>>(plan.workers);
  for (int64_t i = 0; i < plan.workers; ++i) {
    PoolGradScratch<S> s{};
    s.stack = arena.take<T>(2 * plan.rows * plan.stride);
    s.quads = arena.take<T>(plan.quads ? quad_rows_size<T>(2 * plan.rows, plan.width) : 0);
    s.scores = arena.take<T>(2 * plan.rows * plan.columns);
    s.shift = arena.take<T>(plan.rows);
    s.delta = arena.take<T>(plan.rows);
    s.excess = arena.take<T>(plan.rows);
    s.buffer = needs_buffer(plan) && !plan.dots ? arena.take<T>(plan.block * plan.width) : nullptr;
    s.grads = arena.take<T>(kGradTokens * plan.width);
    s.raw = arena.take<T>(plan.width);
    s.moments = arena.take<TokenMoments<T>>(plan.block);
    s.dots = take_dot_scratch(plan, 2 * plan.rows, arena);
    if (plan.dots) {
      s.pair_weights = arena.take<Operand<S>>(plan.rows * plan.columns);
      s.pair_stack = arena.take<Operand<S>>(plan.rows * plan.width);
    }
    s.fetched = -1;
    if (arena.base != nullptr) m.scratch[i] = s;
  }
  return m;
}

template <typename T>
X_ROPE_CLS_INLINE T lse_grad(const PoolBackwardParams& g, int64_t b, int64_t r) {
  if (g.grad_lse == nullptr) return T{0};
  const int64_t queries = g.forward.queries;
  return static_cast<const T*>(
      g.grad_lse)[b * g.grad_lse_stride_b + r / queries * g.grad_lse_stride_h +
                  r % queries * g.grad_lse_stride_m];
}

// Everything that belongs to the rows of batch b.
template <typename S>
void prepare_rows(const PoolPlan& plan, const PoolBackwardParams& g, int64_t b,
                  const PoolGradScratch<S>& s) {
  using T = Compute<S>;
  const PoolParams& p = *plan.p;
  T* grads = s.stack + plan.rows * plan.stride;
  pack_pool_rows<S>(plan, p.query, b, 0, plan.rows, static_cast<T>(p.scale * kLog2E), s.stack);
  pack_pool_rows<S>(plan, g.grad, b, 0, plan.rows, T{1}, grads);
  if (plan.quads) rows_to_quads(s.stack, plan.stride, 2 * plan.rows, plan.width, s.quads);
  if constexpr (kHasDots<S>) {
    if (plan.dots) {
      copy_pool_rows<S>(plan, p.query, b, s.dots.rows);
      copy_pool_rows<S>(plan, g.grad, b, s.dots.rows + plan.rows * plan.stride);
      stack_rows(reinterpret_cast<const Operand<S>*>(s.dots.rows), plan.stride / 2, 2 * plan.rows,
                 plan.width, s.pair_stack, plan.width);
    }
  }
  for (int64_t r = 0; r < plan.rows; ++r) {
    const int64_t row = b * plan.rows + r;
    const T lse = static_cast<const T*>(p.lse)[row] * static_cast<T>(kLog2E);
    s.shift[r] = lse == -kInfinity<T> ? kInfinity<T> : lse;
    load_row(static_cast<const S*>(p.pooled) + row * p.channels, 1, p.channels, s.raw);
    for (int64_t c = p.channels; c < plan.width; ++c) s.raw[c] = T{0};
    const T* grad = grads + r * plan.stride;
    T delta =
        sum_of<T>(plan.width, [&](int64_t c) { return load<T>(grad + c) * load<T>(s.raw + c); });
    s.delta[r] = delta - lse_grad<T>(g, b, r);
    s.excess[r] = T{0};
  }
}

// Scores s and <g, x> become ds * ln 2 and p.
template <typename S>
void pool_score_grads(const PoolPlan& plan, const PoolBackwardParams& g, int64_t b, int64_t tokens,
                      const PoolGradScratch<S>& s) {
  using T = Compute<S>;
  constexpr int kL = kLanes<T>;
  const Vec<T> ln2 = broadcast<T>(static_cast<T>(kLn2));
  const int64_t columns = round_up(tokens, kL);
  for (int64_t r = 0; r < plan.rows; ++r) {
    T* score = s.scores + r * plan.columns;
    T* other = s.scores + (plan.rows + r) * plan.columns;
    for (int64_t j = tokens; j < columns; ++j) {
      score[j] = -kInfinity<T>;
      other[j] = T{0};
    }
    const Vec<T> shift = broadcast<T>(s.shift[r]);
    const Vec<T> delta = broadcast<T>(s.delta[r]);
    Vec<T> grads{};
    Vec<T> weights{};
    for (int64_t j = 0; j < columns; j += kL) {
      const Vec<T> weight = exp2<T>(load<T>(score + j) - shift);
      const Vec<T> grad = weight * (load<T>(other + j) - delta) * ln2;
      store<T>(score + j, grad);
      store<T>(other + j, weight);
      grads += grad;
      weights += weight;
    }
    s.excess[r] +=
        sum_lanes<T>(grads) - sum_lanes<T>(weights) * lse_grad<T>(g, b, r) * static_cast<T>(kLn2);
  }
}

// The exact ds of a row sum up to grad_lse: a shift of the scores moves the logsumexp and nothing
// else. What the rounding of pooled, and so of delta, leaves over is p times the excess, and is
// taken out of the gradient of the query here.
template <typename S>
void take_out_excess(const PoolPlan& plan, int64_t b, const PoolGradScratch<S>& s,
                     Compute<S>* sums) {
  using T = Compute<S>;
  const PoolParams& p = *plan.p;
  for (int64_t r = 0; r < plan.rows; ++r) {
    load_row(static_cast<const S*>(p.pooled) + (b * plan.rows + r) * p.channels, 1, p.channels,
             s.raw);
    if constexpr (kHasDots<S>) {
      if (plan.dots) dot_order(s.raw, plan.width);
    }
    T* to = sums + r * plan.width;
    for (int64_t c = 0; c < p.channels; ++c) to[c] -= s.excess[r] * s.raw[c];
  }
}

// grads: of the normalised token; becomes that of the token itself.
template <typename S>
void norm_backward(const PoolPlan& plan, const TokenRange& range, int64_t i,
                   TokenMoments<Compute<S>> moments, const PoolGradScratch<S>& s, Compute<S>* grads,
                   Compute<S>* dweight, Compute<S>* dbias) {
  using T = Compute<S>;
  const PoolParams& p = *plan.p;
  const T* weight = static_cast<const T*>(p.norm_weight);
  load_row(token_at<const S>(p.x, range.b, range.token(i)), p.x.stride_c, p.channels, s.raw);
  for (int64_t c = 0; c < p.channels; ++c) {
    s.raw[c] = (s.raw[c] - moments.mean) * moments.inverse;
    dbias[c] += grads[c];
    dweight[c] += grads[c] * s.raw[c];
    if (weight != nullptr) grads[c] *= weight[c];
  }
  for (int64_t c = p.channels; c < plan.width; ++c) s.raw[c] = grads[c] = T{0};
  const T n = static_cast<T>(p.channels);
  const T mean = p.norm == PoolNorm::kLayer
                     ? sum_of<T>(plan.width, [&](int64_t c) { return load<T>(grads + c); }) / n
                     : T{0};
  const T along =
      sum_of<T>(plan.width, [&](int64_t c) { return load<T>(grads + c) * load<T>(s.raw + c); }) / n;
  for (int64_t c = 0; c < p.channels; ++c) {
    grads[c] = (grads[c] - mean - s.raw[c] * along) * moments.inverse;
  }
}

// Scores as weights of the product with the stacked rows.
template <typename S, typename U>
GradFactors<U> grad_factors(const PoolPlan& plan, int64_t count, const PoolGradScratch<S>& s) {
  if constexpr (__is_same(U, Compute<S>)) {
    return {s.scores, plan.columns, s.stack, plan.stride, plan.width, 2 * plan.rows};
  } else {
    pair_weights(plan, count, static_cast<Sum<U>>(plan.p->scale * kLog2E), s.scores,
                 s.pair_weights);
    return {s.pair_weights, plan.columns, s.pair_stack, plan.width, plan.width, plan.rows};
  }
}

// dx of `count` tokens from the i-th of the range on, by products of operands U.
template <typename S, typename U>
void token_grads(const PoolPlan& plan, const PoolBackwardParams& g, const TokenRange& range,
                 int64_t i, int64_t count, const PoolGradScratch<S>& s, Compute<S>* sums) {
  using T = Compute<S>;
  const PoolParams& p = *plan.p;
  const GradFactors<U> f = grad_factors<S, U>(plan, count, s);
  const bool together = range.token(i + count - 1) - range.token(i) == count - 1;
  if (together && plan.direct_grads) {
    S* const to = token_at<S>(g.dx, range.b, range.token(i));
    const auto grads =
        plan.stream_grads ? grads_of_tokens<S, U, true> : grads_of_tokens<S, U, false>;
    return grads(f, 0, count, to, g.dx.stride_n);
  }
  for (int64_t start = 0; start < count; start += kGradTokens) {
    const int64_t few = min_of(kGradTokens, count - start);
    grads_of_tokens<T, U, false>(f, start, few, s.grads, plan.width);
    for (int64_t j = start; j < start + few; ++j) {
      T* row = s.grads + (j - start) * plan.width;
      if (p.norm != PoolNorm::kNone) {
        norm_backward<S>(plan, range, i + j, s.moments[j], s, row, sums + plan.rows * plan.width,
                         sums + (plan.rows + 1) * plan.width);
      }
      if (g.dx.data == nullptr) continue;
      store_row<S>(row, g.dx.stride_c, p.channels, token_at<S>(g.dx, range.b, range.token(i + j)));
    }
  }
}

// Tokens that do not count, from the first of this range to the first of the next.
template <typename S>
void clear_masked(const PoolPlan& plan, const PoolBackwardParams& g, const TokenRange& range,
                  int64_t chunk) {
  const PoolParams& p = *plan.p;
  if (range.kept == nullptr || g.dx.data == nullptr) return;
  const auto start = [&](int64_t i) { return i < range.count ? range.token(i) : p.tokens; };
  const int64_t end = chunk + 1 == plan.chunks ? p.tokens : start(range.last);
  for (int64_t n = chunk == 0 ? 0 : start(range.first); n < end; ++n) {
    if (p.key_mask[range.b * p.key_mask_stride_b + n * p.key_mask_stride_n] != 0) continue;
    S* row = token_at<S>(g.dx, range.b, n);
    for (int64_t c = 0; c < p.channels; ++c) row[c * g.dx.stride_c] = S{};
  }
}

// Returns whether the first block of `after` has been fetched.
template <typename S>
bool pool_grad_range(const PoolPlan& plan, const PoolBackwardParams& g, const TokenRange& range,
                     const TokenRange& after, const PoolGradScratch<S>& s, Compute<S>* sums) {
  const bool tokens_too = g.dx.data != nullptr || g.dweight != nullptr || g.dbias != nullptr;
  prepare_rows<S>(plan, g, range.b, s);
  int64_t ahead = 0;
  for (int64_t i = range.first; i < range.last; i += plan.block) {
    const int64_t count = min_of(plan.block, range.last - i);
    if constexpr (kHasDots<S>) {
      if (plan.dots) {
        const auto x = score_dots(plan, range, after, i, count, 2 * plan.rows, s.dots, s.scores);
        pool_score_grads(plan, g, range.b, count, s);
        if (tokens_too) token_grads<S, Operand<S>>(plan, g, range, i, count, s, sums);
        ahead = distance_to_next<S>(plan, range, i + count, after, x);
        sum_dots(plan, x, s.scores, ahead, s.dots, sums);
        continue;
      }
    }
    const auto x = read_block<S>(plan, range, i, count, s.buffer, s.moments);
    ahead = distance_to_next<S>(plan, range, i + count, after, x);
    const int64_t next = sums_fetch_all(plan.rows) ? 0 : ahead;
    if (plan.quads) {
      const bool near = i == range.first && !range.fetched;
      quad_rows(s.quads, 2 * plan.rows, x, plan.width, near, next, s.scores, plan.columns);
    } else {
      dot_rows(s.stack, plan.stride, 2 * plan.rows, x, plan.width, next, s.scores, plan.columns);
    }
    pool_score_grads(plan, g, range.b, count, s);
    if (tokens_too) token_grads<S, Compute<S>>(plan, g, range, i, count, s, sums);
    sum_rows(s.scores, plan.columns, plan.rows, x, plan.width, ahead, sums, plan.width);
  }
  take_out_excess<S>(plan, range.b, s, sums);
  return ahead != 0;
}

// next: the task that the same worker does next; -1: none that is known.
template <typename S>
void pool_grad_task(const PoolGradMemory<S>& m, const PoolBackwardParams& g, int64_t task,
                    int64_t next, PoolGradScratch<S>& s) {
  using T = Compute<S>;
  const PoolPlan& plan = m.plan;
  const int64_t size = (plan.rows + 2) * plan.width;
  for (int64_t i = task * size; i < (task + 1) * size; ++i) m.sums[i] = T{0};
  for_each_range(plan, task, next, s.fetched, [&](int64_t i, const auto& range, const auto& after) {
    T* sums = m.sums + i / plan.group * size;  // one group a task, or one part
    const bool fetched = pool_grad_range<S>(plan, g, range, after, s, sums);
    clear_masked<S>(plan, g, range, i % plan.chunks);
    return fetched;
  });
  if (plan.stream_grads) finish_streams();
}

// Adds up row `r` of slots [first, first + count) into that of the first.
template <typename S>
Compute<S>* add_slots(const PoolGradMemory<S>& m, int64_t r, int64_t first, int64_t count) {
  using T = Compute<S>;
  const int64_t size = (m.plan.rows + 2) * m.plan.width;
  T* to = m.sums + first * size + r * m.plan.width;
  for (int64_t i = 1; i < count; ++i) {
    const T* from = to + i * size;
    for (int64_t c = 0; c < m.plan.width; ++c) to[c] += from[c];
  }
  return to;
}

// Row `task` of the gradients that are sums: those of the queries first, then weight and bias.
template <typename S>
void finish_row(const PoolGradMemory<S>& m, const PoolBackwardParams& g, int64_t task) {
  using T = Compute<S>;
  const PoolPlan& plan = m.plan;
  const PoolParams& p = *plan.p;
  const bool shared = p.query_batch == 1;
  const int64_t query_rows = p.query_batch * plan.rows;
  if (task >= query_rows) {
    auto* to = static_cast<T*>(task == query_rows ? g.dweight : g.dbias);
    if (to == nullptr) return;
    const T* sum = add_slots(m, plan.rows + (task - query_rows), 0, m.slots);
    for (int64_t c = 0; c < p.channels; ++c) to[c] = sum[c];
    return;
  }
  const int64_t slots = shared ? m.slots : plan.chunks;
  T* sum = add_slots(m, task % plan.rows, task / plan.rows * slots, slots);
  order_channels<S>(plan, sum);
  for (int64_t c = 0; c < p.channels; ++c) sum[c] *= static_cast<T>(p.scale * kLog2E);
  store_row<S>(sum, 1, p.channels, static_cast<S*>(g.dquery) + task * p.channels);
}

template <typename S>
void pool_backward_typed(const PoolBackwardParams& g, const Parallel& parallel, void* workspace) {
  const PoolParams& p = g.forward;
  Arena arena{static_cast<char*>(workspace), 0};
  const auto m = take_pool_grad_memory<S>(g, parallel.workers, arena);
  fill_kept(m.plan);
  run_shares(parallel, m.plan.workers, m.plan.tasks,
             [&](int64_t task, int64_t next, int64_t worker) {
               pool_grad_task<S>(m, g, task, next, m.scratch[worker]);
             });
  run_tasks(parallel, m.plan.workers, p.query_batch * m.plan.rows + 2,
            [&](int64_t task, int64_t) { finish_row<S>(m, g, task); });
}

}  // namespace

int64_t pool_backward_workspace(const PoolBackwardParams& params, int64_t workers) {
  int64_t bytes = 0;
  with_storage_type(params.forward.dtype, [&](auto type) {
    Arena arena{nullptr, 0};
    take_pool_grad_memory<decltype(type)>(params, workers, arena);
    bytes = arena.used;
  });
  return bytes;
}

void pool_backward(const PoolBackwardParams& params, const Parallel& parallel, void* workspace) {
  with_storage_type(params.forward.dtype, [&](auto type) {
    pool_backward_typed<decltype(type)>(params, parallel, workspace);
  });
}

}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
