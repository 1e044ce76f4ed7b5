// Pooling forward: one read of the token states.
//
// A task takes a part of one batch's tokens, block by block: scores of all rows by inner products,
// an online softmax, and the weighted sum of the same block while it is in the cache. Where a
// batch's tokens are cut into several parts, whoever finishes the last of them merges the sums, in
// order, so that results do not depend on the threads.
#include "isa.h"
#include "pooling_common.h"

namespace x_rope_cls::cpu::X_ROPE_CLS_ISA {
namespace {

// Unnormalised sums of one part of a batch's tokens.
template <typename T>
struct PoolSums {
  T* out;      // (rows, width)
  T* maximum;  // (rows), log2
  T* sum;      // (rows)
};

template <typename T>
struct PoolScratch {
  T* query;  // (rows, width), scaled by scale * log2(e)
  T* scores;
  T* buffer;
  TokenMoments<T>* moments;
  T* merged;  // (width)
  PoolSums<T> sums;
  int64_t query_batch;  // whose rows are in `query`; -1: nobody's
};

template <typename T>
struct PoolMemory {
  PoolPlan plan;
  PoolScratch<T>* scratch;
  PoolSums<T> parts;  // of all tasks, one after the other, where there are several parts a batch
  Counter* done;      // parts done, a batch
};

template <typename T>
PoolSums<T> take_sums(const PoolPlan& plan, int64_t count, Arena& arena) {
  return {arena.take<T>(count * plan.rows * plan.width), arena.take<T>(count * plan.rows),
          arena.take<T>(count * plan.rows)};
}

template <typename S>
PoolMemory<Compute<S>> take_pool_memory(const PoolParams& p, int64_t workers, Arena& arena) {
  using T = Compute<S>;
  PoolMemory<T> m{};
  m.plan = make_pool_plan<S>(p, workers, 2);
  const PoolPlan& plan = m.plan;
  take_kept(m.plan, arena);
  m.scratch = arena.take<PoolScratch<T>>(plan.workers);
  if (plan.chunks > 1) {
    m.parts = take_sums<T>(plan, plan.tasks, arena);
    m.done = arena.take<Counter>(p.batch);
  }
  for (int64_t i = 0; i < plan.workers; ++i) {
    PoolScratch<T> s{};
    s.query = arena.take<T>(plan.rows * plan.width);
    s.scores = arena.take<T>(plan.rows * plan.columns);
    s.buffer = needs_buffer<S>(plan) ? arena.take<T>(plan.block * plan.width) : nullptr;
    s.moments = arena.take<TokenMoments<T>>(plan.block);
    if (plan.chunks > 1) {
      s.merged = arena.take<T>(plan.width);
    } else {
      s.sums = take_sums<T>(plan, 1, arena);
    }
    s.query_batch = -1;
    if (arena.base != nullptr) m.scratch[i] = s;
  }
  return m;
}

// Scores of one block become weights; padding columns get none.
template <typename T>
void soften_pool(const PoolPlan& plan, int64_t tokens, T* scores, const PoolSums<T>& sums) {
  const int64_t columns = round_up(tokens, kLanes<T>);
  for (int64_t r = 0; r < plan.rows; ++r) {
    T* row = scores + r * plan.columns;
    for (int64_t j = tokens; j < columns; ++j) row[j] = -kInfinity<T>;
    soften_row(row, columns, sums.maximum[r], sums.sum[r], sums.out + r * plan.width, plan.width);
  }
}

template <typename S>
void pool_range(const PoolPlan& plan, const TokenRange& range, PoolScratch<Compute<S>>& s,
                const PoolSums<Compute<S>>& sums) {
  using T = Compute<S>;
  const PoolParams& p = *plan.p;
  const int64_t wanted = p.query.stride_b == 0 ? 0 : range.b;
  if (s.query_batch != wanted) {
    pack_pool_rows<S>(plan, p.query, wanted, static_cast<T>(p.scale * kLog2E), s.query);
    s.query_batch = wanted;
  }
  for (int64_t i = 0; i < plan.rows * plan.width; ++i) sums.out[i] = T{0};
  for (int64_t r = 0; r < plan.rows; ++r) {
    sums.maximum[r] = -kInfinity<T>;
    sums.sum[r] = T{0};
  }
  for (int64_t i = range.first; i < range.last; i += plan.block) {
    const int64_t count = min_of(plan.block, range.last - i);
    const auto x = read_block<S>(plan, range, i, count, s.buffer, s.moments);
    dot_rows(s.query, plan.width, plan.rows, x, plan.width, s.scores, plan.columns);
    soften_pool(plan, count, s.scores, sums);
    const bool more = x.data != s.buffer && i + 2 * count <= range.last;
    sum_rows(s.scores, plan.columns, plan.rows, x, plan.width, more ? count * x.stride : 0,
             sums.out, plan.width);
  }
}

// Row r of the sums, divided by its weights' sum, to the outputs of batch b.
template <typename S>
void store_pool_row(const PoolPlan& plan, int64_t b, int64_t r, Compute<S> maximum, Compute<S> sum,
                    Compute<S>* out) {
  using T = Compute<S>;
  const PoolParams& p = *plan.p;
  const T inverse = sum == T{0} ? T{0} : T{1} / sum;
  for (int64_t c = 0; c < p.channels; ++c) out[c] *= inverse;
  const int64_t row = b * plan.rows + r;
  store_row<S>(out, 1, p.channels, static_cast<S*>(p.pooled) + row * p.channels);
  static_cast<T*>(p.lse)[row] = log_sum(maximum, sum);
}

// One row of all parts of a batch; `out` (width) is room for the result.
template <typename S>
void merge_row(const PoolPlan& plan, const PoolSums<Compute<S>>& parts, int64_t b, int64_t r,
               Compute<S>* out) {
  using T = Compute<S>;
  const int64_t start = b * plan.chunks * plan.rows + r;  // of part 0; parts are `rows` apart
  T maximum = -kInfinity<T>;
  for (int64_t i = 0; i < plan.chunks; ++i) {
    const T m = parts.maximum[start + i * plan.rows];
    maximum = m > maximum ? m : maximum;
  }
  T sum = T{0};
  for (int64_t c = 0; c < plan.width; ++c) out[c] = T{0};
  for (int64_t i = 0; i < plan.chunks; ++i) {
    const int64_t at = start + i * plan.rows;
    if (parts.sum[at] == T{0}) continue;
    const T factor = exp2<T>(broadcast<T>(parts.maximum[at] - maximum))[0];
    sum += parts.sum[at] * factor;
    const T* from = parts.out + at * plan.width;
    for (int64_t c = 0; c < plan.width; ++c) out[c] += from[c] * factor;
  }
  store_pool_row<S>(plan, b, r, maximum, sum, out);
}

template <typename S>
void pool_task(const PoolMemory<Compute<S>>& m, int64_t task, int64_t worker) {
  const PoolPlan& plan = m.plan;
  PoolScratch<Compute<S>>& s = m.scratch[worker];
  if (plan.chunks == 1) {
    for (int64_t b = task * plan.group; b < min_of(plan.p->batch, (task + 1) * plan.group); ++b) {
      pool_range<S>(plan, range_of(plan, b, 0), s, s.sums);
      for (int64_t r = 0; r < plan.rows; ++r) {
        store_pool_row<S>(plan, b, r, s.sums.maximum[r], s.sums.sum[r],
                          s.sums.out + r * plan.width);
      }
    }
    return;
  }
  const int64_t b = task / plan.chunks;
  const int64_t row = task * plan.rows;
  pool_range<S>(plan, range_of(plan, b, task % plan.chunks), s,
                {m.parts.out + row * plan.width, m.parts.maximum + row, m.parts.sum + row});
  if (add(m.done[b], 1) + 1 < plan.chunks) return;
  for (int64_t r = 0; r < plan.rows; ++r) merge_row<S>(plan, m.parts, b, r, s.merged);
}

template <typename S>
void pool_forward_typed(const PoolParams& p, const Parallel& parallel, void* workspace) {
  Arena arena{static_cast<char*>(workspace), 0};
  const auto m = take_pool_memory<S>(p, parallel.workers, arena);
  fill_kept(m.plan);
  for (int64_t b = 0; m.plan.chunks > 1 && b < p.batch; ++b) m.done[b].value = 0;
  run_tasks(parallel, m.plan.workers, m.plan.tasks,
            [&](int64_t task, int64_t worker) { pool_task<S>(m, task, worker); });
}

}  // namespace

int64_t pool_workspace(const PoolParams& params, int64_t workers) {
  int64_t bytes = 0;
  with_storage_type(params.dtype, [&](auto type) {
    Arena arena{nullptr, 0};
    take_pool_memory<decltype(type)>(params, workers, arena);
    bytes = arena.used;
  });
  return bytes;
}

void pool_forward(const PoolParams& params, const Parallel& parallel, void* workspace) {
  with_storage_type(params.dtype, [&](auto type) {
    pool_forward_typed<decltype(type)>(params, parallel, workspace);
  });
}

}  // namespace x_rope_cls::cpu::X_ROPE_CLS_ISA
